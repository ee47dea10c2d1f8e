"""Passes over the models of a merge, as methods ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mergecli.methods._kinds import Group
from mergecli.models import Models
from mergecli.progress import Progress

Result = TypeVar("Result")


@dataclass
class Passes:
    """Passes over the models, as a method's `survey` asks for them, which tell how far they are."""

    models: Models
    by_blocks: bool
    progress: Progress | None

    @property
    def tensors(self) -> Sequence[str]:
        return self.models.floats

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        return self.map(lambda group: group.copy(), sample)

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        return self.run("surveying", lambda _, group: look(group), sample)

    def run(self, what: str, work: Callable[[int, Group], Result], sample: int = 1) -> Iterator[Result]:
        """What `work(first entry, group)` gives, in order, for one pass."""

        def counted(start: int, group: Group) -> tuple[int, Result]:
            return group.shape.numel() * sample, work(start, group)

        done = 0
        for count, result in self.models.map(counted, sample, blocks=self.by_blocks or sample > 1):
            yield result
            done += count
            if self.progress:
                self.progress(what, min(done, self.models.size), self.models.size)
