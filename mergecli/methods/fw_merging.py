"""FW-Merging: Frank-Wolfe steps from task arithmetic to the model that the gradient points to most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Adapted, Change, Objective, combine
from mergecli.methods._base import Group
from mergecli.methods._coefficients import coefficient_gradients, coefficients_of, columns, weighted
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-8
"""Coefficients of the soft variant before every round but the first."""
NOISE = 1e-5
"""Gradients of a tensor up to this share of the largest tensor's are rounding: keys' biases change no prediction."""


@dataclass(frozen=True)
class FwMerging(Adapted):
    """theta_{k+1} = theta_k + (2 / (k + 2)) gamma (s_k - theta_k),  k = 0 ... steps - 1,  theta_0 + start sum_i tau_i  first

    s_k of the fine-tuned models and the start is the one with the least  sum_n cos(g_n, s_n)  over tensors n, g the
    gradient at theta_k of the sum of all tasks' losses; with `granularity = "layer"` each tensor has an s_k of its own. So
    the result is  theta_0 + sum_i c_i tau_i.

    With `variant = "soft"` each round goes to all models at once,  theta_{k+1} = theta_k + sum_i l_i (theta_i - theta_k),  with
    coefficients l of each tensor that `adam_steps` steps of Adam learn anew, from `start` in the first round and from 1e-8
    in the others: the first round is layer-wise AdaMerging. FusionBench picks a model of its own for each task by the
    gradient before; with a model for each task these are always all of them, so that nothing is picked here.

    The authors take the loss to labels of training images. Methods see no labels here: the classes that the tasks' own
    models predict take their place, as in SyMerge. Tensors whose gradient is nothing but rounding have no say, where
    FusionBench counts the cosine of noise. It runs the soft variant with `objective = "entropy"`, `split = "test"` and
    `batch_size = 16`.
    """

    title: ClassVar[str] = "steps (Frank-Wolfe) to the models that the gradient on unlabeled images points to"
    paper: ClassVar[str] = "Chen et al., FW-Merging, 2025, arXiv 2503.12649"
    also_called: ClassVar[Mapping[str, str]] = {
        "frank_wolfe": "", "frank_wolfe_hard": "", "fw_hard": "", "fw": "", "frank_wolfe_soft": "variant=soft", "fw_soft": "variant=soft",
    }  # fmt: skip
    work: ClassVar[str] = (
        "a few steps, of the soft variant thousands, each a forward and a backward pass of every task's batch and T cosines of whole models; in memory T + 3 "
        "towers and the activations of a batch"
    )

    objective: Literal["entropy", "experts"] = "experts"
    """The loss: the cross-entropy to what the task's own model predicts, or the entropy of the predictions."""
    steps: Annotated[int, Range(0)] = 10
    """Frank-Wolfe steps, or rounds of the soft variant; 0 is task arithmetic."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    learning_rate: Annotated[float, Range(0, 1)] = 0.03
    """gamma, with `hard`: how far the first step goes; FusionBench multiplies 0.1 by 0.3."""
    variant: Literal["hard", "soft"] = "hard"
    """Whether a step goes to one model, or a round to a mixture of all of them that is learned."""
    adam_steps: Annotated[int, Range(1)] = 500
    """With `soft`: steps of Adam in each of the `steps` rounds."""
    adam_rate: Annotated[float, Range(0)] = 1e-3
    """With `soft`: the learning rate of Adam."""
    granularity: Literal["task", "layer"] = "task"
    """With `hard`: whether a step goes to one whole model, or each tensor to a model of its own."""
    batch_size: Annotated[int, Range(1)] = 100
    """Images of each task in a step."""
    split: Literal["test", "train", "validation"] = "train"
    """Whose images are looked at, without their labels."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        found = super().check(tasks, settings)
        other = "hard" if settings.get("variant", cls.variant) == "soft" else "soft"
        own = {"hard": ("learning_rate", "granularity"), "soft": ("adam_steps", "adam_rate")}[other]
        needless = [key for key in own if settings.get(key, getattr(cls, key)) != getattr(cls, key)]
        return found + [(key, f'is for `variant = "{other}"`') for key in needless]

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,) if self.variant == "hard" else (self.adam_steps,) * self.steps

    @property
    def _by_tensor(self) -> bool:
        """Whether each tensor has coefficients of its own."""
        return self.variant == "soft" or self.granularity == "layer"

    def begin(self, objective: Objective, /) -> State:
        import torch

        count = len(objective.weights) if self._by_tensor else 1
        device = next(iter(objective.weights.values())).device
        start = torch.full((len(objective.tasks), count), self.start, device=device)
        if self.variant == "hard":
            return {"coefficients": start}
        return {key: torch.zeros_like(start) for key in ("coefficients", "mean", "square")} | {
            "shares": start
        }

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        return (
            self._one_model(objective, state, number)
            if self.variant == "hard"
            else self._mixture(objective, state, number)
        )

    def _mixture(self, objective: Objective, state: State, number: int) -> tuple[Tensor, Change]:
        """A step of Adam of the soft variant."""
        import torch

        turn, done = divmod(number, self.adam_steps)
        now = dict(state)
        if turn and not done:  # a round begins where the last one has ended
            now = {key: torch.zeros_like(each) for key, each in state.items()}
            now |= {"coefficients": _moved(state), "shares": torch.full_like(state["shares"], LEAST)}
        before = now["coefficients"]
        for name, own in columns(objective, _moved(now)):
            combine(objective.deltas[name], own, objective.weights[name]).add_(objective.base[name])
        losses, gradients = objective.losses_and_gradients(number)
        gradient = coefficient_gradients(objective, gradients.items(), before.shape[1])
        gradient = gradient - (gradient * before).sum(0)  # with respect to the shares

        def change() -> None:
            for key, each in now.items():
                state[key].copy_(each)
            moments = state["mean"], state["square"]
            adam_step(state["shares"], gradient, *moments, self.adam_rate, done + 1)

        return losses, change

    def _one_model(self, objective: Objective, state: State, number: int) -> tuple[Tensor, Change]:
        """A step of the hard variant."""
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
        return {"coefficients": _moved(state)}

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        return {"coefficients": (tasks, len(tensors) if self._by_tensor else 1)}

    def traced(self, state: State, /) -> Tensor:
        return _moved(state).mean(1)

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        return weighted(group, group.deltas, coefficients_of(learned, group.name))


def _moved(state: Mapping[str, Tensor]) -> Tensor:
    """(T, P) the coefficients once a round has gone to its mixture of models: c + sum_i l_i (e_i - c)."""
    before = state["coefficients"]
    if "shares" not in state:
        return before.clone()
    return before + state["shares"] - before * state["shares"].sum(0)


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
