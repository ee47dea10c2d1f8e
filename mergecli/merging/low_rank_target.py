"""Where merges of adapters go: to an adapter, or from coordinates of low rank back to whole weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from mergecli.formats.linear_layers import chosen_layers, modules_of
from mergecli.formats.lora import AdaptedCheckpoint, Kind
from mergecli.formats.lora_files import check_adapter_folder
from mergecli.formats.lora_writer import Factors, write_adapter
from mergecli.merging.low_rank import Change, dropped, factored, kept_whole, refactored, relative
from mergecli.merging.merge_target import MergeTarget, ModelWriter, cast
from mergecli.merging.models import Models
from mergecli.merging.spaces import SpaceModels
from mergecli.methods._mixture import Mixture
from mergecli.recipe.schema import Recipe
from mergecli.results.card import check_card
from mergecli.results.card_file import CARD
from mergecli.runtime.errors import UsageError
from mergecli.storage.atomic import whole_folder
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES, TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor


def target_of(recipe: Recipe, path: Path, card: bool | None = None) -> MergeTarget:
    """What the merge of the recipe writes to the path, as far as the recipe says.

    Raises:
        UsageError: the recipe names no method, or the path is not one for its output.
    """
    if recipe.as_adapter:
        return AdapterTarget.of(recipe, path, card)
    if recipe.rank is not None:
        raise UsageError(
            "rank: is of an adapter, and the output is none",
            "write one with `--as-adapter`; a setting of the method is `method.rank`",
        )
    return MergeTarget.of(recipe, path, card)


def target_in(target: MergeTarget, space: str) -> MergeTarget:
    """The target of a merge in that space."""
    if isinstance(target, AdapterTarget):
        return replace(target, recipe=replace(target.recipe, space=space))
    if space != "dense":
        return LiftedTarget(target.method, target.recipe, target.path, target.has_card)
    return target


class _Assembly:
    """Puts the blocks of merged tensors together, and hands each tensor on when it is whole; from any thread."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], finish: Callable[[str, Tensor], None]) -> None:
        self._shapes, self._finish = shapes, finish
        self._parts: dict[str, Tensor] = {}
        self._left = {name: math.prod(shape) for name, shape in shapes.items()}
        self._lock = threading.Lock()

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        import torch

        with self._lock:
            if name not in self._parts:
                self._parts[name] = torch.empty(self._left[name])
            part = self._parts[name]
        part[start : start + data.numel()] = data.flatten()
        with self._lock:
            self._left[name] -= data.numel()
            if self._left[name]:
                return
            whole = self._parts.pop(name)
        self._finish(name, whole.view(self._shapes[name]))


@dataclass(frozen=True)
class LiftedTarget(MergeTarget):
    """Whole weights, of a merge in coordinates of low rank."""

    def layout(self, models: Models) -> dict[str, tuple[str, tuple[int, ...]]]:
        return super().layout(models.dense)

    def computed(self, models: Models) -> dict[str, str]:
        return dict.fromkeys(models.shapes, "F32")

    def open(
        self,
        models: Models,
        size: int | None,
        stack: ExitStack,
        inputs: Iterable[str],
        more: Mapping[str, str],
    ) -> ModelWriter:
        assert isinstance(models, SpaceModels)
        base = models.dense.reference
        writer = super().open(models.dense, size, stack, inputs, more)
        dtypes = {name: dtype for name, (dtype, _) in self.layout(models).items()}
        for name in models.dense.floats:
            if name not in models.shapes:
                writer.write(name, cast(base.read(name), dtypes[name], name))
        return _LiftingWriter(writer, models, dtypes)


class _LiftingWriter:
    """Adds what is merged in coordinates to the base's weights, and writes these."""

    def __init__(self, writer: ModelWriter, models: SpaceModels, dtypes: Mapping[str, str]) -> None:
        self._writer, self._models, self._dtypes = writer, models, dtypes
        self._assembly = _Assembly(models.shapes, self._finish)
        self.size = writer.size

    @property
    def digest(self) -> str:
        return self._writer.digest

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        self._assembly.write(name, data, start)

    def describe(self, metadata: Mapping[str, str]) -> None:
        self._writer.describe(metadata)

    def _finish(self, name: str, core: Tensor) -> None:
        weight = self._models.dense.reference.read(name)
        change = core.double()
        if name in self._models.bases:
            left, right = self._models.lift(name, core)
            change = (left @ right).view(weight.shape)
        merged = weight.double() + change
        self._writer.write(name, cast(merged, self._dtypes[name], name))


class _Module(NamedTuple):
    """A module that the adapter changes."""

    name: str
    """As adapters call it."""
    kind: Kind
    shape: tuple[int, ...]
    """Of its weight."""
    most: int
    """The rank of its factors where nothing bounds it: of the merge, or the least side of the weight."""


@dataclass(frozen=True)
class AdapterTarget(MergeTarget):
    """A folder with an adapter that plain peft loads."""

    kind: ClassVar[str] = "adapter"

    @classmethod
    def of(cls, recipe: Recipe, path: Path, card: bool | None = None) -> AdapterTarget:
        """Raises UsageError if the recipe names no method, or one that writes more than a tower; or the path is no folder."""
        method = recipe.built
        check_adapter_folder(path)
        if path.suffix:
            raise UsageError(f"{path}: an adapter is a folder", "name one, without suffix")
        if isinstance(method, Mixture) and method.is_mixture:
            raise UsageError(
                f"as_adapter: `{recipe.method}` writes more than one tower, and an adapter changes one"
            )
        has_card = card is not False
        if has_card:
            check_card(path)
        return cls(method, recipe, path, has_card)

    def modules(self, models: Models) -> dict[str, _Module]:
        """Weight -> the module that the adapter has for it.

        Raises:
            UsageError: nothing says which rank it has.
        """
        dense = models.dense
        entries, adapters = dense.reference.entries, _adapters(dense)
        found: dict[str, _Module] = {}
        if len(adapters) < len(dense.tuned):
            if self.recipe.rank is None:
                other = next(name for name in dense.tuned if name not in adapters)
                raise UsageError(
                    f"rank: is missing: `{other}` is no adapter, and has no rank of its own",
                    "give it with `--rank 16`",
                )
            for weight, name in chosen_layers(dense.reference, ()).items():
                shape = entries[weight].shape
                found[weight] = _Module(name, "linear", shape, min(shape))
        plain = modules_of(dense.reference, range(1, 9))
        for weight, shape in {name: each.shape for name, each in entries.items()}.items():
            changes = [each.changes[weight] for each in adapters.values() if weight in each.changes]
            if not changes:
                continue
            names = {each.module for each in changes}
            rows, width = changes[0].shapes[0][0], changes[0].shapes[1][1]
            most = (
                min(rows, width, sum(each.rank for each in changes))
                if weight not in found
                else min(rows, width)
            )
            if isinstance(models, SpaceModels):
                most = min(models.shapes[weight])
            name = names.pop() if len(names) == 1 else plain[weight]
            found[weight] = _Module(name, changes[0].kind, shape, most)
        return found

    def biases(self, models: Models) -> dict[str, str]:
        """Bias that the adapter has whole -> as adapters call it."""
        named = {name: own for each in _adapters(models.dense).values() for name, own in each.biases.items()}
        return {name: named[name] for name in models.dense.reference.entries if name in named}

    def ranks(self, models: Models) -> dict[str, int]:
        """Weight -> rank of its factors."""
        wanted = self.recipe.rank
        return {
            weight: each.most if wanted is None else min(wanted, each.most)
            for weight, each in self.modules(models).items()
        }

    def dtype(self, models: Models) -> str:
        """Of the factors, a torch name: the recipe's; or that of all adapters, or float32 where they differ."""
        if self.recipe.dtype != "same":
            return self.recipe.dtype
        adapters = _adapters(models.dense)
        dtypes = {
            each.adapter.stored.entries[key].dtype
            for each in adapters.values()
            for parts in each.adapter.modules.values()
            for key in parts.values()
        }
        same = len(dtypes) == 1 and len(adapters) == len(models.tuned)
        return TORCH_NAMES[dtypes.pop()] if same else "float32"

    def computed(self, models: Models) -> dict[str, str]:
        return dict.fromkeys(models.reference.entries, "F32")

    def layout(self, models: Models) -> dict[str, tuple[str, tuple[int, ...]]]:
        dtype, ranks = SAFETENSORS_NAMES[self.dtype(models)], self.ranks(models)
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for weight, module in self.modules(models).items():
            found[f"{module.name}.lora_A"] = dtype, (ranks[weight], math.prod(module.shape[1:]))
            found[f"{module.name}.lora_B"] = dtype, (module.shape[0], ranks[weight])
        entries = models.dense.reference.entries
        return found | {name: ("F32", entries[bias].shape) for bias, name in self.biases(models).items()}

    def writer(
        self, path: Path, models: Models, size: int | None, inputs: Iterable[str], more: Mapping[str, str]
    ) -> AdapterWriter:
        del size, inputs, more
        return AdapterWriter(self, path, models)

    def open(
        self,
        models: Models,
        size: int | None,
        stack: ExitStack,
        inputs: Iterable[str],
        more: Mapping[str, str],
    ) -> AdapterWriter:
        folder = stack.enter_context(whole_folder(self.path, (CARD,) if self.has_card else ()))
        return self.writer(folder, models, size, inputs, more)


def _adapters(models: Models) -> dict[str, AdaptedCheckpoint]:
    return {name: each for name, each in models.tuned.items() if isinstance(each, AdaptedCheckpoint)}


class AdapterWriter:
    """Cuts what is merged to factors of a low rank, and writes these when all are there."""

    def __init__(self, target: AdapterTarget, folder: Path, models: Models) -> None:
        self._target, self._folder, self._models = target, folder, models
        self._modules, self._ranks = target.modules(models), target.ranks(models)
        self._dtype, self._biases = target.dtype(models), target.biases(models)
        self._whole: dict[str, Tensor] = {}
        self._changes: dict[str, Change] = {}
        self._assembly = _Assembly(models.shapes, self._finish)
        self.size = target.size(models)
        """Bytes of the weights."""
        self.digest = ""
        """Of the weights; known when they are written."""
        self.tensors = 0
        self.parameters = 0

    @property
    def rank(self) -> int:
        """The largest of all modules."""
        return max((each.rank for each in self._changes.values()), default=0)

    @property
    def error(self) -> float:
        """|merged change - what the adapter has of it| / |merged change|, Frobenius norms of all tensors together."""
        return relative(self._changes.values())

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        self._assembly.write(name, data, start)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Writes the folder, with this metadata and what the cut has lost."""
        reference = self._models.dense.reference
        factors: dict[str, Factors] = {}
        for weight in reference.entries:
            change = self._changes.get(weight)
            if change is None or change.factors is None:
                continue
            module = self._modules[weight]
            left, right = (cast(each, SAFETENSORS_NAMES[self._dtype], weight) for each in change.factors)
            factors[module.name] = Factors(left, right, module.kind, module.shape[1:])
        kept = [change for change in self._changes.values() if change.factors]
        lost = {"error": f"{self.error:.6g}", "error_of_modules": f"{relative(kept):.6g}"}
        self.digest = write_adapter(
            self._folder, factors, reference, self._target.recipe.base, {**metadata, **lost}, self._whole
        )
        every = [each for name, own in factors.items() for each in own.tensors(name).values()]
        every += self._whole.values()
        self.tensors, self.parameters = len(every), sum(each.numel() for each in every)

    def _finish(self, name: str, merged: Tensor) -> None:
        models = self._models
        if isinstance(models, SpaceModels) and name in models.bases:
            left, right = models.lift(name, merged)
            self._changes[name] = refactored(left, right, self._target.recipe.rank, self._dtype)
            return
        before = models.dense.reference.read(name).float()
        delta = merged if isinstance(models, SpaceModels) else merged - before
        if name in self._biases:
            self._whole[self._biases[name]] = cast(before + delta, "F32", name)
            self._changes[name] = kept_whole(delta)
        elif name in self._modules:
            self._changes[name] = factored(delta.flatten(1), self._ranks[name], None, self._dtype)
        else:
            self._changes[name] = dropped(delta)
