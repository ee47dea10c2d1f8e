"""Representation surgery: a merged tower, and for each task a small correction of the image features that it gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._base import Group, uniform
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._mixture import SAME, Conditioned, Part, Read
from mergecli.methods._settings import Range
from mergecli.methods._task_learner import FeatureProbe, TaskLearner
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP = "surgery.down", "surgery.up"
"""Keys of the (T, rank, D) matrices D and the (T, D, rank) matrices U of f - U relu(D f), D also the size of features."""


LOSSES = "trace.losses"
"""(steps, T) the loss of each step's batch."""


@dataclass(frozen=True)
class RepresentationSurgery(Conditioned, TaskLearner):
    """theta_t = theta_merged,  and of its unit image features f the task t takes f - U_t relu(D_t f)

    U_t, D_t bring the corrected features of unlabeled images near the features f_t of the task's own model:
          Adam on mean |f - U relu(D f) - f_t|,  D from Kaiming's uniform distribution, U from 0

    Corrected features are not normalized again. The merged tower is one that another method has written: merge first,
    then name the file as `merged`. Steps are taken on features, which are computed once for each image.
    """

    title: ClassVar[str] = (
        "on top of a merged tower: a small correction of each task's image features, learned without labels"
    )
    paper: ClassVar[str] = "Yang et al., Representation Surgery, ICML 2024, arXiv 2402.02705"
    published = "Representation Surgery"
    also_called: ClassVar[Mapping[str, str]] = {"surgery": ""}
    prefixes = ("surgery.",)
    needs = frozenset({"merged_tower"})
    changeable = frozenset({"merged"})
    derived = frozenset({"feature_size"})
    file_title = "learnt surgery"
    part_title = "surgery"
    besides: ClassVar[str] = "the correction of its features"
    looks_at: ClassVar[str] = "unlabeled images of every task"
    work: ClassVar[str] = "each image goes through two towers once, and the steps are on what comes out"
    elementwise: ClassVar[bool] = True

    merged: str | None = None
    """The tower that is corrected: a merged checkpoint, as a path relative to the current folder or another source. It is
    one plain tower: one that routes, or a file of several, cannot be corrected."""
    rank: Annotated[int, Range(1)] = 16
    """The number of rows of D."""
    steps: Annotated[int, Range(0)] = 1000
    """Of learning, for each task; with 0 the features stay as they are."""
    learning_rate: Annotated[float, Range(0)] = 1e-3
    """Of Adam."""
    batch_size: Annotated[int, Range(1)] = 16
    """Images in a step."""
    split: Literal["test", "train", "validation"] = "test"
    """Whose images are looked at, without their labels: those that the result is evaluated on, as in the published
    tables, or others, which is the honest choice."""
    images: Annotated[int, Range(0)] = 0
    """Images of each task that are looked at, drawn by the recipe's seed, at most; 0 takes as many as the steps can."""
    feature_size: Annotated[int, Range(0)] = 0
    """How many numbers an image's features have; 0 takes what the base has."""

    @property
    def loss(self) -> tuple[str, str]:
        return "loss", LOSSES

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        del tasks
        return {name: Part(SAME, shape)}

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        del tensors
        size, rank = self.feature_size, self.rank
        return {DOWN: Part("F32", (tasks, rank, size)), UP: Part("F32", (tasks, size, rank))}

    def expand(self, group: Group, learned: LearnedTensors, /) -> dict[str, Tensor]:
        assert learned.tower is not None
        stop = group.start + group.shape.numel()
        return {group.name: learned.tower(group.name, group.start, stop).view(group.shape)}

    def values(self, learned: LearnedTensors, /) -> dict[str, Tensor]:
        return {key: learned.tensors[key] for key in (DOWN, UP)}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        del index
        return read(name).float()

    def correction(self, index: int, read: Read, /) -> Callable[[Tensor], Tensor]:
        down, up = read(DOWN)[index], read(UP)[index]

        def corrected(features: Tensor) -> Tensor:
            if features.shape[-1] != self.feature_size:
                raise InputError(
                    f"the surgery is of features of size {self.feature_size}, the base's have {features.shape[-1]}",
                    "name the base that it was learned with",
                )
            return features - (features @ down.T).relu() @ up.T

        return corrected

    def looked_at(self, images: int) -> int:
        return min(images, self.images or images, self.steps * self.batch_size)

    def check_features(self, size: int) -> None:
        if self.rank > size:
            raise UsageError(f"`method.rank`: is {self.rank}, the base's features have {size}")
        if self.feature_size not in (0, size):
            raise UsageError(
                f"`method.feature_size`: is {self.feature_size}, the base's features have {size}"
            )

    def learn_task(self, probe: FeatureProbe, /) -> State:
        given, wanted = probe.features("merged"), probe.features("own")
        down, up, losses = self.learn(given, wanted, probe.task, probe.seed)
        return {DOWN: down, UP: up, LOSSES: losses}

    def joined(self, tasks: Sequence[State], /) -> State:
        import torch

        down, up = (torch.stack([each[key] for each in tasks]) for key in (DOWN, UP))
        return {DOWN: down, UP: up, LOSSES: torch.stack([each[LOSSES] for each in tasks], 1)}

    def completed(self, learned: State, /) -> RepresentationSurgery:
        return replace(self, feature_size=learned[DOWN].shape[2])

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        shapes = {key: part.shape for key, part in self.extras(tensors, tasks).items()}
        return {**shapes, LOSSES: (self.steps, tasks)}

    def learn(
        self, features: Tensor, wanted: Tensor, task: str, seed: int, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rank, D), (D, rank), and (steps,) the loss of each step's batch.

        Args:
            features: (N, D) float32 unit features that the merged tower gives the task's images.
            wanted: (N, D) those that the task's own model gives.
        """
        import torch

        size = features.shape[1]
        bound = size**-0.5  # of Kaiming's uniform distribution with a = sqrt(5)
        down = (
            uniform(seed, DOWN, task, 0, self.rank * size).view(self.rank, size).mul_(2).sub_(1).mul_(bound)
        )
        up, losses = torch.zeros(size, self.rank), torch.zeros(self.steps)
        down_mean, down_square, up_mean, up_square = map(torch.zeros_like, (down, down, up, up))
        batches = self._batches(len(features), task, seed)
        for step, rows in zip(range(self.steps), batches, strict=False):
            interrupts.check()
            given = features[rows]
            hidden = given @ down.T  # (B, rank)
            kept = hidden.relu()
            error = given - kept @ up.T - wanted[rows]
            losses[step] = error.abs().mean()
            gradient = error.sign().div_(error.numel())
            back = (gradient @ up).neg_().mul_(hidden > 0)
            adam_step(up, (gradient.T @ kept).neg_(), up_mean, up_square, self.learning_rate, step + 1)
            adam_step(down, back.T @ given, down_mean, down_square, self.learning_rate, step + 1)
        return down, up, losses

    def _batches(self, count: int, task: str, seed: int) -> Iterator[Tensor]:
        """The numbers of each step's images: every epoch takes all of them, in an order of its own; the last batch of an
        epoch may be smaller."""
        for epoch in itertools.count():
            order = uniform(seed, "surgery.batches", f"{task} {epoch}", 0, count).argsort(stable=True)
            yield from order.split(self.batch_size)
