"""Files that hold more than one tower: what their metadata says they are, checked, and the tower of each task."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.methods._bitmasks import ContradictionError
from mergecli.methods._mixture import SAME, Conditioned, Installed, Mixture, Part, Routed, Routing
from mergecli.methods._sim import FindsTask
from mergecli.runtime.errors import InputError, UsageError, did_you_mean, listed, quoted
from mergecli.storage.checkpoint import PROJECTION, VISION, Checkpoint
from mergecli.storage.differences import Form, differences
from mergecli.storage.lazy_checkpoint import BlockReader, LazyCheckpoint, lazy_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LEFT_OUT = "without"
"""In the metadata of one task's tower: what there is to the task besides."""
_HINT = "it is damaged, or not of this version: merge again"


@dataclass(frozen=True)
class OpenMixture:
    """A mixture whose tensors are known to be what its method writes."""

    stored: Checkpoint
    method: Mixture
    tasks: tuple[str, ...]
    shared: Checkpoint
    """The weights that all tasks share, under the tower's own names."""

    @property
    def is_routed(self) -> bool:
        """Whether one tower serves all tasks; else each has its own."""
        return self.method.is_routed

    @property
    def router(self) -> str | None:
        """What finds the task of an image, whose own tower it then goes through; None if nothing does."""
        return self.method.router if isinstance(self.method, FindsTask) else None

    @property
    def sends_on(self) -> bool:
        """Whether an image passes once to find its weights, and then through them."""
        return isinstance(self.method, Routed) and self.method.sends_on

    def routing(self, asked: Routing) -> Routing | None:
        """How it routes when it is asked to do so by samples or by batches; None if it is task-conditioned."""
        if not isinstance(self.method, Routed) or not self.method.is_routed:
            return None
        return asked if self.method.routes_batches else "sample"

    @property
    def task_parts(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the floating point tensors that tasks add to the shared ones: their task vectors, or parts of them."""
        return {
            key: part.shape
            for name, entry in self.shared.entries.items()
            if entry.is_float
            for key, part in self.method.parts(name, entry.shape, len(self.tasks)).items()
            if key != name and self.stored.entries[key].is_float
        }

    def of_task(self, task: str) -> Checkpoint:
        """One task's tower, computed as it is read; of a tower that routes, what a routing weight of 1 for that
        task alone gives: the method's `own_tower` says what that is.

        Raises:
            InputError: there is none.
        """
        if task not in self.tasks:
            raise InputError(
                f"{self.stored.path}: has no tower for `{task}`{did_you_mean(task, self.tasks)}",
                f"it holds towers for {', '.join(self.tasks)}",
            )
        index = self.tasks.index(task)
        readers = {
            name: _reader(self, name, index) for name, entry in self.shared.entries.items() if entry.is_float
        }
        kept = {
            key: self.stored.metadata[key]
            for key in ("format", "mergecli", "method", "recipe", "inputs", "quantized")
            if key in self.stored.metadata
        }
        if isinstance(self.method, Routed) and self.method.is_routed:
            kept["tower"] = self.method.own_tower
        if isinstance(self.method, Conditioned) and self.method.besides:
            kept[LEFT_OUT] = self.method.besides
        about = {**kept, "kind": "checkpoint", "task": task}
        return lazy_checkpoint(self.shared, readers, dtype="float32", metadata=about, stored=self.shared)

    @property
    def has_heads(self) -> bool:
        """Whether tasks have heads of their own, which take the place of zero-shot heads."""
        return isinstance(self.method, Conditioned) and type(self.method).head is not Conditioned.head

    def install(self, tower: nn.Module, routing: Routing) -> Installed:
        """Puts the routing layers into a tower that has the shared weights already.

        Raises:
            InputError: the file's masks are not those of the values beside them.
        """
        assert isinstance(self.method, Routed)
        assert self.method.is_routed
        with self._named():
            return self.method.install(tower, self.stored.read, self.tasks, routing, VISION)

    @contextmanager
    def _named(self) -> Generator[None]:
        """Errors of reading the tensors name the file."""
        try:
            yield
        except ContradictionError as error:
            raise InputError(f"{self.stored.path}: {error}", _HINT) from error

    def project(self, model: Any, installed: Installed) -> nn.Linear | None:
        """Where each image has a visual projection of its own, puts these in the place of the model's, behind the tower in
        which the routing layers are; gives back what was there, None where it still is."""
        own = getattr(model, "visual_projection", None)
        if own is None or PROJECTION not in self.shared.entries:
            return None
        assert isinstance(self.method, Routed)
        found = self.method.projection(installed, own, self.stored.read, PROJECTION)
        if found is None:
            return None
        model.visual_projection = found
        return own

    def weights(self, name: str, index: int) -> Tensor:
        """(...) float32 weights of one tensor for task number `index`; raises InputError as `install` does."""
        with self._named():
            return self.method.weights(name, index, self.stored.read)

    def correction(self, task: str, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        """What changes the (B, D) unit image features of a task."""
        if not isinstance(self.method, Conditioned):
            return None
        return self.method.correction(self.tasks.index(task), lambda key: self.stored.read(key).to(device))

    def head(self, task: str, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        """What gives the logits of a task for (B, D) unit image features; None if its zero-shot head does."""
        if not isinstance(self.method, Conditioned):
            return None
        return self.method.head(self.tasks.index(task), lambda key: self.stored.read(key).to(device))

    def expect_classes(self, task: str, digests: Mapping[str, str]) -> None:
        """Raises InputError if the file has a head for a task, and it began with other class names or prompts.

        Args:
            digests: of `classes` and of `templates`.
        """
        import torch

        if self.head(task, torch.device("cpu")) is None:
            return
        try:
            known = json.loads(self.stored.metadata["adapted_on"])[task]
            other = [key for key, digest in digests.items() if known[key] != digest]
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.stored.path}: does not say for which classes its head for `{task}` is", _HINT
            ) from error
        if other:
            words = {"classes": "class names", "templates": "prompts"}
            raise InputError(
                f"{self.stored.path}: its head for `{task}` was learned for other {words[other[0]]} than the task has now",
                "evaluate with those that it was merged with, or merge again",
            )


def mixture_of(stored: Checkpoint) -> OpenMixture:
    """The mixture in an open file.

    Raises:
        InputError: the metadata is not that of a mixture, or the tensors are not those that it asks for.
    """
    try:
        name, tasks = stored.metadata["method"], json.loads(stored.metadata["tasks"])
        settings: Any = json.loads(stored.metadata["settings_table"])
        method = methods.create(name, settings)
        if not isinstance(method, Mixture) or not method.is_mixture:
            raise ValueError(name)
        if not isinstance(tasks, list) or not tasks or len({str(task) for task in tasks}) != len(tasks):
            raise ValueError(tasks)
        if not all(isinstance(task, str) for task in tasks):
            raise ValueError(tasks)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        UsageError,
    ) as error:
        why = f": {error.message}" if isinstance(error, UsageError) else ""
        raise InputError(f"{stored.path}: its metadata is not that of a mixture{why}", _HINT) from error
    own = _own_names(stored, method, len(tasks))
    shared = replace(stored, entries={key: stored.entries[key] for key in own}, hashes=stored.hashes.anew())
    if isinstance(shared, LazyCheckpoint):
        shared = replace(shared, stored=None)  # its size is that of its own tensors
    return OpenMixture(stored, method, tuple(tasks), shared)


def _own_names(stored: Checkpoint, method: Mixture, tasks: int) -> list[str]:
    """The names of the shared tensors, once it is known that every tensor of the file is what it should be."""
    shapes = {name: entry.shape for name, entry in stored.entries.items()}
    extras = {key for key in shapes if key.startswith(methods.key_prefixes())}
    own = [name for name in shapes if name not in extras]
    floats = {name: shapes[name] for name in own if stored.entries[name].is_float}
    parts: dict[str, Part] = {}
    for name, shape in floats.items():
        parts |= method.parts(name, shape, tasks)
    parts |= method.extras(floats, tasks)
    want = {
        key: Form(part.shape, "a float", any_float=True)
        if part.dtype == SAME
        else Form(part.shape, part.dtype)
        for key, part in parts.items()
    }
    have = {key: stored.entries[key] for key in shapes if key in extras or key in floats}
    wrong = differences(have, want)
    if not floats:
        wrong.append("has no tensors that all tasks share")
    if wrong:
        raise InputError(
            f"{stored.path}: is not what its metadata says, `{methods.name_of(method)}` of {tasks} tasks:\n{listed(wrong)}",
            _HINT,
        )
    return own


def check_names(names: Iterable[str], whose: Path) -> None:
    """Raises InputError if a tower has tensors whose names a mixture has for others."""
    prefixes = methods.key_prefixes()
    if taken := [name for name in names if name.startswith(prefixes)]:
        raise InputError(
            f"{whose}: {quoted(taken)}: expected names that do not begin as a mixture's own tensors do",
            f"those begin with {quoted(prefixes)}: rename the tensors, or choose a method that writes one tower",
        )


def _reader(mixture: OpenMixture, name: str, index: int) -> BlockReader:
    """Computes the tensor when a part of it is asked for, and keeps it until all of it has been."""

    @lru_cache(maxsize=1)
    def whole() -> Tensor:
        return mixture.weights(name, index).reshape(-1)

    def read(start: int, stop: int, into: Tensor) -> None:
        values = whole()
        into.copy_(values[start:stop])
        if stop == len(values):
            whole.cache_clear()

    return read


def routed(stored: Checkpoint) -> OpenMixture:
    """The mixture in an open file; raises InputError unless it routes."""
    mixture = mixture_of(stored)
    if not mixture.is_routed:
        one_tower(stored)
    return mixture


def install_routing(stored: Checkpoint, tower: nn.Module, whole: nn.Module | None = None) -> None:
    """Puts a file's routing layers into a tower that has the shared weights, and behind it in a whole CLIP; each image routes
    by itself."""
    mixture = routed(stored)
    installed = mixture.install(tower, "sample")
    setattr(tower, _ROUTING, installed)
    mixture.project(whole, installed)


def has_routing(module: nn.Module) -> bool:
    """Whether routing layers were put into a tower, or into one that is part of the module."""
    return any(hasattr(part, _ROUTING) for part in module.modules())


_ROUTING = "mergecli_routing"
"""The attribute of a tower that has its `Installed` routing layers."""


def one_tower(opened: Checkpoint) -> Checkpoint:
    """The image encoder of a checkpoint; raises InputError if it holds more than one."""
    if not opened.is_mixture:
        return opened.encoder()
    tasks = list(mixture_of(opened).tasks)
    shown = ", ".join(tasks[:4]) + (f" and {len(tasks) - 4} more" if len(tasks) > 4 else "")
    raise InputError(
        f"{opened.path}: holds towers for {shown}, and one tower is needed",
        f"name one as `{opened.path}#{tasks[0]}`",
    )
