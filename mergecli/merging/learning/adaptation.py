"""What adapted methods learn: coefficients and masks, kept as a safetensors file, found again by content, applied
without images."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli import methods
from mergecli.merging.learning.files import KIND, finite, read_learnt, said, share, write_learnt
from mergecli.merging.models import Models, Passes
from mergecli.methods._adapted import UNSAVED, Adapted, Learnt, State
from mergecli.methods._concrete_masks import logits_key, mask_shapes
from mergecli.methods.concrete_ada_merging import ConcreteAdaMerging
from mergecli.recipe.schema import Recipe
from mergecli.results.cells import Column
from mergecli.results.tables import Table
from mergecli.runtime.distributed import is_first, is_first_here, join, wait
from mergecli.runtime.errors import InputError, quoted
from mergecli.runtime.progress import Progress
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.sources import parse_source
from mergecli.storage.store import home, locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.merging.learning.files import Learning
    from mergecli.merging.outputs import Output

MASKS = "learnt masks"
"""What a result calls the file of masks that it began with; no task has such a name."""
_MASKED = ("concrete_task_arithmetic", "concrete_ada_merging")


def coefficients(
    models: Models, output: Output, stack: ExitStack, progress: Progress | None, files: Learning
) -> tuple[Adapted, Learnt, Checkpoint]:
    """The method with the settings that it learnt with, what it learnt, and the file of that; read, or learnt now.

    Raises:
        UsageError: there are no images for a task, or the file is of another method. InputError: the file is damaged,
            or is of other models.
    """
    method, recipe = output.method, output.recipe
    assert isinstance(method, Adapted)
    masks = None if files.coefficients else _masks(models, method, stack)
    if masks is not None:
        files.refuse_inputs(output, {MASKS: masks.path})
        assert isinstance(method, ConcreteAdaMerging)
        method = replace(method, masks=parse_source(str(method.masks), Path()).label)  # without folders
    path = files.coefficients or _learn(models, method, recipe, progress, masks)
    wanted = {key: recipe.settings[key] for key in method.applied if key in recipe.settings}
    used, stored = read_learnt(path, method, recipe, models.tuned, stack, ours=wanted, open_=("masks",))
    learnt, _ = _learnt(stored, used, models)
    if is_first():
        share(path, trace_table(learnt, used, said(stored, "adapted_on")), files)
    return used, learnt, stored


def _masks(models: Models, method: Adapted, stack: ExitStack) -> Checkpoint | None:
    """The file of masks that the method begins with, open until `stack` ends, once it is known that it was learnt on
    these models; None if it names none."""
    if not isinstance(method, ConcreteAdaMerging) or method.masks is None:
        return None
    stored = stack.enter_context(open_checkpoint(locate(parse_source(method.masks, Path()))))
    path, learnt_by = stored.path, stored.metadata.get("method")
    if stored.metadata.get("kind") != KIND or learnt_by not in _MASKED:
        raise InputError(
            f"{path}: holds no masks",
            f"expected what {quoted(_MASKED)} learnt, as `--save-coefficients` writes it",
        )
    if said(stored, "tasks") != list(models.tuned):
        raise InputError(f"{path}: holds masks for other models", f"these are {quoted(models.tuned)}")
    assert models.base is not None
    digests = {"base": models.base.digest(), **models.digests()}
    origin = inputs_of(stored.metadata)
    if other := [name for name, digest in digests.items() if origin.get(name) != digest]:
        raise InputError(f"{path}: its masks were learnt on other weights of {quoted(other)}")
    shapes = {name: models.reference.entries[name].shape for name in models.floats}
    _expect(stored, mask_shapes(shapes))
    for name in shapes:
        finite(stored, logits_key(name), stored.read(logits_key(name)))
    return stored


def _learn(
    models: Models, method: Adapted, recipe: Recipe, progress: Progress | None, masks: Checkpoint | None
) -> Path:
    """The file of the store with what the method learns on these models and images."""
    from mergecli.merging.learning.adaptation_loop import Adaptation

    work = Adaptation.of(models, method, recipe, masks)
    folder = home() / KIND / methods.name_of(method)
    others = "".join(f"-{getattr(method, key)}" for key in sorted(method.unlearnt))
    path, partial = folder / f"{work.key}{others}.safetensors", folder / f"{work.key}.partial.safetensors"
    ranks, device = join(models.device)
    if not ranks.all(path.exists(), device):
        like = next(iter(sorted(folder.glob(f"{work.key}-*.safetensors"))), None)
        if ranks.all(like is not None, device):
            kept = _like(like, method, models) if like and is_first_here() else {}
        else:
            surveyed = method.survey(Passes(models, method.by_blocks, progress if is_first() else None))
            state, trace = work.run(surveyed, partial, progress, ranks, device)
            kept = {**surveyed, **state, **trace}
        if is_first_here() and not path.exists():
            tensors = {key: each.contiguous() for key, each in kept.items() if not key.startswith(UNSAVED)}
            more = {"tensors": json.dumps(models.floats)}
            write_learnt(path, tensors, method, recipe, models.tuned, work.inputs, work.looked_at, **more)
        if is_first():
            partial.unlink(missing_ok=True)
        wait()
    return path


def _like(path: Path, method: Adapted, models: Models) -> State:
    """What the method would learn, of a file that differs in nothing that is learnt."""
    with open_checkpoint(path) as stored:
        _, renewed = _learnt(stored, method, models)
        return {key: stored.read(key) for key in stored.entries} | renewed


def trace_table(learnt: Learnt, method: Adapted, looked_at: Collection[str]) -> Table:
    """A row for each step: the entropy of each task that was looked at, their mean, and each task's coefficient (of
    layer-wise coefficients the mean), or what the method shows instead.

    Row k has the entropies that step k found, which are of the model before it, and the coefficients after it.
    """
    losses, shown = learnt.tensors["trace.entropies"], learnt.tensors["trace.coefficients"]
    looked = [place for place, name in enumerate(learnt.tasks) if name in looked_at]
    columns = ["step", "entropy", *(f"entropy {learnt.tasks[place]}" for place in looked)]
    columns += [method.one_shown] if method.one_shown else [f"coefficient {name}" for name in learnt.tasks]
    rows = [
        (
            step + 1,
            sum(row[place] for place in looked) / max(len(looked), 1),
            *(row[place] for place in looked),
            *own,
        )
        for step, (row, own) in enumerate(zip(losses.tolist(), shown.tolist(), strict=True))
    ]
    return Table(tuple(Column(name, "number") for name in columns), tuple(rows))


def _learnt(stored: Checkpoint, method: Adapted, models: Models) -> tuple[Learnt, State]:
    """What the file holds, once it is known that nothing is missing, and what of it was made anew for the method's settings;
    masks are read when they are needed."""
    tensors = [str(name) for name in said(stored, "tensors")]
    if set(tensors) != set(models.floats):
        raise InputError(f"{stored.path}: is for models with other tensors")
    shapes = {each: models.reference.entries[each].shape for each in tensors}
    _expect(stored, method.shapes(len(models.tuned), shapes))

    def read(key: str, start: int, stop: int) -> Tensor:
        return finite(stored, key, stored.read_entries(key, start, stop)).to(models.device)

    held = {
        key: finite(stored, key, stored.read(key))
        for key in stored.entries
        if not key.startswith(logits_key(""))
    }
    learnt = Learnt(tuple(models.tuned), tuple(tensors), held, said(stored, "seed"), read)
    before = said(stored, "settings_table")
    if all(getattr(method, key) == before.get(key) for key in method.applied):
        return learnt, {}
    renewed = method.renewed(learnt, shapes)
    return replace(learnt, tensors=held | renewed), renewed


def _expect(stored: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless the file has tensors of these shapes."""
    for key, shape in shapes.items():
        have = stored.entries[key].shape if key in stored.entries else None
        if have != shape:
            found = "is missing" if have is None else f"has shape {have}"
            raise InputError(f"{stored.path}: `{key}` {found}, expected shape {shape}")
