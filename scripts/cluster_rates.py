"""Calculates how long the evaluations of a published table take on 1, 8 and 64 GPUs, and what each of them waits for. It measures
nothing: the assumptions are the constants below, and options change those that differ most among clusters.

    python scripts/cluster_rates.py                      the tables of docs/guide/clusters.md
    python scripts/cluster_rates.py --read 0.5           a shared file system of 0.5 GB/s
"""

from __future__ import annotations

import argparse
import heapq
from dataclasses import dataclass

TASKS = {
    "svhn": 26032, "sun397": 19850, "gtsrb": 12630, "mnist": 10000, "stanford-cars": 8041, "resisc45": 6300,
    "eurosat": 2700, "dtd": 1880,
}  # fmt: skip
"""Test images of each task."""
PLAIN = 26
ROUTED = {"weight_ensembling_moe": 3.6, "efficient_weight_ensembling_moe": 4.1, "smile": 1.9}
"""Forward passes that cost more than the plain tower's, as docs/benchmarks.md measured them."""
LEARNED = {
    "ada_merging": 1000, "concrete_task_arithmetic": 2000, "concrete_ada_merging": 2000, "weight_ensembling_moe": 1000,
    "efficient_weight_ensembling_moe": 1000,
}  # fmt: skip
"""Steps of the methods that learn, with the default settings."""
STEP = 8 * 16 * 3
"""Forward passes of a step: eight tasks, 16 images each, and the backward pass costs two."""
PIXELS = 3 * 224 * 224
"""Bytes of an image in the cache."""
DECODED = 415
"""Images a second that one processor decodes and resizes: JPEG of 400 x 300, measured."""
START = 5.0
"""Seconds in which a worker starts and loads torch and the CLIP; measured: four of a processor."""
UNIT = 0.5
"""Seconds of a unit beside its images: the head, the digest, the answer."""

CPUS = 16 * 0.1
"""TFLOPS of 16 processors in float32; measured: one makes about ten images a second with a ViT-B/32."""


@dataclass(frozen=True)
class Backbone:
    """Sizes of a vision tower."""

    name: str
    gigaflops: float
    """Of an image, forward."""
    gigabytes: float


BACKBONES = (Backbone("ViT-B/32", 8.8, 0.35), Backbone("ViT-L/14", 162, 1.22))


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    gpus: int
    teraflops: float
    """That a GPU sustains."""
    read: float
    """GB a second of the shared file system, for all machines together."""
    node: int = 8
    """GPUs of a machine."""
    cores: int = 8
    """Processors for each GPU."""


class Simulation:
    """The units in their order, each to the GPU that is free first. A machine reads a tower and the pixels of a task once, then
    its memory has them. The file system serves one read after another. The first unit of a task decodes for all."""

    def __init__(self, backbone: Backbone, cluster: Cluster, ready: float = START) -> None:
        self.backbone, self.cluster = backbone, cluster
        self.free = [(ready, gpu) for gpu in range(cluster.gpus)]
        self.disk = 0.0
        self.computed = self.longest = self.reading = self.decoding = 0.0
        self.here: set[tuple[int, object]] = set()
        self.decoded: dict[str, float] = {}

    def add(self, tower: int, task: str, factor: float) -> None:
        """The next unit."""
        now, gpu = heapq.heappop(self.free)
        machine = gpu // self.cluster.node
        images = TASKS[task]
        if task not in self.decoded:
            took = images / (DECODED * self.cluster.cores * min(self.cluster.node, self.cluster.gpus))
            self.decoding += took
            self.decoded[task] = now + took
            self.here.add((machine, task))  # what it has written is in its memory
        now = max(now, self.decoded[task])
        for what, size in ((tower, self.backbone.gigabytes), (task, images * PIXELS / 1e9)):
            if (machine, what) not in self.here:
                self.here.add((machine, what))
                took = size / self.cluster.read
                self.disk = max(self.disk, now) + took
                self.reading += took
                now = self.disk
        compute = images * factor * self.backbone.gigaflops / (1000 * self.cluster.teraflops)
        self.computed += compute
        self.longest = max(self.longest, compute)
        heapq.heappush(self.free, (now + UNIT + compute, gpu))

    @property
    def end(self) -> float:
        """When the last unit ends."""
        return max(when for when, _ in self.free)


def run(backbone: Backbone, cluster: Cluster, together: bool) -> Simulation:
    """All units of a table: in one command, or the eight of each tower in a command of its own, one after another."""
    simulation = Simulation(backbone, cluster)
    for tower, factor in enumerate([1.0] * PLAIN + list(ROUTED.values())):
        for task in TASKS:
            simulation.add(tower, task, factor)
        if not together:
            begun = simulation.end + START
            simulation.free = [(begun, gpu) for gpu in range(cluster.gpus)]
    if not together:
        simulation.free = [(when - START, gpu) for when, gpu in simulation.free]
    return simulation


def limit(done: Simulation) -> str:
    """What the time went to first."""
    cluster = done.cluster
    needed = {
        "GPUs": done.computed / cluster.gpus,
        "the longest unit": done.longest,
        "file system": done.reading,
        "decoding": done.decoding,
        "starting, and each unit's own": START + UNIT * len(TASKS) * (PLAIN + len(ROUTED)) / cluster.gpus,
    }
    name = max(needed, key=lambda each: needed[each])
    return f"{name}, {100 * needed[name] / done.end:.0f} % of the time"


def said(seconds: float) -> str:
    """Seconds, minutes or hours."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def main() -> None:
    """Prints two tables in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--read", type=float, default=2, help="GB a second of the shared file system (default: 2)"
    )
    parser.add_argument("--float32", type=float, default=10, help="TFLOPS of a GPU in float32 (default: 10)")
    parser.add_argument("--bfloat16", type=float, default=120, help="TFLOPS in bfloat16 (default: 120)")
    parser.add_argument("--cores", type=int, default=8, help="processors for each GPU (default: 8)")
    given = parser.parse_args()
    units = len(TASKS) * (PLAIN + len(ROUTED))
    print(
        "| tower | precision | GPUs | all in one command | units an hour | a command for each tower | limit |"
    )
    print("| :-- | :-- | --: | --: | --: | --: | :-- |")
    for backbone in BACKBONES:
        for precision, rate in (("float32", given.float32), ("bfloat16", given.bfloat16)):
            for gpus in (1, 8, 64):
                cluster = Cluster(gpus, rate, given.read, cores=given.cores)
                done, apart = (run(backbone, cluster, together) for together in (True, False))
                print(
                    f"| {backbone.name} | {precision} | {gpus} | {said(done.end)} | {3600 * units / done.end:,.0f} |"
                    f" {said(apart.end)} | {limit(done)} |"
                )
    print("\n| tower | learning, one GPU in float32 | the longest of them | 16 processors |")
    print("| :-- | --: | --: | --: |")
    for backbone in BACKBONES:
        step = STEP * backbone.gigaflops / 1000
        total, longest = sum(LEARNED.values()), max(LEARNED.values())
        print(
            f"| {backbone.name} | {said(total * step / given.float32)} | {said(longest * step / given.float32)} |"
            f" {said(total * step / CPUS)} |"
        )


if __name__ == "__main__":
    main()
