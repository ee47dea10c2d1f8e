"""Times methods of matrices on the six weights of one layer of eight ViT-B/32: seconds of processor, one thread, beside `tsv_m`.

python scripts/bench_layer.py                                  task vectors of noise
python scripts/bench_layer.py --power 0.5                      singular values that fall like 1 / n^0.5
python scripts/bench_layer.py --only esm,wudi --rounds 3       some of them; each round in the order opposite to the one before
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WIDTH, TASKS = 768, 8
PLACE = "vision_model.encoder.layers.0."
SHAPES = {
    **{f"{PLACE}self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkv"},
    f"{PLACE}self_attn.out_proj.weight": (WIDTH, WIDTH),
    f"{PLACE}mlp.fc1.weight": (4 * WIDTH, WIDTH),
    f"{PLACE}mlp.fc2.weight": (WIDTH, 4 * WIDTH),
}
METHODS: dict[str, dict[str, Any]] = {
    "tsv_m": {}, "iso_c": {}, "act_mat": {}, "dc_merge": {}, "wudi": {"solver": "spectral"}, "esm": {},
}  # fmt: skip


def task_vectors(shape: tuple[int, int], power: float | None, generator: torch.Generator) -> Tensor:
    """(T, O, I) noise, or matrices with random singular vectors and values 1 / n^power."""
    if power is None:
        return 1e-3 * torch.randn(TASKS, *shape, generator=generator)
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(TASKS, side, rank, generator=generator)).Q for side in shape)
    return (left * torch.arange(1, rank + 1) ** -power) @ right.mT


class Inputs:
    """Gram matrices of the inputs of 32 images for each task, whose features differ in size."""

    def __init__(self, generator: torch.Generator) -> None:
        self._grams = {
            width: [self._gram(width, generator) for _ in range(TASKS)] for width in (WIDTH, 4 * WIDTH)
        }

    def _gram(self, width: int, generator: torch.Generator) -> Tensor:
        rows = torch.randn(32 * 50, width, generator=generator) * torch.arange(1, width + 1) ** -0.3 + 0.1
        return rows.T @ rows / len(rows)

    def read(self, task: int, name: str) -> Tensor:
        """(I, I) of the layer's input."""
        return self._grams[4 * WIDTH if "fc2" in name else WIDTH][task]


def work(name: str, vectors: dict[str, Tensor], inputs: Inputs) -> Callable[[], None]:
    """What a method does with the weights of the layer."""
    from mergecli import methods
    from mergecli.methods._base import Group

    method: Any = methods.create(name, METHODS[name])
    joined = getattr(method, "fuses", False)

    def group(names: list[str]) -> Group:
        rows = torch.cat([vectors[each] for each in names], dim=1)
        tasks = tuple(f"t{number}" for number in range(TASKS))
        members = tuple(names) if len(names) > 1 else ()
        return Group(names[0], torch.zeros(rows.shape[1:]), rows, (True,) * TASKS, tasks, members=members)

    names = list(SHAPES)
    stacks = [names[:3], *([each] for each in names[3:])] if joined else [[each] for each in names]

    def run() -> None:
        for stack in stacks:
            if name == "esm":
                method._matrix(group(stack), inputs)
            else:
                method.merge(group(stack))

    return run


def main() -> None:
    """All methods, in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(METHODS), help="some of the methods, with commas between, beside `tsv_m`"
    )
    parser.add_argument("--power", type=float, help="singular values fall like 1 / n^POWER; noise without")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    vectors = {name: task_vectors(shape, given.power, generator) for name, shape in SHAPES.items()}
    inputs = Inputs(generator)
    names = list(dict.fromkeys(["tsv_m", *given.only.split(",")]))
    works = {name: work(name, vectors, inputs) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(given.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            began = time.process_time()
            works[name]()
            taken[name].append(time.process_time() - began)
    beside = statistics.median(taken["tsv_m"])
    for name, seconds in taken.items():
        print(
            f"{name:12} {statistics.median(seconds):7.2f} s {statistics.median(seconds) / beside:6.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
