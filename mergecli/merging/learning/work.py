"""What a method learns from: models, images and settings, and the key that its files in the store get by them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mergecli import methods
from mergecli.formats.opening import model_path
from mergecli.hub.fetched import expect_all
from mergecli.merging.learning.calibration import CalibrationTask, calibration_task, task_of
from mergecli.merging.learning.needed_files import SETTINGS, TITLES
from mergecli.merging.models import Models
from mergecli.methods._adapted import Adapted
from mergecli.methods._learned import Learner, Need
from mergecli.methods._task_learner import TaskLearner
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.storage.checkpoint import PROJECTION, VISION, Checkpoint

if TYPE_CHECKING:
    from mergecli.clip.heads import ClipDigests
    from mergecli.clip.model import Clip


class _HasSplit(Protocol):
    """Every method that looks at images has the setting `split`."""

    @property
    def split(self) -> str: ...


@dataclass(frozen=True)
class LearningWork:
    """A method that learns, the models, and the images that it looks at."""

    models: Models
    method: Learner
    recipe: Recipe
    needed: Mapping[Need, Checkpoint]
    tasks: Mapping[str, CalibrationTask] = field(repr=False)
    """Those whose images are looked at."""

    @classmethod
    def of(
        cls, models: Models, method: Learner, recipe: Recipe, needed: Mapping[Need, Checkpoint]
    ) -> LearningWork:
        """Raises UsageError if a model is not named after a task; InputError if its images are missing."""
        chosen = (method.adapt_on if isinstance(method, Adapted) else ()) or tuple(models.tuned)
        if unknown := [name for name in chosen if name not in models.tuned]:
            raise UsageError(
                f"`method.adapt_on`: there are no models {quoted(unknown)}",
                f"the models are {quoted(models.tuned)}",
            )
        if recipe.base is None or models.base is None:
            raise UsageError(
                "there is no base, a whole CLIP with which images are looked at", "name it with `base = ...`"
            )
        expect_all([], recipe, [task_of(name, recipe) for name in chosen])
        split = cast("_HasSplit", method).split
        tasks = {name: calibration_task(name, split, recipe) for name in chosen}
        if isinstance(method, TaskLearner):
            label, seed = f"{method.part_title}.images", recipe.seed
            tasks = {name: each.sampled(method.looked_at, label, seed) for name, each in tasks.items()}
        return cls(models, method, recipe, needed, tasks)

    @property
    def clip_folder(self) -> Path:
        """Where the whole CLIP is."""
        assert self.recipe.base is not None
        return model_path(self.recipe.base)

    def check(self) -> None:
        """Raises InputError if the towers, or the prompts of the tasks, do not fit the CLIP."""
        from mergecli.clip.heads import check_prompts

        clip = self.load_clip()
        if self.method.needs_head:
            for task in self.tasks.values():
                check_prompts(clip, task.classes, task.templates)

    def load_clip(self) -> Clip:
        """The CLIP, on the CPU; raises InputError if the towers that are put into it do not fit."""
        from mergecli.clip.model import check_tower, load_clip

        clip, method = load_clip(self.clip_folder), self.method
        if isinstance(method, TaskLearner):
            for each in (*self.needed.values(), *self.models.tuned.values()):
                check_tower(clip, each)
            method.check_features(int(clip.model.config.projection_dim))
            return clip
        assert self.models.base is not None
        check_tower(clip, self.models.base)
        known = {VISION + name for name, _ in clip.tower.named_parameters()} | {PROJECTION}
        if unknown := [name for name in self.models.floats if name not in known]:
            raise InputError(f"the base has no {quoted(unknown)}", "only vision towers can be adapted")
        return clip

    @property
    def inputs(self) -> dict[str, str]:
        """Input -> digest."""
        return self.models.digests() | {TITLES[need]: each.digest() for need, each in self.needed.items()}

    @cached_property
    def looked_at(self) -> dict[str, Any]:
        """Task -> what tells its images from others."""
        return {name: each.facts(head=self.method.needs_head) for name, each in self.tasks.items()}

    @cached_property
    def clip_digests(self) -> ClipDigests:
        """Digests of the CLIP's parts."""
        from mergecli.clip.heads import clip_digests

        return clip_digests(self.clip_folder)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the learning depends on."""
        method = self.method
        named = {SETTINGS[need] for need in method.needs}
        without = {*method.not_learned_from, *method.merge_time, *method.derived, *named}
        return methods.table_of(method, without=without)

    @property
    def key(self) -> str:
        """32 hex digits of everything that the result depends on."""
        from mergecli.clip.heads import processing_texts

        facts = [
            methods.name_of(self.method), self.settings, self.recipe.seed, list(self.inputs.items()), self.looked_at,
            self.clip_digests, processing_texts(self.clip_folder),
        ]  # fmt: skip
        return sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def task_key(self, task: str) -> str:
        """The same of what is learned for one task, which depends on no other task."""
        from mergecli.clip.heads import processing_texts

        assert self.models.base is not None
        facts = [
            self.settings, self.recipe.seed, *(each.digest() for each in self.needed.values()),
            self.models.base.digest(), self.clip_digests, processing_texts(self.clip_folder), task,
            self.models.tuned[task].digest(), self.looked_at[task],
        ]  # fmt: skip
        return sha256(json.dumps(facts).encode()).hexdigest()[:32]
