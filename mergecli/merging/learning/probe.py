"""Statistics made: the images that a method looks at, and one file of what it measures on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergecli.clip.pixels import batches
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.atomic import write_errors
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.safetensors_format import bytes_of
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.store import locate

if TYPE_CHECKING:
    from torch import Size, Tensor
    from torch.nn import Module

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images
    from mergecli.data.tasks import Task
    from mergecli.merging.models import Models
    from mergecli.methods._calibrated import Calibrated
    from mergecli.recipe.schema import Recipe
    from mergecli.runtime.progress import Progress


@dataclass(frozen=True)
class Subject:
    """A task and its images; None where they are not on this machine."""

    name: str
    task: Task | None = None
    images: Images | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What tells these images, and the head where that is used, from others."""

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes."""
        own = self.task.classes if self.task else None
        return own or (self.images.classes if self.images else None) or ()


def subject(name: str, method: Calibrated, recipe: Recipe, *, may_lack: bool) -> Subject:
    """A task and its images; with `may_lack` perhaps without them.

    Raises:
        UsageError: there is no such task, or no such split. InputError: the images are missing or damaged.
    """
    from mergecli.data.images import load_images
    from mergecli.data.tasks import digest, find

    try:
        task = find(name, recipe)
        if task.data.kind != "toy":
            locate(task.data)
    except (UsageError, InputError):
        if may_lack:
            return Subject(name)
        raise
    images = load_images(
        task, {"train": task.train_split, "test": task.split}.get(method.split, method.split)
    )
    found = Subject(name, task, images)
    facts: dict[str, Any] = {"split": images.split, "images": min(method.examples, len(images))}
    facts["data"] = images.fingerprint
    if method.needs_head:
        facts |= {"classes": digest(found.classes), "templates": digest(task.templates)}
    return replace(found, facts=facts)


class Laboratory:
    """A CLIP that takes one task's tower after another, and measures."""

    def __init__(
        self, method: Calibrated, models: Models, recipe: Recipe, subjects: Sequence[Subject]
    ) -> None:
        from mergecli.clip.heads import zero_shot_head
        from mergecli.clip.model import check_tower, load_clip

        assert recipe.base is not None
        self._method, self._models, self._seed = method, models, recipe.seed
        self._clip: Clip = load_clip(locate(recipe.base))
        for each in models.tuned.values():
            check_tower(self._clip, each)
        self._clip.model.to(models.device)
        self._heads = {
            each.name: zero_shot_head(self._clip, each.classes, each.task.templates)
            for each in subjects
            if each.task and method.needs_head
        }
        del self._clip.model.text_model  # no longer used, and as large as a tower

    def write(
        self, path: Path, subjects: Sequence[Subject], metadata: Mapping[str, str], progress: Progress | None
    ) -> None:
        """Measures the tasks, and writes what comes out as one file, tensor by tensor as it is known.

        Raises:
            InputError: a model gives NaN or infinity, or an image cannot be read.
        """
        reference = self._models.reference.entries
        layout = self._method.layout({name: reference[name].shape for name in self._models.floats})
        title = subjects[0].name if len(subjects) == 1 else f"{len(subjects)} tasks"

        def tell(done: int, total: int) -> None:
            if progress:
                progress(f"{title}: measuring", done, total)

        with ExitStack() as stack:
            writer = stack.enter_context(SafetensorsWriter(path, layout, metadata))
            measured = stack.enter_context(closing(self._measured(subjects, path.parent, tell)))
            for name, value in measured:
                if not bool(value.isfinite().all()):
                    raise InputError(
                        f"{title}: `{name}` comes out as NaN or infinity",
                        "look at the weights with `mergecli info`",
                    )
                writer.write(name, value.detach().cpu().contiguous())

    def _measured(
        self, subjects: Sequence[Subject], folder: Path, tell: Callable[[int, int], None]
    ) -> Generator[tuple[str, Tensor]]:
        from mergecli.clip.model import set_tower
        from mergecli.data.images import drawn

        method, models = self._method, self._models
        seed = self._seed if method.shuffle else None
        chosen = [drawn(each.images, method.examples, seed) for each in subjects if each.images]
        assert len(chosen) == len(subjects), "images are missing"
        with ExitStack() as stack:
            scratch = Scratch(folder, stack)
            if method.joint:
                assert models.base is not None
                tuned = tuple(models.tuned.values())
                joint = JointTowerProbe(self._clip, tuned, models.base, chosen, scratch, tell)
                yield from method.measure_jointly(joint)
                return
            (one,) = subjects
            set_tower(self._clip, models.tuned[one.name])
            probe = TowerProbe(self._clip, chosen[0], self._heads.get(one.name), scratch, tell)
            yield from method.measure(probe)


Tell = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""


@dataclass(frozen=True)
class Scratch:
    """Where files without a name are made, which vanish when `stack` ends or the program dies."""

    folder: Path
    stack: ExitStack

    def file(self) -> IO[bytes]:
        """A new one, to write and read."""
        with write_errors(self.folder):
            return self.stack.enter_context(tempfile.TemporaryFile(dir=self.folder))


class TowerProbe:
    """One task's tower, which is in the CLIP already, and its images."""

    def __init__(self, clip: Clip, chosen: Images, head: Tensor | None, scratch: Scratch, tell: Tell) -> None:
        self._clip, self._chosen, self._head = clip, chosen, head
        self._scratch, self._tell = scratch, tell
        self.model = tower_of(clip)

    def batches(self, size: int, /) -> Iterator[Tensor]:
        """(B, 3, H, W) the task's images, `size` at a time."""
        done = 0
        for batch in batches(self._clip, self._chosen, size):
            yield batch
            done += len(batch)
            self._tell(done, len(self._chosen))

    def logits(self, pixel_values: Tensor, /) -> Tensor:
        """(B, C) logits of the task's zero-shot head."""
        from mergecli.clip.heads import logits

        assert self._head is not None, "a method that asks for logits sets `needs_head`"
        return logits(self._clip, self._head, pixel_values)

    def layers(self) -> Iterator[tuple[str, Module]]:
        """Name and module of each transformer layer, from the first to the last."""
        return layers_of(self.model, self._tell)

    def states(self, size: int, /) -> DiskStates:
        """What goes into the first layer."""
        return DiskStates(self._scratch, embedded(self._clip, self._chosen, size), self._clip)


class JointTowerProbe:
    """The images of every task, and a tower that takes merged weights; what is read of each model is a tensor."""

    def __init__(
        self,
        clip: Clip,
        tuned: Sequence[Checkpoint],
        base: Checkpoint,
        chosen: Sequence[Images],
        scratch: Scratch,
        tell: Tell,
    ) -> None:
        self._clip, self._tuned, self._base, self._chosen = clip, tuned, base, chosen
        self._scratch, self._tell = scratch, tell
        self.model = tower_of(clip)

    @property
    def tasks(self) -> int:
        """T."""
        return len(self._tuned)

    def tuned(self, task: int, name: str, /) -> Tensor:
        """(...) float32 weights of a task's model."""
        stored = self._tuned[task]
        value = stored.read(name).float()
        if stored.is_task_vector:
            value += self._base.read(name).float()
        return value.to(self._clip.device)

    def base(self, name: str, /) -> Tensor:
        """(...) float32 weights of the base."""
        return self._base.read(name).float().to(self._clip.device)

    def layers(self) -> Iterator[tuple[str, Module]]:
        """Name and module of each transformer layer, from the first to the last."""
        return layers_of(self.model, self._tell)

    def states(self, task: int, size: int, /) -> DiskStates:
        """What goes into the first layer for the images of a task, with the model's weights of now."""
        return DiskStates(self._scratch, embedded(self._clip, self._chosen[task], size), self._clip)


class DiskStates:
    """(B, S, D) float32 activations of many batches, on disk."""

    def __init__(self, scratch: Scratch, batches: Iterable[Tensor], clip: Clip) -> None:
        self._clip, self._folder, self._file = clip, scratch.folder, scratch.file()
        self._shapes: list[Size] = []
        for batch in batches:
            self._shapes.append(batch.shape)
            self._write(batch)

    def look(self, layer: Module, /) -> None:
        """Lets them go through the layer, and forgets what comes out."""
        self._through(layer, keep=False)

    def step(self, layer: Module, /) -> None:
        """Puts what comes out of the layer in their place."""
        self._through(layer, keep=True)

    def _through(self, layer: Module, *, keep: bool) -> None:
        import torch

        place = 0
        for shape in self._shapes:
            interrupts.check()
            batch = torch.empty(shape)
            self._file.seek(place)
            self._file.readinto(bytes_of(batch))  # pyright: ignore[reportAttributeAccessIssue]
            with torch.no_grad():
                after = layer(batch.to(self._clip.device), None)
            if keep:
                self._file.seek(place)
                self._write(after)
            place += batch.nbytes

    def _write(self, batch: Tensor) -> None:
        with write_errors(self._folder):
            self._file.write(bytes_of(batch.cpu()))


def tower_of(clip: Clip) -> Module:
    """The vision tower in a module that gives its parameters the names they have in checkpoints."""
    from torch.nn import ModuleDict

    return ModuleDict({"vision_model": clip.tower})


def layers_of(model: Any, tell: Tell) -> Iterator[tuple[str, Module]]:
    """Name and module of each transformer layer; tells how many are done."""
    layers = model["vision_model"].encoder.layers
    for number, layer in enumerate(layers):
        yield f"vision_model.encoder.layers.{number}", layer
        tell(number + 1, len(layers))


def embedded(clip: Clip, chosen: Images, size: int) -> Iterator[Tensor]:
    """(B, S, D) what goes into the first layer: patches with their positions, normalised."""
    import torch

    tower: Any = clip.tower
    for batch in batches(clip, chosen, size):
        with torch.no_grad():
            yield tower.pre_layrnorm(tower.embeddings(batch))
