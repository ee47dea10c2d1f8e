"""Counts: how many images of one task each of several vision towers gets right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
    from mergecli.clip.pixels import Pixels
    from mergecli.clip.routes import RouteSums
    from mergecli.clip.seats import Seat


SEATS = 4
"""Towers that are evaluated at once, at most: each takes its memory."""


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


@dataclass(frozen=True)
class Round:
    """The towers that are shown one task's images, and what they are shown them with."""

    checkpoints: Sequence[Checkpoint]
    head: Tensor
    size: int
    """Images in a batch."""
    task: str
    features: Sequence[LayerFeatures | None]
    tell: Callable[[int, Tally, int], None]
    """Called with a tower's number, its tally so far, and how many images were added just now."""
    routes: Sequence[RouteSums | None] = ()
    """For each tower, what takes in its routing weights; empty where nobody asks."""


def count(seats: list[Seat], work: Round, parts: Iterable[Pixels]) -> list[Tally]:
    """What each tower gets on the images, which come in parts that are shown to every tower.

    Each seat is a thread; on a processor there are up to `SEATS`, as far as there are towers, which share its cores: that
    is faster than all of them working on one tower. `seats` grows as far as is needed.
    """
    import torch

    tallies = [Tally() for _ in work.checkpoints]
    several = seats[0].clip.device.type == "cpu" and not any(work.features)
    wanted = min(SEATS, torch.get_num_threads(), len(tallies)) if several else 1
    while len(seats) < wanted:
        seats.append(seats[0].another())
    lock = threading.Lock()
    turns = [_Turn(seat, work, tallies, lock) for seat in seats[:wanted]]
    at_once = len(tallies) - len(tallies) % len(turns) if len(turns) > 1 else 0
    for part in parts:
        if at_once:
            _show_at_once(turns, part, at_once)
        for number in range(at_once, len(tallies)):  # too few for every seat: all cores work on each
            turns[0].show(part, number)
    return tallies


def _show_at_once(turns: Sequence[_Turn], part: Pixels, towers: int) -> None:
    """Shows a part to all towers; each turn takes the next that waits."""
    import torch

    threads = torch.get_num_threads()
    waiting = iter(range(towers))
    lock = threading.Lock()

    def work(turn: _Turn) -> None:
        torch.set_num_threads(max(1, threads // len(turns)))
        with torch.inference_mode():
            while True:
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                turn.show(part, number)

    with ThreadPoolExecutor(len(turns)) as pool:
        running = [pool.submit(work, turn) for turn in turns]
        try:
            while any(not each.done() for each in running):
                wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                interrupts.check()
                if any(each.done() and each.exception() for each in running):
                    _stop(turns)
                    break
        except BaseException:
            _stop(turns)
            raise
        finally:
            pool.shutdown()
            torch.set_num_threads(threads)
    for each in running:
        each.result()


def _stop(turns: Sequence[_Turn]) -> None:
    for turn in turns:
        turn.stopped = True


class _Turn:
    """A seat at work."""

    def __init__(self, seat: Seat, work: Round, tallies: Sequence[Tally], lock: threading.Lock) -> None:
        from mergecli.clip.processing import Normalisation
        from mergecli.clip.seats import Forward

        self._seat, self._work, self._tallies, self._lock = seat, work, tallies, lock
        self._forward, self._normalise = Forward(seat, work.head), Normalisation(seat.clip)
        self.stopped = False
        """Whether it is to end before the next batch."""

    def show(self, part: Pixels, number: int) -> None:
        """Shows a part to a tower. While a device beside the processor computes on one batch, the one before is counted."""
        self._seat.take(self._work.checkpoints[number], self._work.task)
        sums = self._work.routes[number] if self._work.routes else None
        self._forward.watch = sums.add if sums else None
        seen, size = len(self._tallies[number].labels), self._work.size
        waiting: tuple[Tensor, Tensor] | None = None
        for start in range(0, len(part), size):
            interrupts.check()
            if self.stopped:
                return
            stop = min(start + size, len(part))
            batch = part.batch(start, stop)
            batch = batch.pin_memory() if self._work.head.is_cuda else batch
            scores = self._forward(self._normalise(batch), self._work.features[number], seen + start)
            if waiting is not None:
                self._settle(number, *waiting)
            waiting = (scores, part.labels[start:stop])
        if waiting is not None:
            self._settle(number, *waiting)

    def _settle(self, number: int, scores: Tensor, labels: Tensor) -> None:
        with self._lock:
            if not self._tallies[number].add(scores.cpu(), labels):
                raise InputError(
                    f"{self._work.checkpoints[number].path}: gives NaN or infinite logits on task `{self._work.task}`",
                    "look at the weights with `mergecli info`",
                )
            self._work.tell(number, self._tallies[number], len(labels))


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
