"""Draws the picture of the README, time and memory beside other programs, and writes the tables of the README and of
`docs/benchmarks.md`, from `docs/benchmarks.json`.

    python scripts/readme_picture.py            writes docs/images/benchmark-light.svg and -dark.svg, and both pages

Both pictures have the same shapes; only the colors differ. The same numbers give the same bytes. A table of a page is what
stands between `<!-- benchmark: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
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
        "sd-mecha": "#78818c",
    },
    "dark": {
        "text": "#f0f6fc",
        "faint": "#9198a1",
        "line": "#3d444d",
        "mergecli": "#4493f8",
        "FusionBench": "#7a828e",
        "mergekit": "#4a525c",
        "sd-mecha": "#a9b1ba",
    },
}
PROGRAMS = ("mergecli", "FusionBench", "mergekit", "sd-mecha")
PANELS = (("seconds", "seconds"), ("gigabytes", "memory, GB (max RSS)"))

NOT_MEASURED = "Not measured yet: `make bench`."

WIDTH, LABELS, GAP, BAR, ROW = 880, 136, 70, 11, 15
"""Pixels: the whole, the column of names, the space right of a panel's bars, a bar, the space between rows."""
TOP, BOTTOM = 74, 34


def picture(numbers: dict[str, Any], colors: dict[str, str]) -> str:
    """The SVG text."""
    rows = [row for row in numbers["rows"] if "mergecli" in row]
    most = {unit: _most(rows, unit) for unit, _ in PANELS}
    width = (WIDTH - LABELS) / 2 - GAP
    shapes = [_heading(numbers, colors)]
    y = float(TOP)
    for row in rows:
        programs = [program for program in PROGRAMS if program in row]
        height = len(programs) * (BAR + 2)
        shapes.append(
            _text(LABELS - 12, y + height / 2 + 3, row["name"], colors["text"], 13, "end", mono=True)
        )
        for panel, (unit, _) in enumerate(PANELS):
            left = LABELS + panel * (width + GAP)
            shapes += _bars(row, programs, unit, left, y, width / most[unit], colors)
        y += height + ROW
    for panel, (_, title) in enumerate(PANELS):
        left = LABELS + panel * (width + GAP)
        shapes.append(_text(left, TOP - 14, title, colors["faint"], 12))
        shapes.append(
            f'<path d="M{left - 0.5:g} {TOP - 6}V{y - ROW + 4:g}" stroke="{colors["line"]}" stroke-width="1"/>'
        )
    shapes.append(_text(LABELS, y + BOTTOM - 22, f"Measured: {_how(numbers)}.", colors["faint"], 11))
    height = y + BOTTOM - 12
    names = ", ".join(row["name"] for row in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f"<title>Time and memory of {names}</title>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def _most(rows: list[dict[str, Any]], unit: str) -> float:
    """The longest bar."""
    found = [row[program] for row in rows for program in PROGRAMS if program in row]
    return max(
        _failed_at(each) if "failed" in each and unit == "gigabytes" else each.get(unit, 0.0)
        for each in found
    )


def _failed_at(found: dict[str, Any]) -> float:
    """The gigabytes that a program held when it ran out of memory; 0 where nobody knows."""
    return float(found["failed"].split()[-2]) if found["failed"].endswith(" GB") else 0.0


def _how(numbers: dict[str, Any]) -> str:
    """How it was measured, and which versions of the others."""
    versions = ", ".join(f"{name} {text}" for name, text in numbers["programs"].items() if text)
    earlier = f"; {', '.join(numbers['earlier'])} measured earlier" if numbers.get("earlier") else ""
    return f"{numbers['measured']}, {versions}{earlier}"


def _heading(numbers: dict[str, Any], colors: dict[str, str]) -> str:
    what = numbers["what"].split(";")[0]
    parts = [_text(0, 20, f"Merging {what}", colors["text"], 14, bold=True)]
    left = LABELS
    for program in [each for each in PROGRAMS if any(each in row for row in numbers["rows"])]:
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
            if at := _failed_at(found) if unit == "gigabytes" else 0.0:  # as far as it came
                shapes.append(
                    f'<rect x="{left:g}" y="{top + 0.5:g}" width="{at * scale:.1f}" '
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


def pages(numbers: dict[str, Any]) -> dict[Path, str]:
    """The README and the page of benchmarks, with the tables of these numbers."""
    tables = {"readme": readme_table, "merges": merges_table, "growth": growth_table, "cold": cold_table}
    return {
        page: re.sub(
            r"(<!-- benchmark: (\w+) -->\n).*?(<!-- end -->)",
            lambda found: f"{found[1]}{tables[found[2]](numbers)}\n{found[3]}",
            page.read_text("utf-8"),
            flags=re.DOTALL,
        )
        for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
    }


def readme_table(numbers: dict[str, Any]) -> str:
    """The commands that most of the programs have."""
    programs = [each for each in PROGRAMS if any(each in row for row in numbers["rows"])]
    rows = [row for row in numbers["rows"] if {"mergekit", "sd-mecha"} & row.keys()]
    cells = [
        [
            f"`{row['name']}`",
            *(_cell(row.get(each), ("seconds", "gigabytes"), (" s", " GB")) for each in programs),
        ]
        for row in rows
    ]
    return _table(["", *(_named(each, numbers) for each in programs)], cells)


def merges_table(numbers: dict[str, Any]) -> str:
    """Every command and program."""
    units = ("seconds", "cpu_seconds", "gigabytes")
    programs = list(numbers["programs"])
    plain = {
        row["name"]: row[each]
        for row in numbers["rows"]
        for each in ("system calls", "python")
        if each in row
    }
    start, under = (plain.get(each, {}).get("seconds") for each in ("import torch", "read all, write one"))
    cells = [[name, "", _cell(found, units), *[""] * (len(programs) - 1)] for name, found in plain.items()]
    for row in numbers["rows"]:
        if "mergecli" in row:
            share = f"{(row['mergecli']['seconds'] - start) / under:.1f}" if start and under else ""
            cells.append([f"`{row['name']}`", share, *(_cell(row.get(each), units) for each in programs)])
    return _table(["", "of the floor", *(_named(each, numbers) for each in programs)], cells)


def growth_table(numbers: dict[str, Any]) -> str:
    """How many floors of what is read the time of a command grows by."""
    if "growth" not in numbers:
        return NOT_MEASURED
    found = numbers["growth"]["lines"]
    cells = [
        [f"`{each['what']}`", each["grows"], f"{each['slope']:.1f}", f"{100 * each['bend']:.0f} %"]
        for each in found
    ]
    return _table(["", "more", "floors more for each floor more", "off the line, at most"], cells)


def cold_table(numbers: dict[str, Any]) -> str:
    """The same commands where the files are not in the page cache."""
    if "cold" not in numbers:
        return NOT_MEASURED
    units = ("seconds", "cpu_seconds", "gigabytes")
    rows = numbers["cold"]["rows"]
    cells = [
        [f"`{row['name']}`" if "mergecli" in row else row["name"], _cell(found, units)]
        for row in rows
        for program, found in row.items()
        if program in ("mergecli", "system calls", "python")
    ]
    return _table(["", "not in the page cache"], cells)


def _named(program: str, numbers: dict[str, Any]) -> str:
    when = " (earlier)" if program in numbers["earlier"] else ""
    return f"{program} {numbers['programs'].get(program, '')}".strip() + when


def _cell(found: dict[str, Any] | None, units: tuple[str, ...], ends: tuple[str, ...] = ("", "", "")) -> str:
    if not found:
        return ""
    if "failed" in found:
        return str(found["failed"])
    texts: list[str] = []
    for unit, end in zip(units, ends, strict=False):
        value = found.get(unit)
        if value is None:
            texts.append("?")
        elif unit == "gigabytes":
            texts.append(f"{value:.2f}{end}")
        else:
            texts.append(f"{value:.1f}{end}" if value < 100 else f"{value:.0f}{end}")
    return " · ".join(texts)


def _table(heads: list[str], cells: list[list[str]]) -> str:
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *cells]
    return "\n".join(
        f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines
    )


def main() -> None:
    numbers = json.loads(NUMBERS.read_text("utf-8"))
    for page, text in pages(numbers).items():
        page.write_text(text, "utf-8")
    IMAGES.mkdir(exist_ok=True)
    for theme, colors in THEMES.items():
        (IMAGES / f"benchmark-{theme}.svg").write_text(picture(numbers, colors), "utf-8")


if __name__ == "__main__":
    main()
