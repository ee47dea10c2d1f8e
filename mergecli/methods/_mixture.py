"""Methods whose result is more than one tower: towers of all tasks in one small file, or a tower that routes its inputs.

The file holds the weights that all tasks share under the tower's own names, and beside each what tasks add to it, under
keys that begin otherwise. Letters in shapes: T tasks, `...` a tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from mergecli.methods._base import Group, Method, merge_group

if TYPE_CHECKING:
    from torch import Tensor, nn

SAME = "same"
"""The dtype of the tower's own tensors, which the recipe may change."""

Read = Callable[[str], "Tensor"]
"""Key -> the tensor, as it stands in the file."""

Routing = Literal["sample", "batch"]
"""Whether each image has weights of its own, or a batch's images share the mean of them, as in the published tables: then
images of one batch tell each other which task they are from."""


class Part(NamedTuple):
    """One tensor of the file."""

    dtype: str
    """`same`, or a safetensors dtype such as `U8`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Mixture(Method):
    """What such methods share, beside their kind: `expand` takes the place of `merge`."""

    elementwise = False
    prefixes: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the file's keys that are no names of a tower's tensors."""

    @property
    def is_mixture(self) -> bool:
        """Whether the method, as it is set, writes more than one tower."""
        return True

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        """Key -> what is written for the tower's tensor `name`, itself included."""
        raise NotImplementedError

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        """Key -> what is written beside, for a tower with tensors of these names and shapes."""
        del tensors, tasks
        return {}

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        """The tensors of `parts`, floating point ones in float32; `learned` is what a survey or images taught."""
        raise NotImplementedError

    def values(self, learned: Any, /) -> dict[str, Tensor]:
        """The tensors of `extras`."""
        del learned
        return {}

    def weights(self, name: str, place: int, read: Read, /) -> Tensor:
        """(...) float32 weights of the tower's tensor `name` for task number `place`; of a tower that routes, those that
        a routing weight of 1 for that task alone gives."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conditioned(Mixture):
    """Mixtures that must be told the task: each has a tower of its own, computed from the file as it is read."""

    def correction(self, place: int, read: Read, /) -> Callable[[Tensor], Tensor] | None:
        """What changes (B, D) unit image features of task number `place` before they are compared with classes."""
        del place, read
        return None


class Installed(Protocol):
    """A tower whose layers route."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Key in the file -> what decides the routing, and can be learned."""
        ...

    @property
    def keeps_batches_whole(self) -> bool:
        """Whether what is made of an image depends on the others of its batch."""
        ...

    def routes(self) -> Mapping[str, Tensor]:
        """Layer -> (B, T) weights that the last forward pass gave each image, or (1, T) if its batch shared them."""
        ...

    def remove(self) -> None:
        """Puts the tower's own layers back."""
        ...


@dataclass(frozen=True)
class Routed(Mixture):
    """Mixtures that find out the task, or what is best for an image or token, by themselves."""

    own_tower: ClassVar[str] = "the tower that it computes when everything goes to the task"
    """What `weights` gives for a task, in a few words."""
    routes_batches: ClassVar[bool] = True
    """Whether routing by batches differs from routing by samples."""

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        """Puts routing layers into a tower that has the shared weights already; `prefix` and the tower's own name of a
        tensor make its name in the file. What is read is moved to the tower's device and dtype."""
        raise NotImplementedError

    def install_to_learn(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], prefix: str, /
    ) -> Installed:
        """The same while the routers are learned, which may be done by another routing than evaluation."""
        return self.install(tower, read, tasks, "sample", prefix)


def outcomes(method: Method, group: Group, learned: Any) -> dict[str, Tensor]:
    """Key -> what a method of any kind makes of one group."""
    if isinstance(method, Mixture) and method.is_mixture:
        return method.expand(group, learned)
    return {group.name: merge_group(method, group, learned)}


def extra_values(method: Method, learned: Any) -> dict[str, Tensor]:
    """Key -> what a method of any kind writes beside what it makes of groups."""
    return method.values(learned) if isinstance(method, Mixture) and method.is_mixture else {}
