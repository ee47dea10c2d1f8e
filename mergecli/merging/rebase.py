"""Task vectors moved to another base of the same architecture.

theta_a is the base that a task vector tau was made on, theta_b the other one, s = theta_b - theta_a, tensor by tensor:

identity        tau
orthogonal      tau - (<tau, s> / |s|^2) s: what the bases differ in is not moved a second time; tau where |s|^2 is at most 1e-12
gradient_sign   tau where its sign is that of -dL/dtheta at theta_b, else 0 (GradFix)
gradient_force  |tau| with the sign of -dL/dtheta at theta_b

L is the mean cross-entropy of labeled training images of the task against the zero-shot head of theta_b's CLIP, or of theta_a's if
theta_b is a tower alone. Nothing that
changes widths or depths is among them: it needs maps between the layers of two models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergecli.data.tasks import find
from mergecli.formats.mixture import one_tower
from mergecli.formats.opening import model_path, open_source
from mergecli.hub.fetched import expect_all
from mergecli.merging.models import Models
from mergecli.methods._base import Group, Unit
from mergecli.recipe.schema import Recipe
from mergecli.runtime import interrupts
from mergecli.runtime.counts import count
from mergecli.runtime.errors import InputError, UsageError, did_you_mean, listed
from mergecli.storage.differences import Form, differences, other_architecture
from mergecli.storage.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

TRANSPORTS = ("identity", "orthogonal", "gradient_sign", "gradient_force")
"""Names of the ways to move a task vector."""
EXAMPLES = 128
"""Images of which the gradient is taken by default."""

_BATCH = 32
_SAME = 1e-12
"""|s|^2 of tensors that count as equal in both bases."""


@dataclass(frozen=True)
class Transport:
    """How task vectors are moved, and where to."""

    name: str
    start: Source
    """The base that they were made on, and the one that they are moved to."""
    goal: Source
    examples: int = EXAMPLES

    @classmethod
    def of(cls, name: str | None, start: Source, goal: Source, examples: int | None) -> Transport:
        """Raises UsageError if there is no such way, or it looks at no images and a number of them was given."""
        name = name or "orthogonal"
        if name not in TRANSPORTS:
            raise UsageError(
                f"transport: expected one of {', '.join(TRANSPORTS)}, got `{name}`{did_you_mean(name, TRANSPORTS)}"
            )
        if examples is not None and not name.startswith("gradient"):
            raise UsageError(f"examples: `{name}` looks at no images", "leave it out")
        return cls(name, start, goal, EXAMPLES if examples is None else count("examples", examples))

    @property
    def label(self) -> str:
        """The name of the goal among the models."""
        return f"{self.goal} (the base to move to)"

    def recipe_of(self, recipe: Recipe) -> Recipe:
        """The recipe with `start` as its base, whatever it names; of equal sources its own, which a lock may have pinned.

        Raises:
            UsageError: the task of a model, whose images are needed, is unknown. InputError: the bases have other tensors, or
                one of them is missing.
        """
        known = recipe if str(recipe.base) == str(self.start) else replace(recipe, base=self.start)
        for name in known.tuned if self.name.startswith("gradient") else ():
            find(name, known)
        self._check(known)
        return known

    def _check(self, recipe: Recipe) -> None:
        assert recipe.base is not None
        expect_all([recipe.base, self.goal], recipe)
        with ExitStack() as stack:
            opened = [stack.enter_context(open_source(each)) for each in (recipe.base, self.goal)]
            for each in opened:
                one_tower(each)
            start, goal = (each.vision() for each in opened)
            for each in (start, goal):
                if each.is_task_vector:
                    raise InputError(f"{each.path}: is a task vector, a base was expected")
            want = {name: Form(entry.shape) for name, entry in start.entries.items()}
            if lines := differences(goal.entries, want, f"{recipe.base} has"):
                other = other_architecture(goal.entries, want, f"{recipe.base} has")
                raise InputError(
                    f"{self.goal}: a task vector of {recipe.base} cannot be moved to it:\n"
                    f"{listed([other] if other else lines)}",
                    "both bases must have the same architecture: an entry of the one has no place in the other",
                )

    def signs(self, recipe: Recipe, name: str) -> Mapping[str, Tensor]:
        """Tensor -> signs that the task vector of a task should have; empty where no images are looked at.

        Raises:
            UsageError: there is no task of that name. InputError: its data are missing.
        """
        return _signs(self.goal, recipe, name, self.examples) if self.name.startswith("gradient") else {}

    def move(self, group: Group, signs: Mapping[str, Tensor]) -> Tensor:
        """(...) the moved task vector of one tensor; the group has the task vector and theta_b, in this order."""
        import torch

        tau, shift = group.deltas
        if self.name == "orthogonal":
            flat, along = tau.double().flatten(), shift.double().flatten()
            square = float(along @ along)
            return tau if square <= _SAME else tau - (float(flat @ along) / square) * shift
        sign = signs.get(group.name)
        if sign is None:
            return tau
        if self.name == "gradient_force":
            return tau.abs() * sign
        return torch.where(tau.sign() == sign, tau, 0.0)


def write_moved(
    models: Models, transport: Transport, signs: Mapping[str, Tensor], write: Callable[[str, Tensor], None]
) -> tuple[float, float]:
    """Moves the task vector of the first of two models, the second of which is theta_b, and gives its norm before and after."""

    def work(_: int, group: Group) -> tuple[float, float]:
        before = float(group.deltas[0].double().square().sum())
        moved = transport.move(group, signs)
        write(group.name, moved)
        return before, float(moved.double().square().sum())

    squares = list(models.map(work, unit=Unit.TENSOR))
    before, after = (sum(each[number] for each in squares) ** 0.5 for number in (0, 1))
    return before, after


def _signs(goal: Source, recipe: Recipe, name: str, examples: int) -> dict[str, Tensor]:
    import torch
    from torch.nn.functional import cross_entropy

    from mergecli.clip.heads import clip_digests, compare
    from mergecli.clip.model import features, load_clip, set_tower
    from mergecli.clip.preprocessing import Normalization
    from mergecli.training.data import TrainingTask

    assert recipe.base is not None
    with open_source(goal) as tower:
        whole = goal if tower.is_whole_clip else recipe.base
        clip = load_clip(model_path(whole))
        if whole is not goal:
            set_tower(clip, tower)
    task = TrainingTask.of(find(name, recipe), False, None)
    task.check(clip)
    prepared = task.prepare(clip, clip_digests(model_path(whole)).text, examples)
    clip.model.requires_grad_(True)
    normalized = Normalization(clip)
    rows = next(prepared.batches(min(examples, len(prepared.images)), recipe.seed, 0))
    for part in rows.split(_BATCH):
        interrupts.check()
        logits = compare(clip, features(clip, normalized(prepared.images.rows(part))), prepared.head)
        loss = cross_entropy(logits, prepared.images.labels[part], reduction="sum")
        (loss / len(rows)).backward()
    found = {name: each.grad for name, each in clip.model.named_parameters()}
    return {key: torch.sign(-each) for key, each in found.items() if each is not None}
