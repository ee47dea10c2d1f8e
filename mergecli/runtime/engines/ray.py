"""The engine `ray`: the machines of a Ray cluster. The only file that imports Ray."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mergecli.runtime import interrupts
from mergecli.runtime.engines.contract import Engine, LostWorkerError, Report, Unit, Work
from mergecli.runtime.engines.worker import perform
from mergecli.runtime.errors import InputError, MergecliError, MergecliWarning, UsageError, listed

PACKAGES = ("mergecli", "torch", "transformers")
"""What must be of the same version on every machine."""
PATIENCE = 10
"""Seconds without an ended unit after which it is asked whether any machine can still run one."""
_LIMIT = 120
"""Seconds in which a machine must answer."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}
"""Ray asks nobody on the internet, and leaves CUDA_VISIBLE_DEVICES of units without GPUs to us."""


@dataclass(frozen=True)
class _Running:
    """A unit that was submitted."""

    reference: Any

    def result(self) -> Report:
        """Raises LostWorkerError, or what the unit raised."""
        ray = _ray()

        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise LostWorkerError(str(error).strip().splitlines()[0]) from error


class RayExecutor:
    """Ray itself tries a unit again whose worker was lost, and spreads the units over the machines."""

    retries = 0
    slots = 1

    def __init__(self, engine: Engine, device: str, owns: bool) -> None:
        ray = _ray()

        self._owns = owns
        cpus, on_gpu = engine.cpus_per_unit or 1, device.partition(":")[0] == "cuda"
        gpus = engine.gpus_per_unit if engine.gpus_per_unit is not None else float(on_gpu)
        self._needed = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}
        able = _able(self._needed)
        if not able:
            raise _too_much(self._needed)
        if on_gpu and not gpus:
            raise UsageError(
                "--gpus-per-unit 0: a unit that computes on a GPU needs some of it", "such as 0.5"
            )
        if gpus and not on_gpu:
            warnings.warn(
                f"--gpus-per-unit {gpus:g}: units hold GPUs and compute on processors; `--device cuda` computes on GPUs",
                MergecliWarning,
                stacklevel=2,
            )
        _check_versions(able)
        self._call = ray.remote(_perform).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=engine.retries, retry_exceptions=False,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._given = cpus, bool(gpus), str(Path.cwd())
        self._pending: set[_Running] = set()

    @contextmanager
    def serving(self, work: Work, /) -> Generator[None]:
        """Cancels at its end what still runs, and leaves the machines.

        Raises:
            InputError: a machine lacks models or data.
        """
        ray = _ray()

        able = _able(self._needed)
        _check_sources(able, work)
        self.slots = 2 * sum(_room(node, self._needed) for node in able)
        self._shared = ray.put(work)
        try:
            # Ray tells on stdout what it tries again, from a thread of its own
            with redirect_stdout(sys.stderr):
                yield
        finally:
            with suppress(Exception):
                for each in self._pending:
                    ray.cancel(each.reference, force=True)
                leaving = [_on(node, _leave).remote(self._shared) for node in _able({})]
                ray.wait(leaving, num_returns=len(leaving), timeout=10)
            self._pending.clear()

    def submit(self, work: Work, unit: Unit, /) -> _Running:
        """The unit's reference."""
        del work  # the machines have it
        running = _Running(self._call.remote(self._shared, unit, *self._given))
        self._pending.add(running)
        return running

    def wait(self, running: Collection[_Running], /) -> Collection[_Running]:
        """Those that have ended.

        Raises:
            InputError: no machine is left that could run them.
        """
        ray = _ray()

        by = {each.reference: each for each in running}
        asked = time.monotonic()
        while True:
            ended, _ = ray.wait(list(by), num_returns=1, timeout=1.0)
            interrupts.check()
            if ended:
                ended, _ = ray.wait(list(by), num_returns=len(by), timeout=0)
                found = [by[each] for each in ended]
                self._pending -= set(found)
                return found
            if time.monotonic() - asked > PATIENCE:
                asked = time.monotonic()
                if not _able(self._needed):
                    raise InputError(
                        f"no machine of the Ray cluster is left that has {_said(self._needed)}",
                        "the same command goes on with what is done, once there are some",
                    )

    def shutdown(self) -> None:
        """Leaves the cluster, and ends it if it was started here."""
        if self._owns:
            _ray().shutdown()


def open_ray(engine: Engine, device: str) -> RayExecutor:
    """The executor that the settings mean, for work on that device.

    Raises:
        UsageError: Ray is not installed, or no machine has what a unit needs.
        InputError: there is no cluster, or its machines differ.
    """
    os.environ.update({key: os.environ.get(key, each) for key, each in _QUIET.items()})
    try:
        ray = _ray()
    except ModuleNotFoundError as error:
        raise UsageError(
            "--engine ray: Ray is not installed", "`pip install 'mergecli[ray]'` brings it"
        ) from error
    owns = not ray.is_initialized()
    if owns:
        try:
            _expect_answer(engine.address or os.environ.get("RAY_ADDRESS", ""))
            ray.init(address=engine.address, log_to_driver=False, logging_level=logging.CRITICAL)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(
                f"--address {_address(engine)}: there is no Ray cluster that lets us in: {reason}",
                "`ray start --head` starts one, and one that asks for a token needs RAY_AUTH_MODE=token and the token here "
                "too; without `--address` and RAY_ADDRESS, Ray starts on this machine",
            ) from error
        except ray.exceptions.RayError as error:  # no token: it is no RuntimeError
            raise InputError(
                f"--address {_address(engine)}: Ray does not start: {str(error).strip().splitlines()[0].split('. ')[0]}",
                "write the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN, or unset RAY_AUTH_MODE",
            ) from error
    try:
        return RayExecutor(engine, device, owns)
    except BaseException:
        if owns:
            ray.shutdown()
        raise


def _address(engine: Engine) -> str:
    """As messages name it."""
    return engine.address or os.environ.get("RAY_ADDRESS", "auto")


def _expect_answer(address: str) -> None:
    """Raises OSError if nobody answers at HOST:PORT, where Ray would try for minutes."""
    if found := re.fullmatch(r"([^:/]+):(\d{1,5})", address):
        socket.create_connection((found[1], int(found[2])), timeout=10).close()


def _ray() -> Any:
    """The library. Without types, since it is an extra that need not be there."""
    return import_module("ray")


def _perform(work: Work, unit: Unit, threads: int, has_gpu: bool, folder: str) -> Report:
    """What runs on the far side."""
    with suppress(OSError):
        os.chdir(folder)
    if not has_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(threads)  # Ray has chosen others
    return perform(work, unit)


def _leave(work: Work) -> None:
    work.leave()


def _able(needed: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """The machines that are alive and have what a unit needs."""
    ray = _ray()

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        node for node in alive if all(node["Resources"].get(key, 0) >= each for key, each in needed.items())
    ]


def _room(node: Mapping[str, Any], needed: Mapping[str, float]) -> int:
    """How many units a machine runs at a time."""
    return int(min(node["Resources"].get(key, 0) / each for key, each in needed.items()))


def _too_much(needed: Mapping[str, float]) -> UsageError:
    """Ray would wait for ever."""
    has = [
        f"{node['NodeManagerHostname']}: {node['Resources'].get('CPU', 0):g} processors, {node['Resources'].get('GPU', 0):g} GPUs"
        for node in _able({})
    ]
    return UsageError(
        f"no machine of the Ray cluster has {_said(needed)} for a unit:\n{listed(has)}",
        "ask for less with `--gpus-per-unit` and `--cpus-per-unit`",
    )


def _said(needed: Mapping[str, float]) -> str:
    return " and ".join(
        f"{each:g} {'GPUs' if key == 'GPU' else 'processors'}"
        for key, each in sorted(needed.items(), reverse=True)
    )


def _on(node: Mapping[str, Any], function: Any) -> Any:
    """The function as a task that only this machine runs."""
    strategies: Any = import_module("ray.util.scheduling_strategies")
    where = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return _ray().remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where)


def _check_versions(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError unless every machine has our versions."""

    own = _look_at_versions()(PACKAGES)
    for name, found in zip(_names(nodes), _asked(nodes, _look_at_versions(), PACKAGES), strict=True):
        if isinstance(found, Exception):
            raise InputError(f"{name}: does not answer: {found}", "look at `ray status`")
        if found != own:
            lines = [f"{key} {found[key]}, here {each}" for key, each in own.items() if found[key] != each]
            raise InputError(
                f"{name}: has other versions than this machine:\n{listed(lines)}",
                "install the same on every machine of the cluster",
            )


def _check_sources(nodes: Sequence[Mapping[str, Any]], work: Work) -> None:
    """Raises InputError unless every machine sees the models and data."""
    for name, found in zip(
        _names(nodes), _asked(nodes, _look_at_sources, work, str(Path.cwd())), strict=True
    ):
        if isinstance(found, MergecliError):
            raise InputError(f"{name}: {found.message}", found.hint)
        if isinstance(found, Exception):
            raise InputError(f"{name}: does not answer: {found}", "look at `ray status`")


def _names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What messages call the machines."""
    return [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes]


def _asked(nodes: Sequence[Mapping[str, Any]], function: Any, *arguments: Any) -> list[Any]:
    """What the function returns or raises on each machine."""
    ray = _ray()

    found: list[Any] = []
    asked = [_on(node, function).remote(*arguments) for node in nodes]
    for each in asked:
        try:
            found.append(ray.get(each, timeout=_LIMIT))
        except ray.exceptions.RayTaskError as error:
            found.append(error.cause if isinstance(error.cause, Exception) else error)
        except (ray.exceptions.RayError, TimeoutError) as error:
            found.append(RuntimeError(str(error).strip().splitlines()[0]))
    return found


def _look_at_versions() -> Callable[[Sequence[str]], dict[str, str]]:
    """A function that gives package -> version. It travels whole, since the other machine may not have this file."""

    def versions(packages: Sequence[str]) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, str] = {}
        for each in packages:
            try:
                found[each] = version(each)
            except PackageNotFoundError:
                found[each] = "none"
        return found

    return versions


def _look_at_sources(work: Work, folder: str) -> None:
    """Raises InputError if the machine lacks models or data."""
    with suppress(OSError):
        os.chdir(folder)
    work.expect_sources()
