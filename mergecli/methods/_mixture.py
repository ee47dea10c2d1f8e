"""Methods that write more than one tower: a small file with the towers of all tasks, or a tower that routes its inputs.

The file holds the weights that all tasks share under the tower's own names, and what tasks add to each of them under
keys that begin with one of the method's `prefixes`. Letters in shapes: T tasks, `...` a tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from mergecli.methods._base import Group, Method, expect_shape, merge_group

if TYPE_CHECKING:
    from torch import Tensor, nn

SAME = "same"
"""The dtype of the tower's own tensors, which the recipe may change."""

Read = Callable[[str], "Tensor"]
"""Key -> the tensor of the file."""

Routing = Literal["sample", "batch"]
"""Whether each image has weights of its own, or the images of a batch share the mean of their weights, as in the published
tables: there a batch holds images of one task only, which tells the model the task."""


class Part(NamedTuple):
    """One tensor of the file."""

    dtype: str
    """`same`, or a safetensors dtype such as `U8`."""
    shape: tuple[int, ...]
    packed: bool = False
    """Whether it is a row of bits for each task, eight entries of the tower's tensor a byte. Of a block of entries `expand`
    gives the bytes of these entries in each row."""


@dataclass(frozen=True)
class Mixture(Method):
    """What such methods share besides their kind: `expand` takes the place of `merge`."""

    elementwise = False
    prefixes: ClassVar[tuple[str, ...]] = ()
    """Beginnings of those keys of the file that are no names of a tower's tensors."""

    @property
    def is_mixture(self) -> bool:
        """Whether the method, as it is set, writes more than one tower."""
        return True

    @property
    def is_routed(self) -> bool:
        """Whether the method, as it is set, writes a tower that needs not be given the task."""
        return False

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        """Key -> tensor that is written for the tower's tensor `name`, itself included."""
        raise NotImplementedError

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        """Key -> further tensor that is written, for a tower with tensors of these names and shapes."""
        del tensors, tasks
        return {}

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        """The tensors of `parts`, floating point ones in float32; `learned` comes from a survey or from images."""
        raise NotImplementedError

    def values(self, learned: Any, /) -> dict[str, Tensor]:
        """The tensors of `extras`."""
        del learned
        return {}

    def measured_values(self, statistics: Any, tasks: int, /) -> dict[str, Tensor]:
        """Those of them that come from statistics, which methods of any kind may need."""
        del statistics, tasks
        return {}

    def refitted(self, tensors: Sequence[str], exact: Read, kept: Read, /) -> dict[str, Tensor]:
        """Key -> tensor of `extras` that was computed from what tasks add, and changes where that is quantized.

        Args:
            tensors: the tower's own names of those that are merged.
            exact: key -> the tensor as it was; `kept`: as it will be read.
        """
        del tensors, exact, kept
        return {}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        """(...) float32 weights of the tower's tensor `name` for task number `index`; of a tower that routes, those
        with routing weight 1 for that task and 0 for all others."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conditioned(Mixture):
    """Task-conditioned mixtures: every task has a tower of its own, computed from the file as it is read."""

    kind = "task-conditioned"
    besides: ClassVar[str] = ""
    """What a task's result comes from besides its tower, in a few words; empty if from nothing."""

    def correction(self, index: int, read: Read, /) -> Callable[[Tensor], Tensor] | None:
        """Corrects (B, D) unit image features of task number `index` before they are compared with classes; None if nothing does."""
        del index, read
        return None

    def head(self, index: int, read: Read, /) -> Callable[[Tensor], Tensor] | None:
        """Gives (B, C) logits for (B, D) unit image features of task number `index`; None if its zero-shot head does."""
        del index, read
        return None


class Installed(Protocol):
    """A tower whose layers route."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Key in the file -> parameter of the routers, which can be learned."""
        ...

    @property
    def keeps_batches_whole(self) -> bool:
        """Whether the features of an image depend on the others of its batch."""
        ...

    @property
    def chosen(self) -> Tensor | None:
        """(B,) the number of the task of each image in the last forward pass; None if layers or tokens decide."""
        ...

    def routes(self) -> Mapping[str, Tensor]:
        """Layer -> (B, T) routing weights of each image in the last forward pass, or (1, T) if the batch shared them."""
        ...

    def remove(self) -> None:
        """Puts the tower's own layers back."""
        ...


@dataclass(frozen=True)
class Routed(Mixture):
    """Mixtures that need not be given the task: they weigh the tasks for each image or token."""

    kind = "routed"
    own_tower: ClassVar[str] = "the tower that it computes when everything goes to the task"
    """What `weights` gives for a task, in a few words for metadata."""
    routes_batches: ClassVar[bool] = True
    """Whether routing by batches differs from routing by samples."""

    @property
    def is_routed(self) -> bool:
        return True

    @property
    def sends_on(self) -> bool:
        """Whether a first pass finds the weights of each image, through which it then goes in a second one."""
        return False

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        """Puts routing layers into a tower that has the shared weights already, on the tower's device and in its dtype.

        Args:
            prefix: with the tower's own name of a tensor behind it, that tensor's name in the file.
        """
        raise NotImplementedError

    def projection(self, installed: Installed, own: nn.Linear, read: Read, name: str, /) -> nn.Module | None:
        """What takes the place of the visual projection `own` behind the tower that routes; None where all images share that.

        Args:
            name: the projection's name in the file.
        """
        del installed, own, read, name
        return None

    def install_to_learn(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], prefix: str, /
    ) -> Installed:
        """The same while the routers are learned, which may be done by another routing than evaluation."""
        return self.install(tower, read, tasks, "sample", prefix)


def outcomes(method: Method, group: Group, learned: Any) -> dict[str, Tensor]:
    """Key -> tensor that a method of any kind makes of one group.

    Raises:
        UsageError: one has another shape than the method says.
    """
    if isinstance(method, Mixture) and method.is_mixture:
        found = method.expand(group, learned)
        for own in group.apart():
            for key, part in method.parts(own.name, tuple(own.shape), own.tasks).items():
                expect_shape(method, "expand", key, found.get(key), part.shape)
        return found
    return group.named(merge_group(method, group, learned))


def extra_values(method: Method, learned: Any, statistics: Any, tasks: int) -> dict[str, Tensor]:
    """Key -> further tensor that a method of any kind writes."""
    if not isinstance(method, Mixture) or not method.is_mixture:
        return {}
    return method.values(learned) | method.measured_values(statistics, tasks)
