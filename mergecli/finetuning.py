"""`finetune`: trains a CLIP's vision tower on one task against the fixed zero-shot head."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import interrupts
from mergecli.errors import InputError, UsageError, listed
from mergecli.output import refuse_inputs
from mergecli.provenance import about
from mergecli.sources import locate, parse_source
from mergecli.training_state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip
    from mergecli.progress import Progress
    from mergecli.recipe import Recipe

PIXEL_BYTES = 1 << 30
"""Training images that take no more than this once processed are kept; others are processed at every use."""

SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning came to."""

    path: Path
    steps: int
    resumed_from: int
    """The step at which an interrupted run was taken up; 0 if there was none."""
    loss: float
    """Mean of the last steps' losses, of at most 100."""
    images_per_second: float
    """Of this run alone."""


def finetune(
    recipe: str | Path | Recipe | None = None,
    *,
    task: str,
    output: str | Path,
    base: str | Path | None = None,
    data: str | Path | None = None,
    steps: int = 4000,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    save_every: int = 500,
    progress: Progress | None = None,
) -> Finetuned:
    """What was written to `output`: the base's vision tower, trained on the task's training images.

    Loss: cross-entropy of exp(logit_scale) * cosine(image, class), mean over the batch. Adam in float32, no
    augmentation, no dropout; each epoch is a new order of all images. Text tower, projections and logit scale
    stay as they are. The state is kept beside the output every `save_every` steps and on Ctrl-C: the same
    call takes it up, and ends with the same bytes as if it had never stopped.

    Args:
        schedule: `cosine` lets the learning rate fall to 0 over the steps; `constant` keeps it.
        dtype: of the weights that are written.

    Raises:
        UsageError: an argument is wrong, or the recipe.
        InputError: the base or the data do not fit; or the loss is no longer a number.
    """
    import torch

    from mergecli.catalogue import read_recipe
    from mergecli.clip.heads import zero_shot_head
    from mergecli.clip.images import load_images
    from mergecli.clip.model import load_clip, save_tower
    from mergecli.clip.tasks import digest, find
    from mergecli.devices import usable_device
    from mergecli.opening import open_source

    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "seed": seed,
        "dtype": dtype,
    }
    _check({**settings, "save_every": save_every})
    known = read_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    chosen = find(task, known)
    if data is not None:
        chosen = replace(chosen, data=parse_source(str(data), Path()), config=None)
    source = parse_source(str(base), Path()) if base is not None else known.base if known else None
    if source is None:
        raise UsageError("no base to fine-tune", "name a recipe that has a `base`, or the base itself")
    target, place = Path(output), usable_device(device)
    with open_source(source) as stored:
        refuse_inputs(target, {"the base": stored.files[0]})
        base_digest = stored.vision().digest()
    clip = load_clip(locate(source))
    images = load_images(chosen, chosen.train_split)
    classes = chosen.classes or images.classes or ()
    clip.model.to(place)
    head = zero_shot_head(clip, classes, chosen.templates)
    work = {"base": base_digest, "data": images.fingerprint, "split": images.split, "task": chosen.name}
    work |= {"classes": digest(classes), "templates": digest(chosen.templates)}
    state = TrainingState(clip, target, {**settings, **work})
    began, first, seen = time.perf_counter(), state.step, 0

    def report(loss: float, batch: int) -> None:
        nonlocal seen
        seen += batch
        if progress is not None:
            speed = seen / (time.perf_counter() - began)
            progress(f"{chosen.name}: loss {loss:.3f}, {speed:.0f} images/s", state.step, steps)

    _train(clip, head, images, state, settings, save_every, report)
    seconds = time.perf_counter() - began
    written = about("checkpoint", method="finetune", inputs={"base": base_digest}, task=chosen.name)
    written["settings"] = json.dumps({**settings, **work})
    save_tower(clip, target, written, getattr(torch, dtype))
    state.path.unlink(missing_ok=True)
    return Finetuned(
        path=target,
        steps=steps,
        resumed_from=first,
        loss=sum(state.losses) / len(state.losses),
        images_per_second=seen / seconds,
    )


def _train(
    clip: Clip,
    head: Tensor,
    images: Images,
    state: TrainingState,
    settings: Mapping[str, Any],
    save_every: int,
    report: Callable[[float, int], None],
) -> None:
    """Steps until there have been enough; the state is saved on the way, and on Ctrl-C."""
    from torch.nn.functional import cross_entropy

    from mergecli.clip.heads import logits

    read = _reader(clip, images)
    steps: int = settings["steps"]
    whole = True
    try:
        for rows in _batches(len(images), settings["batch_size"], settings["seed"], state.step):
            if state.step >= steps:
                break
            interrupts.check()
            pixel_values, labels = read(rows)
            loss = cross_entropy(logits(clip, head, pixel_values.to(head.device)), labels.to(head.device))
            value = float(loss.detach())
            if not math.isfinite(value):
                kept = f"; the state of step {state.saved} is kept in {state.path}" if state.saved else ""
                raise InputError(
                    f"{state.path.parent}: the loss of `{state.settings['task']}` is {value} at step {state.step + 1}",
                    f"lower `learning_rate` (it is {settings['learning_rate']}){kept}",
                )
            state.optimizer.zero_grad()
            loss.backward()
            for group in state.optimizer.param_groups:
                group["lr"] = _rate(state.step, settings)
            whole = False
            state.optimizer.step()
            state.step += 1
            state.losses.append(value)
            whole = True
            report(value, len(rows))
            if state.step % save_every == 0 and state.step < steps:
                state.save()
    except KeyboardInterrupt:
        if whole and state.step > state.saved:
            state.save()
        raise


def _reader(clip: Clip, images: Images) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from row numbers to ((B, 3, H, W) pixels, (B,) labels); all are kept if they are few."""
    import torch

    from mergecli.clip.model import pixels

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [images[int(row)] for row in rows]
        return pixels(clip, [image for image, _ in pairs]), torch.tensor([label for _, label in pairs])

    one, _ = read(torch.tensor([0]))
    if one.nbytes * len(images) > PIXEL_BYTES:
        return read
    parts = [read(rows) for rows in torch.arange(len(images)).split(256)]
    every, labels = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    return lambda rows: (every[rows], labels[rows])


def _batches(count: int, size: int, seed: int, skip: int) -> Iterator[Tensor]:
    """Row numbers of one batch after another, without end: every epoch is a new order of all rows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            if number >= skip:
                yield rows
            number += 1


def _rate(step: int, settings: Mapping[str, Any]) -> float:
    """The learning rate of a step, which is counted from 0."""
    rate: float = settings["learning_rate"]
    if settings["schedule"] == "constant":
        return rate
    return rate * (1 + math.cos(math.pi * step / settings["steps"])) / 2


def _check(settings: Mapping[str, Any]) -> None:
    """Raises UsageError that lists every setting that cannot be."""
    wrong = [
        f"`{name}`: expected a whole number of at least 1, got {settings[name]!r}"
        for name in ("steps", "batch_size", "save_every")
        if not isinstance(settings[name], int) or settings[name] < 1
    ]
    if not 0 < settings["learning_rate"] < math.inf:
        wrong.append(f"`learning_rate`: expected a number above 0, got {settings['learning_rate']!r}")
    if not 0 <= settings["weight_decay"] < math.inf:
        wrong.append(f"`weight_decay`: expected a number of at least 0, got {settings['weight_decay']!r}")
    for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES)):
        if settings[name] not in known:
            wrong.append(f"`{name}`: expected one of {', '.join(known)}, got {settings[name]!r}")
    if wrong:
        raise UsageError(f"fine-tuning cannot be done so:\n{listed(wrong)}")
