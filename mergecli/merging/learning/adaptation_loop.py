"""The loop of steps in which a method adapts: resumed where an interrupted run stopped."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.merging.learning.work import LearningWork
from mergecli.methods._adapted import UNSAVED, Adapted
from mergecli.methods._learned import State
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import Ranks, is_first
from mergecli.runtime.errors import InputError
from mergecli.runtime.progress import Progress
from mergecli.storage.cache import kept
from mergecli.storage.metadata import about

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.storage.checkpoint import Checkpoint

SAVE_EVERY = 60.0
"""Seconds, at least, between two states that are saved: a run that is killed does about so many again."""


@dataclass
class LoopState:
    """The state after the steps so far, and the trace of them."""

    path: Path
    """The file that the state is saved in."""
    key: str
    """That of the work; a file of another work is ignored."""
    state: State
    phases: tuple[int, ...]
    """Steps at most of each."""
    patience: int
    """A phase ends early when the mean entropy of this many steps is no lower than that of as many before; 0: never."""
    number: int = 0
    """The next step. A phase that ends early skips its other numbers, so that a number always means the same step."""
    entropies: list[Tensor] = field(default_factory=list["Tensor"])
    """(T,) of each step."""
    coefficients: list[Tensor] = field(default_factory=list["Tensor"])
    """(T,) or (1,) of each step."""
    _sums: list[float] = field(default_factory=list[float])
    """The sum of all tasks' entropies in each step of this phase."""
    _saved: int = 0
    """How many steps the state in the file has."""
    _due: float = field(default_factory=lambda: time.monotonic() + SAVE_EVERY)

    @property
    def step(self) -> int:
        """How many steps have been done."""
        return len(self.entropies)

    def add(self, losses: Tensor, traced: Tensor) -> None:
        """Counts a step whose change is in the state already: the entropies are those before it, `traced` is that after."""
        self.coefficients.append(traced.to("cpu", copy=True))  # it may be a part of the state
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
        """Saves if it is time; saving takes at most a twentieth of all time."""
        now = time.monotonic()
        if now >= self._due:
            self.save()
            self._due = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - now))

    def save(self) -> None:
        """Writes everything that the next step needs, if there is anything new."""
        from mergecli.storage.safetensors_writer import save_tensors

        if not is_first() or self.step == self._saved:
            return
        tensors = {f"state.{name}": each for name, each in self.state.items() if not name.startswith(UNSAVED)}
        tensors = {name: each.cpu().contiguous() for name, each in {**tensors, **self.trace(1)}.items()}
        save_tensors(tensors, self.path, about("adaptation state", key=self.key), checked=True)
        self._saved = self.step

    def load(self, ranks: Ranks, tasks: int, traced: int) -> None:
        """Resumes from the file, if it is of the same work; all processes resume where the first one does.

        Args:
            tasks: T, the length of a step's entropies.
            traced: the length of what is traced of a step.
        """
        import torch

        device = next(iter(self.state.values())).device
        if is_first() and (found := self._stored()):
            self._take(found.pop("trace.entropies"), found.pop("trace.coefficients"))
            self.state = {name: found[f"state.{name}"].to(device) for name in self.state}
        steps = int(ranks.broadcast(torch.tensor([self.step], device=device)))
        if ranks.count > 1 and steps:
            for each in self.state.values():
                ranks.broadcast(each)
            trace = [torch.zeros(steps, width, device=device) for width in (tasks, traced)]
            if is_first():
                trace = [each.to(device) for each in self.trace(tasks).values()]
            self._take(*(ranks.broadcast(each).cpu() for each in trace))

    def _take(self, entropies: Tensor, coefficients: Tensor) -> None:
        self.number = 0
        for rows in (self.entropies, self.coefficients, self._sums):
            rows.clear()
        for losses, traced in zip(entropies, coefficients, strict=True):
            self.add(losses, traced)
        self._saved = self.step

    def _stored(self) -> State | None:
        """The tensors of the file; None if no file is there that is whole and of the same work."""
        wanted = {f"state.{name}" for name in self.state} | self.trace(1).keys()

        def read(stored: Checkpoint) -> State | None:
            if stored.metadata.get("key") != self.key or set(stored.entries) != wanted:
                return None
            return {name: stored.read(name) for name in stored.entries}

        return kept(self.path, "the adaptation starts", read)


def adapt(
    work: LearningWork,
    method: Adapted,
    surveyed: State,
    partial: Path,
    progress: Progress | None,
    ranks: Ranks,
    device: str,
) -> tuple[State, State]:
    """What is kept after the last step, and the trace: (steps, T) entropies and (steps, T or 1) coefficients.

    The state is saved in the file `partial` now and then, from which an interrupted run resumes.

    Each of several processes computes the gradients of its own tasks; only those of coefficients, mask logits or
    routers are summed, in the order of the ranks. So the same number of processes always gives the same bytes. Other
    numbers of them round sums otherwise: coefficients are within a thousandth of `learning_rate` a step of each other,
    except those whose gradient is nothing but rounding (biases of keys), from which Adam makes whole steps.

    Raises:
        InputError: the entropy is NaN or infinity, or the base and the models do not fit together.
    """
    import torch

    from mergecli.merging.learning.objective import tower_objective

    objective = tower_objective(work, method, surveyed, ranks, device)
    tasks, total, mean = len(work.models.tuned), method.total_steps, 0.0
    with torch.no_grad():
        loop = LoopState(partial, work.key, method.begin(objective), method.phases, method.patience)
        loop.load(ranks, tasks, len(method.traced(loop.state)))
        try:
            while loop.number < total:
                interrupts.check()
                losses, change = method.step(objective, loop.state, loop.number)
                mean = float(losses.sum()) / len(work.tasks)
                if not math.isfinite(mean):
                    break
                with interrupts.deferred():
                    change()
                    loop.add(losses, method.traced(loop.state))
                if progress is not None and is_first():
                    progress(f"adapting: mean {method.loss[0]} {mean:.3f}", loop.number, total)
                loop.save_sometimes()
            kept = {key: each.cpu() for key, each in method.finish(objective, loop.state).items()}
        except BaseException as error:
            with interrupts.deferred():
                loop.save()
            interrupts.tell(error, lambda: f"{loop.number} of {total} steps of learning are kept")
            raise
    if not math.isfinite(mean):
        raise InputError(
            f"adapting: the {method.loss[0]} is {mean} in step {loop.step + 1}",
            f"use lower learning rates (`learning_rate` is {method.learning_rate:g})",
        )
    return kept, loop.trace(tasks)
