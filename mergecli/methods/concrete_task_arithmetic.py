"""Concrete task arithmetic: task arithmetic under a learned mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._adapted import Adapted, Change, Objective
from mergecli.methods._base import Group, total
from mergecli.methods._concrete_masks import (
    Kind,
    begin_masks,
    final_mask,
    kept_masks,
    logits_key,
    mask_gradient,
    mask_means,
    mask_shapes,
    move_masks,
    rescaled,
    sampled,
)
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConcreteTaskArithmetic(Adapted):
    """theta = theta_0 + lambda (m / mean(m)) sum_i tau_i,  m = sigmoid((logit(u) + phi) / temperature),  u uniform

    one phi for each entry of the model, shared by the tasks, minimizing  sum_t mean_x H(softmax(logits_t(x; theta)))
    by `steps` steps of Adam, each with a newly drawn mask; the mean is over a tensor.

    At the end one more mask is drawn (`mask = "sample"`, as published), so the result depends on the seed; `expected`
    takes sigmoid(phi), `discrete` draws 0 or 1.
    """

    title: ClassVar[str] = "task arithmetic under a mask learned on unlabeled images"
    published = "Concrete Task Arithmetic"
    gives_masks = True
    changeable = frozenset({"mask"})
    not_learned_from = frozenset({"mask"})
    streamed = (logits_key(""),)
    trace_column: ClassVar[str] = "mask probability"
    paper: ClassVar[str] = "Tang et al., Concrete Subspace Learning, arXiv 2312.06173, algorithm 1"

    work: ClassVar[str] = (
        "steps of Adam on a number for each weight, each a forward and a backward pass of every task's batch; in memory 8 "
        "towers (base, sum of the task vectors, merged weights, gradients, a mask, its logits and their two moments), however "
        "many tasks there are, and the activations of a batch"
    )

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda."""
    steps: Annotated[int, Range(0)] = 2000
    """Steps of Adam on the mask."""
    temperature: Annotated[float, Range(0, open_low=True)] = 0.5
    """Of the concrete distribution: the lower, the nearer masks are to 0 and 1."""
    initial_logits: Annotated[float, Range()] = 0.0
    """phi before the first step; 0 is a probability of a half."""
    mask: Kind = "sample"
    """The mask that is applied: one more sample, the probability of each entry, or 0 or 1 drawn with that probability. What was
    learned once serves all three."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    @property
    def decay(self) -> float:
        """How strongly the logits are drawn to 0 in each step."""
        return 0.0

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        del surveyed
        return total(group.deltas).mul_(self.scaling_factor)[None]

    def begin(self, objective: Objective, /) -> State:
        return begin_masks(objective, self.initial_logits)

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        masks: State = {}
        for name, weight in objective.weights.items():
            masks[name] = mask = sampled(objective, state, name, f"step {number}", self.temperature)
            weight.copy_(rescaled(mask).mul_(objective.deltas[name][0]).add_(objective.base[name]))
        losses, gradients = objective.losses_and_gradients(number)
        found = {
            name: mask_gradient(
                objective, masks.pop(name), gradient.mul_(objective.deltas[name][0]), self.temperature
            )
            for name, gradient in gradients.items()
        }
        return losses, lambda: move_masks(state, found, self.learning_rate, number + 1, self.decay)

    def finish(self, objective: Objective, state: State, /) -> State:
        return kept_masks(objective, state, self.mask, self.temperature)

    def renewed(self, learned: LearnedTensors, tensors: Mapping[str, tuple[int, ...]], /) -> State:
        return {"mask_means": mask_means(learned, tensors, self.mask, self.temperature)}

    def traced(self, state: State, /) -> Tensor:
        return mean_probability(state)

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        del tasks
        return mask_shapes(tensors)

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        mask = final_mask(learned, group, self.mask, self.temperature)
        return total(group.deltas).mul_(mask).mul_(self.scaling_factor).add_(group.base)


def mean_probability(state: State) -> Tensor:
    """(1,) the mean probability of an entry to be kept."""
    import torch

    logits = [each for key, each in state.items() if key.startswith(logits_key(""))]
    count = sum(each.numel() for each in logits)
    return torch.stack([each.sigmoid().sum() for each in logits]).sum()[None] / max(count, 1)
