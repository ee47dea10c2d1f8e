"""Where a merge goes: the file or folder, its tensors, and its metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from mergecli import methods
from mergecli.formats.mixture import check_names
from mergecli.formats.projection import foreign_projection
from mergecli.merging.models import Models
from mergecli.methods._base import Method
from mergecli.methods._fused import stacks
from mergecli.methods._layers import Place, UnmatchedError, by_tensor, places
from mergecli.methods._mixture import SAME, Mixture
from mergecli.recipe.schema import Recipe, recipe_text
from mergecli.results.card import check_card
from mergecli.results.card_file import CARD
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.atomic import check_target, whole_folder
from mergecli.storage.checkpoint import MIXTURE
from mergecli.storage.metadata import UNKNOWN_DIGEST, about, inputs_of, model_folder_files
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES, TORCH_NAMES, layout_size
from mergecli.storage.safetensors_writer import SafetensorsWriter, ShardedWriter
from mergecli.storage.sources import Source

if TYPE_CHECKING:
    from torch import Tensor


class ModelWriter(Protocol):
    """Writes what is merged."""

    size: int
    """Bytes of the output."""

    @property
    def digest(self) -> str:
        """Of the content; known when all is written."""
        ...

    def write(self, name: str, data: Tensor, start: int = 0, /) -> None:
        """Takes entries of a tensor from `start` on; from any thread."""
        ...

    def describe(self, metadata: Mapping[str, str], /) -> None:
        """Takes the metadata, of the length that was planned, when all is merged."""
        ...


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
    digest: str = ""
    """Of the content, as `info` shows it; empty in processes that write nothing."""
    warnings: tuple[str, ...] = ()
    card: Path | None = None
    """The model card, if one was written."""
    state: Path | None = None
    """What the next step of a chain needs, if one was written."""
    rank: int | None = None
    """Of an adapter: the largest of its modules."""
    error: float | None = None
    """Of an adapter: |merged change - what it has of it| / |merged change|, Frobenius norms."""


@dataclass(frozen=True)
class MergeTarget:
    """What one merge writes: by which method and recipe, to which file or folder."""

    method: Method
    recipe: Recipe
    path: Path
    has_card: bool = False
    """Whether a model card is written too."""
    places: Mapping[str, Place] = field(default_factory=dict[str, Place])
    """Tensor -> where it stands among the method's settings by layer; empty if there are none."""
    kind: ClassVar[str] = "checkpoint"
    """Of the file, where it holds one tower."""

    @classmethod
    def of(cls, recipe: Recipe, path: Path, card: bool | None = None) -> MergeTarget:
        """By default, a folder gets a `card` and a file none.

        Raises UsageError if the recipe names no method, the path's suffix does not say what it is, or a card that is there
        would lose what its owner wrote.
        """
        method = recipe.built
        if path.suffix not in ("", ".safetensors"):
            raise UsageError(f"{path}: expected a `.safetensors` file, or a folder's name without suffix")
        if not path.suffix and isinstance(method, Mixture) and method.is_mixture:
            raise UsageError(
                f"{path}: `{recipe.method}` writes more than one tower, which transformers would not find in a folder",
                "name a `.safetensors` file",
            )
        check_target(path, folder=not path.suffix)
        has_card = not path.suffix if card is None else card
        if has_card:
            check_card(path)
        return cls(method, recipe, path, has_card)

    @property
    def sources(self) -> list[Source]:
        """What is merged."""
        return [*([self.recipe.base] if self.recipe.base else []), *self.recipe.tuned.values()]

    def layout(self, models: Models) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype and shape of what is written."""
        wanted, entries = SAFETENSORS_NAMES.get(self.recipe.dtype), models.reference.entries
        own = {name: wanted if wanted and entry.is_float else entry.dtype for name, entry in entries.items()}
        found = {name: (own[name], entry.shape) for name, entry in entries.items()}
        if not isinstance(self.method, Mixture) or not self.method.is_mixture:
            return found
        tasks, shapes = len(models.tuned), models.shapes
        for name, shape in shapes.items():
            for key, part in self.method.parts(name, shape, tasks).items():
                found[key] = (own[name] if part.dtype == SAME else part.dtype, part.shape)
        for key, part in self.method.extras(shapes, tasks).items():
            found[key] = (part.dtype, part.shape)
        return found

    def computed(self, models: Models) -> dict[str, str]:
        """Name -> dtype of what the method gives, for the writer."""
        return {name: dtype for name, (dtype, _) in self.layout(models).items()}

    def packed(self, models: Models) -> dict[str, int]:
        """Name -> bytes of a row, of what is packed."""
        if not isinstance(self.method, Mixture) or not self.method.is_mixture:
            return {}
        tasks = len(models.tuned)
        parts = [self.method.parts(name, shape, tasks) for name, shape in models.shapes.items()]
        return {key: part.shape[1] for each in parts for key, part in each.items() if part.packed}

    def size(self, models: Models) -> int:
        """Bytes of what is written."""
        return layout_size(self.layout(models))

    @cached_property
    def merged_by(self) -> Mapping[str, Method]:
        """Tensor -> the method with its settings there; empty where all tensors have the same."""
        return by_tensor(self.method, self.places)

    @property
    def every_method(self) -> list[Method]:
        """What merges tensors, each with its settings."""
        return list({id(each): each for each in self.merged_by.values()}.values()) or [self.method]

    def fitted(self, models: Models) -> MergeTarget:
        """The same for these models, whose tensors it is known to fit.

        Raises:
            UsageError: no tensor belongs to one of the method's settings by layer.
            InputError: the method writes more than one tower, and cannot from tensors of these names.
        """
        self._check(models)
        if not self.method.layers:
            return self
        where = f"{self.recipe.path}: " if self.recipe.path else ""
        try:
            found = replace(self, places=places(self.method.layers, models.floats))
        except UnmatchedError as error:
            raise UsageError(
                f"{where}`method.layers[{error.line}].match`: {error}",
                "`mergecli info BASE --keys` lists the tensors",
            ) from error
        for name, members in stacks(models.shapes):
            several = {id(found.merged_by[each]): found.merged_by[each] for each in members}
            if len(several) > 1 and any(each.fuses for each in several.values()):
                raise UsageError(
                    f"{where}`method.layers`: `{self.recipe.method}` merges queries, keys and values as one matrix, "
                    f"and those of `{name}` have other settings each",
                    "match all three, or set `fuse_qkv = false` for them",
                )
        return found

    def _check(self, models: Models) -> None:
        if not isinstance(self.method, Mixture) or not self.method.is_mixture:
            return
        entries, path = models.reference.entries, models.reference.path
        check_names(entries, path)
        if self.layout(models).keys() == entries.keys():
            raise InputError(
                f"{path}: expected tensors that `{self.recipe.method}` has experts for, got none",
                f"`mergecli methods {self.recipe.method}` says which those are",
            )

    def metadata(self, digests: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
        """The file's metadata."""
        kind, settings = self.kind, methods.recipe_table(self.method)
        if isinstance(self.method, Mixture) and self.method.is_mixture:
            kind = MIXTURE
            more = {
                **more,
                "tasks": json.dumps(list(self.recipe.tuned)),
                "settings_table": json.dumps(settings),
            }
        if self.recipe.space:
            more = {**more, "space": self.recipe.space}
        return about(
            kind,
            method=str(self.recipe.method),
            recipe=recipe_text(self.recipe, self.recipe.method, settings),
            inputs=digests,
            **more,
        )

    def writer(
        self, path: Path, models: Models, size: int | None, inputs: Iterable[str], more: Mapping[str, str]
    ) -> ModelWriter:
        """What writes the weights to the file or folder `path`; nothing is written yet."""
        return self._writer(path, models, size, inputs, more)

    def _writer(
        self, path: Path, models: Models, size: int | None, inputs: Iterable[str], more: Mapping[str, str]
    ) -> SafetensorsWriter | ShardedWriter:
        layout, placeholder = self.layout(models), self.metadata(dict.fromkeys(inputs, UNKNOWN_DIGEST), more)
        if not self.path.suffix and size:
            return ShardedWriter(path, layout, placeholder, size)
        return SafetensorsWriter(
            path if self.path.suffix else path / "model.safetensors", layout, placeholder
        )

    def open(
        self,
        models: Models,
        size: int | None,
        stack: ExitStack,
        inputs: Iterable[str],
        more: Mapping[str, str],
    ) -> ModelWriter:
        """The writer, to which copied tensors are written already; the file is whole when `stack` ends."""
        path = self.path
        if not path.suffix:
            path = stack.enter_context(whole_folder(self.path, (CARD,) if self.has_card else ()))
            reference = models.reference
            files = model_folder_files(reference.path, has_projection=reference.has_projection)
            for name, text in files.items():
                (path / name).write_text(text, encoding="utf-8")
        writer = stack.enter_context(self._writer(path, models, size, inputs, more))
        for name in models.others:
            writer.write(name, models.reference.read(name))
        return writer


def foreign_vectors(models: Models, digests: Mapping[str, str]) -> Iterator[str]:
    """A warning for each task vector that was made from another base than the one it is added to."""
    for name, each in models.tuned.items():
        origin, base = inputs_of(each.metadata).get("base"), digests.get("base")
        if each.is_task_vector and origin and base and origin != base:
            yield f"{each.path}: `{name}` is a task vector of another base ({origin}) than {base}"
        elif each.is_task_vector and (foreign := foreign_projection(each.metadata, models.base)):
            yield f"{each.path}: `{name}` is a task vector of another base: {foreign}"


def same_weights(names: Iterable[str], digests: Mapping[str, str]) -> Iterator[str]:
    """A warning for each of these models that has the weights of the base, or of a model before it."""
    first = {digests["base"]: "the base"} if "base" in digests else {}
    for name in names:
        other = first.setdefault(digests[name], name)
        if other == "the base":
            yield f"`{name}` has the weights of the base: its task vector is zero"
        elif other != name:
            yield f"`{name}` has the weights of `{other}`: they count twice"


def cast(
    result: Tensor,
    dtype: str,
    name: str,
    what: str = "merged values",
    cure: str = "use smaller settings, or `--set dtype=float32`",
) -> Tensor:
    """(...) the tensor in a safetensors dtype, on the CPU.

    Raises:
        InputError: a value does not fit.
    """
    import torch

    cast = result.to("cpu", getattr(torch, TORCH_NAMES[dtype]))
    if not math.isfinite(float(cast.sum(dtype=torch.float32))) and not bool(cast.isfinite().all()):
        raise InputError(f"`{name}`: the {what} do not fit {TORCH_NAMES[dtype]}", cure)
    return cast
