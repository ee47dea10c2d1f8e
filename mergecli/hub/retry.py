"""How often and how long something is tried again, and work in several threads that Ctrl-C ends at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from mergecli.hub.client import TransientError
from mergecli.runtime import interrupts
from mergecli.runtime.errors import HubError

T = TypeVar("T")


class StoppedError(Exception):
    """The work was given up from outside."""


@dataclass
class _Waited:
    """How long a hub was waited for because it asked for it."""

    seconds: float = 0.0
    until: float = 0.0
    noted: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class RetryPolicy:
    """How often and for how long a hub is asked again."""

    tries: int = 5
    """In a row without any progress."""
    first: float = 1.0
    """Seconds before the second try; each further pause is twice as long."""
    longest: float = 8.0
    """Seconds of the longest such pause."""
    asked: float = 300.0
    """Seconds that are waited at most, all together, because the hub itself says how long (`Retry-After`)."""
    note: Callable[[str], None] | None = None
    """Called the first time that a hub asks for a wait of more than 10 seconds."""
    _waited: _Waited = field(default_factory=_Waited)

    def pause(self, failures: int, reason: TransientError, stop: threading.Event) -> None:
        """Waits after that many failures in a row.

        Raises:
            HubError: there were too many, or the hub asks for too long a wait.
            StoppedError: the work was given up meanwhile.
        """
        if failures >= self.tries:
            raise HubError(f"{reason.reason}, {failures} times", "try again later: what has arrived is kept")
        if reason.wait is not None:
            self._agree(reason.reason, reason.wait)
        grown = min(self.longest, self.first * 2 ** (failures - 1))
        if stop.wait(grown if reason.wait is None else reason.wait):
            raise StoppedError

    def _agree(self, reason: str, wait: float) -> None:
        """Counts a wait that the hub asks for; waits at the same time in several threads count once."""
        with self._waited.lock:
            now = time.monotonic()
            more = max(0.0, now + wait - max(now, self._waited.until))
            if not wait <= self.asked or self._waited.seconds + more > self.asked:
                raise HubError(
                    f"{reason}, and asks to wait {wait:.0f} s", "try again then: what has arrived is kept"
                )
            self._waited.seconds += more
            self._waited.until = max(self._waited.until, now + wait)
            tell = wait > 10 and not self._waited.noted
            self._waited.noted |= tell
        if tell and self.note:
            self.note(f"waiting {wait:.0f} s: {reason}")


def retried(action: Callable[[], T], stop: threading.Event, policy: RetryPolicy) -> T:
    """The result of an action that may raise TransientError; HubError when the policy allows no more."""
    failures = 0
    while True:
        try:
            return action()
        except TransientError as reason:
            failures += 1
            policy.pause(failures, reason, stop)


def in_threads(
    actions: Iterable[Callable[[], T]], jobs: int, stop: threading.Event
) -> Iterator[tuple[int, T | Exception]]:
    """(number, result or error) of each action as it ends; at most `jobs` run at a time.

    The threads do not keep the program alive: one that waits for a silent server would hold up Ctrl-C. When the
    caller stops listening, `stop` is set.
    """
    waiting: queue.SimpleQueue[tuple[int, Callable[[], T]] | None] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()
    count = 0
    for count, action in enumerate(actions, 1):
        waiting.put((count - 1, action))

    def work() -> None:
        while not stop.is_set() and (task := waiting.get()) is not None:
            number, action = task
            try:
                ended.put((number, action()))
            except Exception as error:  # noqa: BLE001  handed over to the caller
                ended.put((number, error))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, count))]
    for worker in workers:
        waiting.put(None)
        worker.start()
    try:
        for _ in range(count):
            while True:
                interrupts.check()
                try:
                    result = ended.get(timeout=0.5)
                    break
                except queue.Empty:
                    pass
            yield result
    except BaseException:
        stop.set()
        for worker in workers:  # a block may just be on its way to the disk
            worker.join(timeout=0.2)
        raise
