"""FW-Merging: Frank-Wolfe steps from task arithmetic to the model that the gradient points to most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adapted import Adapted, Change, Objective, combine
from mergecli.methods._base import Group
from mergecli.methods._coefficients import coefficients_of, columns, weighted
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

NOISE = 1e-5
"""Gradients of a tensor up to this share of the largest tensor's are rounding: keys' biases change no prediction."""


@dataclass(frozen=True)
class FwMerging(Adapted):
    """theta_{k+1} = theta_k + (2 / (k + 2)) gamma (s_k - theta_k),  k = 0 ... steps - 1,  theta_0 + start sum_i tau_i  first

    s_k of the fine-tuned models and the start is the one with the least  sum_n cos(g_n, s_n)  over tensors n, g the
    gradient at theta_k of the sum of all tasks' losses; with `granularity = "layer"` each tensor has an s_k of its own. So
    the result is  theta_0 + sum_i c_i tau_i.

    The authors take the loss to labels of training images. Methods see no labels here: the classes that the tasks' own
    models predict take their place, as in SyMerge. Tensors whose gradient is nothing but rounding have no say, where
    FusionBench counts the cosine of noise. Its soft variant, which goes on with AdaMerging, is not here.
    """

    title: ClassVar[str] = "steps (Frank-Wolfe) to the models that the gradient on unlabeled images points to"
    paper: ClassVar[str] = "Chen et al., FW-Merging, 2025, arXiv 2503.12649"
    also_called: ClassVar[Mapping[str, str]] = {
        "frank_wolfe": "", "frank_wolfe_hard": "", "fw_hard": "", "fw": "",
    }  # fmt: skip
    work: ClassVar[str] = (
        "a few steps, each a forward and a backward pass of every task's batch and T cosines of whole models; in memory T + 3 "
        "towers and the activations of a batch"
    )

    objective: Literal["entropy", "experts"] = "experts"
    """The loss: the cross-entropy to what the task's own model predicts, or the entropy of the predictions."""
    steps: Annotated[int, Range(0)] = 10
    """Frank-Wolfe steps; 0 is task arithmetic."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    learning_rate: Annotated[float, Range(0, 1)] = 0.03
    """gamma: how far the first step goes; FusionBench multiplies 0.1 by 0.3."""
    granularity: Literal["task", "layer"] = "task"
    """Whether a step goes to one whole model, or each tensor to a model of its own."""
    batch_size: Annotated[int, Range(1)] = 100
    """Images of each task in a step."""
    split: Literal["test", "train", "validation"] = "train"
    """Whose images are looked at, without their labels."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    def begin(self, objective: Objective, /) -> State:
        import torch

        count = len(objective.weights) if self.granularity == "layer" else 1
        device = next(iter(objective.weights.values())).device
        return {"coefficients": torch.full((len(objective.tasks), count), self.start, device=device)}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        import torch

        coefficients = state["coefficients"]
        tasks = len(coefficients)
        for name, own in columns(objective, coefficients):
            combine(objective.deltas[name], own, objective.weights[name]).add_(objective.base[name])
        losses, gradients = objective.losses_and_gradients(number)
        found = [_cosines(objective, name, each, self.start) for name, each in gradients.items()]
        sizes = torch.stack([size for size, _ in found])  # (P,)
        cosines = torch.stack([each for _, each in found], dim=1) * (
            sizes > NOISE * sizes.max()
        )  # (T + 1, P)
        if self.granularity == "task":
            cosines = cosines.sum(1, keepdim=True)
        corners = torch.cat([torch.eye(tasks), torch.full((1, tasks), self.start)]).to(coefficients)
        nearest = corners[cosines.argmin(0)].T  # (T, P) or (T, 1)
        rate = 2 / (number + 2) * self.learning_rate

        def change() -> None:
            coefficients.lerp_(nearest, rate)

        return losses, change

    def finish(self, objective: Objective, state: State, /) -> State:
        del objective
        return {"coefficients": state["coefficients"].clone()}

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        return {"coefficients": (tasks, len(tensors) if self.granularity == "layer" else 1)}

    def traced(self, state: State, /) -> Tensor:
        return state["coefficients"].mean(1)

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        return weighted(group, group.deltas, coefficients_of(learned, group.name))


def _cosines(objective: Objective, name: str, gradient: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """() the size of one tensor's gradient, and (T + 1,) its cosines with the weights of the models and of the start."""
    import torch

    gradient = objective.total(gradient).flatten()
    base, deltas = objective.base[name].flatten(), objective.deltas[name].float().flatten(1)
    models = [base + delta for delta in deltas] + [base + start * deltas.sum(0)]
    size = gradient.norm()
    dots = torch.stack([gradient @ each for each in models])
    norms = torch.stack([each.norm() for each in models])
    return size, dots / (size * norms).clamp(min=torch.finfo(torch.float32).tiny)
