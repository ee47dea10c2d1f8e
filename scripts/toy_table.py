"""Every kind of method on the toy zoo, several seeds where there is chance: one table, with sizes and spread.

    python scripts/toy_table.py out/toy-table            # goes on where it was; prints the table as Markdown
    python scripts/toy_table.py out/toy-table --steps 1000 --seeds 0,1,2
    python scripts/toy_table.py out/toy-table --pace      # and images a second of every row, beside the plain tower

Methods that learn take `--steps` steps, a tenth of the published number by default, at the published rates; the test
images without labels, as published. Everything else is the default of its method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

RECIPE = Path(__file__).parents[1] / "recipes" / "toy.toml"
STEPS = "STEPS"
ROWS: list[tuple[str, str, dict[str, str], bool]] = [
    ("average", "average", {}, False),
    ("Fisher", "fisher", {}, True),
    ("RegMean", "reg_mean", {}, True),
    ("RegMean++", "reg_mean_plus_plus", {}, True),
    ("task arithmetic", "task_arithmetic", {}, False),
    ("TIES", "ties", {}, False),
    ("AdaMerging, task", "ada_merging", {"granularity": "task", "steps": STEPS}, True),
    ("AdaMerging, layer", "ada_merging", {"granularity": "layer", "steps": STEPS}, True),
    ("Concrete task arithmetic", "concrete_task_arithmetic", {"steps": STEPS}, True),
    ("Concrete AdaMerging, layer", "concrete_ada_merging", {"mask_steps": STEPS, "steps": STEPS}, True),
    ("SMILE", "smile", {"rank": "16"}, False),
    ("WEMoE", "weight_ensembling_moe", {"steps": STEPS}, True),
    ("E-WEMoE 90 %", "efficient_weight_ensembling_moe", {"steps": STEPS}, True),
    (
        "Surgery on AdaMerging, layer",
        "representation_surgery",
        {"merged": "AdaMerging, layer", "steps": STEPS},
        True,
    ),
    ("TALL masks", "tall_mask", {}, False),
    ("EMR", "emr", {}, False),
    ("TSV-C", "tsv_c", {}, False),
]


def call(*arguments: object) -> None:
    """Runs mergecli."""
    subprocess.run(
        [sys.executable, "-m", "mergecli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL
    )


def stem(label: str, seed: int) -> str:
    """The name of a row's files."""
    return "".join(letter if letter.isalnum() else "-" for letter in label.lower()) + f"-{seed}"


def merged(folder: Path, row: tuple[str, str, dict[str, str], bool], seed: int, steps: int) -> Path:
    """The row's checkpoint, merged unless it is there."""
    label, method, settings, _ = row
    path = folder / f"{stem(label, seed)}.safetensors"
    if not path.exists():
        given = [f"seed={seed}"]
        for key, value in settings.items():
            value = str(steps) if value == STEPS else value
            if key == "merged":
                value = json.dumps(str(folder / f"{stem(value, seed)}.safetensors"))
            elif key == "granularity":
                value = json.dumps(value)
            given.append(f"method.{key}={value}")
        call(
            "merge",
            RECIPE,
            "--method",
            method,
            *(part for each in given for part in ("--set", each)),
            "-o",
            path,
        )
    return path


def scored(folder: Path, path: Path, routing: str) -> float:
    """The average accuracy of a checkpoint in percent, evaluated unless it has been."""
    result = folder / f"{path.stem}.{routing}.json"
    if not result.exists():
        call("eval", path, "--recipe", RECIPE, "--routing", routing, "-o", result)
    return 100 * json.loads(result.read_text())["average"]["accuracy"]


def size(path: Path) -> float:
    """Bytes relative to one model."""
    base = RECIPE.parents[1] / "mergecli/data/toy/models/base/model.safetensors"
    with safe_open(base, "pt") as stored:
        one = sum(stored.get_tensor(key).nbytes for key in stored.keys() if key.startswith("vision_model."))  # noqa: SIM118
    return path.stat().st_size / one


def pace(path: Path, routing: str) -> float:
    """Images a second relative to the plain tower, as `eval` shows batches of 128 to a tower; turns in one process."""
    import torch

    from mergecli.clip.heads import zero_shot_head
    from mergecli.clip.model import load_clip
    from mergecli.evaluation.counting import ModelSlot, Worker
    from mergecli.storage.checkpoint import open_checkpoint
    from mergecli.storage.sources import parse_source
    from mergecli.storage.store import locate

    base = locate(parse_source("toy:base", Path()))
    clip = load_clip(base)
    other = load_clip(base)
    slots = ModelSlot(other), ModelSlot(clip, routing)  # type: ignore[arg-type]
    shown = torch.randn(128, 3, 32, 32)
    best = [float("inf"), float("inf")]
    with open_checkpoint(base) as plain, open_checkpoint(path) as stored, torch.inference_mode():
        slots[0].take(plain.vision(), "digits")
        slots[1].take(stored.vision(), "digits")
        workers = [
            Worker(slot, zero_shot_head(slot.clip, ["one", "two"], ["a photo of {}."])) for slot in slots
        ]
        for _ in range(12):
            for number, worker in enumerate(workers):
                began = time.perf_counter()
                worker.logits(shown)
                best[number] = min(best[number], time.perf_counter() - began)
    return best[0] / best[1]


def line(label: str, values: list[float], relative: float | None, speed: float | None = None) -> str:
    """One row of the table."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    shown = "" if relative is None else f"{relative:.2f}"
    return f"| {label} | {statistics.mean(values):.1f}{spread} | {shown} |" + (
        f" {speed:.2f} |" if speed else ""
    )


def main() -> None:
    """Merges, evaluates, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="rows whose label contains this")
    parser.add_argument(
        "--pace", action="store_true", help="also images a second relative to the plain tower"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = ["| method | average | size |", "| :-- | --: | --: |"]
    if given.pace:
        lines = ["| method | average | size | images/s |", "| :-- | --: | --: | --: |"]
    for name, more in (("base", ["toy:base", "--clip", "toy:base", "--task", "toy8"]),
                       ("fine-tuned", ["--individual", "--recipe", RECIPE])):  # fmt: skip
        if not (given.folder / f"{name}.json").exists():
            call("eval", *more, "-o", given.folder / f"{name}.json")
        accuracy = 100 * json.loads((given.folder / f"{name}.json").read_text())["average"]["accuracy"]
        lines.append(line(name, [accuracy], 1.0 if name == "base" else 8.0, 1.0 if given.pace else None))
    for row in ROWS:
        if given.only not in row[0]:
            continue
        seeds = [int(seed) for seed in given.seeds.split(",")][: None if row[3] else 1]
        paths = [merged(given.folder, row, seed, given.steps) for seed in seeds]
        routed = "WEMoE" in row[0]
        for routing in ("sample", "batch") if routed else ("sample",):
            values = [scored(given.folder, path, routing) for path in paths]
            speed = pace(paths[0], routing) if given.pace else None
            label = row[0] + (f", a {routing}" if routed else "")
            lines.append(line(label, values, size(paths[0]), speed))
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
