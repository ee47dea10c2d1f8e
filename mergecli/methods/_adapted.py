"""Methods that learn their coefficients or masks on images without labels: AdaMerging, Concrete.

A gradient with respect to a coefficient is the inner product of the gradient with respect to the merged weights with
the task vector. So the weights are merged in place, one ordinary backward pass is run, and inner products are taken: no
graph ever goes through the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from mergecli.methods._base import Group, Groups, Looking
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
"""Everything that changes from step to step, by name: what is learnt, and its optimiser's moments."""

Change = Callable[[], None]
"""What changes a state in place. It only adds what a step has computed, so that a step is done whole or not at all."""

BLOCK = 1 << 14
"""Entries of task vectors in bfloat16 that are made float32 at a time, few enough for a processor's cache."""

UNSAVED = "unsaved."
"""Keys of a state that begin so can be made again, and are left out of files."""


class Trial(Protocol):
    """What an adapted method may see: weights, images without labels, and what a merged model makes of them."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks of the models, in order: T."""
        ...

    @property
    def base(self) -> Mapping[str, Tensor]:
        """Name -> (...) weights of the base, float32."""
        ...

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """Name -> (T, ...) task vectors as the method prepared them, perhaps in bfloat16. Where they are held elsewhere
        than the weights, each look at them is a copy: only one tensor's should be kept at a time."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Name -> (...) the merged model's weights, which the method overwrites."""
        ...

    def slopes(self, draw: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(T,) mean entropy of the predictions for batch number `draw` of every task (0 for tasks that are not looked
        at), and name -> (...) gradient of their sum with respect to the weights, which may be overwritten. Where
        several processes share the tasks, the gradient is of this process's own: `total` makes one of what is computed
        from it."""
        ...

    def given(self, key: str) -> Tensor:
        """(...) a tensor of the file of masks that the method's setting `masks` names."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """(...) the sum over all processes, added in the order of their ranks; the tensor itself if there is one."""
        ...

    def routes(self) -> Tensor:
        """(T,) the mean routing weights in the last step, of towers that route."""
        ...

    def uniform(self, name: str, label: str) -> Tensor:
        """(...) random numbers in [0, 1) for the entries of a tensor; the same as a group's `drawn(label)`."""
        ...


@dataclass(frozen=True)
class Learnt:
    """What a method has learnt, as it stands in a file: named tensors, and the settings that they were learnt with."""

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    """The merged tensors; the columns of tensors that have one."""
    tensors: Mapping[str, Tensor]
    seed: int
    """What random masks are drawn from."""
    read: Callable[[str, int, int], Tensor]
    """`read(key, first entry, end)` gives (n,) entries of a tensor that is too large to be held."""


@dataclass(frozen=True)
class Adapted(Looking):
    """What methods share that adapt first; what they learnt is kept as a file and can be applied without images."""

    looks_at: ClassVar[str] = "unlabelled images of every task"
    late: ClassVar[frozenset[str]] = frozenset()
    unrecorded: ClassVar[frozenset[str]] = frozenset({"vectors_on"})
    applied: ClassVar[frozenset[str]] = frozenset()
    """Settings that may be others than those it was learnt with when what was learnt is applied."""
    unlearnt: ClassVar[frozenset[str]] = frozenset()
    """Those of them that change nothing that is learnt: what was learnt once serves all their values."""
    one_shown: ClassVar[str] = ""
    """What `shown` gives, where it is one number and not a coefficient of each task."""

    learning_rate: Annotated[float, Range(0)] = 1e-3
    """Of Adam."""
    batch_size: Annotated[int, Range(1)] = 16
    """Images of each task in a step."""
    split: Literal["test", "train", "validation"] = "test"
    """Whose images are looked at, without their labels: those that the result is evaluated on, as in the published
    tables, or others, which is the honest choice."""
    adapt_on: tuple[str, ...] = ()
    """The tasks whose images are looked at; all by default."""
    patience: Annotated[int, Range(0)] = 0
    """Stop when the mean entropy over so many steps is no lower than over as many before, or of a method that learns one
    thing after another go on to the next; 0 never stops early."""
    vectors: Literal["float32", "bfloat16"] = "float32"
    """The dtype in which AdaMerging and Concrete hold the task vectors while adapting: `bfloat16` halves their T towers. The
    merge itself takes them as they are."""
    vectors_on: Literal["cpu"] | None = None
    """Where they hold them: on the device, or with `cpu` in the machine's own memory, from which each tensor's are copied when
    they are needed; that is slower, and gives the same numbers."""

    @property
    def phases(self) -> tuple[int, ...]:
        """Steps at most of each thing that is learnt after another; `step` counts them through."""
        raise NotImplementedError

    @property
    def total_steps(self) -> int:
        """Steps at most of all phases together."""
        return sum(self.phases)

    def survey(self, groups: Groups, /) -> State:
        """What `prepared` needs to know of the whole models; kept with what is learnt."""
        del groups
        return {}

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        """(T, ...) the task vectors that are combined."""
        del surveyed
        return group.deltas

    def begin(self, trial: Trial, /) -> State:
        """The state before the first step."""
        raise NotImplementedError

    def step(self, trial: Trial, state: State, number: int, /) -> tuple[Tensor, Change]:
        """(T,) mean entropies of step `number`, from 0, and what it changes in the state."""
        raise NotImplementedError

    def finish(self, trial: Trial, state: State, /) -> State:
        """What is kept of the state after the last step."""
        raise NotImplementedError

    def renewed(self, learnt: Learnt, tensors: Mapping[str, tuple[int, ...]], /) -> State:
        """What is kept besides the learning itself, made anew because settings of `applied` are others."""
        del learnt, tensors
        return {}

    def shapes(self, tasks: int, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Key -> shape of what is kept of the learning on merged tensors of these names and shapes."""
        raise NotImplementedError

    def shown(self, state: State, /) -> Tensor:
        """(T,) or (1,) what tells how far it has come: each task's coefficient, or the mean of them, or `one_shown`."""
        raise NotImplementedError


def entropy(logits: Tensor) -> Tensor:
    """() mean over (B, C) logits of the entropy of the predictions (Yang et al., AdaMerging, equation 4)."""
    chances = logits.softmax(1)
    return -(chances * (chances + 1e-8).log()).sum(1).mean()


def inner(slope: Tensor, deltas: Tensor) -> Tensor:
    """(T,) inner products of a (...) gradient with (T, ...) task vectors."""
    import torch

    products = [torch.mv(rows, part) for part, rows in _blocks(slope, deltas)]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def combine(deltas: Tensor, coefficients: Tensor, out: Tensor) -> Tensor:
    """(...) sum_i c_i delta_i of (T, ...) task vectors, written into `out`, which is contiguous."""
    import torch

    for part, rows in _blocks(out, deltas):
        torch.mv(rows.T, coefficients, out=part)
    return out


def _blocks(tensor: Tensor, deltas: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of a tensor's entries, and the (T, n) entries of the task vectors there in float32."""
    import torch

    flat, rows = tensor.reshape(-1), deltas.reshape(len(deltas), -1)
    size = BLOCK if rows.is_cpu and rows.dtype != torch.float32 else max(len(flat), 1)
    for start in range(0, max(len(flat), 1), size):
        yield flat[start : start + size], rows[:, start : start + size].float()
