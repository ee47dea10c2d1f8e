"""Every method on one set of models: accuracy, time, memory, size and images needed, and how its order compares with the published one.

    python scripts/method_table.py recipes/toy.toml out/table               # resumes; prints the table as Markdown
    python scripts/method_table.py RECIPE DIR --share 0.1 --seeds 0         # a tenth of the published steps, one seed
    python scripts/method_table.py RECIPE DIR --or-share 0.1 --table        # rows with all steps, and with a tenth where these are missing
    python scripts/method_table.py RECIPE DIR --only ada --only tsv_m       # rows whose label contains one of these
    python scripts/method_table.py RECIPE DIR --row ties --row tsv_m        # these rows
    python scripts/method_table.py RECIPE DIR --json FILE --page PAGE       # compact results, and the table between the marks of a page
    python scripts/method_table.py RECIPE DIR --table                       # makes nothing, prints what is there
    python scripts/method_table.py RECIPE DIR --known FILE --json FILE      # makes what compact results of these models lack

RECIPE names a base, models that are called after their tasks, and their images. Every method of the registry has a row with its
defaults, some have more (`VARIANTS`); ensembles of the models are beside them. Rows with random numbers, or that draw images, are made with every seed. Methods that
learn look at the images that their defaults say, unlabeled test images as published for most.

A row of one seed is a file of DIR/rows. It is not made again while models, settings and seed are the same, so the same command goes
on after an interruption, and does what is new; several commands with other seeds or other rows can work on one DIR at the same
time, and `--table` then prints all. Each runs in a process of its own, whose processor time and peak memory are noted, and
with a store of its own, in which nothing is measured or learned yet; its time is that from models to merged file. Merged files
are removed when they are evaluated, unless `--keep`. With `--known` compact results stand for rows of earlier runs, whatever code
and defaults these had; the new results have both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from string import Formatter
from typing import Any

import mergecli
from mergecli import methods
from mergecli.methods._base import DataDriven, Method
from mergecli.methods._calibrated import Calibrated
from mergecli.methods._mixture import Routed

LEFT_OUT = {
    "linear": "merges two models",
    "slerp": "merges two models",
    "weighted_average": "has weights to choose",
}
EXPERTS = {"objective": "experts", "split": "train"}
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ada_merging": [
        ("by task", {"granularity": "task"}),
        ("by layer", {}),
        ("by layer, experts' labels", EXPERTS),
    ],
    "concrete_ada_merging": [("by layer", {})],
    "concrete_task_arithmetic": [("", {}), ("experts' labels", EXPERTS)],
    "weight_ensembling_moe": [("", {}), ("experts' labels", EXPERTS)],
    "efficient_weight_ensembling_moe": [("", {}), ("experts' labels", EXPERTS)],
    "ada_rank": [("", {}), ("from the mean", {"center": "mean", "initial_rank_ratio": 0.16, "start": 2.3})],
    "act_mat": [("ACTMat", {}), ("TACT", {"density": 0.5})],
    "wudi": [("", {}), ("ridge", {"solver": "ridge"}), ("spectral", {"solver": "spectral"})],
    "emr": [("", {}), ("sim", {"router": "sim"})],
    "tall_mask": [("", {}), ("sim", {"router": "sim"})],
    "tsv_c": [("", {}), ("sim", {"router": "sim"})],
}
ON = {"representation_surgery": ("task_arithmetic", "ada_merging, by layer")}
"""Method that corrects a merged tower -> the rows whose towers it corrects."""
DRAWS = ("dare", "della")
"""Methods that look at no images, and draw random numbers."""
ENSEMBLES = ("logits", "probabilities", "confidence")
STEPS = ("steps", "mask_steps", "epochs")
FEWEST = 10
"""So many steps, or as many as is usual if they are fewer, are made whatever `--share` is."""
NEED = {"statistics", "coefficients", "experts"}
"""Folders of the store that a row must fill by itself."""
MARKS = ("<!-- method table -->", "<!-- end of method table -->")
READY = (
    "torch", "safetensors.torch", "transformers.models.clip.modeling_clip", "mergecli.merging.merge",
    "mergecli.merging.learning.objective", "mergecli.evaluation.evaluate", "mergecli.evaluation.counting", "mergecli.clip.model",
)  # fmt: skip
"""What is imported before processes are forked, so that none of them takes time for it."""


@dataclass(frozen=True)
class Row:
    """One line of the table; its label says which."""

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    on: str = ""
    """The row whose tower is corrected."""
    share: float = 1
    """Of the usual steps."""

    @property
    def built(self) -> Method:
        return methods.create(self.method, {**self.settings, **({"merged": "x"} if self.on else {})})

    @property
    def has_chance(self) -> bool:
        built = self.built
        return isinstance(built, DataDriven) or "router" in self.settings or self.method in DRAWS

    @property
    def routings(self) -> tuple[str, ...]:
        built = self.built
        both = isinstance(built, Routed) and built.is_routed and built.routes_batches
        return ("sample", "batch") if both else ("sample",)

    @property
    def images(self) -> str:
        """Which images of each task are looked at."""
        built: Any = self.built
        if self.settings.get("router") == "sim":
            return f"{built.router_examples or 32} train"
        if not isinstance(built, DataDriven):
            return "none" if not getattr(built, "examples", 0) else f"{built.examples} train"
        split = getattr(built, "split", "train")
        return f"{built.examples} {split}" if isinstance(built, Calibrated) else f"all {split}"

    def entry(self, routing: str) -> tuple[str, float, str]:
        """What names a line of the compact results: its label, the share of the steps and the settings."""
        more = f", each {'image' if routing == 'sample' else 'batch'}" if len(self.routings) > 1 else ""
        return self.label + more, self.share, json.dumps(dict(self.settings), sort_keys=True)

    def published(self, routing: str) -> str:
        """The row of published tables that this one is, empty if none."""
        kind, settings = methods.find(self.method), dict(self.settings)
        named = [key for _, key, _, _ in Formatter().parse(kind.published) if key]
        usual = {key: value for key, value in settings.items() if key not in (*named, *STEPS)}
        if usual or self.on or routing != self.routings[-1]:  # the tables routed by batches
            return ""
        values = {key: str(settings.get(key, getattr(kind, key))).capitalize() for key in named}
        return kind.published.format(**values)


def rows(share: float) -> Iterator[Row]:
    """All of them, those that look at no images first, those that need others' towers last."""
    found: list[Row] = []
    for name in methods.names():
        if name in LEFT_OUT:
            continue
        for suffix, settings in VARIANTS.get(name, [("", {})]):
            more = fewer_steps(name, share)
            for on in ON.get(name, ("",)):
                label = f"{name} on {on}" if on else f"{name}, {suffix}" if suffix else name
                found.append(Row(label, name, {**settings, **more}, on, share if more else 1))
    yield from sorted(found, key=lambda row: (bool(row.on), isinstance(row.built, DataDriven)))


def fewer_steps(name: str, share: float) -> dict[str, int]:
    """The settings of a method that learns with so large a share of its usual steps."""
    if share == 1 or not issubclass(methods.find(name), DataDriven):
        return {}
    known = methods.settings(name)
    usual = {key: known[key].default for key in STEPS if key in known}
    return {key: max(round(share * value), min(FEWEST, value)) for key, value in usual.items()}


class Table:
    """The recipe, the folder, and what is done to make a row."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.recipe, self.folder, self.given = given.recipe.absolute(), given.folder.absolute(), given
        self.every = {row.label: row for row in rows(given.share)}
        for name in ("rows", "towers", "stores"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.models = self._models()
        known = self._compact(given.known) if given.known else {}
        self.known: dict[tuple[str, float, str], dict[str, Any]] = {
            (line["label"], line["share of steps"], json.dumps(line["settings"], sort_keys=True)): line
            for line in known.get("rows", ())
        }
        self.known_unmerged: dict[str, Any] = known.get("unmerged", {})
        shares = {given.share, given.or_share or given.share, *(share for _, share, _ in self.known)}
        self.by_share = {
            share: {row.label: row for row in rows(share)} for share in sorted(shares, reverse=True)
        }
        self.failed: list[str] = []

    def _compact(self, file: Path) -> dict[str, Any]:
        """What `--json` has written, if it is of these models and images."""
        try:
            known = json.loads(file.read_text("utf-8"))
            models, limit, _ = known["models"], known.get("limit"), known["rows"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            sys.exit(f"{file}: expected results that `--json` has written: {error}")
        if models != self.models:
            sys.exit(f"{file}: is of other models")
        if limit != self.given.limit:
            sys.exit(f"{file}: is of {limit or 'all'} images of each task")
        return known

    def _models(self) -> dict[str, str]:
        """Model -> digest."""
        from mergecli.merging.models import open_models
        from mergecli.recipe.reading import recipe_of

        with ExitStack() as stack:
            recipe = recipe_of(self.recipe)
            return dict(open_models(recipe, stack, needs="base", device="cpu").digests())

    def key(self, what: object, seed: int) -> str:
        """Names everything that a row's file depends on."""
        facts = [self.models, self.recipe.read_text("utf-8"), what, seed, self.given.limit]
        return sha256(json.dumps(facts, default=dict).encode()).hexdigest()[:32]

    def stem(self, label: str, seed: int) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in label.lower()) + f"-{seed}"

    def done(self, label: str, seed: int, key: str) -> dict[str, Any] | None:
        """The row's file, if it is of these models and settings."""
        path = self.folder / "rows" / f"{self.stem(label, seed)}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("key") == key else None

    def row(self, row: Row, seed: int, *, makes: bool) -> dict[str, Any] | None:
        """The row's results with a seed, made if they are not there and `makes`; None if there are none."""
        below = self.below(row)
        key = self.key(
            [row.method, row.settings, row.routings, below and [below.method, below.settings]], seed
        )
        found = self.done(row.label, seed, key)
        if found is None and makes and (tower := self.tower(row, seed, key)):
            found = self.evaluated(row, seed, key, tower)
        return found

    def known_seeds(self, row: Row) -> set[int]:
        """The seeds with which compact results have the row, in all its routings, with as large a share of the steps or a larger one."""
        found: set[int] = set()
        for share, same in self.by_share.items():
            if share >= row.share:
                lines = [self.known.get(same[row.label].entry(routing)) for routing in row.routings]
                found |= set[int].intersection(
                    *(set(line["seeds"]) if line else set[int]() for line in lines)
                )
        return found

    def below(self, row: Row) -> Row | None:
        """The row whose tower is corrected."""
        return self.by_share[row.share][row.on] if row.on else None

    def tower(self, row: Row, seed: int, key: str) -> dict[str, Any] | None:
        """What making its merged file took; the file is at `path`."""
        path = self.folder / "towers" / f"{self.stem(row.label, seed)}.safetensors"
        about = path.with_suffix(".json")
        known = json.loads(about.read_text()) if about.exists() and path.exists() else {}
        if known.get("key") == key:
            return known
        settings, made = dict(row.settings), self.stem(row.label, seed)
        if row.on:
            below = self.below(row)
            assert below is not None
            settings["merged"] = str(self.folder / "towers" / f"{self.stem(row.on, seed)}.safetensors")
            own = self.key([below.method, below.settings, below.routings, None], seed)
            if self.tower(below, seed, own) is None:
                return None
        store = self.folder / "stores" / made
        resumed = store.exists()

        def merge() -> None:
            self.own_store(store)
            mergecli.merge(
                self.recipe, method=row.method, settings=settings, changes=[f"seed={seed}"], output=path,
                device=self.given.device,
            )  # fmt: skip

        took = self.forked(f"merge {row.label}, seed {seed}", merge)
        if took is None:
            return None
        shutil.rmtree(store, ignore_errors=True)
        found = {"key": key, "path": str(path), "resumed": resumed, **took}
        write(about, json.dumps(found))
        return found

    def evaluated(self, row: Row, seed: int, key: str, tower: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row's file, once its tower is evaluated."""
        path, results = Path(tower["path"]), list[dict[str, Any]]()
        for routing in row.routings:
            file = self.folder / "rows" / f"{self.stem(row.label, seed)}.{routing}.eval.json"
            took = self.forked(
                f"eval {row.label}, seed {seed}",
                partial(self.evaluate, [path], file, routing=routing),
            )
            if took is None:
                return None
            results.append({"routing": routing, **self.scores(file), "evaluation": took})
        found = {"key": key, "label": row.label, "seed": seed, "merge": dict(tower), "results": results}
        write(self.folder / "rows" / f"{self.stem(row.label, seed)}.json", json.dumps(found))
        if not self.given.keep and all(row.label != other.on for other in self.every.values()):
            path.unlink()
            path.with_suffix(".json").unlink()
        return found

    def references(self, *, makes: bool) -> dict[str, Any]:
        """Label -> results of the base, of ensembles of the models, and of each model on its own task."""
        found: dict[str, Any] = {}
        for label, more in (("base", {"ensemble": ENSEMBLES}), ("fine-tuned", {"individual": True})):
            key = self.key(label, 0)
            known = self.done(label, 0, key)
            if known is None and makes:
                folder = self.folder / "rows" / f"{self.stem(label, 0)}-evaluated"
                if self.forked(f"eval {label}", partial(self.evaluate, [], folder, **more)) is None:
                    continue
                wanted = [label, *(f"ensemble-{kind}" for kind in more.get("ensemble", ()))]
                known = {
                    "key": key,
                    "results": {name: self.scores(folder / f"{name}.json") for name in wanted},
                }
                shutil.rmtree(folder)
                write(self.folder / "rows" / f"{self.stem(label, 0)}.json", json.dumps(known))
            found |= known["results"] if known else {}
        return found

    def evaluate(self, checkpoints: Sequence[Path], file: Path, **more: Any) -> None:
        mergecli.evaluate(
            checkpoints, recipe=self.recipe, limit=self.given.limit, device=self.given.device, output=file, **more
        )  # fmt: skip

    def scores(self, file: Path) -> dict[str, Any]:
        """What of a result file is kept, which is removed."""
        from mergecli.results.result import read_result

        result = read_result(file)
        file.unlink()
        tasks = {name: each.accuracy for name, each in result.tasks.items()}
        found = [each.task_found for each in result.tasks.values() if each.task_found is not None]
        kept = {"average": result.average.accuracy, "tasks": tasks, "size": result.relative_size}
        return {**kept, **({"task_found": statistics.mean(found)} if found else {})}

    def own_store(self, store: Path) -> None:
        """Makes a store in which nothing is measured or learned, but whatever else there is in the user's."""
        from mergecli.storage.store import cache_folder, home

        usual = home()
        os.environ["MERGECLI_CACHE"] = str(cache_folder())
        store.mkdir(exist_ok=True)
        for each in usual.iterdir() if usual.is_dir() else ():
            if each.name not in (*NEED, "cache") and not (store / each.name).exists():
                (store / each.name).symlink_to(each)
        os.environ["MERGECLI_HOME"] = str(store)

    def forked(self, what: str, work: Callable[[], None]) -> dict[str, float] | None:
        """Seconds, processor seconds and peak memory of a process that does the work; None if it failed."""
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            except KeyboardInterrupt:
                status = 130
            except mergecli.MergecliError as error:
                print(f"{what}: {error.message}", file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status, used = os.wait4(child, 0)
        seconds = time.perf_counter() - began
        if code := os.waitstatus_to_exitcode(status):
            if code in (130, -2):
                raise KeyboardInterrupt
            self.failed.append(what)
            print(f"{what}: failed ({code})", file=sys.stderr, flush=True)
            return None
        processor = used.ru_utime + used.ru_stime
        print(f"{what}: {seconds:.0f} s, of the processor {processor:.0f} s", file=sys.stderr, flush=True)
        return {
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
            "gigabytes": round(used.ru_maxrss / 1e6, 3),
        }


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    from mergecli.storage.atomic import write_text

    write_text(path, text)


def summary(
    table: Table, found: Sequence[tuple[Row, list[dict[str, Any]]]], references: Mapping[str, Any]
) -> dict[str, Any]:
    """The compact results: one entry for each row and routing."""
    lines = [
        joined(compact(row, number, seeds) if seeds else None, table.known.get(row.entry(routing)))
        for row, seeds in found
        for number, routing in enumerate(row.routings)
    ]
    return {
        "recipe": table.recipe.name,
        "models": table.models,
        **({"limit": table.given.limit} if table.given.limit else {}),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "unmerged": {
            label: {
                "mean": round(100 * each["average"], 2),
                "tasks": {task: round(100 * value, 1) for task, value in each["tasks"].items()},
                "size": round(each["size"], 2),
            }
            for label, each in references.items()
        }
        or table.known_unmerged,
        "rows": lines,
        "order": {name: order(lines, name) for name in table.given.reference.split(",") if name},
    }


def compact(row: Row, number: int, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry of a row's routing of that number, of the files of its seeds."""
    routing, each = row.routings[number], [one["results"][number] for one in seeds]
    averages = [round(100 * one["average"], 4) for one in each]  # a cell of the table is rounded once
    merges = [one["merge"] for one in seeds]
    return {
        "label": row.entry(routing)[0],
        "method": row.method,
        "settings": dict(row.settings),
        "share of steps": row.share,
        "kind": row.built.kind,
        "routing": routing,
        "images": row.images,
        "published": row.published(routing),
        "seeds": [one["seed"] for one in seeds],
        "averages": averages,
        **center(averages),
        "tasks": {
            task: round(100 * statistics.mean(one["tasks"][task] for one in each), 1)
            for task in each[0]["tasks"]
        },
        "size": round(each[0]["size"], 2),
        "seconds": round(statistics.median(one["seconds"] for one in merges), 1),
        "processor_seconds": round(statistics.median(one["processor_seconds"] for one in merges), 1),
        "gigabytes": max(one["gigabytes"] for one in merges),
        **({"resumed": True} if any(one["resumed"] for one in merges) else {}),
        **({"task_found": round(100 * each[0]["task_found"], 1)} if "task_found" in each[0] else {}),
    }


def center(averages: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over the seeds."""
    spread = round(statistics.stdev(averages), 2) if len(averages) > 1 else None
    return {"mean": round(statistics.mean(averages), 4), "spread": spread}


def joined(own: dict[str, Any] | None, known: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a row with the seeds of both: of a seed that both have, one that was made here counts.

    Accuracies of single tasks are those of all seeds, unless both have the same ones; time and memory are those of what was
    made here.
    """
    if own is None or known is None or set(known["seeds"]) <= set(own["seeds"]):
        found = own or known
        assert found is not None
        return found
    both = {
        **dict(zip(known["seeds"], known["averages"], strict=True)),
        **dict(zip(own["seeds"], own["averages"], strict=True)),
    }
    seeds = sorted(both)
    averages = [both[seed] for seed in seeds]
    tasks = own["tasks"]
    if not set(known["seeds"]) & set(own["seeds"]):
        weights = len(known["seeds"]) / len(seeds), len(own["seeds"]) / len(seeds)
        tasks = {
            task: round(weights[0] * known["tasks"][task] + weights[1] * value, 1)
            for task, value in tasks.items()
        }
    return {**own, "seeds": seeds, "averages": averages, **center(averages), "tasks": tasks}


def order(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Kendall's tau (b) of our means with the averages of a published table, and the methods of both."""
    from mergecli.results.references import find

    theirs = {row.name.lower(): round(100 * row.averages["all"], 2) for row in find(name).rows.values()}
    both = [
        (line["label"], line["mean"], theirs[line["published"].lower()])
        for line in lines
        if line["published"].lower() in theirs
    ]
    return {
        "tau": kendall([own for _, own, _ in both], [other for _, _, other in both]),
        "methods": [
            {"label": label, "ours": own, "published": other}
            for label, own, other in sorted(both, key=lambda each: -each[2])
        ],
    }


def kendall(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where one side is all ties."""

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    pairs = [
        (sign(ours[i] - ours[j]), sign(theirs[i] - theirs[j])) for i in range(len(ours)) for j in range(i)
    ]
    sizes = [sum(pair[side] != 0 for pair in pairs) for side in (0, 1)]
    if not all(sizes):
        return None
    return round(sum(one * other for one, other in pairs) / (sizes[0] * sizes[1]) ** 0.5, 3)


def markdown(results: Mapping[str, Any]) -> str:
    """The table, the lines below it, and the two orders side by side."""
    lines: list[Mapping[str, Any]] = results["rows"]
    heads = ["method", "accuracy", "size", "images of each task", "time, s", "memory, GB"]
    text = ["| " + " | ".join(heads) + " |", "| :-- " + "| --: " * 5 + "|"]

    def add(*cells: str) -> None:
        text.append("| " + " | ".join([*cells, *[""] * (6 - len(cells))]) + " |")

    unmerged: Mapping[str, Any] = results["unmerged"]
    for label, each in unmerged.items():
        if label == "base":
            add(label, f"{each['mean']:.1f}", size(each))
    for kind in methods.KINDS:
        own = sorted((line for line in lines if line["kind"] == kind), key=lambda line: -line["mean"])
        if own:
            add(f"**{kind}**")
        for line in own:
            name, comma, rest = line["label"].partition(",")
            rest = comma + rest
            spread = "" if line["spread"] is None else f" ± {line['spread']:.1f}"
            found = f", task found {line['task_found']:.0f} %" if "task_found" in line else ""
            if line["share of steps"] < 1:
                rest += f", {100 * line['share of steps']:g} % of the steps"
            add(
                (name if " on " in name else f"`{name}`") + rest,
                f"{line['mean']:.1f}{spread}",
                size(line),
                line["images"] + found,
                ("≥ " if line.get("resumed") else "")
                + f"{line['processor_seconds']:.{int(line['processor_seconds'] < 10)}f}",
                f"{line['gigabytes']:.2f}",
            )
    for label, each in unmerged.items():
        if label != "base":
            name = (
                "each model on its own task"
                if label == "fine-tuned"
                else label.replace("-", " of the models, ")
            )
            add(name, f"{each['mean']:.1f}", size(each))
    for name, found in results["order"].items():
        if len(found["methods"]) < 2:
            continue
        text += ["", f"Kendall's tau with the published order of `{name}`: {found['tau']}.", ""]
        text += ["| method | published | place | here | place |", "| :-- | --: | --: | --: | --: |"]
        ranks = sorted((each["ours"] for each in found["methods"]), reverse=True)
        for place, each in enumerate(found["methods"], 1):
            text.append(
                f"| {each['label']} | {each['published']:.1f} | {place} | {each['ours']:.1f} | {ranks.index(each['ours']) + 1} |"
            )
    return "\n".join(text)


def size(line: Mapping[str, Any]) -> str:
    """Relative to one model."""
    return f"{line['size']:.2f}".rstrip("0").rstrip(".")


def put(page: Path, text: str) -> None:
    """Writes the table between the marks of a page."""
    old = page.read_text("utf-8")
    before, first, rest = old.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not last:
        sys.exit(f"{page}: expected the lines `{MARKS[0]}` and `{MARKS[1]}`, between which the table goes")
    page.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}", "utf-8")


def main() -> None:
    """Makes what is missing, one seed of all rows after another, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the published steps of methods that learn"
    )
    parser.add_argument("--or-share", type=float, help="with --table: of rows that are not made with --share")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--only", action="append", default=[], help="rows whose label contains this; may be repeated"
    )
    parser.add_argument("--row", action="append", default=[], help="the row of this label; may be repeated")
    parser.add_argument("--limit", type=int, help="evaluate at most so many images of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--reference",
        default="clip-vit-base-patch32-ta8,clip-vit-base-patch32-tsv-pool",
        help="published tables, with commas between",
    )
    parser.add_argument("--keep", action="store_true", help="keep merged files")
    parser.add_argument("--table", action="store_true", help="make nothing: print the table of what is there")
    parser.add_argument(
        "--known",
        type=Path,
        help="compact results of the same models; rows and seeds that it has are not made again",
    )
    parser.add_argument("--json", type=Path, help="where the compact results go")
    parser.add_argument("--page", type=Path, help="a page with the marks between which the table goes")
    given = parser.parse_args()
    for name in READY:
        import_module(name)
    table = Table(given)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    chosen = [
        row
        for row in table.every.values()
        if not (given.only or given.row)
        or row.label in given.row
        or any(each in row.label for each in given.only)
    ]
    if unknown := set(given.row) - set(table.every):
        parser.error(f"no row is called {', '.join(sorted(unknown))}")
    if given.or_share and not given.table:
        parser.error("--or-share: expected --table with it")

    def known(row: Row) -> list[dict[str, Any]]:
        found = (table.row(row, seed, makes=False) for seed in (seeds if row.has_chance else [0]))
        return [each for each in found if each]

    for seed in [] if given.table else seeds:
        for row in chosen:
            own = seed if row.has_chance else 0
            if (row.has_chance or seed == seeds[0]) and own not in table.known_seeds(row):
                table.row(row, own, makes=True)
    found: list[tuple[Row, list[dict[str, Any]]]] = []
    for label, row in table.every.items():
        for each in (same[label] for same in table.by_share.values()):
            if (results := known(each) if row in chosen else []) or table.known_seeds(each):
                found.append((each, results))
                break
    results = summary(table, found, table.references(makes=not (given.table or table.known_unmerged)))
    text = markdown(results)
    print(text)
    if given.json:
        given.json.write_text(json.dumps(results, separators=(",", ":")) + "\n", "utf-8")
    if given.page:
        put(given.page, text)
    if table.failed:
        sys.exit("failed: " + "; ".join(table.failed))


if __name__ == "__main__":
    try:
        main()
    except mergecli.MergecliError as error:
        sys.exit(f"error: {error.message}")
