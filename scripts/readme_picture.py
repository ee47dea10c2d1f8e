"""Draws the picture of the README, time and memory beside FusionBench and mergekit, from `docs/benchmarks.json`.

    python scripts/readme_picture.py            writes docs/images/benchmark-light.svg and benchmark-dark.svg

Both pictures have the same shapes; only the colors differ. The same numbers give the same bytes.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / "docs" / "benchmarks.json"
IMAGES = ROOT / "docs" / "images"

THEMES = {
    "light": {
        "text": "#1f2328",
        "faint": "#59636e",
        "line": "#d1d9e0",
        "mergecli": "#0969da",
        "FusionBench": "#a0a8b3",
        "mergekit": "#cfd5dc",
    },
    "dark": {
        "text": "#f0f6fc",
        "faint": "#9198a1",
        "line": "#3d444d",
        "mergecli": "#4493f8",
        "FusionBench": "#7a828e",
        "mergekit": "#4a525c",
    },
}
PROGRAMS = ("mergecli", "FusionBench", "mergekit")
PANELS = (("seconds", "seconds", 120.0), ("gigabytes", "memory, GB (max RSS)", 23.0))
LEFT_OUT = {"ties, six models"}
"""Rows that only the table has."""

WIDTH, LABELS, GAP, BAR, ROW = 880, 136, 70, 11, 15
"""Pixels: the whole, the column of names, the space right of a panel's bars, a bar, the space between rows."""
TOP, BOTTOM = 74, 34


def picture(numbers: dict[str, Any], colors: dict[str, str]) -> str:
    """The SVG text."""
    rows = [row for row in numbers["rows"] if row["name"] not in LEFT_OUT]
    width = (WIDTH - LABELS) / 2 - GAP
    shapes = [_heading(numbers, colors)]
    y = float(TOP)
    for row in rows:
        programs = [program for program in PROGRAMS if program in row]
        height = len(programs) * (BAR + 2)
        shapes.append(
            _text(LABELS - 12, y + height / 2 + 3, row["name"], colors["text"], 13, "end", mono=True)
        )
        for panel, (unit, _, most) in enumerate(PANELS):
            left = LABELS + panel * (width + GAP)
            shapes += _bars(row, programs, unit, left, y, width / most, colors)
        y += height + ROW
    for panel, (_, title, _) in enumerate(PANELS):
        left = LABELS + panel * (width + GAP)
        shapes.append(_text(left, TOP - 14, title, colors["faint"], 12))
        shapes.append(
            f'<path d="M{left - 0.5:g} {TOP - 6}V{y - ROW + 4:g}" stroke="{colors["line"]}" stroke-width="1"/>'
        )
    shapes.append(_text(LABELS, y + BOTTOM - 22, f"Measured: {numbers['measured']}.", colors["faint"], 11))
    height = y + BOTTOM - 12
    names = ", ".join(row["name"] for row in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f"<title>Time and memory of {names}</title>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def _heading(numbers: dict[str, Any], colors: dict[str, str]) -> str:
    what = numbers["what"].split(";")[0]
    parts = [_text(0, 20, f"Merging {what}", colors["text"], 14, bold=True)]
    left = LABELS
    for program in PROGRAMS:
        parts.append(f'<rect x="{left}" y="31" width="11" height="11" rx="2" fill="{colors[program]}"/>')
        parts.append(_text(left + 17, 41, program, colors["text"], 12))
        left += 45 + 7 * len(program)
    return "\n".join(parts)


def _bars(
    row: dict[str, Any],
    programs: list[str],
    unit: str,
    left: float,
    y: float,
    scale: float,
    colors: dict[str, str],
) -> list[str]:
    """One row's bars in one panel, each with its number; a program that failed has its reason instead of a bar."""
    shapes: list[str] = []
    for place, program in enumerate(programs):
        found, top = row[program], y + place * (BAR + 2)
        if "failed" in found:
            reason = found["failed"] if unit == "gigabytes" else "did not finish"
            if reason.endswith(" GB"):  # as far as it came
                shapes.append(
                    f'<rect x="{left:g}" y="{top + 0.5:g}" width="{float(reason.split()[-2]) * scale:.1f}" '
                    f'height="{BAR - 1}" fill="none" stroke="{colors[program]}" stroke-dasharray="3 2"/>'
                )
            shapes.append(_text(left + 6, top + 9.5, reason, colors["faint"], 11))
            continue
        long = max(found[unit] * scale, 1.5)
        bold = program == "mergecli"
        shapes.append(
            f'<rect x="{left:g}" y="{top:g}" width="{long:.1f}" height="{BAR}" fill="{colors[program]}"/>'
        )
        ink = colors["text"] if bold else colors["faint"]
        shapes.append(_text(left + long + 5, top + 9.5, _number(found[unit], unit), ink, 11, bold=bold))
    return shapes


def _number(value: float, unit: str) -> str:
    """The number with as many digits as the tables give it."""
    places, most = (2, 10) if unit == "gigabytes" else (1, 100)
    return f"{value:.{places}f}" if value < most else f"{value:g}"


def _text(
    x: float,
    y: float,
    text: str,
    color: str,
    size: int,
    anchor: str = "start",
    *,
    bold: bool = False,
    mono: bool = False,
) -> str:
    more = ' font-weight="600"' if bold else ""
    more += ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"' if mono else ""
    more += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}"{more}>{escape(text)}</text>'


def main() -> None:
    numbers = json.loads(NUMBERS.read_text("utf-8"))
    IMAGES.mkdir(exist_ok=True)
    for theme, colors in THEMES.items():
        (IMAGES / f"benchmark-{theme}.svg").write_text(picture(numbers, colors), "utf-8")


if __name__ == "__main__":
    main()
