"""The training loop: gradients of each task's batches, in one process or several, Adam, and validations."""

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
from mergecli.training.data import PreparedTask
from mergecli.training.lora import dropouts
from mergecli.training.resume import TrainingState
from mergecli.training.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergecli.clip.model import Clip

_BUCKET = 1 << 22
"""Gradient entries per all-reduce; a larger parameter is exchanged alone."""

Report = Callable[[float, int], None]
"""Called after each step with its loss and its number of images."""

Save = Callable[[], None]
"""Called at every save point, and when an exception stops the training; writes the resume file."""


class DivergedError(InputError):
    """A loss is NaN or infinite."""


def dropout_seed(seed: int, step: int, process: int = 0) -> int:
    """The seed for the dropout of one step, so that a resumed training draws the same masks."""
    return int.from_bytes(sha256(f"{seed} {step} {process}".encode()).digest()[:7])


class Training:
    """The training of one tower on one or more tasks."""

    def __init__(
        self,
        clip: Clip,
        tasks: Sequence[PreparedTask],
        state: TrainingState,
        settings: Settings,
        ranks: Ranks,
    ) -> None:
        self.clip, self.tasks, self.state, self.settings, self.ranks = clip, tasks, state, settings, ranks
        self._normalize = Normalization(clip)
        self._dropouts = dropouts(clip.tower)

    def run(self, save_every: int, report: Report, save: Save) -> None:
        """Runs the training loop; saves a resume file every `save_every` steps, after the best validation so far, and when
        an exception stops it.

        Raises:
            DivergedError: a loss is NaN or infinite; the state holds the last weights with finite losses.
        """
        state, settings = self.state, self.settings
        batches = [each.batches(settings.images_per_step, settings.seed, state.step) for each in self.tasks]
        try:
            while True:
                if settings.validates_at(state.step) and state.step not in state.validation:
                    accuracies = [self._accuracy(each) for each in self.tasks]
                    with interrupts.deferred():
                        state.record_validation(accuracies)
                    if state.best_step == state.step < settings.steps:
                        save()
                if state.step >= settings.steps:
                    if not settings.validate_every:
                        self._expect_finite(self._losses(batches))
                    return
                interrupts.check()
                losses, images = self._gradients(batches)
                self._expect_finite(losses)
                if state.step % save_every == 0:
                    save()  # only now is it known that these weights have finite losses
                with interrupts.deferred():
                    state.record_finite()
                    self._update(losses)
                report(sum(losses), images)
        except DivergedError:
            raise
        except BaseException:
            with interrupts.deferred():
                save()
            raise

    def rehearse(self) -> None:
        """Makes a step on the first batch of each task."""
        batches = [each.batches(self.settings.images_per_step, self.settings.seed, 0) for each in self.tasks]
        losses, _ = self._gradients(batches)
        self.state.record_finite()
        self._update(losses)

    def _expect_finite(self, losses: Sequence[float]) -> None:
        """Raises DivergedError if one of the (T,) losses of the current weights is NaN or infinite."""
        state = self.state
        for task, loss in zip(self.tasks, losses, strict=True):
            if math.isfinite(loss):
                continue
            if not state.step:
                hint = "the base is damaged: fetch or copy it again" + (
                    ", or lower `alpha`" if self.settings.low_rank else ""
                )
            else:
                hint = f"lower `learning_rate` (it is {self.settings.learning_rate})"
            raise DivergedError(
                f"{state.output}: the loss of `{task.name}` is {loss} at step {state.step + 1}", hint
            )

    def _gradients(self, batches: Sequence[Iterator[Tensor]]) -> tuple[list[float], int]:
        """Sets each parameter's gradient of the summed losses; returns the (T,) losses and the number of images.

        A task's loss is the mean over all its images of the step, over all processes.
        """
        import torch

        settings, ranks, device = self.settings, self.ranks, self.clip.device
        losses = torch.zeros(len(self.tasks), dtype=torch.float64, device=device)
        images = 0
        self.state.optimizer.zero_grad()
        with self._dropout_on():
            for number, (task, following) in enumerate(zip(self.tasks, batches, strict=True)):
                rows = next(following)
                images += len(rows)
                for part in rows.split(settings.batch_size * ranks.count):
                    own = part.tensor_split(ranks.count)[ranks.own]
                    if len(own):
                        loss = self._loss(task, own) * (len(own) / len(rows))
                        self.state.scaler.scale(loss).backward()
                        losses[number] += loss.detach()
        parameters = list(self.state.parameters.values())
        if ranks.count > 1:
            _sum_gradients(parameters, ranks)
        return ranks.total(losses).tolist(), images

    def _losses(self, batches: Sequence[Iterator[Tensor]]) -> list[float]:
        """(T,) the losses of one batch of each task with the current weights."""
        import torch

        with torch.no_grad():
            own = [
                self._loss(task, next(following)[: self.settings.batch_size]).double()
                for task, following in zip(self.tasks, batches, strict=True)
            ]
        return self.ranks.total(torch.stack(own)).tolist()

    def _loss(self, task: PreparedTask, rows: Tensor) -> Tensor:
        """Mean cross-entropy of the images in these rows."""
        from torch.nn.functional import cross_entropy

        labels = task.images.labels[rows].to(self.clip.device)
        return cross_entropy(self._logits(task, task.images.rows(rows)), labels)

    def _logits(self, task: PreparedTask, pixels: Tensor) -> Tensor:
        """(B, C) exp(logit_scale) * cosine; only the tower computes in the reduced precision."""
        import torch

        from mergecli.clip.heads import compare
        from mergecli.clip.model import features

        wanted = self.settings.precision
        dtype = getattr(torch, "bfloat16" if wanted == "float32" else wanted)
        with torch.autocast(self.clip.device.type, dtype, enabled=wanted != "float32"):
            image = features(self.clip, self._normalize(pixels))
        return compare(self.clip, image, task.head)

    def _update(self, losses: list[float]) -> None:
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(state.step)
        state.between_steps = False
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.losses.append(losses)
        state.between_steps = True

    def _accuracy(self, task: PreparedTask) -> float:
        """Accuracy on the validation images, over all processes."""
        import torch

        held = task.validation
        assert held is not None
        start, stop = (len(held) * own // self.ranks.count for own in (self.ranks.own, self.ranks.own + 1))
        correct, worst = torch.zeros(2, 1, dtype=torch.float64, device=self.clip.device)
        with torch.no_grad():
            for first in range(start, stop, self.settings.batch_size):
                interrupts.check()
                last = min(first + self.settings.batch_size, stop)
                found = self._logits(task, held.batch(first, last))
                correct += (found.argmax(dim=1) == held.labels[first:last].to(found.device)).sum()
                worst += found.abs().max().double() * 0  # NaN if a logit is NaN or infinite, else 0
        if not math.isfinite(nonfinite := float(self.ranks.total(worst))):
            self._expect_finite([nonfinite if each is task else 0.0 for each in self.tasks])
        return float(self.ranks.total(correct)) / len(held)

    @contextmanager
    def _dropout_on(self) -> Generator[None]:
        """Turns dropout on, drawn from seed and step alone; the global random state stays as it was."""
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


def _sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replaces each gradient by the sum over all processes, added in the order of their ranks."""
    import torch

    def exchange(some: Sequence[nn.Parameter]) -> None:
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in some]
        every = ranks.total(torch.cat([grad.flatten() for grad in grads]))
        for each, grad in zip(some, every.split([each.numel() for each in some]), strict=True):
            each.grad = grad.view_as(each).clone()

    waiting: list[nn.Parameter] = []
    for parameter in parameters:
        if waiting and sum(each.numel() for each in waiting) + parameter.numel() > _BUCKET:
            exchange(waiting)
            waiting = []
        waiting.append(parameter)
    exchange(waiting)
