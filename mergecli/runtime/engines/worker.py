"""What runs on the far side: one unit after another, in a process or on a machine of an engine."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from typing import IO, Any

from mergecli.runtime.engines.contract import Report, Unit, Work
from mergecli.runtime.errors import MergecliError, MergecliWarning


class BugError(Exception):
    """What a unit raised that was no failure of its input: the far side's traceback as text."""


def perform(work: Work, unit: Unit) -> Report:
    """The unit's result, and where it ran.

    Raises:
        MergecliError: the unit fails for its input. BugError: it fails for another reason.
    """
    if work.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MergecliWarning)
        try:
            result = work(unit)
        except MergecliError:
            raise
        except Exception as error:
            raise BugError(f"{unit.name} on {node()}:\n{traceback.format_exc()}") from error
    said = tuple(dict.fromkeys(str(each.message) for each in caught))
    return Report(result, node(), _device(work), time.perf_counter() - started, said)


def report_of(result: bytes, device: str, seconds: float) -> Report:
    """The report of a unit that the caller's own process did."""
    return Report(result, node(), device, seconds)


def node() -> str:
    """The name of this machine."""
    import platform

    return platform.node() or "unknown"


def _device(work: Work) -> str:
    """The device, with the numbers of the GPUs that this process may use."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{work.device}:{own}" if own and work.device == "cuda" else work.device


def serve() -> None:
    """Does the units that come on stdin and sends what comes of them to stdout, until there are no more. When the caller has
    gone, stdin ends, and the process with it, in the middle of whatever it does."""
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                calls.put(pickle.load(sys.stdin.buffer))
        except BaseException:  # noqa: BLE001  whatever it is, there will be no more
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    with suppress(BrokenPipeError):
        while True:
            pickle.dump(_answer(*calls.get()), answers, protocol=5)
            answers.flush()


def _answer(work: Work, unit: Unit) -> Report | Exception:
    try:
        return perform(work, unit)
    except Exception as error:  # noqa: BLE001  goes to the caller
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
        return BugError(f"{unit.name}: {error!r}")
