"""What calibrated methods see of a CLIP: a task's images, its tower, and the tower layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergecli import interrupts
from mergecli.checkpoint import Checkpoint
from mergecli.clip.batches import batches
from mergecli.layout import bytes_of
from mergecli.output import write_errors

if TYPE_CHECKING:
    from torch import Size, Tensor
    from torch.nn import Module

    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip

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
