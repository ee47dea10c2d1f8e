"""An adaptation: the images that a method looks at, and its steps, which go on where an interrupted run stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import caching, interrupts, methods
from mergecli.clip.adaptation_run import Run
from mergecli.clip.tasks import Task, digest, find
from mergecli.errors import InputError, UsageError, quoted
from mergecli.methods._adapted import Adapted, State
from mergecli.methods._mixture import Installed
from mergecli.methods._routers import WeightEnsembling
from mergecli.models import Models
from mergecli.parallel import Ranks, is_first
from mergecli.progress import Progress
from mergecli.recipe import Recipe
from mergecli.sources import locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip
    from mergecli.clip.trial import Seen, TowerTrial


@dataclass(frozen=True)
class Adaptation:
    """A method's work on some models: everything that the result depends on."""

    models: Models
    method: Adapted
    recipe: Recipe
    images: Mapping[str, tuple[Task, Images]]
    """The tasks that are looked at."""
    inputs: Mapping[str, str]
    """Input -> digest."""
    masks: Checkpoint | None = None
    """The file of masks that the method begins with, if it names one."""

    @classmethod
    def of(
        cls, models: Models, method: Adapted, recipe: Recipe, masks: Checkpoint | None = None
    ) -> Adaptation:
        """Raises UsageError if a model is not named after a task; InputError if its images are not there."""
        from mergecli.clip.images import load_images

        looked = method.adapt_on or tuple(models.tuned)
        if unknown := [name for name in looked if name not in models.tuned]:
            raise UsageError(f"`method.adapt_on`: there are no models {quoted(unknown)}")
        if recipe.base is None or models.base is None:
            raise UsageError(
                "there is no base, whose text tower makes the heads", "name it with `base = ...`"
            )
        images: dict[str, tuple[Task, Images]] = {}
        for name in looked:
            task = find(name, recipe)
            split = {"train": task.train_split, "test": task.split}.get(method.split, method.split)
            images[name] = task, load_images(task, split)
        inputs = {"base": models.base.digest(), **models.digests()}
        if masks is not None:
            inputs["learnt masks"] = masks.digest()
        return cls(models, method, recipe, images, inputs, masks)

    @property
    def folder(self) -> Path:
        """Where the whole CLIP is."""
        assert self.recipe.base is not None
        return locate(self.recipe.base)

    @property
    def looked_at(self) -> dict[str, Any]:
        """Task -> split, number and digests of the images, and of the class names and prompts."""
        return {
            name: {"split": each.split, "images": len(each), "data": each.fingerprint,
                   "classes": digest(task.classes or each.classes or ()), "templates": digest(task.templates)}
            for name, (task, each) in self.images.items()
        }  # fmt: skip

    @property
    def key(self) -> str:
        """A name for files of this work."""
        from mergecli.clip.heads import clip_digests, processing_texts

        facts = [
            methods.name_of(self.method), methods.table_of(self.method, without={*self.method.unlearnt, "masks"}),
            self.recipe.seed, list(self.inputs.items()), self.looked_at, clip_digests(self.folder), processing_texts(self.folder),
        ]  # fmt: skip
        return sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def run(
        self, surveyed: State, partial: Path, progress: Progress | None, ranks: Ranks, device: str
    ) -> tuple[State, State]:
        """What is kept after the last step, and the trace: (steps, T) entropies and (steps, T or 1) coefficients.

        The state is written to the file `partial` now and then, and taken from it.

        Each of several processes computes the gradients of its own tasks; only those of coefficients, mask logits or
        routers are added, in the order of the ranks. So many processes always give the same bytes. Other numbers of
        them round sums otherwise: coefficients are within a thousandth of `learning_rate` a step of each other, except
        those whose gradient is nothing but rounding (biases of keys), from which Adam makes whole steps.

        Raises:
            InputError: the entropy is no longer a number, or the base and the models do not fit together.
        """
        import torch

        trial = self._trial(surveyed, ranks, device)
        method, total, mean = self.method, self.method.total_steps, 0.0
        with torch.no_grad():
            run = Run(partial, self.key, method.begin(trial), method.phases, method.patience)
            run.load(ranks, len(self.models.tuned), len(method.shown(run.state)))
            try:
                while run.number < total:
                    interrupts.check()
                    losses, change = method.step(trial, run.state, run.number)
                    mean = float(losses.sum()) / len(self.images)
                    if not math.isfinite(mean):
                        break
                    with interrupts.undisturbed():
                        change()
                        run.add(losses, method.shown(run.state))
                    if progress is not None and is_first():
                        progress(f"adapting: mean entropy {mean:.3f}", run.number, total)
                    run.save_sometimes()
                kept = {key: each.cpu() for key, each in method.finish(trial, run.state).items()}
            except BaseException:
                with interrupts.undisturbed():
                    run.save()
                raise
        if not math.isfinite(mean):
            raise InputError(
                f"adapting: the entropy is {mean} in step {run.step + 1}",
                f"use lower learning rates (`learning_rate` is {method.learning_rate:g})",
            )
        return kept, run.trace(len(self.models.tuned))

    def _trial(self, surveyed: State, ranks: Ranks, device: str) -> TowerTrial:
        """The base, the prepared task vectors, the heads and a CLIP, all in memory."""
        import torch

        from mergecli.checkpoint import VISION
        from mergecli.clip.model import check_tower, load_clip
        from mergecli.clip.trial import TOGETHER, Moved, TowerTrial

        assert self.models.base is not None
        clip = load_clip(self.folder)
        check_tower(clip, self.models.base)
        known = {VISION + name for name, _ in clip.tower.named_parameters()}
        if unknown := [name for name in self.models.floats if name not in known]:
            raise InputError(f"the base has no {quoted(unknown)}", "only vision towers can be adapted")
        clip.model.to(device)
        seen = [each for number, each in enumerate(self.images) if number % ranks.count == ranks.own]
        looked = self._seen(clip, seen)
        del clip.model.text_model  # no longer used, and as large as a tower
        tasks, size, seed = list(self.models.tuned), self.method.batch_size, self.recipe.seed
        if isinstance(self.method, WeightEnsembling):
            installed = self._installed(clip, self.method, device)
            together = TOGETHER if self.method.train_routing == "sample" else size
            return TowerTrial(clip, tasks, {}, {}, looked, size, seed, ranks, installed, together)
        base: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        dtype, place = getattr(torch, self.method.vectors), self.method.vectors_on or device

        def look(_: int, group: Any) -> tuple[str, Tensor, Tensor]:
            vectors = self.method.prepared(group, surveyed)
            return group.name, group.base.to(device, copy=True), vectors.to(place, dtype, copy=True)

        for name, own, vectors in self.models.map(look, blocks=False):
            pin = place == "cpu" and device.startswith("cuda")  # else copies would wait for each other
            base[name], deltas[name] = own, vectors.pin_memory() if pin else vectors
        given = self.masks.read if self.masks else None
        return TowerTrial(clip, tasks, base, Moved(deltas, device), looked, size, seed, ranks, given=given)

    def _installed(self, clip: Clip, method: WeightEnsembling, device: str) -> Installed:
        """Puts the tower that routes into the CLIP, its routers still without weights."""
        import torch

        from mergecli.checkpoint import VISION

        parts: dict[str, Tensor] = {}

        def look(_: int, group: Any) -> dict[str, Tensor]:
            return {key: each.to(device, copy=True) for key, each in method.expand(group, None).items()}

        for found in self.models.map(look, blocks=False):
            parts |= found
        shapes = {name: self.models.reference.entries[name].shape for name in self.models.floats}
        for key, part in method.extras(shapes, len(self.models.tuned)).items():
            parts[key] = torch.zeros(part.shape, device=device)
        for name, tensor in clip.tower.state_dict().items():
            tensor.copy_(parts.pop(VISION + name))
        return method.install(
            clip.tower, parts.__getitem__, tuple(self.models.tuned), method.train_routing, VISION
        )

    def _seen(self, clip: Clip, names: list[str]) -> list[Seen]:
        """The images and heads of some of the tasks that are looked at."""
        from mergecli.clip.heads import cached_head, clip_digests
        from mergecli.clip.pixels import Processing, cached_pixels, stored_pixels
        from mergecli.clip.trial import Seen

        places, size = list(self.models.tuned), caching.allowed_size()
        text = clip_digests(self.folder).text if names else ""
        found: list[Seen] = []
        for name in names:
            task, images = self.images[name]
            how = Processing(max_size=size)
            few = 4 * self.method.total_steps * self.method.batch_size < len(images)
            if few and stored_pixels(clip, images, how) is None:
                how = Processing()  # not worth to decode all images
            head = cached_head(clip, task.classes or images.classes or (), task.templates, text, size)
            found.append(Seen(places.index(name), name, cached_pixels(clip, images, how), head))
        return found
