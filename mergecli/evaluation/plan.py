"""The plan of an evaluation: what of it is kept from before, and about how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergecli.evaluation.counting import AT_ONCE
from mergecli.evaluation.features import feature_file, feature_size
from mergecli.evaluation.settings import Settings, Tower
from mergecli.results.plan import Plan, Work
from mergecli.runtime.memory import peak_memory

if TYPE_CHECKING:
    from pathlib import Path

    from mergecli.clip.heads import ClipDigests
    from mergecli.clip.model import Clip
    from mergecli.data.images import TaskImages


@dataclass(frozen=True)
class PlannedCounts:
    """A tower on a task."""

    tower: Tower
    of_task: TaskImages
    is_counted: bool
    """Whether an evaluation that was interrupted has counted it."""


def evaluation_plan(
    clip: Clip,
    counts: Sequence[PlannedCounts],
    settings: Settings,
    digests: ClipDigests,
    outputs: Sequence[Path],
    *,
    several: bool,
) -> Plan:
    """The plan of counts of towers on tasks, with the CLIP where and in the dtype that it computes in.

    Args:
        several: whether the features of each tower have a folder of their own.
    """
    from mergecli.clip.timing import forward_seconds

    began = time.perf_counter()
    each_image = forward_seconds(clip, settings.batch_size)
    towers = {each.tower.name: each.tower for each in counts}
    work = [
        Work(
            "read",
            name,
            tower.label,
            tensors=len(tower.checkpoint.entries),
            passes=1,
            bytes=tower.checkpoint.nbytes,
        )
        for name, tower in towers.items()
    ]
    for of_task in {each.of_task.task.name: each.of_task for each in counts}.values():
        own = [each for each in counts if each.of_task is of_task]
        if not all(each.is_counted for each in own):
            work += _of_task(clip, of_task, settings, digests)
        for each in own:
            images = len(of_task.images)
            seconds = 0.0 if each.is_counted else images * each_image
            what = f"{each.tower.name} on {of_task.task.name}"
            work.append(Work("evaluate", what, images=images, cached=each.is_counted, seconds=seconds))
    for each in counts:
        file = feature_file(settings.features, each.tower.name, each.of_task.task.name, several)
        if file is not None:
            size = feature_size(clip, len(each.of_task.images))
            work.append(Work("write", f"features of {each.tower.name}", str(file), bytes=size))
    work += [Work("write", "results", str(path)) for path in outputs]
    return Plan("eval", tuple(work), _memory(clip, len(towers)), time.perf_counter() - began)


def _of_task(clip: Clip, of_task: TaskImages, settings: Settings, digests: ClipDigests) -> list[Work]:
    """What is made once for all towers on a task: its head and its pixels."""
    from mergecli.clip.heads import has_head, zero_shot_head
    from mergecli.clip.pixels import Processing, stored_pixels
    from mergecli.clip.timing import decode_seconds

    name, classes, templates = of_task.task.name, of_task.classes, of_task.task.templates
    cached, seconds = has_head(clip, digests.text, classes, templates, settings.max_size), 0.0
    if not cached:
        began = time.perf_counter()
        zero_shot_head(clip, classes[:2], templates)
        seconds = (time.perf_counter() - began) / len(classes[:2]) * len(classes)
    found = [Work("head", name, cached=cached, seconds=seconds)]
    how = Processing(settings.corruption, settings.workers, settings.max_size)
    images, cached, seconds = of_task.images, True, 0.0
    if stored_pixels(clip, of_task.images, how) is None:
        cached, seconds = False, len(images) * decode_seconds(clip, images, how)
    return [*found, Work("decode", name, images=len(images), cached=cached, seconds=seconds)]


def _memory(clip: Clip, towers: int) -> int:
    """The max RSS so far, and that of the other towers which a processor evaluates at once."""
    import torch

    others = min(AT_ONCE, torch.get_num_threads(), towers) - 1 if clip.device.type == "cpu" else 0
    return peak_memory() + others * sum(each.nbytes for each in clip.tower.state_dict().values())
