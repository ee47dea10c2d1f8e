"""The whole tool on eight tasks: a base, fine-tuning, LoRA, L-LoRA, merges by every method, evaluations, a report.

    python scripts/experiment.py DATA out/real                        small tasks of real images
    python scripts/experiment.py toy out/toy --kinds lora,l-lora      the toy tasks, on the toy base

DATA has a folder of Parquet files for each task: mnist, gtsrb, eurosat, dtd10, fashion_mnist, cifar10, emnist_letters,
sign_digits. Every step is a mergecli command that is printed before it runs; what is there already is not done again.
The tables go to `report/*.md`, and every command with its seconds, result and trace to the lines of `report/archive.jsonl`, which
is what `recipes/experiments/` keeps.

The base of real images is the toy base, trained further on four of the tasks at once, for its towers are too small and have seen too
little to know anything of real images; the other four tasks are new to it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import mergecli
from mergecli import methods

SEEN = ("cifar10", "fashion_mnist", "emnist_letters", "gtsrb")
TASKS = ("mnist", "gtsrb", "eurosat", "dtd10", "fashion_mnist", "cifar10", "emnist_letters", "sign_digits")
TOYS = ("digits", "letters", "shapes", "textures", "arrows", "colours", "positions", "faces")
TEMPLATE = "a photo of {}."
SHORT = {  # the toy text tower takes 24 tokens, and has few words
    "eurosat": "crops, forest, herbs, highway, factories, pasture, orchard, houses, river, sea",
    "gtsrb": "speed 20, speed 30, speed 50, speed 60, speed 70, speed 80, end of 80, speed 100, speed 120, no passing, "
    "no truck passes, right of way, priority, yield, stop, no vehicles, no trucks, no entry, caution, left bend, "
    "right bend, two bends, bumps, slippery, narrow, road work, signals, walkers, children, bicycles, ice, animals, "
    "end of limits, turn right, turn left, ahead, ahead or right, ahead or left, keep right, keep left, circle, "
    "end of no passing, end of no trucks",
}
FULL = ["--learning-rate", "2e-4"]
LOW_RANK = ["--rank", "8", "--alpha", "16", "--learning-rate", "2e-3"]
NEAR = ["--learning-rate", "5e-5"]  # towers that stay near the base
KINDS = {"full": FULL, "near": NEAR, "lora": ["--lora", *LOW_RANK], "l-lora": ["--l-lora", *LOW_RANK]}
LEARNING = {
    "ada_merging": ["method.steps=100"],
    "concrete_task_arithmetic": ["method.steps=100"],
    "concrete_ada_merging": ["method.steps=100", "method.mask_steps=100"],
    "weight_ensembling_moe": ["method.steps=100"],
    "efficient_weight_ensembling_moe": ["method.steps=100"],
    "smile": ["method.rank=16"],
    "representation_surgery": ["method.steps=300"],
}
OF_TWO = {"linear", "slerp"}
"""Methods that merge two models."""
FEW = ["average", "task_arithmetic", "ties", "tsv_m", "iso_c"]
"""What the towers of `near` are merged with."""


class Experiment:
    """The folder, and the commands run so far with their times."""

    def __init__(self, data: Path, folder: Path, steps: int, base_steps: int) -> None:
        self.toy = str(data) == "toy"
        self.tasks = TOYS if self.toy else TASKS
        self.data, self.folder, self.steps, self.base_steps = data.absolute(), folder, steps, base_steps
        self.log = folder / "commands.tsv"
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, target: Path, *arguments: object, again: bool = False) -> Path:
        """`mergecli ARGUMENTS -o TARGET`, unless the log says that this command has been done; or `again`."""
        words = [*map(str, arguments), "-o", str(target)]
        done = self.log.read_text().splitlines() if self.log.exists() else []
        if again or not (target.exists() and any(line.endswith(f"\t{shlex.join(words)}") for line in done)):
            print("mergecli", shlex.join(words), file=sys.stderr, flush=True)
            began = time.perf_counter()
            if subprocess.run(
                [sys.executable, "-m", "mergecli", *words], stdout=subprocess.DEVNULL
            ).returncode:
                sys.exit(f"stopped: mergecli {shlex.join(words)}")
            with self.log.open("a") as file:
                file.write(f"{time.perf_counter() - began:.1f}\t{shlex.join(words)}\n")
        return target

    def recipe(self, name: str, base: object, tuned: dict[str, Path]) -> Path:
        """A recipe of the eight tasks."""
        lines = [f"base = {json.dumps(str(base))}", "[tuned]"]
        lines += [f"{task} = {json.dumps(str(path.absolute()))}" for task, path in tuned.items()]
        lines += ["[eval]", f"tasks = {json.dumps(list(self.tasks))}"]
        for task in () if self.toy else TASKS:
            lines += [
                f"[tasks.{task}]",
                f"data = {json.dumps(str(self.data / task))}",
                f'templates = ["{TEMPLATE}"]',
            ]
            if task in SHORT:
                lines.append(f"classes = {json.dumps(SHORT[task].split(', '))}")
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def base(self) -> str:
        """A whole CLIP: the toy base, for real images with a tower that has learnt four of the tasks."""
        if self.toy:
            return "toy:base"
        recipe = self.recipe("base", "toy:base", {})
        seen = [part for task in SEEN for part in ("--task", task)]
        tower = self.run(self.folder / "base.safetensors", "finetune", recipe, *seen, "--steps", self.base_steps,
                         "--learning-rate", "5e-4", "--trace", self.folder / "base.csv")  # fmt: skip
        whole = self.folder / "base"
        if not whole.exists():
            pool = mergecli.ModelPool({"base": "toy:base", "tower": str(tower)})
            fresh = self.folder / "base.partial"
            pool.load_clip_model("tower").save_pretrained(fresh)
            toy = Path(mergecli.__file__).parent / "data/toy/models/base"
            for file in toy.iterdir():
                if not file.name.startswith(("model", "config")):
                    shutil.copy(file, fresh / file.name)
            fresh.rename(whole)
        return str(whole.absolute())

    def towers(self, kind: str, base: str) -> Path:
        """The recipe of eight fine-tuned towers or adapters."""
        recipe = self.recipe("base-of-all", base, {})
        suffix = "" if "lora" in kind else ".safetensors"
        tuned = {
            task: self.run(self.folder / kind / (task + suffix), "finetune", recipe, "--task", task, "--steps", self.steps,
                           *KINDS[kind])
            for task in self.tasks
        }  # fmt: skip
        return self.recipe(kind, base, tuned)

    def together(self, base: str, recipe: Path) -> list[Path]:
        """The result of one tower that has learnt all tasks at once: traditional multi-task learning."""
        every = [part for task in self.tasks for part in ("--task", task)]
        of_all = self.recipe("base-of-all", base, {})
        tower = self.run(
            self.folder / "full" / "all tasks.safetensors",
            "finetune",
            of_all,
            *every,
            "--steps",
            self.steps,
            *FULL,
        )
        return [self.run(self.folder / "full-results" / "all tasks.json", "eval", tower, "--recipe", recipe)]

    def images(self) -> list[int]:
        """How many training images each task has."""
        pool = mergecli.ModelPool(self.recipe("base-of-all", self.base(), {}))
        return [len(pool.load_train_dataset(task)) for task in self.tasks]

    def merges(self, kind: str, recipe: Path, names: list[str]) -> list[Path]:
        """A result for each method."""
        results: list[Path] = []
        for name in names:
            path = self.folder / f"{kind}-merged" / f"{name}.safetensors"
            given = [*LEARNING.get(name, [])]
            if name == "weighted_average":
                given.append(f"method.weights=[{', '.join(map(str, self.images()))}]")
            if name == "representation_surgery":
                given.append(
                    f"method.merged={json.dumps(str(path.with_name('task_arithmetic.safetensors')))}"
                )
            changes = [part for each in given for part in ("--set", each)]
            own = self.folder / f"{kind}-results"
            if name in LEARNING and name != "smile":
                own.mkdir(parents=True, exist_ok=True)
                changes += ["--trace", str(own / f"{name}.csv")]
            self.run(path, "merge", recipe, "--method", name, *changes)
            results.append(self.run(own / f"{name}.json", "eval", path, "--recipe", recipe))
            if name.endswith("_moe"):
                batch = own / f"{name}, batch.json"
                results.append(
                    self.run(batch, "eval", f"{name}, batch={path}", "--recipe", recipe, "--routing", "batch")
                )
        return results


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of each fine-tuning")
    parser.add_argument(
        "--base-steps", type=int, default=1200, help="of the base, each with images of four tasks"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="of fine-tuning")
    parser.add_argument("--methods", help="of merging; all by default, and few for `near`")
    parser.add_argument("--report", type=Path, help="a folder for the tables and the archive of results")
    given = parser.parse_args()
    kinds, chosen = given.kinds.split(","), given.methods.split(",") if given.methods else methods.names()
    if wrong := [*(set(kinds) - set(KINDS)), *(set(chosen) - set(methods.names()))]:
        parser.error(f"there is no {', '.join(sorted(wrong))}; kinds are {', '.join(KINDS)}")
    missing = [task for task in TASKS if str(given.data) != "toy" and not (given.data / task).is_dir()]
    if missing:
        parser.error(f"{given.data}: has no folder {', '.join(missing)}")
    work = Experiment(given.data, given.folder, given.steps, given.base_steps)
    base = work.base()
    report = given.report or work.folder / "report"
    archived: dict[str, Path] = {}
    for kind in kinds:
        recipe = work.towers(kind, base)
        results = work.folder / f"{kind}-results"
        every = sorted(
            set(methods.names()) - OF_TWO, key=lambda name: (name == "representation_surgery", name)
        )
        every = [name for name in every if name in chosen]
        found = [
            work.run(results / "base.json", "eval", "base=" + base, "--recipe", recipe),
            *work.merges(kind, recipe, FEW if kind == "near" else every),
            *(work.together(base, recipe) if kind == "full" and not given.methods else []),
            work.run(results / "fine-tuned.json", "eval", "--individual", "--recipe", recipe),
        ]
        work.run(report / f"{kind}-merges.md", "report", *found, "--format", "md", again=True)
        cross = work.folder / f"{kind}-each"
        work.run(cross, "eval", "--recipe", recipe)
        work.run(
            report / f"{kind}-each.md",
            "report",
            *(cross / f"{task}.json" for task in ("base", *work.tasks)),
            "--format",
            "md",
            again=True,
        )
        archived |= {f"{kind}/{file.name}": file for file in (*found, *sorted(results.glob("*.csv")))}
        archived |= {f"{kind}-each/{file.name}": file for file in sorted(cross.glob("*.json"))}
    done = work.log.read_text()
    for place, name in ((report, "REPORT"), (work.folder, "WORK"), (work.data, "DATA")):
        done = done.replace(str(place.absolute()), name).replace(str(place), name)
    write_archive(report / "archive.jsonl", done, archived)


def write_archive(path: Path, commands: str, files: Mapping[str, Path]) -> None:
    """A line for each command with its seconds, then one for each result or trace."""
    lines: list[dict[str, object]] = []
    for row in commands.splitlines():
        seconds, _, command = row.partition("\t")
        lines.append({"command": command, "seconds": float(seconds)})
    for name, file in files.items():
        text = file.read_text()
        lines.append(
            {"file": name, "result": json.loads(text)}
            if file.suffix == ".json"
            else {"file": name, "text": text}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


if __name__ == "__main__":
    main()
