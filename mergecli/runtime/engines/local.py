"""The engine `local`: processes of this machine, on one with GPUs one a GPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from queue import SimpleQueue

from mergecli.runtime.engines.contract import Engine, LostWorkerError, Report, Unit, Work
from mergecli.runtime.errors import UsageError


class LocalExecutor:
    """Each process is fed by a thread through a pipe, one unit at a time; when the caller is killed, its pipe ends and so does
    the process."""

    def __init__(self, jobs: int, gpus: Sequence[str], threads: int, retries: int) -> None:
        self.slots, self.retries = jobs, retries
        self._threads = threads
        self._places: SimpleQueue[str | None] = SimpleQueue()
        for number in range(jobs):
            self._places.put(gpus[number % len(gpus)] if gpus else None)
        self._pool = ThreadPoolExecutor(jobs)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def serving(self, work: Work, /) -> AbstractContextManager[None]:
        """Nothing is left to do: each process gets the work with a unit."""
        del work
        return nullcontext()

    def submit(self, work: Work, unit: Unit, /) -> Future[Report]:
        """The unit's future; the process that gets it first."""
        return self._pool.submit(self._run, work, unit)

    def wait(self, running: Collection[Future[Report]], /) -> Collection[Future[Report]]:
        """Those that have ended."""
        return wait(running, return_when=FIRST_COMPLETED).done

    def shutdown(self) -> None:
        """Kills the processes."""
        with self._lock:
            self._ended = True
            for child in self._children:
                child.kill()
        self._pool.shutdown(cancel_futures=True)
        for child in self._children:
            with suppress(BrokenPipeError), child:  # one that was killed still has a unit in its pipe
                pass

    def _run(self, work: Work, unit: Unit) -> Report:
        child: subprocess.Popen[bytes] = getattr(self._own, "child", None) or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            pickle.dump((work, unit), child.stdin)
            child.stdin.flush()
            answer = pickle.load(child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self._own.child = None
            child.kill()
            raise LostWorkerError(f"a process of this machine ended with status {child.wait()}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if not hasattr(self._own, "place"):
            self._own.place = self._places.get()
        package = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        given = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads)}
        if self._own.place is not None:
            given["CUDA_VISIBLE_DEVICES"] = self._own.place
        with self._lock:
            if self._ended:
                raise LostWorkerError("the engine was shut down")
            child = subprocess.Popen(
                [sys.executable, "-c", "from mergecli.runtime.engines.worker import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **given},
                start_new_session=True,
            )  # fmt: skip  Ctrl-C is for this process alone, which ends the others
            self._children.append(child)
        self._own.child = child
        return child


def open_local(engine: Engine) -> LocalExecutor:
    """The executor that the settings mean.

    Raises:
        UsageError: this machine has no such GPU.
    """
    import torch

    gpus = _gpus(engine.gpus) if engine.gpus else ()
    jobs = engine.jobs or len(gpus) or 1
    threads = engine.cpus_per_unit or max(1, torch.get_num_threads() // jobs)
    return LocalExecutor(jobs, gpus, threads, engine.retries)


def _gpus(wanted: str) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES is for each of the GPUs."""
    import torch

    count = torch.cuda.device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [each.strip() for each in seen.split(",")] if seen else [str(number) for number in range(count)]
    numbers = range(count) if wanted == "all" else sorted({int(each) for each in wanted.split(",")})
    if not count:
        raise UsageError(f"--gpus {wanted}: this machine has no GPU that torch can use", "leave it out")
    if missing := [number for number in numbers if number >= count]:
        raise UsageError(f"--gpus {wanted}: there is no GPU {missing[0]}, the last one is {count - 1}")
    return tuple(names[number] for number in numbers)
