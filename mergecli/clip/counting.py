"""Counts: how many images of one task each of several vision towers gets right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import interrupts
from mergecli.checkpoint import open_checkpoint
from mergecli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.features import LayerFeatures
    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels


@dataclass
class Tally:
    """What one tower has got so far on one task."""

    labels: list[int] = field(default_factory=list[int])
    chosen: list[int] = field(default_factory=list[int])
    probabilities: list[float] = field(default_factory=list[float])
    """Of the chosen class."""
    batch_losses: list[float] = field(default_factory=list[float])
    """Sum of the losses of each batch."""
    batch_means: list[float] = field(default_factory=list[float])

    @property
    def correct(self) -> int:
        """How many of the chosen classes are the labels."""
        return sum(label == chosen for label, chosen in zip(self.labels, self.chosen, strict=True))

    @property
    def loss(self) -> float:
        """Mean over the images."""
        return sum(self.batch_losses) / len(self.labels)

    @property
    def loss_batch_mean(self) -> float:
        """Mean over the batches of their means."""
        return sum(self.batch_means) / len(self.batch_means)

    def add(self, scores: Tensor, labels: Tensor) -> bool:
        """Takes in (B, C) logits and (B,) labels of one batch; False if a loss is no number."""
        import torch

        losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none").double()
        self.labels += labels.tolist()
        self.chosen += scores.argmax(dim=1).tolist()
        self.probabilities += torch.softmax(scores, dim=1).amax(dim=1).tolist()
        self.batch_losses.append(float(losses.sum()))
        self.batch_means.append(float(losses.mean()))
        return bool(losses.isfinite().all())


class Seat:
    """A CLIP with room for one vision tower at a time."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._taken: Checkpoint | None = None

    def take(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's weights in, unless they are there already."""
        from mergecli.clip.model import set_tower

        if checkpoint is not self._taken:
            self._taken = None
            set_tower(self.clip, checkpoint)
            self._taken = checkpoint


def count(
    seat: Seat,
    checkpoints: Sequence[Checkpoint],
    head: Tensor,
    parts: Iterable[Pixels],
    size: int,
    task: str,
    features: Sequence[LayerFeatures | None],
    tell: Callable[[int, Tally, int], None],
) -> list[Tally]:
    """What each tower gets on the images, which come in parts that are shown to every tower.

    `tell` is called with a tower's number, its tally so far, and how many images were added just now. While a device beside the processor computes on one batch, the one before is counted.
    """
    from mergecli.clip.processing import Normalisation

    tallies = [Tally() for _ in checkpoints]
    forward = _Forward(seat.clip, head)
    normalise = Normalisation(seat.clip)

    def settle(number: int, scores: Tensor, labels: Tensor) -> None:
        if not tallies[number].add(scores.cpu(), labels):
            raise InputError(
                f"{checkpoints[number].path}: gives NaN or infinite logits on task `{task}`",
                "look at the weights with `mergecli info`",
            )
        tell(number, tallies[number], len(labels))

    for part in parts:
        for number, tally in enumerate(tallies):
            seat.take(checkpoints[number])
            seen = len(tally.labels)
            waiting: tuple[Tensor, Tensor] | None = None
            for start in range(0, len(part), size):
                interrupts.check()
                stop = min(start + size, len(part))
                batch = part.batch(start, stop)
                batch = batch.pin_memory() if head.is_cuda else batch
                scores = forward(normalise(batch), features[number], seen + start)
                if waiting is not None:
                    settle(number, *waiting)
                waiting = (scores, part.labels[start:stop])
            if waiting is not None:
                settle(number, *waiting)
    return tallies


class _Forward:
    """Logits of a batch, computed in as many pieces as the device needs."""

    def __init__(self, clip: Clip, head: Tensor) -> None:
        self._clip, self._head = clip, head
        self._most: int | None = None

    def __call__(self, pixel_values: Tensor, features: LayerFeatures | None, row: int) -> Tensor:
        """(B, C); `row` is the number of the batch's first image."""
        import torch

        from mergecli.clip.heads import logits

        while True:
            pieces = pixel_values.split(self._most or len(pixel_values))
            try:
                with features.of_images_from(row) if features else nullcontext():
                    return torch.cat([logits(self._clip, self._head, piece) for piece in pieces])
            except torch.cuda.OutOfMemoryError as error:
                if len(pieces[0]) == 1:
                    raise InputError("the device has too little memory for one image") from error
                self._most = (len(pieces[0]) + 1) // 2
                torch.cuda.empty_cache()


def keep(tally: Tally, path: Path, what: str) -> None:
    """Writes a tally, so that an evaluation that is interrupted need not count again."""
    import torch

    from mergecli.clip.model import save_tensors

    columns: dict[str, Any] = {each.name: getattr(tally, each.name) for each in fields(Tally)}
    kinds = {name: torch.int64 if name in ("labels", "chosen") else torch.float64 for name in columns}
    save_tensors(
        {name: torch.tensor(values, dtype=kinds[name]) for name, values in columns.items()},
        path,
        {"what": what},
    )


def kept(path: Path, labels: Sequence[int]) -> Tally | None:
    """The tally in the file, if there is one and its labels are these."""
    try:
        with open_checkpoint(path) as stored:
            tally = Tally(**{each.name: stored.read(each.name).tolist() for each in fields(Tally)})
    except (InputError, KeyError):
        return None
    return tally if tally.labels == list(labels) and len(tally.chosen) == len(labels) else None
