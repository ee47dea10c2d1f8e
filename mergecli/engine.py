"""`merge`: open the models, check that they fit, let the method look, stream block by block, write.

Fixed policies: sums are float32 in the recipe's order, cast once at the end to `dtype` (by default the base
tensor's own); tensors that are not floating point must be equal in all models and are copied; NaN or infinity is
an error that names task and tensor; randomness comes from the CPU and depends on seed, tensor name and block only,
so that the same inputs and recipe give the same bytes. Of a whole CLIP only the vision tower is merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mergecli import methods
from mergecli.catalogue import read_recipe, recipe_from
from mergecli.errors import InputError, UsageError, shown
from mergecli.layout import TORCH_NAMES
from mergecli.methods._kinds import Group, Method, TwoPass, merge_group
from mergecli.models import Models, open_models
from mergecli.output import SafetensorsWriter, check_target, refuse_inputs, whole_folder
from mergecli.progress import Progress
from mergecli.provenance import UNKNOWN_DIGEST, about, inputs_of, model_folder_files
from mergecli.recipe import Recipe
from mergecli.shards import ShardedWriter, parse_size

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

_SAFETENSORS = {name: dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote."""

    path: Path
    method: str
    tasks: tuple[str, ...]
    tensors: int
    parameters: int
    inputs: Mapping[str, str]
    """Input -> digest of its content."""
    warnings: tuple[str, ...] = ()


def merge(
    recipe: str | Path | Recipe | Mapping[str, str | Path],
    *,
    output: str | Path,
    base: str | Path | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    device: str = "cpu",
    shard_size: str | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merges fine-tuned models into one checkpoint at `output`, never holding more than a block of each.

    Args:
        recipe: a recipe or its file; or the fine-tuned models themselves, name -> source, in the order of all sums.
        output: a `.safetensors` file, or a Hugging Face folder if the name has no suffix.
        base: the base model, where `recipe` is a mapping.
        method: a method's name; replaces the recipe's.
        settings: the method's settings, with `method`.
        changes: further changes to the recipe, each `key=value` as for `--set`.
        device: where the method computes; files are read and written by the CPU.
        shard_size: of the files of a folder, such as `2GB`; by default there is one file.

    Raises:
        UsageError: the recipe is wrong. InputError: a model is missing, damaged, or does not fit the others.
    """
    if isinstance(recipe, Mapping):
        recipe = recipe_from(base, recipe, changes, method, settings)
    elif not isinstance(recipe, Recipe):
        more = [f"method.{key}={shown(value)}" for key, value in (settings or {}).items()]
        recipe = read_recipe(recipe, [*more, *changes], method)
    if recipe.method is None:
        raise UsageError(
            "no method is named", "name one in `[method]` or with `--method`; `mergecli methods` lists them"
        )
    chosen = methods.create(recipe.method, recipe.settings)
    target = Path(output)
    if target.suffix not in ("", ".safetensors"):
        raise UsageError(f"{target}: expected a `.safetensors` file, or a folder's name without suffix")
    check_target(target, folder=not target.suffix)
    size = parse_size(shard_size) if shard_size is not None else None
    if size is not None and target.suffix:
        raise UsageError(
            f"{target}: one file has no shards", "name a folder, without suffix, with `--shard-size`"
        )
    with ExitStack() as stack:
        models = open_models(recipe, stack, needs="base" if chosen.needs_base else "weights", device=device)
        refuse_inputs(target, models.paths)
        return _stream(models, chosen, recipe, target, size, progress)


def _stream(
    models: Models, method: Method, recipe: Recipe, target: Path, size: int | None, progress: Progress | None
) -> Merged:
    assert recipe.method is not None
    reference = models.reference.entries
    wanted = _SAFETENSORS.get(recipe.dtype)
    layout = {
        name: (wanted if wanted and entry.is_float else entry.dtype, entry.shape)
        for name, entry in reference.items()
    }
    settings = methods.table_of(method)

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        return about(
            "checkpoint", method=str(recipe.method), recipe=recipe, settings=settings, inputs=digests
        )

    with ExitStack() as stack:
        placeholder = metadata(dict.fromkeys(models.read, UNKNOWN_DIGEST))
        if target.suffix:
            writer = SafetensorsWriter(target, layout, placeholder)
        else:
            folder = stack.enter_context(whole_folder(target))
            for name, text in model_folder_files(models.reference.path).items():
                (folder / name).write_text(text, encoding="utf-8")
            whole = folder / "model.safetensors"
            writer = (
                ShardedWriter(folder, layout, placeholder, size)
                if size
                else SafetensorsWriter(whole, layout, placeholder)
            )
        stack.enter_context(writer)
        for name in models.others:
            writer.write(name, models.reference.read(name))
        _write_merged(models, method, writer, {name: layout[name][0] for name in models.floats}, progress)
        digests = models.digests()
        writer.describe(metadata(digests))
    return Merged(
        target, recipe.method, tuple(models.tuned), len(layout), models.reference.parameters, digests,
        tuple(_foreign_vectors(models, digests)),
    )  # fmt: skip


def _cast(result: Tensor, dtype: str, name: str) -> Tensor:
    import torch

    cast = result.to("cpu", getattr(torch, TORCH_NAMES[dtype]))
    if not math.isfinite(float(cast.sum(dtype=torch.float32))) and not bool(cast.isfinite().all()):
        raise InputError(
            f"`{name}`: the merged values do not fit {TORCH_NAMES[dtype]}",
            "use smaller settings, or dtype float32",
        )
    return cast


@dataclass
class _Passes:
    """Passes over the models, as a method's `survey` asks for them, which tell how far they are."""

    models: Models
    by_blocks: bool
    progress: Progress | None

    @property
    def tensors(self) -> Sequence[str]:
        return self.models.floats

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        return self.map(lambda group: group.copy(), sample)

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        return self.run("surveying", lambda _, group: look(group), sample)

    def run(self, what: str, work: Callable[[int, Group], Result], sample: int = 1) -> Iterator[Result]:
        """What `work(first entry, group)` gives, in order, for one pass."""

        def counted(start: int, group: Group) -> tuple[int, Result]:
            return group.shape.numel() * sample, work(start, group)

        done = 0
        for count, result in self.models.map(counted, sample, blocks=self.by_blocks or sample > 1):
            yield result
            done += count
            if self.progress:
                self.progress(what, min(done, self.models.size), self.models.size)


def _write_merged(
    models: Models,
    method: Method,
    writer: SafetensorsWriter | ShardedWriter,
    dtypes: Mapping[str, str],
    progress: Progress | None,
) -> None:
    """Merges every block, or every tensor, and writes it where it belongs."""
    passes = _Passes(models, method.by_blocks, progress)
    surveyed = method.survey(passes) if isinstance(method, TwoPass) else None

    def work(start: int, group: Group) -> None:
        shape = group.shape
        result = merge_group(method, group, surveyed)
        assert result.shape == shape, f"{group.name}: {tuple(result.shape)} is not {tuple(shape)}"
        writer.write(group.name, _cast(result, dtypes[group.name], group.name), start)

    for _ in passes.run("merging", work):
        pass


def _foreign_vectors(models: Models, digests: Mapping[str, str]) -> Iterator[str]:
    """A warning for each task vector that was taken from another base than the one it is added to."""
    for name, each in models.tuned.items():
        if each.is_task_vector:
            origin = inputs_of(each.metadata).get("base")
            if origin and origin != digests.get("base"):
                yield f"{each.path}: `{name}` is a task vector of another base ({origin}) than {digests.get('base')}"
