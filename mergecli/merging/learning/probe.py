"""Measuring statistics: what a method sees of a task's model and images, and the file of what it measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.clip.pixels import batches
from mergecli.formats.opening import model_path
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.storage.atomic import write_errors
from mergecli.storage.checkpoint import PROJECTION, Checkpoint
from mergecli.storage.safetensors_format import bytes_of
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.scratch import Scratch

if TYPE_CHECKING:
    from torch import Size, Tensor
    from torch.nn import Module

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images
    from mergecli.merging.learning.calibration import CalibrationTask
    from mergecli.merging.models import Models
    from mergecli.methods._calibrated import Calibrated
    from mergecli.recipe.schema import Recipe
    from mergecli.runtime.progress import Progress


class StatisticsRun:
    """Measures several tasks one after another, in one CLIP."""

    def __init__(
        self, method: Calibrated, models: Models, recipe: Recipe, tasks: Sequence[CalibrationTask]
    ) -> None:
        from mergecli.clip.heads import zero_shot_head

        self._method, self._models, self._seed = method, models, recipe.seed
        self.layout = method.layout(models.shapes)
        self._clip = fitting_clip(method, models, recipe, tasks)
        self._clip.model.to(models.device)
        self._heads = {
            each.name: zero_shot_head(self._clip, each.classes, each.templates)
            for each in tasks
            if each.task and method.needs_head
        }
        self._clip.drop_text_tower()

    def write(
        self,
        path: Path,
        tasks: Sequence[CalibrationTask],
        metadata: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        """Measures the tasks and writes one file, each tensor as soon as it is known.

        Raises:
            InputError: a model gives NaN or infinity, or an image cannot be read.
        """
        title = tasks[0].name if len(tasks) == 1 else f"{len(tasks)} tasks"

        def report(done: int, total: int) -> None:
            if progress:
                progress(f"{title}: measuring", done, total)

        with ExitStack() as stack:
            writer = stack.enter_context(SafetensorsWriter(path, self.layout, metadata, checked=True))
            scratch = Scratch(path.parent, stack)
            measured = stack.enter_context(
                closing(self._measured(tasks, scratch, self._method.examples, report, self._method))
            )
            for name, value in measured:
                if not bool(value.isfinite().all()):
                    raise InputError(
                        f"{title}: `{name}` comes out as NaN or infinity",
                        "its training diverged, or the file is damaged: take an earlier checkpoint",
                    )
                writer.write(name, value.detach().cpu().contiguous())

    def images(self, tasks: Sequence[CalibrationTask]) -> int:
        """How many images of these tasks are looked at."""
        return sum(min(self._method.examples, len(each.images)) for each in tasks if each.images)

    def expected_seconds(self, tasks: Sequence[CalibrationTask]) -> float:
        """About how long `write` takes for these tasks: as many seconds an image as a few images take more than one."""
        wanted = max(min(self._method.examples, len(each.images)) for each in tasks if each.images)
        self._seconds(tasks, 1)  # what is loaded or begun the first time counts once
        one, few = self._seconds(tasks, 1), min(FEW, wanted)
        if few == 1 or one > LONG:
            return one * wanted * self._method.rounds
        each = max(self._seconds(tasks, few) - one, 0.0) / (few - 1)
        return (one + each * (wanted - 1)) * self._method.rounds

    def _seconds(self, tasks: Sequence[CalibrationTask], examples: int) -> float:
        began = time.perf_counter()
        with ExitStack() as stack:
            scratch = Scratch(Path(), stack, in_memory=True)
            for _ in self._measured(tasks, scratch, examples, _report_nothing, self._method.trial()):
                pass
        return time.perf_counter() - began

    def _measured(
        self,
        tasks: Sequence[CalibrationTask],
        scratch: Scratch,
        examples: int,
        report: Report,
        method: Calibrated,
    ) -> Generator[tuple[str, Tensor]]:
        from mergecli.clip.model import set_tower
        from mergecli.data.images import drawn

        models = self._models
        has_projection = PROJECTION in models.shapes
        seed = self._seed if method.shuffle else None
        chosen = [drawn(each.images, examples, seed) for each in tasks if each.images]
        assert len(chosen) == len(tasks), "images are missing"
        if method.joint:
            assert models.base is not None
            tuned = tuple(models.tuned.values())
            joint = JointTaskProbe(self._clip, tuned, models.base, chosen, scratch, report, has_projection)
            yield from method.measure_jointly(joint)
            return
        (one,) = tasks
        if not method.of_base:  # whose tower is in the CLIP as it is loaded
            set_tower(self._clip, models.tuned[one.name])
        head = self._heads.get(one.name)
        probe = TaskProbe(self._clip, chosen[0], head, scratch, report, has_projection)
        yield from method.measure(probe)


def _report_nothing(done: int, total: int) -> None:
    del done, total


FEW = 9
"""Images that are measured to know how long many take."""
LONG = 2.0
"""Seconds that one image may take for more to be measured."""


def fitting_clip(
    method: Calibrated, models: Models, recipe: Recipe, tasks: Sequence[CalibrationTask]
) -> Clip:
    """The CLIP with which a method measures these tasks; raises InputError if models or prompts do not fit it."""
    from mergecli.clip.heads import check_prompts
    from mergecli.clip.model import check_tower, load_clip

    assert recipe.base is not None
    clip = load_clip(model_path(recipe.base))
    for each in models.tuned.values():
        check_tower(clip, each)
    for each in tasks:
        if each.task and method.needs_head:
            check_prompts(clip, each.classes, each.templates)
    return clip


Report = Callable[[int, int], None]
"""Called with how much is done, and the total."""


class TaskProbe:
    """The `Probe` of one task, whose tower is in the CLIP already."""

    def __init__(
        self,
        clip: Clip,
        chosen: Images,
        head: Tensor | None,
        scratch: Scratch,
        report: Report,
        has_projection: bool = False,
    ) -> None:
        """Args:
        has_projection: whether the visual projection is merged.
        """
        self._clip, self._chosen, self._head = clip, chosen, head
        self._scratch, self._report, self._has_projection = scratch, report, has_projection
        self.model = tower_of(clip, has_projection)

    def batches(self, size: int, /) -> Iterator[Tensor]:
        """(B, 3, H, W) the task's images, `size` at a time."""
        done = 0
        for batch in batches(self._clip, self._chosen, size):
            yield batch
            done += len(batch)
            self._report(done, len(self._chosen))

    def logits(self, pixel_values: Tensor, /) -> Tensor:
        """(B, C) logits of the task's zero-shot head."""
        from mergecli.clip.heads import logits

        assert self._head is not None, "a method that asks for logits sets `needs_head`"
        return logits(self._clip, self._head, pixel_values)

    def features(self, pixel_values: Tensor, /) -> Tensor:
        """(B, D) unit features."""
        from mergecli.clip.model import features

        found = features(self._clip, pixel_values)
        return found / found.norm(dim=1, keepdim=True)

    @property
    def projection(self) -> Tensor:
        """(D, W) the CLIP's visual projection."""
        return self._clip.model.visual_projection.weight

    def layers(self) -> Iterator[tuple[str, Module]]:
        """Name and module of each transformer layer, from the first to the last."""
        return layers_of(self.model, self._report)

    def behind(self) -> Iterator[tuple[str, Module]]:
        """The visual projection, if it is merged."""
        return behind_layers(self._clip, self._has_projection)

    def activations(self, size: int, /) -> ActivationFile:
        """The inputs of the first layer."""
        return ActivationFile(self._scratch, embedded(self._clip, self._chosen, size), self._clip)


class JointTaskProbe:
    """The `JointProbe`: the images of every task, and a tower for merged weights; models are read tensor by tensor."""

    def __init__(
        self,
        clip: Clip,
        tuned: Sequence[Checkpoint],
        base: Checkpoint,
        chosen: Sequence[Images],
        scratch: Scratch,
        report: Report,
        has_projection: bool = False,
    ) -> None:
        self._clip, self._tuned, self._base, self._chosen = clip, tuned, base, chosen
        self._scratch, self._report, self._has_projection = scratch, report, has_projection
        self.model = tower_of(clip, has_projection)

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
        return layers_of(self.model, self._report)

    def behind(self) -> Iterator[tuple[str, Module]]:
        """The visual projection, if it is merged."""
        return behind_layers(self._clip, self._has_projection)

    def activations(self, task: int, size: int, /) -> ActivationFile:
        """The inputs of the first layer for the images of a task, by the weights that the model has now."""
        return ActivationFile(self._scratch, embedded(self._clip, self._chosen[task], size), self._clip)


class ActivationFile:
    """The `Activations` of many batches, (B, S, D) float32 each, in a file."""

    def __init__(self, scratch: Scratch, batches: Iterable[Tensor], clip: Clip) -> None:
        self._clip, self._folder, self._file = clip, scratch.folder, scratch.file()
        self._shapes: list[Size] = []
        for batch in batches:
            self._shapes.append(batch.shape)
            self._write(batch)

    def look(self, layer: Module, /) -> None:
        """Sends them through the layer and drops its output: hooks see what goes in."""
        self._through(layer, keep=False)

    def step(self, layer: Module, /) -> None:
        """Replaces them by the layer's output."""
        self._through(layer, keep=True)

    def batches(self) -> Iterator[Tensor]:
        """The activations as they are now, on the device."""
        return (batch for _, batch in self._placed())

    def _placed(self) -> Iterator[tuple[int, Tensor]]:
        """Where in the file each batch begins, and the batch."""
        import torch

        offset = 0
        for shape in self._shapes:
            interrupts.check()
            batch = torch.empty(shape)
            self._file.seek(offset)
            self._file.readinto(bytes_of(batch))  # pyright: ignore[reportAttributeAccessIssue]
            yield offset, batch.to(self._clip.device)
            offset += batch.nbytes

    def _through(self, layer: Module, *, keep: bool) -> None:
        import torch

        for offset, batch in self._placed():
            with torch.no_grad():
                after = layer(batch, None)
            if keep:
                self._file.seek(offset)
                self._write(after)

    def _write(self, batch: Tensor) -> None:
        with write_errors(self._folder):
            self._file.write(bytes_of(batch.cpu()))


def tower_of(clip: Clip, has_projection: bool = False) -> Module:
    """The vision tower, in a module that names its parameters as checkpoints do; perhaps with its projection."""
    from torch.nn import ModuleDict

    projection = {"visual_projection": clip.model.visual_projection} if has_projection else {}
    return ModuleDict({"vision_model": clip.tower, **projection})


def layers_of(model: Any, report: Report) -> Iterator[tuple[str, Module]]:
    """Name and module of each transformer layer; reports how many are done."""
    layers = model["vision_model"].encoder.layers
    for number, layer in enumerate(layers):
        yield f"vision_model.encoder.layers.{number}", layer
        report(number + 1, len(layers))


def behind_layers(clip: Clip, has_projection: bool) -> Iterator[tuple[str, Module]]:
    """The visual projection as one more layer, without a name; nothing if it is not merged."""
    from mergecli.clip.network import BehindLayers

    if has_projection:
        yield "", BehindLayers(clip.model)


def embedded(clip: Clip, chosen: Images, size: int) -> Iterator[Tensor]:
    """(B, S, D) the inputs of the first layer: patches with their positions, after the first norm if there is one."""
    import torch

    tower: Any = clip.tower
    norm = getattr(tower, "pre_layrnorm", torch.nn.Identity())
    for batch in batches(clip, chosen, size):
        with torch.no_grad():
            yield norm(tower.embeddings(batch))
