"""`finetune`: trains a CLIP's vision tower, or a low-rank adapter for it, against the fixed zero-shot heads."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.runtime import interrupts
from mergecli.runtime.distributed import is_first, join, wait
from mergecli.runtime.errors import UsageError
from mergecli.storage.atomic import refuse_inputs
from mergecli.storage.sources import Source, parse_source
from mergecli.storage.store import locate
from mergecli.training.output import Product
from mergecli.training.settings import LowRank, Settings, check_output, last_good, modules_of
from mergecli.training.trace import Records, trace_table

if TYPE_CHECKING:
    from mergecli.recipe.schema import Recipe
    from mergecli.runtime.progress import Progress
    from mergecli.training.data import Lesson

_LAST = 100
"""Steps over which the loss is averaged that `finetune` tells."""


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning came to."""

    path: Path
    steps: int
    resumed_from: int
    """The step at which an interrupted run was taken up; 0 if there was none."""
    loss: float
    """Mean of the last steps' losses, of at most 100; a loss is the sum over the tasks."""
    images_per_second: float
    """Of this run alone."""
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
    progress: Progress | None = None,
) -> Finetuned:
    """What was written to `output`: the base's vision tower, or an adapter for it, trained on training images.

    Loss: cross-entropy of exp(logit_scale) * cosine(image, class), mean over the images of a step; with several tasks
    the sum over them, each with as many images (traditional multi-task learning). Adam in float32, no augmentation, no
    dropout but that of adapters; each epoch is a new order of all images of a task, the same that it has alone. Text
    tower, projections and logit scale stay as they are. The state is kept beside the output every `save_every` steps
    and on Ctrl-C: the same call takes it up, and ends with the same bytes as if it had never stopped. Where a loss is
    no longer a number, the best weights so far, or else the last ones that gave numbers, are written as
    `NAME.last-good` beside the output.

    In several processes, as `torchrun` starts them, a step has `batch_size` images of each task in each process.
    They train what one does with `accumulate` times their number: to the same bytes where `accumulate` is 1, there is
    one task without dropout, and its images fill whole steps; else the sums are rounded in another order. So they are
    against one process with a larger `batch_size`: the losses agree, but not every weight does, since Adam makes steps
    of the learning rate even out of the rounding of gradients that vanish.

    Args:
        task: one, several, or the name of a set of them.
        schedule: `cosine` lets the learning rate fall to 0 over the steps; `constant` keeps it.
        accumulate: batches that make a step, one after another: as one batch of so many times the size.
        precision: what the tower computes in; float32 weights are trained in any case.
        lora: train an adapter, and write the folder of it that peft reads (arXiv 2106.09685).
        l_lora: the same in its tangent space (arXiv 2310.04742): A stays as it was drawn, B is trained.
        rank, alpha, target_modules, lora_dropout: of the adapter; 16, 32, q_proj and v_proj, 0.1.
        validate_every: steps between validations; the weights with the best mean accuracy are written.
        validation_split: by default the split for validation, or else a tenth of the training images, held out.
        trace, tensorboard: a CSV file, and a folder, for losses and accuracies of each step; written whenever the state
            is.
        dtype: of the weights that are written.
        fresh: begin anew where an interrupted training would go on.

    Raises:
        UsageError: an argument is wrong, or the recipe; the tower has not the layers for the adapter; or a training
            with other settings was interrupted, and it is not `fresh`.
        InputError: the base or the data do not fit; or the loss is no longer a number.
    """
    low_rank = LowRank.of(
        lora, l_lora, rank=rank, alpha=alpha, target_modules=modules_of(target_modules), dropout=lora_dropout
    )
    settings = Settings(
        steps, learning_rate, batch_size, weight_decay, schedule, seed, dtype,
        accumulate, precision, low_rank, validate_every,
    )  # fmt: skip
    settings.check(save_every, device)
    target = Path(output)
    check_output(target, low_rank)
    if validation_split is not None and not validate_every:
        raise UsageError(
            "`validation_split`: nothing is validated", "give `validate_every` (`--validate-every`) too"
        )
    records = Records(Path(trace) if trace else None, Path(tensorboard) if tensorboard else None)
    records.check(target)
    from mergecli.clip.heads import clip_digests
    from mergecli.clip.model import load_clip
    from mergecli.formats.opening import open_source
    from mergecli.runtime.distributed import usable_device
    from mergecli.training.data import told_of
    from mergecli.training.loop import DivergedError, Training
    from mergecli.training.lora import add_adapter
    from mergecli.training.resume import TrainingState

    source, lessons = _subjects(recipe, task, base, data, bool(validate_every), validation_split)
    with open_source(source) as stored:
        for each in (target, last_good(target)):
            refuse_inputs(each, {"the base": stored.files[0]})
        base_digest = stored.vision().digest()
    ranks, place = join(device)
    settings = replace(settings, processes=ranks.count)
    clip = load_clip(locate(source))
    adapter = add_adapter(clip, low_rank, seed) if low_rank else None
    if adapter is None:
        clip.tower.requires_grad_(True)
    clip.model.to(usable_device(place))
    digests = clip_digests(locate(source))
    work = {"base": base_digest, **told_of(lessons)}
    rest = {"clip": digests._asdict(), "processing": json.loads(clip.processor.to_json_string())}
    trained = {name: each for name, each in clip.tower.named_parameters() if each.requires_grad}
    state = TrainingState(
        target, trained, {**asdict(settings), **work, **rest}, len(lessons), ranks, fresh=fresh
    )
    ready = [each.ready(clip, digests.text, steps * settings.images_a_step) for each in lessons]
    clip.drop_text_tower()
    names = [each.name for each in ready]
    began, first, seen = time.perf_counter(), state.step, 0

    def report(loss: float, images: int) -> None:
        nonlocal seen
        seen += images
        if progress is not None and is_first():
            speed = seen / (time.perf_counter() - began)
            progress(f"{work['task']}: loss {loss:.3f}, {speed:.0f} images/s", state.step, steps)

    def record() -> None:
        if is_first() and state.losses:
            records.write(trace_table(names, settings, state.losses, state.validation))

    def keep() -> None:
        state.save()
        record()

    product = Product(clip, adapter, source, base_digest, settings, work)
    try:
        Training(clip, ready, state, settings, ranks).run(save_every, report, keep)
    except DivergedError as error:
        kept = product.rescue(state)
        record()
        wait()  # else one that ends first takes the one that writes down with it
        raise DivergedError(error.message, f"{error.hint}; {kept}") from error
    seconds = time.perf_counter() - began
    if is_first():
        try:
            state.take_best()
            product.write(target, **({"best_step": str(state.best_step)} if state.best_step else {}))
            record()
        except BaseException:
            with interrupts.undisturbed():
                state.save()  # nothing is trained again, only written
            raise
        state.path.unlink(missing_ok=True)
    wait()
    totals = [sum(losses) for losses in state.losses[-_LAST:]]
    return Finetuned(
        path=target,
        steps=steps,
        resumed_from=first,
        loss=sum(totals) / len(totals),
        images_per_second=seen / seconds,
        best_step=state.best_step or steps,
        validation={step: dict(zip(names, row, strict=True)) for step, row in state.validation.items()},
    )


def _subjects(
    recipe: str | Path | Recipe | None,
    task: str | Sequence[str],
    base: str | Path | None,
    data: str | Path | None,
    validates: bool,
    split: str | None,
) -> tuple[Source, list[Lesson]]:
    """The base, and what it is to learn."""
    from mergecli.data.tasks import expand, find
    from mergecli.recipe.reading import recipe_of
    from mergecli.training.data import Lesson

    known = recipe_of(recipe) if recipe is not None else None
    chosen = [find(name, known) for name in expand([task] if isinstance(task, str) else task, known)]
    if not chosen:
        raise UsageError("no task to learn", "name at least one")
    if data is not None:
        if len(chosen) > 1:
            raise UsageError("`data`: is for one task alone", "give the tasks' data in a recipe")
        chosen = [replace(chosen[0], data=parse_source(str(data), Path()), config=None)]
    source = parse_source(str(base), Path()) if base is not None else known.base if known else None
    if source is None:
        raise UsageError("no base to fine-tune", "name a recipe that has a `base`, or the base itself")
    return source, [Lesson.of(each, validates, split) for each in chosen]
