"""What learning costs, before it begins: images, steps, memory, and a time that is measured on a few images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergecli import methods
from mergecli.clip.timing import decode_seconds, forward_seconds, gradient_seconds
from mergecli.merging.learning.files import LearningPlan
from mergecli.merging.learning.task_learning import part_file
from mergecli.merging.learning.work import LearningWork
from mergecli.methods._adapted import Adapted
from mergecli.methods._mixture import SAME, Part, Routed
from mergecli.methods._task_learner import TaskLearner
from mergecli.results.plan import Work
from mergecli.storage.cache import allowed_size, is_stored
from mergecli.storage.safetensors_format import layout_size


def expected(work: LearningWork, parts: Path) -> LearningPlan:
    """The work of learning; `parts` is the folder of what is learned for single tasks."""
    method = work.method
    if isinstance(method, Adapted):
        return _adapted(work, method)
    assert isinstance(method, TaskLearner)
    return _by_task(work, method, parts)


def _adapted(work: LearningWork, method: Adapted) -> LearningPlan:
    from mergecli.clip.pixels import Processing, stored_pixels

    models, clip = work.models, work.load_clip()
    clip.model.to(models.device)
    rows: list[Work] = []
    batch, steps = method.batch_size * len(work.tasks), method.total_steps
    how = Processing(max_size=allowed_size())
    for name, task in work.tasks.items():
        assert task.images is not None
        if stored_pixels(clip, task.images, how) is None:
            few = min(len(task.images), 4 * steps * method.batch_size)
            seconds = few * decode_seconds(clip, task.images, how)
            rows.append(Work("decode", name, images=few, seconds=seconds))
    images, each = batch * steps, gradient_seconds(clip, min(batch, 16))
    rows.append(Work("learn", methods.name_of(method), images=images, steps=steps, seconds=images * each))
    return LearningPlan(rows, held_bytes(method, models.shapes, len(models.tuned)))


def held_bytes(method: Adapted, shapes: Mapping[str, tuple[int, ...]], tasks: int) -> int:
    """What an adaptation holds beside a CLIP: gradients or merged weights of a tower, and the task vectors or, of a method that
    routes, the tower's parts as its file has them."""
    tower = 4 * layout_size({name: ("U8", shape) for name, shape in shapes.items()})
    if not isinstance(method, Routed):
        return tower + tasks * tower // (2 if method.vectors == "bfloat16" else 1)
    parts: dict[str, Part] = dict(method.extras(shapes, tasks))
    for name, shape in shapes.items():
        parts |= method.parts(name, shape, tasks)
    layout = {key: ("F32" if part.dtype == SAME else part.dtype, part.shape) for key, part in parts.items()}
    return tower + layout_size(layout)


def _by_task(work: LearningWork, method: TaskLearner, parts: Path) -> LearningPlan:
    clip = work.load_clip()
    clip.model.to(work.models.device)
    each = forward_seconds(clip, 128)
    rows: list[Work] = []
    most = 0
    for name, task in work.tasks.items():
        count, steps = len(task.images or ()), getattr(method, "steps", None)
        if is_stored(part_file(work, parts, name)):
            rows.append(Work("learn", name, cached=True, seconds=0.0))
            continue
        rows.append(
            Work("learn", name, images=2 * count, steps=steps, cached=False, seconds=2 * count * each)
        )
        most = max(most, 2 * count * int(clip.model.config.projection_dim) * 4)
    return LearningPlan(rows, most)
