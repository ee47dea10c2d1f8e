"""Concrete AdaMerging: AdaMerging under a learned mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import UNSAVED, Adapted, Change, Objective, combine
from mergecli.methods._base import Group
from mergecli.methods._coefficients import coefficient_gradients, coefficients_of, columns, weighted
from mergecli.methods._concrete_masks import (
    FINAL,
    Kind,
    begin_masks,
    final_mask,
    kept_masks,
    logits_key,
    mask_gradient,
    mask_means,
    mask_of,
    mask_shapes,
    mean_of,
    move_masks,
    rescaled,
    sampled,
)
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConcreteAdaMerging(Adapted):
    """theta = theta_0 + (m / mean(m)) sum_i c_i tau_i,  m = sigmoid((logit(u) + phi) / temperature),  u uniform

    First the mask is learned in `mask_steps` steps: from c = `start` one step of descent on c under a sampled mask, then
    one step of Adam on phi at that c, each on a batch of its own; the second gradient does not go through the first
    step. Then one mask is fixed, and c is learned from `start` as in AdaMerging, in `steps` steps.

    With `order = "corrected"` c is set back to `start` before the weights are merged, and its step is `inner_rate` times
    the gradient. `published` is the order of FusionBench: the weights are merged before c is set back, so that the
    gradient is that at the c of the step before, and Adam of rate `inner_rate`, whose moments are kept, applies it to
    `start`.
    """

    title: ClassVar[str] = "coefficients, and before them a mask, learned on unlabeled images"
    paper: ClassVar[str] = "Tang et al., Concrete Subspace Learning, arXiv 2312.06173, algorithm 2"
    also_called: ClassVar[Mapping[str, str]] = {
        "concrete_layer_wise_adamerging": "",
        "concrete_task_wise_adamerging": "granularity=task",
    }
    published = "Concrete {granularity}-wise AdaMerging"
    needs = frozenset({"masks"})
    gives_masks = True
    changeable = frozenset({"mask"})
    streamed = (logits_key(""),)

    work: ClassVar[str] = (
        "steps of Adam, those on the mask two and those on the coefficients one forward and backward pass of every task's "
        "batch; in memory T + 7 towers (base, task vectors, merged weights, gradients, a mask, its logits and their two "
        "moments), with `masks` T + 5, and the activations of a batch"
    )

    granularity: Literal["task", "layer"] = "layer"
    """One coefficient a task, or one for each task and tensor."""
    mask_steps: Annotated[int, Range(0)] = 1000
    """Steps of Adam on the mask."""
    steps: Annotated[int, Range(0)] = 1000
    """Steps of Adam on the coefficients, after the mask."""
    mask_rate: Annotated[float, Range(0)] = 1e-3
    """Learning rate of the mask; `learning_rate` is that of the coefficients."""
    inner_rate: Annotated[float, Range(0)] = 1.0
    """How far the coefficients follow their gradient while the mask is learned."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    temperature: Annotated[float, Range(0, open_low=True)] = 0.5
    """Of the concrete distribution: the lower, the nearer masks are to 0 and 1."""
    initial_logits: Annotated[float, Range()] = 0.0
    """phi before the first step; 0 is a probability of a half."""
    mask: Kind = "sample"
    """The mask that is applied: one more sample, the probability of each entry, or 0 or 1 drawn with that probability. Coefficients
    are learned under it; `--coefficients` can apply them under another."""
    masks: str | None = None
    """A file of what this method or `concrete_task_arithmetic` learned on the same models, as a path relative to the current
    folder or another source: its mask is taken, and only the coefficients are learned."""
    order: Literal["corrected", "published"] = "corrected"
    """Whether c is set back before the weights are merged (`corrected`) or after (`published`), while the mask is learned."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.mask_steps if self.masks is None else 0, self.steps)

    def begin(self, objective: Objective, /) -> State:
        import torch

        columns = len(objective.weights) if self.granularity == "layer" else 1
        device = next(iter(objective.weights.values())).device
        names = ("coefficients", "mean", "square", "inner", "inner_mean", "inner_square")
        table = {name: torch.zeros(len(objective.tasks), columns, device=device) for name in names}
        table["coefficients"] += self.start
        table["inner"] += self.start
        if self.masks is None:
            return {**begin_masks(objective, self.initial_logits), **table}
        keys = [logits_key(name) for name in objective.weights]
        return {**{key: objective.mask(key) for key in keys}, **table}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        first, _ = self.phases
        if number < first:
            return self._mask_step(objective, state, number)
        masks = {name: self._final(objective, state, name) for name in objective.weights}
        gradient, losses = self._gradient(objective, masks, state["coefficients"], first + number)
        at = number - first + 1
        return losses, lambda: adam_step(
            state["coefficients"], gradient, state["mean"], state["square"], self.learning_rate, at
        )

    def _mask_step(self, objective: Objective, state: State, number: int) -> tuple[Tensor, Change]:
        masks = {
            name: sampled(objective, state, name, f"step {number}", self.temperature)
            for name in objective.weights
        }
        table = {name: state[name].clone() for name in ("inner", "inner_mean", "inner_square")}
        inner = table["inner"]
        if self.order == "corrected":
            inner.fill_(self.start)
        gradient, _ = self._gradient(objective, masks, inner, 2 * number, rescale=True)
        if self.order == "corrected":
            inner.sub_(gradient, alpha=self.inner_rate)
        else:
            inner.fill_(self.start)
            adam_step(
                inner, gradient, table["inner_mean"], table["inner_square"], self.inner_rate, number + 1
            )
        self._merge(objective, masks, inner, rescale=True)
        losses, gradients = objective.losses_and_gradients(2 * number + 1)
        found: State = {}
        for name, own in columns(objective, inner):
            gradient = gradients[name].mul_(combine(objective.deltas[name], own, objective.weights[name]))
            found[name] = mask_gradient(objective, masks.pop(name), gradient, self.temperature)

        def change() -> None:
            for name, value in table.items():
                state[name].copy_(value)
            move_masks(state, found, self.mask_rate, number + 1)

        return losses, change

    def _merge(self, objective: Objective, masks: State, coefficients: Tensor, *, rescale: bool) -> None:
        """Overwrites the weights with those that masks and coefficients give."""
        for name, own in columns(objective, coefficients):
            mask = rescaled(masks[name]) if rescale else masks[name]
            combine(objective.deltas[name], own, objective.weights[name]).mul_(mask).add_(
                objective.base[name]
            )

    def _gradient(
        self, objective: Objective, masks: State, coefficients: Tensor, batch: int, *, rescale: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(T, P) or (T, 1) the gradient with respect to the coefficients at batch number `batch`, and (T,) entropies."""
        self._merge(objective, masks, coefficients, rescale=rescale)
        losses, gradients = objective.losses_and_gradients(batch)
        masked = (
            (name, each.mul_(rescaled(masks[name]) if rescale else masks[name]))
            for name, each in gradients.items()
        )
        return coefficient_gradients(objective, masked, coefficients.shape[1]), losses

    def _final(self, objective: Objective, state: State, name: str) -> Tensor:
        """(...) the rescaled mask that coefficients are learned under; computed once, and again after a resumed run."""
        if (key := f"{UNSAVED}{name}") not in state:
            drawn = objective.uniform(name, FINAL).view(objective.weights[name].shape)
            mask = mask_of(self.mask, state[logits_key(name)], drawn, self.temperature)
            mean = mean_of(mask)
            state[key] = mask / mean if mean else mask
        return state[key]

    def finish(self, objective: Objective, state: State, /) -> State:
        kept = kept_masks(objective, state, self.mask, self.temperature)
        return {**kept, "coefficients": state["coefficients"].clone()}

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        count = len(tensors) if self.granularity == "layer" else 1
        return {**mask_shapes(tensors), "coefficients": (tasks, count)}

    def renewed(self, learned: LearnedTensors, tensors: Mapping[str, tuple[int, ...]], /) -> State:
        return {"mask_means": mask_means(learned, tensors, self.mask, self.temperature)}

    def traced(self, state: State, /) -> Tensor:
        return state["coefficients"].mean(1)

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        mask = final_mask(learned, group, self.mask, self.temperature)
        merged = weighted(group, group.deltas, coefficients_of(learned, group.name)).sub_(group.base)
        return merged.mul_(mask).add_(group.base)
