"""Published tables for comparison, as data."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mergecli.data.pools import pools
from mergecli.runtime.errors import UsageError, did_you_mean, quoted

B32 = "clip-vit-base-patch32"
IMAGES: Mapping[str, int] = {
    "sun397": 19850, "stanford-cars": 8041, "resisc45": 6300, "eurosat": 2700, "svhn": 26032, "gtsrb": 12630,
    "mnist": 10000, "dtd": 1880,
}  # fmt: skip
"""Task -> number of test images behind the published accuracies."""


@dataclass(frozen=True)
class Row:
    """One row of a published table; accuracies are fractions."""

    name: str
    accuracies: Mapping[str, float]
    """In the table's order of tasks; empty where only the average is published."""
    averages: Mapping[str, float]
    """As printed: of `all` tasks, or of the `seen` and of the `unseen` ones."""


@dataclass(frozen=True)
class Reference:
    """One published table."""

    name: str
    backbone: str
    """The CLIP's name on the hub, without its owner."""
    rows: Mapping[str, Row]
    split: str | None = None
    """The evaluated split, if it is not each task's own test split."""
    seen: tuple[str, ...] = ()
    """The tasks whose models were merged, if not all."""
    caveat: str = ""
    """A known problem of the table."""
    pool: str = "fusion_bench"
    """The pool of its models, as `mergecli.data.pools` names it."""
    averaged: tuple[str, ...] = ()
    """The tasks that averages are over, of a table that has nothing else."""
    sources: tuple[str, ...] = ()
    """Where its numbers come from, if that is not the page of FusionBench."""

    @property
    def suffix(self) -> str:
        """The end of its models' names on the hub, after the task."""
        return "_lora-16" if self.name.endswith("-ta8-lora") else ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task of the table."""
        return self.averaged or tuple(next(iter(self.rows.values())).accuracies)


def names() -> list[str]:
    """Names of the tables: a backbone and an experiment."""
    return sorted(_tables())


def find(name: str) -> Reference:
    """The published table of that name.

    Raises:
        UsageError: there is no such table.
    """
    if name not in _tables():
        raise UsageError(
            f"unknown reference `{name}`{did_you_mean(name, names())}", f"there are {quoted(names(), 30)}"
        )
    return _tables()[name]


@cache
def _tables() -> Mapping[str, Reference]:
    found = [*_main(), *_generalization(), *_robustness(), *_averages()]
    return {each.name: each for each in found}


def _main() -> Iterable[Reference]:
    """The merges of all eight models, and every single model on every task."""
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in _lines("clip-vit-ta8"):
        kind = "" if row["table"] == "merged" else "individual-"
        tuning = "" if row["finetuning"] == "full" else f"-{row['finetuning']}"
        groups.setdefault((row["backbone"], f"{kind}{row['backbone']}-ta8{tuning}"), []).append(row)
    for (backbone, name), rows in groups.items():
        yield Reference(name, backbone, {row["row"]: _row(row["row"], row) for row in rows})


def _generalization() -> Iterable[Reference]:
    lines = _lines("generalization-b32")
    for number in sorted({line["experiment"] for line in lines}):
        own = [line for line in lines if line["experiment"] == number]
        rows: dict[str, Row] = {}
        for method in dict.fromkeys(line["method"] for line in own):
            theirs = [line for line in own if line["method"] == method]
            rows[method] = Row(
                method,
                {line["task"]: _fraction(line["accuracy"]) for line in theirs if line["task"] != "average"},
                {line["split"]: _fraction(line["accuracy"]) for line in theirs if line["task"] == "average"},
            )
        seen = [line["task"] for line in own if line["split"] == "seen" and line["task"] != "average"]
        yield Reference(
            f"{B32}-generalization-{number}", B32, rows, seen=tuple(dict.fromkeys(seen)),
            caveat="its row `Pre-trained` disagrees with the main table: it was evaluated in another way",
        )  # fmt: skip


def _robustness() -> Iterable[Reference]:
    lines = _lines("robustness-b32")
    for corruption in dict.fromkeys(line["corruption"] for line in lines):
        rows = {
            line["method"]: _row(line["method"], line) for line in lines if line["corruption"] == corruption
        }
        caveat = "" if corruption == "clean" else "the severity of its corruption is not published"
        if corruption == "pixelate":
            caveat += ", and its images seem to have been shrunk to 32 x 32 pixels"
        split = None if corruption == "clean" else corruption
        yield Reference(f"{B32}-robustness-{corruption}", B32, rows, split, caveat=caveat)


_COUNT = {"ta8": "", "tall14": "-14", "tall20": "-20"}
_OTHER_DIGITS = {"emnist_letters": "emnist_digits"}
"""What pools for open_clip have in the place of a task."""


def _averages() -> Iterable[Reference]:
    """Averages only, of the methods of 2026 and what they were compared with; of whatever pool."""
    from mergecli.data.tasks import expand

    groups: dict[tuple[str, str, str], list[Mapping[str, str]]] = {}
    for line in _lines("pools"):
        groups.setdefault((line["pool"], line["backbone"], line["tasks"]), []).append(line)
    for (pool, backbone, tasks), lines in groups.items():
        place = pools()[pool].tables.format(tasks=tasks, count=_COUNT[tasks])
        own = expand((tasks,))
        if pool != "fusion_bench":
            own = tuple(_OTHER_DIGITS.get(task, task) for task in own)
        yield Reference(
            f"{backbone}-{place}", backbone,
            {each["row"]: Row(each["row"], {}, {"all": _fraction(each["average"])}) for each in lines},
            pool=pool, averaged=own, sources=tuple(dict.fromkeys(each["source"] for each in lines)),
        )  # fmt: skip


def _row(name: str, line: Mapping[str, str]) -> Row:
    accuracies = {task: _fraction(line[task]) for task in line if task in IMAGES}
    return Row(name, accuracies, {"all": _fraction(line["average"])})


def _fraction(percent: str) -> float:
    """A percentage with one decimal as a fraction, without the rounding error of the division."""
    return round(float(percent) / 100, 6)


def _lines(name: str) -> list[Mapping[str, str]]:
    with (Path(__file__).parent / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
