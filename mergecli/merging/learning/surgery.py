"""What representation surgery corrects, a merged tower, and what it learns: kept as a safetensors file, found again by
content, applied without images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.clip.pixels import micro_batch_size
from mergecli.formats.mixture import mixture_of
from mergecli.formats.opening import open_source
from mergecli.merging.learning.files import KIND, Learning, Lesson, finite, read_learnt, share, write_learnt
from mergecli.merging.models import Models, check_fit
from mergecli.merging.outputs import Output
from mergecli.methods._base import uniform
from mergecli.methods.representation_surgery import DOWN, UP, RepresentationSurgery, Surgeries
from mergecli.recipe.schema import Recipe
from mergecli.results.cells import Column
from mergecli.results.tables import Table
from mergecli.runtime.distributed import is_first
from mergecli.runtime.errors import InputError, UsageError
from mergecli.runtime.progress import Progress
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import about
from mergecli.storage.sources import Source, parse_source
from mergecli.storage.store import home, locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images

MERGED, LEARNT = "merged tower", "learnt surgery"
"""What a result calls the files that it is made of, besides the models; no task has such a name."""


def surgery(
    models: Models, output: Output, stack: ExitStack, progress: Progress | None, files: Learning
) -> Lesson:
    """The merged tower and the corrections, read or learnt now; files stay open until `stack` ends.

    Raises:
        UsageError: no merged tower is named, there are no images for a task, or the file is of another method.
        InputError: a file is damaged, or does not fit the models.
    """
    method, recipe = output.method, output.recipe
    assert isinstance(method, RepresentationSurgery)
    source = _source(method)
    merged = _opened(source, models, recipe, stack)
    files.refuse_inputs(output, {MERGED: merged.files[0]})
    method = replace(method, merged=source.label)  # without the folders of its path
    if not is_first():  # the first of several processes learns, and writes
        return Lesson(replace(output, method=method))
    path = files.coefficients or _learnt(models, merged, method, recipe, progress)
    own, found = {"merged": method.merged}, () if method.feature_size else ("feature_size",)
    used, stored = read_learnt(path, method, recipe, models.tuned, stack, ours=own, open_=found)
    _check(stored, used, len(models.tuned))
    share(path, trace_table(stored, tuple(models.tuned)), files)

    def read(name: str, start: int, stop: int) -> Tensor:
        values = merged.read_entries(name, start, stop).float()
        return finite(merged, name, values).to(models.device)

    learnt = Surgeries(stored.read(DOWN), stored.read(UP), read)
    facts = {"adapted_on": stored.metadata["adapted_on"]}
    return Lesson(replace(output, method=used), learnt, {MERGED: merged, LEARNT: stored}, facts)


def _source(method: RepresentationSurgery) -> Source:
    if method.merged is None:
        raise UsageError(
            "`method.merged`: no merged tower is named that the surgery could correct",
            "make one with another method, such as `mergecli merge RECIPE --method ada_merging -o ada.safetensors`; "
            "then name it with `--set method.merged=ada.safetensors`",
        )
    return parse_source(method.merged, Path())


def _opened(source: Source, models: Models, recipe: Recipe, stack: ExitStack) -> Checkpoint:
    """The tower that is corrected, once it is known that it fits the models."""
    merged = stack.enter_context(open_source(source, recipe.base)).vision()
    if merged.is_mixture:
        raise InputError(
            f"{merged.path}: `method.merged`: expected one plain tower, got "
            + ("one that routes" if mixture_of(merged).is_routed else "towers of several tasks"),
            "name a merge by a method that writes one tower; a task's own tower in such a file is `PATH#TASK`",
        )
    if merged.is_task_vector:
        raise InputError(f"{merged.path}: is a task vector, a merged tower was expected as `method.merged`")
    check_fit(replace(models, tuned={MERGED: merged}))
    return merged


def _learnt(
    models: Models,
    merged: Checkpoint,
    method: RepresentationSurgery,
    recipe: Recipe,
    progress: Progress | None,
) -> Path:
    """The file of the store with what the method learns on these towers and images."""

    work = Surgery.of(models, merged, method, recipe)
    folder = home() / KIND / methods.name_of(method)
    path = folder / f"{work.key}.safetensors"
    if not path.exists():
        tensors = work.learn(folder / "tasks", progress)
        used = replace(method, feature_size=tensors[DOWN].shape[2])
        inputs = {**models.digests(), MERGED: merged.digest()}
        write_learnt(path, tensors, used, recipe, models.tuned, inputs, work.looked_at)
    return path


def trace_table(stored: Checkpoint, tasks: tuple[str, ...]) -> Table:
    """A row for each step: the mean loss, and that of each task's batch."""

    rows = stored.read(LOSSES).tolist()
    columns = ["step", "loss", *(f"loss {task}" for task in tasks)]
    return Table(
        tuple(Column(name, "number") for name in columns),
        tuple((step, sum(row) / len(row), *row) for step, row in enumerate(rows, 1)),
    )


def _check(stored: Checkpoint, method: RepresentationSurgery, tasks: int) -> None:
    """Raises InputError unless the file's tensors are what its settings say, and numbers."""

    shapes = {key: part.shape for key, part in method.extras({}, tasks).items()}
    for key, shape in {**shapes, LOSSES: (method.steps, tasks)}.items():
        entry = stored.entries.get(key)
        if entry is None or entry.shape != shape or entry.dtype != "F32":
            found = "is missing" if entry is None else f"is {entry.dtype} of shape {entry.shape}"
            raise InputError(f"{stored.path}: `{key}` {found}, expected F32 of shape {shape}")
        finite(stored, key, stored.read(key))


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
        from mergecli.data.images import load_images
        from mergecli.data.tasks import find

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

        from mergecli.storage.safetensors_writer import save_tensors

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

        from mergecli.clip.model import features, set_tower
        from mergecli.clip.pixels import batches

        images, done = self.images[task], 0
        result = torch.empty(len(images), int(clip.model.config.projection_dim))
        if not len(images):
            return result
        set_tower(clip, tower)
        with torch.no_grad():
            for batch in batches(
                clip, images, micro_batch_size(clip) if clip.device.type == "cpu" else DEVICE_PIECE
            ):
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
