"""An adaptation: the images that a method looks at, and its steps, which go on where an interrupted run stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.data.tasks import Task, digest, find
from mergecli.merging.models import Models
from mergecli.methods._adapted import UNSAVED, Adapted, State
from mergecli.methods._mixture import Installed
from mergecli.methods._wemoe import WeightEnsembling
from mergecli.recipe.schema import Recipe
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import Ranks, is_first
from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.runtime.progress import Progress
from mergecli.storage import cache as caching
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import about
from mergecli.storage.store import locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images
    from mergecli.merging.learning.trial import Seen, TowerTrial
    from mergecli.storage.checkpoint import Checkpoint

SAVE_EVERY = 60.0
"""Seconds, at least, between two states that are saved: a run that is killed does about so many again."""


@dataclass
class Run:
    """The state after the steps so far, and the trace of them."""

    path: Path
    """Where the state is kept."""
    key: str
    """The work that it belongs to."""
    state: State
    phases: tuple[int, ...]
    """Steps at most of each."""
    patience: int
    """A phase ends when so many steps in it were on average no better than as many before; 0: it never ends early."""
    number: int = 0
    """The next step, counted through all phases as if none ended early."""
    entropies: list[Tensor] = field(default_factory=list["Tensor"])
    """(T,) of each step."""
    coefficients: list[Tensor] = field(default_factory=list["Tensor"])
    """(T,) or (1,) of each step."""
    _sums: list[float] = field(default_factory=list[float])
    """The sum of all tasks' entropies in each step of this phase."""
    _saved: int = 0
    """The step whose state stands in the file."""
    _due: float = field(default_factory=lambda: time.monotonic() + SAVE_EVERY)

    @property
    def step(self) -> int:
        """How many steps have been done."""
        return len(self.entropies)

    def add(self, losses: Tensor, shown: Tensor) -> None:
        """Counts a step, whose change is in the state by now: the entropies are of before it, what is shown is of after
        it."""
        self.coefficients.append(shown.cpu())
        self.entropies.append(losses.cpu())
        self._sums.append(float(self.entropies[-1].sum()))
        self.number += 1
        end = next(end for end in accumulate(self.phases) if end >= self.number)
        if self._stands_still():
            self.number = end
        if self.number == end:
            self._sums.clear()

    def _stands_still(self) -> bool:
        last, before = self._sums[-self.patience :], self._sums[-2 * self.patience : -self.patience]
        return 0 < self.patience == len(before) and sum(last) >= sum(before)

    def trace(self, tasks: int) -> State:
        """The trace as tensors: (steps, T) and (steps, T or 1)."""
        import torch

        empty = torch.zeros(0, tasks)
        return {
            "trace.entropies": torch.stack(self.entropies) if self.entropies else empty,
            "trace.coefficients": torch.stack(self.coefficients) if self.coefficients else empty,
        }

    def save_sometimes(self) -> None:
        """Saves if it is time; no more than a twentieth of all time goes into it."""
        now = time.monotonic()
        if now >= self._due:
            self.save()
            self._due = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - now))

    def save(self) -> None:
        """Writes everything that the next step needs, if there is something new."""
        from mergecli.storage.safetensors_writer import save_tensors

        if not is_first() or self.step == self._saved:
            return
        tensors = {f"state.{name}": each for name, each in self.state.items() if not name.startswith(UNSAVED)}
        tensors = {name: each.cpu().contiguous() for name, each in {**tensors, **self.trace(1)}.items()}
        save_tensors(tensors, self.path, about("adaptation state", key=self.key))
        self._saved = self.step

    def load(self, ranks: Ranks, tasks: int, shown: int) -> None:
        """Goes on from the file, if it is of the same work; all processes go on where the first one does.

        `tasks` and `shown` are the lengths of what is added at each step.
        """
        import torch

        device = next(iter(self.state.values())).device
        if is_first() and (found := self._stored()):
            self._take(found.pop("trace.entropies"), found.pop("trace.coefficients"))
            self.state = {name: found[f"state.{name}"].to(device) for name in self.state}
        steps = int(ranks.first(torch.tensor([self.step], device=device)))
        if ranks.count > 1 and steps:
            for each in self.state.values():
                ranks.first(each)
            trace = [torch.zeros(steps, width, device=device) for width in (tasks, shown)]
            if is_first():
                trace = [each.to(device) for each in self.trace(tasks).values()]
            self._take(*(ranks.first(each).cpu() for each in trace))

    def _take(self, entropies: Tensor, coefficients: Tensor) -> None:
        self.number = 0
        for rows in (self.entropies, self.coefficients, self._sums):
            rows.clear()
        for losses, shown in zip(entropies, coefficients, strict=True):
            self.add(losses, shown)
        self._saved = self.step

    def _stored(self) -> State | None:
        """What stands in the file; None if there is none that is whole and of the same work."""
        wanted = {f"state.{name}" for name in self.state} | self.trace(1).keys()
        try:
            with open_checkpoint(self.path) as stored:
                if stored.metadata.get("key") != self.key or set(stored.entries) != wanted:
                    return None
                return {name: stored.read(name) for name in stored.entries}
        except InputError:
            return None


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
        from mergecli.data.images import load_images

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

        from mergecli.clip.model import check_tower, load_clip
        from mergecli.merging.learning.trial import TOGETHER, Moved, TowerTrial
        from mergecli.storage.checkpoint import VISION

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

        from mergecli.storage.checkpoint import VISION

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
        from mergecli.merging.learning.trial import Seen

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
