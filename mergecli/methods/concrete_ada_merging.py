"""Concrete AdaMerging: AdaMerging on the entries that a learnt mask leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import UNSAVED, Adapted, Change, Learnt, State, Trial, combine
from mergecli.methods._base import Group
from mergecli.methods._concrete_masks import (
    FINAL,
    Kind,
    begin_masks,
    final_mask,
    kept_masks,
    logits_key,
    mask_means,
    mask_of,
    mask_shapes,
    mask_slope,
    mean_of,
    move_masks,
    rescaled,
    sampled,
)
from mergecli.methods._settings import Range
from mergecli.methods.ada_merging import coefficients_of, columns, slopes_of, weighted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConcreteAdaMerging(Adapted):
    """theta = theta_0 + (m / mean(m)) sum_i c_i tau_i,  m = sigmoid((logit(u) + phi) / temperature),  u uniform

    First the mask, `mask_steps` times: from c = `start` one step of descent on c under a sampled mask, then one step of
    Adam on phi at that c, each on a batch of its own; the second gradient does not go through the first step. Then
    one mask is fixed, and c is learnt from `start` as in AdaMerging, `steps` times.

    With `order = "corrected"` the weights are merged after c is set back, and the step on c is
    `inner_rate` times the gradient. `published` is the order of FusionBench: merged before, so that the gradient belongs
    to the c of the step before, which Adam of rate `inner_rate`, never set back, applies to `start`.
    """

    title: ClassVar[str] = "coefficients, and before them a mask, learnt on unlabelled images"
    paper: ClassVar[str] = "Tang et al., Concrete Subspace Learning, arXiv 2312.06173, algorithm 2"
    applied: ClassVar[frozenset[str]] = frozenset({"mask"})

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
    """How far the coefficients follow their gradient while the mask is learnt."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    temperature: Annotated[float, Range(0, open_low=True)] = 0.5
    """Of the concrete distribution: the lower, the nearer masks are to 0 and 1."""
    initial_logits: Annotated[float, Range()] = 0.0
    """phi before the first step; 0 is a chance of a half."""
    mask: Kind = "sample"
    """The mask that is applied: one more sample, the chance of each entry, or 0 or 1 drawn with that chance. Coefficients
    are learnt under it; `--coefficients` can apply them under another."""
    masks: str | None = None
    """A file of what this method or `concrete_task_arithmetic` learnt on the same models, as a path relative to the current
    folder or another source: its mask is taken, and only the coefficients are learnt."""
    order: Literal["corrected", "published"] = "corrected"
    """The order of the steps on coefficients and mask."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.mask_steps if self.masks is None else 0, self.steps)

    def begin(self, trial: Trial, /) -> State:
        import torch

        columns = len(trial.weights) if self.granularity == "layer" else 1
        device = next(iter(trial.weights.values())).device
        names = ("coefficients", "mean", "square", "inner", "inner_mean", "inner_square")
        table = {name: torch.zeros(len(trial.tasks), columns, device=device) for name in names}
        table["coefficients"] += self.start
        table["inner"] += self.start
        if self.masks is None:
            return {**begin_masks(trial, self.initial_logits), **table}
        keys = [logits_key(name) for name in trial.weights]
        return {**{key: trial.given(key) for key in keys}, **table}

    def step(self, trial: Trial, state: State, number: int, /) -> tuple[Tensor, Change]:
        first, _ = self.phases
        if number < first:
            return self._mask_step(trial, state, number)
        masks = {name: self._final(trial, state, name) for name in trial.weights}
        slope, losses = self._slope(trial, masks, state["coefficients"], first + number)
        at = number - first + 1
        return losses, lambda: adam_step(
            state["coefficients"], slope, state["mean"], state["square"], self.learning_rate, at
        )

    def _mask_step(self, trial: Trial, state: State, number: int) -> tuple[Tensor, Change]:
        masks = {
            name: sampled(trial, state, name, f"step {number}", self.temperature) for name in trial.weights
        }
        table = {name: state[name].clone() for name in ("inner", "inner_mean", "inner_square")}
        inner = table["inner"]
        if self.order == "corrected":
            inner.fill_(self.start)
        slope, _ = self._slope(trial, masks, inner, 2 * number, rescale=True)
        if self.order == "corrected":
            inner.sub_(slope, alpha=self.inner_rate)
        else:
            inner.fill_(self.start)
            adam_step(inner, slope, table["inner_mean"], table["inner_square"], self.inner_rate, number + 1)
        self._merge(trial, masks, inner, rescale=True)
        losses, slopes = trial.slopes(2 * number + 1)
        found: State = {}
        for name, own in columns(trial, inner):
            slope = slopes[name].mul_(combine(trial.deltas[name], own, trial.weights[name]))
            found[name] = mask_slope(trial, masks.pop(name), slope, self.temperature)

        def change() -> None:
            for name, value in table.items():
                state[name].copy_(value)
            move_masks(state, found, self.mask_rate, number + 1)

        return losses, change

    def _merge(self, trial: Trial, masks: State, coefficients: Tensor, *, rescale: bool) -> None:
        """Overwrites the weights with those that masks and coefficients give."""
        for name, own in columns(trial, coefficients):
            mask = rescaled(masks[name]) if rescale else masks[name]
            combine(trial.deltas[name], own, trial.weights[name]).mul_(mask).add_(trial.base[name])

    def _slope(
        self, trial: Trial, masks: State, coefficients: Tensor, draw: int, *, rescale: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(T, P) or (T, 1) the gradient with respect to the coefficients at batch number `draw`, and (T,) entropies."""
        self._merge(trial, masks, coefficients, rescale=rescale)
        losses, slopes = trial.slopes(draw)
        masked = (
            (name, each.mul_(rescaled(masks[name]) if rescale else masks[name]))
            for name, each in slopes.items()
        )
        return slopes_of(trial, masked, coefficients.shape[1]), losses

    def _final(self, trial: Trial, state: State, name: str) -> Tensor:
        """(...) the rescaled mask that is kept; made once."""
        if (key := f"{UNSAVED}{name}") not in state:
            drawn = trial.uniform(name, FINAL).view(trial.weights[name].shape)
            mask = mask_of(self.mask, state[logits_key(name)], drawn, self.temperature)
            mean = mean_of(mask)
            state[key] = mask / mean if mean else mask
        return state[key]

    def finish(self, trial: Trial, state: State, /) -> State:
        kept = kept_masks(trial, state, self.mask, self.temperature)
        return {**kept, "coefficients": state["coefficients"].clone()}

    def shapes(self, tasks: int, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        count = len(tensors) if self.granularity == "layer" else 1
        return {**mask_shapes(tensors), "coefficients": (tasks, count)}

    def renewed(self, learnt: Learnt, tensors: Mapping[str, tuple[int, ...]], /) -> State:
        return {"mask_means": mask_means(learnt, tensors, self.mask, self.temperature)}

    def shown(self, state: State, /) -> Tensor:
        return state["coefficients"].mean(1)

    def merge(self, group: Group, learnt: Any, /) -> Tensor:
        mask = final_mask(learnt, group, self.mask, self.temperature)
        merged = weighted(group, group.deltas, coefficients_of(learnt, group.name)).sub_(group.base)
        return merged.mul_(mask).add_(group.base)
