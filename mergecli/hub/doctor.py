"""`doctor`: what mergecli runs on and what it keeps, for a look and for a bug report."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecli.hub.environment import reason_of
from mergecli.hub.retry import RetryPolicy
from mergecli.hub.session import Session
from mergecli.runtime.dry_run import dry
from mergecli.runtime.errors import MergecliError
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.atomic import check_name, check_target
from mergecli.storage.cache import allowed_size
from mergecli.storage.health import Health, cache_health, store_health
from mergecli.storage.sources import HUBS, Source
from mergecli.storage.store import Store, cache_folder, home

SECONDS = 10
"""A hub that is silent for longer is not reached."""
LEAST = 1 << 20
"""Bytes of a disk that is not full."""
VARIABLES = (
    "MERGECLI_HOME", "MERGECLI_CACHE", "MERGECLI_CACHE_SIZE", "XDG_CACHE_HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN", "HTTP_PROXY", "HTTPS_PROXY",
    "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "WORLD_SIZE", "RAY_ADDRESS", "NO_COLOR",
)  # fmt: skip
"""Variables that change what mergecli does; which of them are set is told, and not to what."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Examined:
    """What was found. No value is a token, the name of the user, or the path of the user's own folder."""

    versions: Facts
    """Package -> version; None of an optional one that is not installed."""
    machine: Facts
    """System, processors, threads, memory in bytes, and the devices that torch can use."""
    store: Facts
    """The folder of fetched models and data, what is in it in bytes, and how many digests were compared."""
    cache: Facts
    """The same of what evaluations and merges keep."""
    variables: tuple[str, ...]
    """The variables of the environment that are set, of those that change what mergecli does."""
    hubs: Mapping[str, Facts]
    """Hub -> host, and seconds until it answered, None if it did not, and then why; empty unless it was asked for."""
    damaged: tuple[str, ...]
    """Files that are not as they were written, and what is wrong with them."""
    problems: tuple[str, ...]
    """What else is wrong, such as libraries that are missing or too old, or a cache in which nothing can be kept."""


def doctor(*, online: bool = False, progress: AnyProgress | None = None) -> Examined:
    """Versions, devices, sizes and health of the store and the cache.

    Args:
        online: also ask both hubs whether they can be reached; nothing else opens a socket.
    """
    with shown(progress) as report:
        store, cache = store_health(home(), report), cache_health(cache_folder(), report)
    versions, problems = _versions()
    problems += _unusable()
    return _anonymous(
        Examined(
            versions=versions,
            machine=_machine(problems),
            store={**_about(store, "commits"), "free": _free(home())},
            cache={**_about(cache, "files"), "may_grow_to": _allowed(problems)},
            variables=tuple(
                each for each in VARIABLES if os.environ.get(each) or os.environ.get(each.lower())
            ),
            hubs={name: _reached(kind) for kind, name in HUBS.items()} if online else {},
            damaged=(*store.damaged, *cache.damaged),
            problems=tuple(problems),
        )
    )


def _versions() -> tuple[dict[str, object], list[str]]:
    """Package -> version of mergecli and of all that it needs, and what is missing or too old."""
    from packaging.requirements import Requirement

    versions: dict[str, object] = {
        "mergecli": importlib.metadata.version("mergecli"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
    }
    problems: list[str] = []
    for written in importlib.metadata.requires("mergecli") or []:
        needed = Requirement(written)
        extra = re.search(r"""extra == ['"](\w+)['"]""", written)
        if extra and extra[1] in ("docs", "dev"):
            continue
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            versions[needed.name] = None
            if not extra:
                problems.append(
                    f"{needed.name} is not installed; mergecli needs {needed.name}{needed.specifier}"
                )
            continue
        versions[needed.name] = found
        if not needed.specifier.contains(found, prereleases=True):
            problems.append(f"{needed.name} is {found}; mergecli needs {needed.name}{needed.specifier}")
    return versions, sorted(problems)


def _machine(problems: list[str]) -> dict[str, object]:
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):  # no such names on this system
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    found: dict[str, object] = {"system": system, "processors": os.cpu_count(), "memory": memory}
    try:
        return found | _torch()
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a library that it needs is missing, or does not fit
        problems.append(f"torch cannot be used: {str(error).partition(chr(10))[0]}")
        return found | {"devices": []}


def _torch() -> dict[str, object]:
    """How torch was built, its threads, and the devices that it can use."""
    import torch

    from mergecli.runtime.distributed import usable_device

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    hip: Any = getattr(torch.version, "hip", None)
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({about.name}, {about.total_memory:,} bytes)")
    if torch.backends.mps.is_available():
        devices.append("mps")
    usable: list[str] = []
    for each in devices:
        try:
            usable_device(each.partition(" ")[0])
            usable.append(each)
        except MergecliError:
            usable.append(f"{each}, cannot be used")
    return {
        "torch_build": f"ROCm {hip}" if hip else build,
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "devices": usable,
    }


def _about(health: Health, unit: str) -> dict[str, object]:
    held = {kind: {unit: count, "bytes": size} for kind, (count, size) in health.kinds.items()}
    sample = {"files": health.files, "compared": health.checked, "damaged": len(health.damaged)}
    return {"folder": str(health.folder), **held, "unfinished": health.unfinished, "sample": sample}


def _unusable() -> list[str]:
    """Why the store cannot be there, or nothing can be kept in the cache, which evaluations only notice by their time. A store
    may be read-only."""
    try:
        check_name(home(), folder=True)
        with dry():
            check_target(cache_folder(), folder=True)
    except MergecliError as error:
        return [error.message]
    free = _free(cache_folder())
    return [f"{cache_folder()}: the disk is full"] if free is not None and free < LEAST else []


def _allowed(problems: list[str]) -> int | None:
    try:
        return allowed_size()
    except MergecliError as error:
        problems.append(error.message)
        return None


def _free(folder: Path) -> int | None:
    """Bytes free on the disk of the folder, which need not be there."""
    for each in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(each).free
    return None


def _reached(kind: str) -> Facts:
    """How long the hub took to answer, whatever it said, or why it did not."""
    import urllib.error
    import urllib.request

    try:
        source = Source("hf" if kind == "hf" else "ms", "org/name")
        hub = Session(Store(home()), RetryPolicy()).hub(source)
    except MergecliError as error:
        return {"host": None, "seconds": None, "why": error.message}
    start = time.monotonic()
    try:
        request = urllib.request.Request(hub.endpoint, method="HEAD", headers={"user-agent": "mergecli"})
        with urllib.request.urlopen(request, timeout=SECONDS):
            pass
    except urllib.error.HTTPError as error:
        error.close()  # it has answered
    except (OSError, ValueError) as error:
        return {"host": hub.host, "seconds": None, "why": reason_of(error)}
    return {"host": hub.host, "seconds": round(time.monotonic() - start, 2), "why": None}


def _anonymous(found: Examined) -> Examined:
    """The same without the name of the user in any path."""
    with contextlib.suppress(OSError, KeyError, ImportError):  # nobody has this number
        return Examined(**_without(vars(found), str(Path.home()), getpass.getuser()))
    return Examined(**_without(vars(found), str(Path.home()), ""))


def _without(value: Any, folder: str, user: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(each, folder, user) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(each, folder, user) for each in value)
    if not isinstance(value, str):
        return value
    shorter = re.sub(rf"{re.escape(folder)}(?=/|$)", "~", value) if len(folder) > 1 else value
    return re.sub(rf"(?<=/){re.escape(user)}(?=/|$)", "USER", shorter) if user else shorter
