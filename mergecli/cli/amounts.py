"""Numbers as people read them."""

from __future__ import annotations


def count(number: int, what: str) -> str:
    """`1 task`, `3 tasks`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """`2.6 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def memory(size: int) -> str:
    """`1.6 kB`, `1.6 MB`, `640 MB`, `1.24 GB`."""
    if size < 10e6:
        return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
