"""Methods that learn coefficients, masks or routers by descent, on images without labels.

A gradient with respect to a coefficient is the inner product of the gradient with respect to the merged weights with
the task vector. So the weights are merged in place, one ordinary backward pass is run, and inner products are taken: no
graph ever goes through the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from mergecli.methods._base import Group, Groups
from mergecli.methods._learned import Learner, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[], None]
"""Applies what a step has computed to a state, in place. A step that is interrupted before has changed nothing."""

BLOCK = 1 << 14
"""Entries of task vectors in bfloat16 that are made float32 at a time, few enough for a processor's cache."""

UNSAVED = "unsaved."
"""Beginning of keys of a state that can be computed again, and are left out of files."""


class Objective(Protocol):
    """What a method that adapts sees: weights, and the loss of a merged model on images without labels."""

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
        """Name -> (T, ...) task vectors as the method prepared them, perhaps in bfloat16.

        Where they are in main memory and the weights on another device, reading one copies it: keep only one at a time.
        """
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Name -> (...) the merged model's weights, which the method overwrites."""
        ...

    @property
    def heads(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Place of each task that is looked at -> (C, D) weights and (C,) biases of its head, which the method overwrites: at
        first those of the zero-shot head, with the logit scale in it. Empty unless the method `learns_heads`."""
        ...

    def order(self, number: int) -> list[int]:
        """The places of the tasks that are looked at, in an order that is drawn for round `number`."""
        ...

    def losses_and_gradients(
        self, batch: int, places: Sequence[int] | None = None, factors: Tensor | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(T,) mean loss of the predictions on batch number `batch` of every task, or of those in some places (0 for tasks that
        are not looked at), and name -> (...) gradient of their sum with respect to the weights, which may be overwritten; with
        (T,) `factors` that of the sum of each loss times the factor of its task.

        Where several processes share the tasks, the gradient is that of this process's tasks: `total` sums what is
        computed from it.
        """
        ...

    def head_gradients(self, place: int) -> tuple[Tensor, Tensor]:
        """(C, D) and (C,) the same with respect to the head of a task, summed over all processes."""
        ...

    def mask(self, key: str) -> Tensor:
        """(...) a tensor of the file of masks that the setting `masks` names, for methods that need it."""
        ...

    def total(self, tensor: Tensor) -> Tensor:
        """(...) the sum over all processes, added in the order of their ranks; the tensor itself if there is one."""
        ...

    def routes(self) -> Tensor:
        """(T,) mean routing weights in the last step, of a tower that routes."""
        ...

    def drawn(self, label: str, count: int) -> Tensor:
        """(count,) random numbers in [0, 1) that depend on the seed and the label, on the CPU."""
        ...

    def uniform(self, name: str, label: str) -> Tensor:
        """(...) random numbers in [0, 1) for the entries of a tensor; the same as a group's `drawn(label)`."""
        ...


@dataclass(frozen=True)
class Adapted(Learner):
    """Methods that adapt the merged model by steps of descent, on images of all tasks at once."""

    kind = "test-time"
    looks_at: ClassVar[str] = "unlabeled images of every task"
    needs_head = True
    not_recorded: ClassVar[frozenset[str]] = frozenset({"vectors_on"})
    trace_column: ClassVar[str] = ""
    """What `traced` gives, where it is one number and not a coefficient of each task."""
    learns_heads: ClassVar[bool] = False
    """Whether the heads of the tasks are learned too."""

    objective: Literal["entropy", "experts"] = "entropy"
    """What is made small: the entropy of the predictions, as published, or with `experts` their cross-entropy to what the
    task's own model predicts, without the images on which the merged model differs and is surer (SyMerge). Entropy can
    end in one class for all images where the merged model is mostly wrong; the experts' labels cannot."""
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
    """Stop when the mean loss over this many steps is no lower than over as many before; a method that learns one
    thing after another goes on to the next. 0 never stops early."""
    vectors: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the task vectors in memory while adapting, of methods that hold them: `bfloat16` halves their T
    towers. The merge itself takes them as they are."""
    vectors_on: Literal["cpu"] | None = None
    """Where those task vectors are: on the device, or with `cpu` in main memory, from which each tensor is copied when
    it is needed; that is slower, and gives the same numbers."""

    @property
    def loss(self) -> tuple[str, str]:
        return "entropy" if self.objective == "entropy" else "cross-entropy", "trace.entropies"

    @property
    def phases(self) -> tuple[int, ...]:
        """The most steps of each phase, such as a mask and then coefficients; `step` numbers them through all phases."""
        raise NotImplementedError

    @property
    def total_steps(self) -> int:
        """Steps at most of all phases together."""
        return sum(self.phases)

    def survey(self, groups: Groups, /) -> State:
        """What `prepared` needs to know of the whole models; it is written to the file."""
        del groups
        return {}

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        """(T, ...) the task vectors that are combined."""
        del surveyed
        return group.deltas

    def begin(self, objective: Objective, /) -> State:
        """The state before the first step."""
        raise NotImplementedError

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        """(T,) mean losses of step `number`, from 0, and the change of the state."""
        raise NotImplementedError

    def finish(self, objective: Objective, state: State, /) -> State:
        """The tensors of the file, from the state after the last step."""
        raise NotImplementedError

    def traced(self, state: State, /) -> Tensor:
        """(T,) or (1,) what the trace records of a state: each task's mean coefficient, or `trace_column`."""
        raise NotImplementedError


def entropy(logits: Tensor) -> Tensor:
    """() mean over (B, C) logits of the entropy of the predictions (Yang et al., AdaMerging, equation 4)."""
    probabilities = logits.softmax(1)
    return -(probabilities * (probabilities + 1e-8).log()).sum(1).mean()


def expert_loss(logits: Tensor, labels: Tensor, confidences: Tensor) -> Tensor:
    """() mean cross-entropy of (B, C) logits to the (B,) classes that an expert predicts with (B,) probabilities, over the
    images on which the merged model predicts the same or is no surer; 0 without gradient where there is none.

    Jung et al., SyMerge, ICML 2026, arXiv 2412.19098. Their code takes the mean of nothing, whose gradient is 0 too.
    """
    import torch

    with torch.no_grad():
        probability, predicted = logits.softmax(1).max(1)
        kept = (predicted == labels) | (confidences >= probability)
    if not bool(kept.any()):
        return 0.0 * logits.sum()
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept])


def inner(gradient: Tensor, deltas: Tensor) -> Tensor:
    """(T,) inner products of a (...) gradient with (T, ...) task vectors."""
    import torch

    products = [torch.mv(rows, part) for part, rows in _blocks(gradient, deltas)]
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
