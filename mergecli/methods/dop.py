"""DOP: the merge so far and a new model are balanced by what each of them changed, from the left and from the right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam
from mergecli.methods._base import Group, PerTensor
from mergecli.methods._continual import Continual, Remembered, Step
from mergecli.methods._settings import Fraction, Range
from mergecli.methods._svd import decompose, is_matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dop(Continual, PerTensor):
    """theta_1 = the first expert;  theta_k from the old W_1 = theta_{k-1} and the new W_2, for the models in their order:

    matrices   `steps` steps of Adam on a L_1(W) + (1 - a) L_2(W) from the mean of W_1 and W_2,
               L_j(W) = |diag(s) U^T (W - W_j)|^2 + |(W - W_j) V diag(s)|^2,  W_j - W_0 = U diag(s) V^T,  of whose singular values
               the largest stay, up to `energy` of their sum
    others     the mean of theta_{k-1} and the new model

    With `balance = "min_norm"` a is `weight` at first and moves by 1 - `smoothing` of the way in each step to the a that makes the
    sum of both gradients, each divided by its loss, shortest. In FusionBench the class embedding stays the base's.
    """

    title: ClassVar[str] = (
        "the merge so far and each new model balanced on the directions that either changed"
    )
    paper: ClassVar[str] = (
        "Yang et al., Continual model merging without data: dual projections, NeurIPS 2025 (no arXiv number known)"
    )
    kind: ClassVar[str] = "continual"
    also_called: ClassVar[Mapping[str, str]] = {"dual_projections": "", "continual_dop": ""}
    work: ClassVar[str] = (
        "`steps` times four products of matrices for each matrix and model: of a ViT-B/32 140 TFLOP, on two cores a quarter of an hour"
    )
    elementwise: ClassVar[bool] = False
    remembers: ClassVar[Remembered] = "weights"
    why_not_without: ClassVar[str] = "it is part of the start and of the aim of every descent after it"

    steps: Annotated[int, Range(0)] = 200
    """Of Adam, for each matrix and model; 0 gives the mean."""
    learning_rate: Annotated[float, Range(0)] = 1e-4
    """About how far each entry moves in a step."""
    balance: Literal["min_norm", "fixed"] = "min_norm"
    """Whether the weights of the two losses follow their gradients, or stay."""
    weight: Annotated[float, Range(0, 1)] = 0.8
    """a, how much the merge so far counts; with min_norm at first."""
    smoothing: Annotated[float, Range(0, 1)] = 0.999
    """Of min_norm: how much of a stays in each step."""
    energy: Fraction = 0.99999
    """Share of the sum of singular values whose directions count."""

    def merge(self, group: Group, /) -> Tensor:
        return self.whole(Step(group))

    def remember(self, step: Step, /) -> Tensor:
        group, rows = step.group, step.group.tuned
        merged = rows[0].clone()
        is_map = is_matrix(group, "table") and merged.numel() > 0
        for row in rows[1:]:
            mean = (merged + row).div_(2)
            merged = self._balanced(group.base, (merged, row), mean) if is_map and self.steps else mean
        return merged

    def weights(self, memory: Tensor, step: Step, /) -> Tensor:
        del step
        return memory

    def _balanced(self, base: Tensor, ends: tuple[Tensor, Tensor], start: Tensor) -> Tensor:
        """(O, I) the weights between the two `ends` that Adam reaches from `start`, which is overwritten."""
        pulls = [self._pull(end - base) for end in ends]
        share = self.weight

        def gradient(at: Tensor) -> Tensor:
            nonlocal share
            apart = [at - end for end in ends]
            slopes = [pull(each) for pull, each in zip(pulls, apart, strict=True)]
            if self.balance == "min_norm":
                # a quadratic form is half the product of its argument and its gradient
                losses = [_dot(slope, each) / 2 for slope, each in zip(slopes, apart, strict=True)]
                share = self.smoothing * share + (1 - self.smoothing) * _shortest(slopes, losses)
            return slopes[0].mul_(share).add_(slopes[1], alpha=1 - share)

        return adam(start, gradient, self.learning_rate, self.steps)

    def _pull(self, change: Tensor) -> Callable[[Tensor], Tensor]:
        """The gradient of L_j at W, given W - W_j; `change` is W_j - W_0."""
        left, values, right = decompose(change)
        before = values.cumsum(0)
        kept = int((before < self.energy * before[-1]).sum())
        left, right = (each[:, :kept] * values[:kept] for each in (left, right))
        from_left, from_right = _times(left), _times(right)
        return lambda apart: from_left(apart).add_(from_right(apart.T).T).mul_(2)


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """X -> F F^T X in float32 for a float64 (n, k) F; by way of F F^T where that is the shorter way."""
    rows, columns = factor.shape
    if rows <= 2 * columns:
        square = (factor @ factor.T).float()
        return lambda values: square @ values
    narrow = factor.float()
    return lambda values: narrow @ (narrow.T @ values)


def _shortest(slopes: list[Tensor], losses: list[float]) -> float:
    """The share of the first of two gradients in the shortest sum of them, each divided by its loss, as the authors bound it."""
    (first, second), (by, other_by) = slopes, [loss if loss > 0 else 1.0 for loss in losses]
    one, both = _dot(first, first) / by**2, _dot(first, second) / (by * other_by)
    other = _dot(second, second) / other_by**2
    if both >= one:
        return 0.999
    if both >= other:
        return 0.001
    return (other - both) / (one + other - 2 * both)


def _dot(one: Tensor, other: Tensor) -> float:
    """The sum of all products of two tensors' entries, without a tensor of these."""
    return float(one.flatten().dot(other.flatten()))
