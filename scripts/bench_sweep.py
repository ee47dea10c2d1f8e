"""Times a sweep of ten TIES scaling factors on the toys beside ten merges and evaluations by themselves, as whole processes,
and compares their counts. Both find the images in the cache.

    python scripts/bench_sweep.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "toy.toml"
FACTORS = [f"{number / 10:g}" for number in range(1, 11)]


def mergecli(*arguments: object) -> float:
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mergecli", *map(str, arguments)], check=True, capture_output=True)
    return time.perf_counter() - began


def counts(file: Path) -> dict[str, int]:
    """Task -> right answers."""
    return {task: score["correct"] for task, score in json.loads(file.read_text())["tasks"].items()}


def main() -> None:
    """Measures, compares and prints."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MERGECLI_HOME"] = str(folder / "home")
        mergecli("eval", "toy:base", "--recipe", RECIPE)  # fills the cache
        swept = mergecli("eval", "--recipe", RECIPE, "--method", "ties", "--sweep", "method.scaling_factor=0.1:1.0:0.1",
                         "-o", folder / "swept")  # fmt: skip
        alone = 0.0
        for factor in FACTORS:
            merged = folder / f"{factor}.safetensors"
            alone += mergecli(
                "merge", RECIPE, "--method", "ties", "--set", f"method.scaling_factor={factor}", "-o", merged
            )
            alone += mergecli("eval", merged, "--recipe", RECIPE, "-o", folder / f"{factor}.json")
        points = {
            float(json.loads(file.read_text())["checkpoint"]["method.scaling_factor"]): counts(file)
            for file in (folder / "swept").glob("ties*.json")
        }
        same = sum(counts(folder / f"{factor}.json") == points[float(factor)] for factor in FACTORS)
    print(
        f"sweep {swept:.1f} s, by themselves {alone:.1f} s: {alone / swept:.2f} times; {same} of 10 with the same counts"
    )


if __name__ == "__main__":
    main()
