"""The plan of a fine-tuning: its steps and images, and time and memory from a few steps on noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergecli.clip.pixels import Processing, in_memory, stored_pixels
from mergecli.clip.timing import decode_seconds, forward_seconds, noise, repeated
from mergecli.results.plan import Plan, Work
from mergecli.runtime.distributed import Ranks
from mergecli.runtime.memory import peak_memory
from mergecli.storage.cache import allowed_size
from mergecli.training.data import PreparedTask, TrainingTask, is_kept
from mergecli.training.loop import Training
from mergecli.training.resume import TrainingState
from mergecli.training.settings import Settings

if TYPE_CHECKING:
    from mergecli.clip.model import Clip
    from mergecli.data.images import Images


def training_plan(
    clip: Clip, tasks: Sequence[TrainingTask], state: TrainingState, settings: Settings, size: int
) -> Plan:
    """The plan of what is left of a training; its weights are other ones afterwards.

    Args:
        size: bytes of the trained weights as they are written.
    """
    began = time.perf_counter()
    first, every = state.step, settings.validate_every
    left = settings.steps - first
    validations = sum(settings.validates_at(step) for step in range(first, settings.steps + 1))
    each_forward = forward_seconds(clip, settings.batch_size)
    step = _step_seconds(clip, tasks, state, settings)
    work: list[Work] = []
    for task in tasks:
        keep = is_kept(task.images, settings.steps * settings.images_per_step)
        for images in (task.images, *([task.validation] if task.validation else [])):
            what = f"{task.task.name}, {images.split}"
            work += _decoded(clip, images, what, settings, keep=keep or images is task.validation)
    names = ", ".join(task.task.name for task in tasks)
    images = left * settings.images_per_step * len(tasks)
    work.append(Work("train", names, images=images, steps=left, seconds=left * step))
    if every:
        held = sum(len(task.validation or ()) for task in tasks) * validations
        work.append(Work("validate", names, images=held, seconds=held * each_forward))
    what = settings.low_rank.kind if settings.low_rank else "tower"
    work.append(Work("write", what, str(state.output), tensors=len(state.parameters), bytes=size))
    return Plan("finetune", tuple(work), peak_memory(), time.perf_counter() - began)


def _decoded(clip: Clip, images: Images, what: str, settings: Settings, *, keep: bool) -> list[Work]:
    """The decoding of images, each once if they are kept, else whenever they are used."""
    how = Processing(max_size=allowed_size())
    if stored_pixels(clip, images, how) is not None:
        return []
    count = len(images) if keep else settings.steps * settings.images_per_step
    seconds = count * decode_seconds(clip, images, how)
    return [Work("decode", what, images=count, seconds=seconds)]


def _step_seconds(
    clip: Clip, tasks: Sequence[TrainingTask], state: TrainingState, settings: Settings
) -> float:
    """Seconds of a step, made on noise."""
    import torch

    size = settings.batch_size * settings.accumulate
    pixels = noise(clip, size)
    prepared: list[PreparedTask] = []
    for task in tasks:
        head = torch.nn.functional.normalize(torch.ones(len(task.classes), clip.model.config.projection_dim))
        labels = torch.zeros(size, dtype=torch.int64)
        prepared.append(PreparedTask(task.task.name, head.to(clip.device), in_memory(pixels, labels), None))
    training = Training(clip, prepared, state, settings, Ranks())
    return repeated(training.rehearse)
