"""SyMerge: coefficients and a classification head of each task, learned together from what each task's own model predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Adapted, Change, Objective, combine
from mergecli.methods._base import Group
from mergecli.methods._coefficients import coefficient_gradients, coefficients_of, columns, weighted
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._mixture import SAME, Conditioned, Part, Read
from mergecli.methods._settings import Range
from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, BIAS = "sy_merge.weight", "sy_merge.bias"
"""Keys of the (C, D) weights and (C,) biases of the heads of all tasks, one after another; D is the size of features."""
COUNTS = "sy_merge.classes"
"""Key of the (T,) number of classes of each task's head, in what was learned."""


@dataclass(frozen=True)
class SyMerge(Conditioned, Adapted):
    """theta = theta_0 + sum_i clamp(c_i, 0, 1) tau_i,  logits_t = W_t f / |f| + b_t,  f the image's features by theta

    One c_i for each task and tensor from `start`, and for each task the whole head: W_t from its zero-shot head times the
    logit scale, b_t from 0. They minimize the cross-entropy of logits_t to the class that the task's own model, with its
    zero-shot head, predicts for images of task t without labels; images on which the merged model differs and is surer
    are left out. `steps` rounds, each with one step of Adam a task, in an order that is drawn for the round.

    The file has one tower and T heads: a task's head is part of its result, so that it can be evaluated with the class
    names and prompts that it began with, and no others. Tasks that `adapt_on` leaves out keep their zero-shot head.

    The authors compute in float16. Where all images of a batch are left out, their gradient is 0 and Adam goes on by its
    momentum; here no step is made, and none where the loss is 0 otherwise.
    """

    title: ClassVar[str] = (
        "coefficients and a classification head of each task, learned from the predictions of the tasks' own models"
    )
    paper: ClassVar[str] = "Jung et al., SyMerge, ICML 2026, arXiv 2412.19098"
    published = "SyMerge"
    prefixes = ("sy_merge.",)
    derived = frozenset({"feature_size", "class_counts"})
    besides: ClassVar[str] = "its own classification head"
    looks_at: ClassVar[str] = "unlabeled images of every task"
    elementwise: ClassVar[bool] = True
    learns_heads: ClassVar[bool] = True
    work: ClassVar[str] = (
        "each task's model sees its images once; then steps of Adam on coefficients and heads, each a forward and a backward "
        "pass of one task's batch; in memory T + 3 towers and the activations of a batch"
    )

    objective: Literal["entropy", "experts"] = "experts"
    """What is made small: the cross-entropy to what the task's own model predicts, or the entropy of the predictions."""
    steps: Annotated[int, Range(0)] = 500
    """Rounds, each with a step for every task; with 0 it is task arithmetic with zero-shot heads."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    sum_tasks: bool = False
    """Whether a round is one step, on the sum of all tasks' losses, in place of a step for each task as published."""
    learning_rate: Annotated[float, Range(0)] = 1e-2
    """Of Adam, of coefficients and heads."""
    batch_size: Annotated[int, Range(1)] = 32
    """Images of each task in a round."""
    feature_size: Annotated[int, Range(0)] = 0
    """How many numbers an image's features have; 0 takes what the base has."""
    class_counts: tuple[int, ...] = ()
    """The number of classes of each task's head, 0 where it is the zero-shot head; by default what the tasks have."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        del tasks
        return {name: Part(SAME, shape)}

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        del tensors, tasks
        rows = sum(self.class_counts)
        return {WEIGHT: Part("F32", (rows, self.feature_size)), BIAS: Part("F32", (rows,))}

    def expand(self, group: Group, learned: LearnedTensors, /) -> dict[str, Tensor]:
        return {group.name: weighted(group, group.deltas, coefficients_of(learned, group.name))}

    def values(self, learned: LearnedTensors, /) -> dict[str, Tensor]:
        return {key: learned.tensors[key] for key in (WEIGHT, BIAS)}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        del index
        return read(name).float()

    def head(self, index: int, read: Read, /) -> Callable[[Tensor], Tensor] | None:
        import torch

        ends = list(accumulate(self.class_counts))
        if index >= len(ends) or not self.class_counts[index]:
            return None
        rows = slice(ends[index] - self.class_counts[index], ends[index])
        weight, bias = read(WEIGHT)[rows], read(BIAS)[rows]
        return lambda features: torch.nn.functional.linear(features, weight, bias)

    def begin(self, objective: Objective, /) -> State:
        import torch

        self._check(objective)
        some = next(iter(objective.weights.values()))
        tasks = len(objective.tasks)
        learned: State = {
            "coefficients": torch.full((tasks, len(objective.weights)), self.start, device=some.device)
        }
        for place, (weight, bias) in objective.heads.items():
            learned |= {f"weight.{place}": weight.clone(), f"bias.{place}": bias.clone()}
        moments = {
            f"{kind}.{key}": torch.zeros_like(each)
            for key, each in learned.items()
            for kind in ("mean", "square")
        }
        # the steps so far, of the coefficients in the last place and of each head: some batches make none
        return {**learned, **moments, "made": torch.zeros(tasks + 1, device=some.device)}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        import torch

        after = {key: each.clone() for key, each in state.items()}
        order = objective.order(number)
        losses = torch.zeros(len(objective.tasks), device=state["made"].device)
        for places in [sorted(order)] if self.sum_tasks else [[place] for place in order]:
            losses += self._descend(objective, after, number, places)

        def change() -> None:
            for key, value in after.items():
                state[key].copy_(value)

        return losses, change

    def _descend(self, objective: Objective, state: State, batch: int, places: Sequence[int]) -> Tensor:
        """(T,) the losses of some tasks' batches, whose step is made in the state."""
        used = state["coefficients"].clamp(0, 1)
        for name, own in columns(objective, used):
            combine(objective.deltas[name], own, objective.weights[name]).add_(objective.base[name])
        for place in places:
            weight, bias = objective.heads[place]
            weight.copy_(state[f"weight.{place}"])
            bias.copy_(state[f"bias.{place}"])
        losses, gradients = objective.losses_and_gradients(batch, places)
        gradient = coefficient_gradients(objective, gradients.items(), used.shape[1])
        gradient *= used == state["coefficients"]
        found = {len(objective.tasks): {"coefficients": gradient}}
        for place in places:
            weight, bias = objective.head_gradients(place)
            found[place] = {f"weight.{place}": weight, f"bias.{place}": bias}
        moving = [place for place in places if float(losses[place]) != 0]
        for place in [*moving, *([len(objective.tasks)] if moving else [])]:
            state["made"][place] += 1
            made = int(state["made"][place])
            for key, each in found[place].items():
                moments = state[f"mean.{key}"], state[f"square.{key}"]
                adam_step(state[key], each, *moments, self.learning_rate, made)
        return losses

    def finish(self, objective: Objective, state: State, /) -> State:
        import torch

        heads = [(state[f"weight.{place}"], state[f"bias.{place}"]) for place in sorted(objective.heads)]
        counts = [
            len(objective.heads[n][1]) if n in objective.heads else 0 for n in range(len(objective.tasks))
        ]
        return {
            "coefficients": state["coefficients"].clamp(0, 1),
            WEIGHT: torch.cat([weight for weight, _ in heads]),
            BIAS: torch.cat([bias for _, bias in heads]),
            COUNTS: torch.tensor([float(count) for count in counts]),
        }

    def completed(self, learned: State, /) -> SyMerge:
        counts = tuple(int(count) for count in learned[COUNTS])
        return replace(self, feature_size=learned[WEIGHT].shape[1], class_counts=counts)

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        heads = {key: part.shape for key, part in self.extras(tensors, tasks).items()}
        return {"coefficients": (tasks, len(tensors)), COUNTS: (tasks,), **heads}

    def traced(self, state: State, /) -> Tensor:
        return state["coefficients"].clamp(0, 1).mean(1)

    def _check(self, objective: Objective) -> None:
        """Raises UsageError if the recipe says other sizes of heads than the tasks have."""
        heads = objective.heads
        counts = tuple(len(heads[n][1]) if n in heads else 0 for n in range(len(objective.tasks)))
        size = next(iter(heads.values()))[0].shape[1]
        if self.class_counts not in ((), counts):
            raise UsageError(
                f"`method.class_counts`: is {list(self.class_counts)}, the tasks have {list(counts)}"
            )
        if self.feature_size not in (0, size):
            raise UsageError(
                f"`method.feature_size`: is {self.feature_size}, the base's features have {size}"
            )
