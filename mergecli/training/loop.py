"""The steps of a training: gradients of every task's batches, in one process or several, Adam, and validations."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

from mergecli.clip.preprocessing import Normalization
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import Ranks
from mergecli.runtime.errors import InputError
from mergecli.training.data import Ready
from mergecli.training.lora import dropouts
from mergecli.training.resume import TrainingState
from mergecli.training.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergecli.clip.model import Clip

_TOGETHER = 1 << 22
"""Entries of gradients that are exchanged at one time, unless one parameter has more."""

Report = Callable[[float, int], None]
"""Called after each step with its loss, and the number of its images."""

Keep = Callable[[], None]
"""Called on the way, and when something stops the training: to write down how far it has come."""


class DivergedError(InputError):
    """A loss is no longer a number."""


def dropout_seed(seed: int, step: int, process: int = 0) -> int:
    """What the dropout of a step (counted from 0) is drawn from, so that no step depends on those before it."""
    return int.from_bytes(sha256(f"{seed} {step} {process}".encode()).digest()[:7])


class Training:
    """A tower that is trained on some tasks: what is done at each step, and how far it has come."""

    def __init__(
        self, clip: Clip, lessons: Sequence[Ready], state: TrainingState, settings: Settings, ranks: Ranks
    ) -> None:
        self.clip, self.lessons, self.state, self.settings, self.ranks = clip, lessons, state, settings, ranks
        self._normalise = Normalization(clip)
        self._dropouts = dropouts(clip.tower)

    def run(self, save_every: int, report: Report, keep: Keep) -> None:
        """Steps until there have been enough; it is kept how far they have come every `save_every` steps, when a
        validation was the best, and when something stops them.

        Raises:
            DivergedError: a loss is no longer a number; the state knows the last weights that gave numbers.
        """
        state, settings = self.state, self.settings
        batches = [each.batches(settings.images_a_step, settings.seed, state.step) for each in self.lessons]
        try:
            while True:
                if settings.validates(state.step) and state.step not in state.validation:
                    accuracies = [self._accuracy(each) for each in self.lessons]
                    with interrupts.undisturbed():
                        state.validated(accuracies)
                    if state.best_step == state.step < settings.steps:
                        keep()
                if state.step >= settings.steps:
                    if not settings.validate_every:
                        self._expect_numbers(self._losses(batches))
                    return
                interrupts.check()
                losses, images = self._gradients(batches)
                self._expect_numbers(losses)
                if state.step % save_every == 0:
                    keep()  # not before it is known that these weights give numbers
                with interrupts.undisturbed():
                    state.gave_numbers()
                    self._update(losses)
                report(sum(losses), images)
        except DivergedError:
            raise
        except BaseException:
            with interrupts.undisturbed():
                keep()
            raise

    def _expect_numbers(self, losses: Sequence[float]) -> None:
        """Raises DivergedError unless the weights as they are now give (T,) losses that are numbers."""
        state = self.state
        for lesson, loss in zip(self.lessons, losses, strict=True):
            if math.isfinite(loss):
                continue
            if not state.step:
                hint = "look at the base with `mergecli info`" + (
                    ", and at `alpha`" if self.settings.low_rank else ""
                )
            else:
                hint = f"lower `learning_rate` (it is {self.settings.learning_rate})"
            raise DivergedError(
                f"{state.output}: the loss of `{lesson.name}` is {loss} at step {state.step + 1}", hint
            )

    def _gradients(self, batches: Sequence[Iterator[Tensor]]) -> tuple[list[float], int]:
        """Puts into every parameter the gradient of the losses' sum; (T,) losses of all processes, number of images.

        A task's loss is the mean over all its images of the step, whichever process they are in.
        """
        import torch

        settings, ranks, device = self.settings, self.ranks, self.clip.device
        losses = torch.zeros(len(self.lessons), dtype=torch.float64, device=device)
        images = 0
        self.state.optimizer.zero_grad()
        with self._drawing():
            for number, (lesson, following) in enumerate(zip(self.lessons, batches, strict=True)):
                rows = next(following)
                images += len(rows)
                for part in rows.split(settings.batch_size * ranks.count):
                    own = part.tensor_split(ranks.count)[ranks.own]
                    if len(own):
                        loss = self._loss(lesson, own) * (len(own) / len(rows))
                        self.state.scaler.scale(loss).backward()
                        losses[number] += loss.detach()
        parameters = list(self.state.parameters.values())
        if ranks.count > 1:
            _add_up(parameters, ranks)
        return ranks.total(losses).tolist(), images

    def _losses(self, batches: Sequence[Iterator[Tensor]]) -> list[float]:
        """(T,) the losses of one batch of each task, with the weights as they are now."""
        import torch

        with torch.no_grad():
            own = [
                self._loss(lesson, next(following)[: self.settings.batch_size]).double()
                for lesson, following in zip(self.lessons, batches, strict=True)
            ]
        return self.ranks.total(torch.stack(own)).tolist()

    def _loss(self, lesson: Ready, rows: Tensor) -> Tensor:
        """Mean cross-entropy of the images of these numbers."""
        from torch.nn.functional import cross_entropy

        labels = lesson.images.labels[rows].to(self.clip.device)
        return cross_entropy(self._logits(lesson, lesson.images.rows(rows)), labels)

    def _logits(self, lesson: Ready, pixels: Tensor) -> Tensor:
        """(B, C) exp(logit_scale) * cosine; only the tower computes in less than float32."""
        import torch

        from mergecli.clip.heads import compare
        from mergecli.clip.model import features

        wanted = self.settings.precision
        dtype = getattr(torch, "bfloat16" if wanted == "float32" else wanted)
        with torch.autocast(self.clip.device.type, dtype, enabled=wanted != "float32"):
            image = features(self.clip, self._normalise(pixels))
        return compare(self.clip, image, lesson.head)

    def _update(self, losses: list[float]) -> None:
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = self.settings.rate(state.step)
        state.is_whole = False
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.losses.append(losses)
        state.is_whole = True

    def _accuracy(self, lesson: Ready) -> float:
        """Share of the images for validation that are told right, in all processes together."""
        import torch

        held = lesson.validation
        assert held is not None
        start, stop = (len(held) * own // self.ranks.count for own in (self.ranks.own, self.ranks.own + 1))
        correct, worst = torch.zeros(2, 1, dtype=torch.float64, device=self.clip.device)
        with torch.no_grad():
            for first in range(start, stop, self.settings.batch_size):
                interrupts.check()
                last = min(first + self.settings.batch_size, stop)
                found = self._logits(lesson, held.batch(first, last))
                correct += (found.argmax(dim=1) == held.labels[first:last].to(found.device)).sum()
                worst += found.abs().max().double() * 0
        if not math.isfinite(spoilt := float(self.ranks.total(worst))):
            self._expect_numbers([spoilt if each is lesson else 0.0 for each in self.lessons])
        return float(self.ranks.total(correct)) / len(held)

    @contextmanager
    def _drawing(self) -> Generator[None]:
        """Turns dropout on, drawn from seed and step alone; what others draw stays as it was."""
        import torch

        if not self._dropouts:
            yield
            return
        device = self.clip.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed(self.settings.seed, self.state.step, self.ranks.own))
            for each in self._dropouts:
                each.train()
            try:
                yield
            finally:
                for each in self._dropouts:
                    each.eval()


def _add_up(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replaces every gradient by the sum over all processes, in the order of their ranks."""
    import torch

    def exchange(some: Sequence[nn.Parameter]) -> None:
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in some]
        every = ranks.total(torch.cat([grad.flatten() for grad in grads]))
        for each, grad in zip(some, every.split([each.numel() for each in some]), strict=True):
            each.grad = grad.view_as(each).clone()

    waiting: list[nn.Parameter] = []
    for parameter in parameters:
        if waiting and sum(each.numel() for each in waiting) + parameter.numel() > _TOGETHER:
            exchange(waiting)
            waiting = []
        waiting.append(parameter)
    exchange(waiting)
