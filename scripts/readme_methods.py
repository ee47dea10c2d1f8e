"""Writes the README's table of methods: what each needs, the year in which it appeared, and how right it is on the toys. A test
compares the two.

python scripts/readme_methods.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from method_table import STEPS

from mergecli import methods

README = Path(__file__).resolve().parents[1] / "README.md"
TOYS = README.parent / "recipes" / "experiments" / "toy-methods.json"
"""What `scripts/method_table.py` measured."""
FIRST = 2023
"""Methods of this year and of all before it stand together."""
_TABLE = re.compile(r"^\| what the method needs \|.*\n(?:\|.*\n)+", re.MULTILINE)


def table() -> str:
    """The table, a row for each kind of method."""
    rows = [
        "| what the method needs | methods, by the year in which they appeared; average accuracy on the toys in % |",
        "| :-- | :-- |",
    ]
    right = accuracies()
    for kind, needs in methods.KINDS.items():
        found: dict[int, list[str]] = {}
        for name in methods.names():
            if methods.find(name).kind == kind:
                link = f"[`{name}`](mergecli/methods/{name}.py)"
                shown = f"{link} {right[name]:.1f}" if name in right else link
                found.setdefault(max(year(name), FIRST), []).append(shown)
        cells = [
            f"{f'to {FIRST}' if each == FIRST else each}: {' · '.join(names)}"
            for each, names in sorted(found.items())
        ]
        rows.append(f"| **{kind[0].upper()}{kind[1:]}**: {needs} | {'<br>'.join(cells)} |")
    return "\n".join(rows) + "\n"


def accuracies() -> Mapping[str, float]:
    """Method -> average accuracy, %, with its defaults but for the number of steps; each image routes by itself."""
    found: dict[str, float] = {}
    for line in json.loads(TOYS.read_text("utf-8"))["rows"]:
        if line["settings"].keys() <= set(STEPS) and line["routing"] == "sample":
            found.setdefault(line["method"], line["mean"])
    return found


def year(name: str) -> int:
    """That in which a method appeared: of its arXiv numbers, else of what else its paper says."""
    paper = methods.find(name).paper
    numbers = [2000 + int(each) for each in re.findall(r"arXiv (\d\d)\d\d\.", paper)]
    return max(numbers or [int(each) for each in re.findall(r"\b(?:19|20)\d\d\b", paper)] or [FIRST])


def main() -> None:
    """Replaces the table."""
    text = README.read_text("utf-8")
    README.write_text(_TABLE.sub(lambda _: table(), text, count=1), "utf-8")


if __name__ == "__main__":
    main()
