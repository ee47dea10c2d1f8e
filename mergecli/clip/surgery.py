"""Representation surgery learnt: what two towers make of a task's images, and the steps that bring them together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.checkpoint import Checkpoint, open_checkpoint
from mergecli.clip.seats import piece_of
from mergecli.errors import InputError, UsageError
from mergecli.methods._kinds import uniform
from mergecli.methods.representation_surgery import DOWN, UP, RepresentationSurgery
from mergecli.models import Models
from mergecli.progress import Progress
from mergecli.provenance import about
from mergecli.recipe import Recipe
from mergecli.sources import locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip

LOSSES = "trace.losses"
"""(steps, T) the loss of each step's batch."""
DEVICE_PIECE = 128
"""Images that go through the tower at once on a device beside the processor."""


@dataclass(frozen=True)
class Surgery:
    """The learning of one method on a merged tower: everything that the result depends on."""

    models: Models
    merged: Checkpoint
    method: RepresentationSurgery
    recipe: Recipe
    images: Mapping[str, Images] = field(repr=False)
    """Task -> the images that are looked at."""

    @classmethod
    def of(cls, models: Models, merged: Checkpoint, method: RepresentationSurgery, recipe: Recipe) -> Surgery:
        """Raises UsageError if a model is not named after a task; InputError if its images are not there."""
        from mergecli.clip.images import load_images
        from mergecli.clip.tasks import find

        if recipe.base is None or models.base is None:
            raise UsageError(
                "there is no base, whose projection makes the features", "name it with `base = ...`"
            )
        chosen: dict[str, Images] = {}
        for name in models.tuned:
            task = find(name, recipe)
            split = {"train": task.train_split, "test": task.split}.get(method.split, method.split)
            every = load_images(task, split)
            count = method.looked_at(len(every))
            order = uniform(recipe.seed, "surgery.images", name, 0, len(every)).argsort(stable=True)
            few = order[:count].sort().values.tolist()
            chosen[name] = every if count == len(every) else every.chosen(few)
        return cls(models, merged, method, recipe, chosen)

    @property
    def folder(self) -> Path:
        """Where the whole CLIP is."""
        assert self.recipe.base is not None
        return locate(self.recipe.base)

    @cached_property
    def looked_at(self) -> dict[str, Any]:
        """Task -> split, number and digest of the images."""
        return {
            name: {"split": each.split, "images": len(each), "data": each.fingerprint}
            for name, each in self.images.items()
        }

    @cached_property
    def keys(self) -> dict[str, str]:
        """Task -> a name for the file of what is learnt for it, which depends on no other task."""
        from mergecli.clip.heads import clip_digests, processing_texts

        settings = methods.table_of(self.method, without=("merged", "feature_size"))
        assert self.models.base is not None
        common = [
            settings, self.recipe.seed, self.merged.digest(), self.models.base.digest(), clip_digests(self.folder),
            processing_texts(self.folder),
        ]  # fmt: skip
        own = {name: [name, each.digest(), self.looked_at[name]] for name, each in self.models.tuned.items()}
        return {
            name: sha256(json.dumps([*common, *each]).encode()).hexdigest()[:32] for name, each in own.items()
        }

    @property
    def key(self) -> str:
        """A name for the file of what is learnt for all tasks."""
        return sha256(json.dumps(self.keys).encode()).hexdigest()[:32]

    def learn(self, folder: Path, progress: Progress | None) -> dict[str, Tensor]:
        """(T, rank, D), (T, D, rank) and (steps, T): what is learnt for all tasks, and the losses on the way.

        Each task's part is kept in a file of `folder`, and taken from there; an interrupted run goes on with the next.

        Raises:
            InputError: the towers do not fit the CLIP, an image cannot be read, or features are no numbers.
        """
        import torch

        from mergecli.clip.model import save_tensors

        paths = {name: folder / f"{key}.safetensors" for name, key in self.keys.items()}
        found: list[dict[str, Tensor]] = []
        clip: Clip | None = None
        for name, path in paths.items():
            if not path.exists():
                clip = clip or self._clip()
                save_tensors(
                    self._learn(clip, name, progress),
                    path,
                    about("surgery of one task", task=name, what=f"surgery of {name}"),
                )
            with open_checkpoint(path) as stored:
                found.append({key: stored.read(key) for key in stored.entries})
        down, up = (torch.stack([each[key] for each in found]) for key in (DOWN, UP))
        return {DOWN: down, UP: up, LOSSES: torch.stack([each[LOSSES] for each in found], 1)}

    def _clip(self) -> Clip:
        """The CLIP, without its text tower."""
        from mergecli.clip.model import check_tower, load_clip

        clip = load_clip(self.folder)
        for each in (self.merged, *self.models.tuned.values()):
            check_tower(clip, each)
        size, wanted = int(clip.model.config.projection_dim), self.method.feature_size
        if self.method.rank > size:
            raise UsageError(f"`method.rank`: is {self.method.rank}, the base's features have {size}")
        if wanted not in (0, size):
            raise UsageError(f"`method.feature_size`: is {wanted}, the base's features have {size}")
        clip.model.to(self.models.device)
        del clip.model.text_model  # not used, and as large as a tower
        return clip

    def _learn(self, clip: Clip, task: str, progress: Progress | None) -> dict[str, Tensor]:
        """What is learnt for one task."""
        towers, total = (self.merged, self.models.tuned[task]), 2 * len(self.images[task])
        done = 0

        def tell(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(f"{task}: features of the merged and its own model", done, total)

        given, wanted = (self._features(clip, each, task, tell) for each in towers)
        down, up, losses = self.method.learn(given, wanted, task, self.recipe.seed)
        return {DOWN: down, UP: up, LOSSES: losses}

    def _features(self, clip: Clip, tower: Checkpoint, task: str, tell: Callable[[int], None]) -> Tensor:
        """(N, D) float32 unit features of a task's images, on the CPU."""
        import torch

        from mergecli.clip.batches import batches
        from mergecli.clip.model import features, set_tower

        images, done = self.images[task], 0
        result = torch.empty(len(images), int(clip.model.config.projection_dim))
        if not len(images):
            return result
        set_tower(clip, tower)
        with torch.no_grad():
            for batch in batches(clip, images, piece_of(clip) if clip.device.type == "cpu" else DEVICE_PIECE):
                image = features(clip, batch).float()
                result[done : done + len(batch)] = image / image.norm(dim=-1, keepdim=True)
                done += len(batch)
                tell(len(batch))
        if not bool(result.isfinite().all()):
            raise InputError(
                f"{tower.path}: gives features of {task} that are NaN or infinity",
                "look at the weights with `mergecli info`",
            )
        return result
