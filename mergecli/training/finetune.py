"""`finetune`: trains a CLIP's vision tower, or a low-rank adapter for it, against the fixed zero-shot heads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.runtime import interrupts
from mergecli.runtime.distributed import is_first, join, wait
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.errors import UsageError
from mergecli.runtime.progress import shown
from mergecli.storage.atomic import check_space, refuse_inputs
from mergecli.storage.sources import Source, parse_source
from mergecli.training.output import TrainedModel
from mergecli.training.settings import LowRank, Settings, check_output, last_good_path, parse_modules
from mergecli.training.trace import TraceFiles, trace_table

if TYPE_CHECKING:
    from mergecli.recipe.schema import Recipe
    from mergecli.runtime.progress import AnyProgress, Progress
    from mergecli.training.data import TrainingTask

_AVERAGED_STEPS = 100
"""Last steps over which `Finetuned.loss` is a mean."""


@dataclass(frozen=True)
class Finetuned:
    """The result of a fine-tuning."""

    path: Path
    steps: int
    resumed_from: int
    """The step from which an interrupted training was resumed; 0 if it was not interrupted."""
    loss: float
    """Mean loss of the last 100 steps; a loss is the sum over the tasks."""
    images_per_second: float
    """Since the start or the resume."""
    best_step: int
    """The step whose weights were written: the last one, unless there were validations."""
    validation: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])
    """Step -> task -> accuracy, a fraction."""


def finetune(
    recipe: str | Path | Recipe | None = None,
    *,
    task: str | Sequence[str],
    output: str | Path,
    base: str | Path | None = None,
    data: str | Path | None = None,
    steps: int = 4000,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: int = 0,
    epsilon: float = 1e-8,
    accumulate: int = 1,
    precision: str = "float32",
    seed: int = 0,
    lora: bool = False,
    l_lora: bool = False,
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    lora_dropout: float | None = None,
    validate_every: int = 0,
    validation_split: str | None = None,
    trace: str | Path | None = None,
    tensorboard: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    save_every: int = 500,
    fresh: bool = False,
    progress: AnyProgress | None = None,
) -> Finetuned:
    """Trains the vision tower of a base, or an adapter for it, on training images, and writes it to `output`.

    The loss is the cross-entropy of exp(logit_scale) * cosine(image, class), a mean over the images of a step. With
    several tasks it is the sum over them, each with the same number of images (traditional multi-task learning). Adam
    in float32; no augmentation; dropout only in adapters. Each epoch shuffles all images of a task, in the order that
    the task alone would have. Text tower, projections and logit scale do not change.

    A resume file beside the output is saved every `save_every` steps and on Ctrl-C. The same call resumes from it, and
    ends with the bytes of an uninterrupted training. If a loss is NaN or infinite, the best weights so far, or else the
    last ones with finite losses, are written as `NAME.last-good` beside the output.

    In several processes, as `torchrun` starts them, a step has `batch_size` images of each task in each process. N
    processes train what one process trains with N times `accumulate`. The bytes are the same if `accumulate` is 1, there
    is one task without dropout, and its images fill whole steps; otherwise sums are rounded in another order. Compared
    with one process and a larger `batch_size` the losses agree, but a few weights do not: where a gradient vanishes,
    Adam makes a step of the learning rate from its rounding error.

    Args:
        task: one, several, or the name of a set of them.
        schedule: `cosine` lets the learning rate fall to 0 over the steps; `constant` keeps it.
        warmup: steps over which the learning rate rises to `learning_rate`, before the schedule begins. The first steps of
            Adam change every weight by about the learning rate; with a warm-up, weights that do not matter stay where they
            are, which other tasks in a merge feel.
        epsilon: Adam's. A weight whose gradients are smaller moves less than the learning rate, so that a larger one keeps
            the change in the weights that matter.
        accumulate: batches per step, whose gradients are summed: as one batch of that many times the size.
        precision: the dtype of the forward pass; the trained weights are always float32.
        lora: train a LoRA adapter, and write a folder that peft reads (arXiv 2106.09685).
        l_lora: the same in its tangent space (arXiv 2310.04742): only B is trained.
        rank, alpha, target_modules, lora_dropout: of the adapter; 16, 32, q_proj and v_proj, 0.1.
        validate_every: steps between validations; the weights with the best mean accuracy are written.
        validation_split: by default the split `validation`, or else a held-out tenth of the training images.
        trace, tensorboard: a CSV file, and a folder, for losses and accuracies of each step; written whenever the resume
            file is.
        dtype: of the written weights.
        fresh: start again instead of resuming an interrupted training.

    Raises:
        UsageError: an argument or the recipe is wrong; the tower lacks the layers for the adapter; or there is a resume
            file of other settings, and `fresh` is not set.
        InputError: the base or the data do not fit; or a loss is NaN or infinite.
    """
    low_rank = LowRank.of(
        lora,
        l_lora,
        rank=rank,
        alpha=alpha,
        target_modules=parse_modules(target_modules),
        dropout=lora_dropout,
    )
    settings = Settings(
        steps, learning_rate, batch_size, weight_decay, schedule, seed, dtype,
        accumulate, precision, low_rank, validate_every, warmup, epsilon,
    )  # fmt: skip
    settings.check(save_every, device)
    target = Path(output)
    check_output(target, low_rank)
    if validation_split is not None and not validate_every:
        raise UsageError(
            "`validation_split`: there is no validation", "give `validate_every` (`--validate-every`) too"
        )
    records = TraceFiles(Path(trace) if trace else None, Path(tensorboard) if tensorboard else None)
    records.check(target)
    import torch

    from mergecli.clip.heads import clip_digests
    from mergecli.clip.model import load_clip
    from mergecli.formats.opening import model_path, open_source
    from mergecli.runtime.distributed import usable_device
    from mergecli.training.data import tasks_metadata
    from mergecli.training.loop import DivergedError, Training
    from mergecli.training.lora import add_adapter
    from mergecli.training.plan import training_plan
    from mergecli.training.resume import TrainingState, state_file, state_size

    source, tasks = base_and_tasks(recipe, task, base, data, bool(validate_every), validation_split)
    with open_source(source) as stored:
        for each in (target, last_good_path(target)):
            refuse_inputs(each, {"the base": stored.files[0]})
        base_digest = stored.vision().digest()
    ranks, own_device = join(device)
    settings = replace(settings, processes=ranks.count)
    clip = load_clip(model_path(source))
    adapter = add_adapter(clip, low_rank, seed) if low_rank else None
    if adapter is None:
        clip.tower.requires_grad_(True)
    clip.model.to(usable_device(own_device))
    trained = {name: each for name, each in clip.tower.named_parameters() if each.requires_grad}
    for each in tasks:
        each.check(clip)
    entries = sum(each.numel() for each in trained.values())
    size = entries * getattr(torch, dtype).itemsize
    check_space({target: size, state_file(target): state_size(entries, validates=bool(validate_every))})
    digests = clip_digests(model_path(source))
    trained_on = {"base": base_digest, **tasks_metadata(tasks)}
    rest = {"clip": digests._asdict(), "processing": json.loads(clip.processor.to_json_string())}
    state = TrainingState(
        target, trained, {**asdict(settings), **trained_on, **rest}, len(tasks), ranks, fresh=fresh
    )
    work_begins(lambda: training_plan(clip, tasks, state, settings, size))

    def kept() -> str:
        return f"{state.step} of {steps} steps are kept in {state.path}" if state.path.exists() else ""

    with interrupts.telling(kept):
        prepared = [each.prepare(clip, digests.text, steps * settings.images_per_step) for each in tasks]
    clip.drop_text_tower()
    names = [each.name for each in prepared]
    began, first, seen = time.perf_counter(), state.step, 0

    def report(told: Progress | None, loss: float, images: int) -> None:
        nonlocal seen
        seen += images
        if told is not None and is_first():
            speed = seen / (time.perf_counter() - began)
            told(f"{trained_on['task']}: loss {loss:.3f}, {speed:.0f} images/s", state.step, steps)

    def record() -> None:
        if is_first() and state.losses:
            records.write(trace_table(names, settings, state.losses, state.validation))

    def save() -> None:
        state.save()
        record()

    model = TrainedModel(clip, adapter, source, base_digest, settings, trained_on)
    try:
        with interrupts.telling(kept), shown(progress) as told:
            Training(clip, prepared, state, settings, ranks).run(save_every, partial(report, told), save)
    except DivergedError as error:
        saved = model.write_last_good(state)
        record()
        wait()  # torchrun ends all processes when one fails: the first one must have written
        raise DivergedError(error.message, f"{error.hint}; {saved}") from error
    seconds = time.perf_counter() - began
    if is_first():
        try:
            state.restore_best()
            model.write(target, **({"best_step": str(state.best_step)} if state.best_step else {}))
            record()
        except BaseException as error:
            with interrupts.deferred():
                state.save()  # the next run does not train again, it only writes
            interrupts.tell(error, kept)
            raise
        state.path.unlink(missing_ok=True)
    wait()
    totals = [sum(losses) for losses in state.losses[-_AVERAGED_STEPS:]]
    return Finetuned(
        path=target,
        steps=steps,
        resumed_from=first,
        loss=sum(totals) / len(totals),
        images_per_second=seen / seconds,
        best_step=state.best_step or steps,
        validation={step: dict(zip(names, row, strict=True)) for step, row in state.validation.items()},
    )


def base_and_tasks(
    recipe: str | Path | Recipe | None,
    task: str | Sequence[str],
    base: str | Path | None,
    data: str | Path | None,
    validates: bool,
    split: str | None,
) -> tuple[Source, list[TrainingTask]]:
    """The base, and the tasks to train on.

    Raises:
        UsageError: there is no base or no task, or the recipe is wrong. InputError: the base or data are missing or damaged.
    """
    from mergecli.data.tasks import expand, find
    from mergecli.hub.fetched import expect_all
    from mergecli.recipe.reading import recipe_of
    from mergecli.training.data import TrainingTask

    known = recipe_of(recipe) if recipe is not None else None
    chosen = [find(name, known) for name in expand([task] if isinstance(task, str) else task, known)]
    if not chosen:
        raise UsageError("no task to train on", "name at least one")
    if data is not None:
        if len(chosen) > 1:
            raise UsageError("`data`: is for a single task", "name the data of each task in a recipe")
        chosen = [replace(chosen[0], data=parse_source(str(data), Path()), config=None)]
    source = parse_source(str(base), Path()) if base is not None else known.base if known else None
    if source is None:
        raise UsageError("no base to fine-tune", "name a recipe that has a `base`, or the base itself")
    expect_all([source], known, chosen)
    return source, [TrainingTask.of(each, validates, split) for each in chosen]
