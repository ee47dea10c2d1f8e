"""Counts: how many images of one task each of several vision towers gets right."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.storage import cache as caching
from mergecli.storage.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.heads import ClipDigests
    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels
    from mergecli.data.selection import Subject
    from mergecli.evaluation.features import LayerFeatures
    from mergecli.evaluation.forward import Seat
    from mergecli.evaluation.routes import RouteSums
    from mergecli.evaluation.settings import Scores, Settings, Tower
    from mergecli.runtime.progress import Progress
    from mergecli.storage.checkpoint import Checkpoint

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
        from mergecli.clip.preprocessing import Normalisation
        from mergecli.evaluation.forward import Forward

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

    from mergecli.storage.safetensors_writer import save_tensors

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


PIXEL_BYTES = 1 << 30
"""Of images that are not in the cache yet, so many bytes are held in memory while the towers take turns."""


def tallies_of(
    seats: list[Seat],
    towers: Sequence[Tower],
    subject: Subject,
    settings: Settings,
    scores: Scores,
    progress: Progress | None,
    routes: Sequence[RouteSums | None],
) -> list[Tally]:
    """What each tower gets on the task: as counted before an interruption, or counted now.

    A tower whose routes are asked for, by its place in `routes`, is counted now: tallies keep no routes.
    """
    from mergecli.clip.heads import cached_head
    from mergecli.clip.pixels import Processing, spans
    from mergecli.evaluation.features import LayerFeatures, feature_file, saved_with

    clip, name, images = seats[0].clip, subject.task.name, subject.images
    keys = [_key(clip, tower, subject, settings, scores.clip) for tower in towers]
    places = [caching.place("results", key) for key in keys]
    targets = [feature_file(settings.features, tower.name, name, len(towers) > 1) for tower in towers]
    labels = images.labels
    found: list[Tally | None] = [None for _ in towers]
    if settings.max_size:
        scores.unfinished += places
        for number, (key, place, target) in enumerate(zip(keys, places, targets, strict=True)):
            if not settings.fresh and routes[number] is None and (target is None or saved_with(target, key)):
                found[number] = kept(place, labels)
    done = len(labels) * sum(each is not None for each in found)
    missing = [number for number, each in enumerate(found) if each is None]

    def tell(position: int, tally: Tally, more: int) -> None:
        nonlocal done
        done += more
        number = missing[position]
        if len(tally.labels) == len(labels) and caching.make_room(40 * len(labels), settings.max_size):
            with suppress(InputError):
                keep(tally, places[number], f"an unfinished evaluation: {towers[number].name} on {name}")
        if progress is not None:
            progress(name, done, len(labels) * len(towers))

    if missing:
        head = cached_head(clip, subject.classes, subject.task.templates, scores.clip.text, settings.max_size)
        processing = Processing(
            settings.corruption, settings.workers, settings.max_size, 2 if head.device.type != "cpu" else 0
        )
        room = PIXEL_BYTES if len(missing) > 1 else 0
        numbers = range(len(labels)) if subject.numbers is None else subject.numbers
        with ExitStack() as files:
            writers = [
                files.enter_context(
                    LayerFeatures(clip, target, labels, numbers, _feature_facts(towers[n], subject, keys[n]))
                )
                if (target := targets[n])
                else None
                for n in missing
            ]
            parts = spans(clip, images, processing, settings.batch_size, room)
            files.callback(parts.close)
            checkpoints = [towers[n].checkpoint for n in missing]
            work = Round(
                checkpoints, head, settings.batch_size, name, writers, tell, [routes[n] for n in missing]
            )
            counted = count(seats, work, parts)
        for number, tally in zip(missing, counted, strict=True):
            found[number] = tally
    elif progress is not None:
        progress(name, done, done)
    return [tally for tally in found if tally is not None]


def _key(clip: Clip, tower: Tower, subject: Subject, settings: Settings, digests: ClipDigests) -> str:
    """32 hex digits of all that a tally depends on."""
    import torch

    from mergecli.storage.metadata import version

    images = subject.images
    about = {
        "program": [version(), torch.__version__, clip.device.type, settings.dtype],
        "tower": [tower.checkpoint.digest(), _reading(tower.checkpoint, subject, settings)],
        "clip": digests,
        "head": [list(subject.classes), list(subject.task.templates)],
        "data": [
            images.fingerprint,
            images.split,
            images.columns,
            None if images.rows is None else list(images.rows),
        ],
        "processor": clip.processor.to_json_string(),
        "corruption": settings.corruption,
        "batch_size": settings.batch_size,
    }
    return sha256(json.dumps(about).encode()).hexdigest()[:32]


def _reading(checkpoint: Checkpoint, subject: Subject, settings: Settings) -> object:
    """What is made of a checkpoint's tensors."""
    if not checkpoint.is_mixture:
        return checkpoint.is_task_vector
    facts = ("method", "tasks", "settings_table")
    return [settings.routing, subject.task.name, *(checkpoint.metadata.get(key) for key in facts)]


def _feature_facts(tower: Tower, subject: Subject, key: str) -> dict[str, str]:
    from mergecli.evaluation.features import KIND
    from mergecli.storage.metadata import about

    images = subject.images
    made_of = {tower.name: tower.checkpoint.digest(), "data": images.fingerprint}
    return about(
        KIND, inputs=made_of, task=subject.task.name, split=images.split, token="class", evaluation=key
    )
