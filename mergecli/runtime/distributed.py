"""Several processes for one job, as `torchrun` starts them: ranks, sums over all of them, and devices."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of processes."""

    own: int = 0
    count: int = 1

    def total(self, tensor: Tensor) -> Tensor:
        """(...) the sum over all processes, added in the order of their ranks, so that all get the same bits.

        Raises:
            InputError: another process has ended.
        """
        if self.count == 1 or not tensor.numel():
            return tensor
        import torch
        from torch import distributed

        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        with _together():
            distributed.all_gather(parts, tensor.contiguous())
        result = parts[0]
        for part in parts[1:]:
            result += part
        return result

    def broadcast(self, tensor: Tensor) -> Tensor:
        """(...) the first process's values, written into this process's tensor of the same shape."""
        if self.count > 1 and tensor.numel():
            from torch import distributed

            with _together():
                distributed.broadcast(tensor, 0)
        return tensor

    def raise_first_error(self, error: UsageError | None, device: str | torch.device) -> None:
        """Raises the first process's error, if it has one, in all processes."""
        import torch

        text = json.dumps([error.message, error.hint] if error else []).encode()
        size = self.broadcast(torch.tensor([len(text)], device=device))
        own = torch.tensor([*text][: int(size)], dtype=torch.uint8, device=device)
        sent = self.broadcast(own if len(own) == int(size) else own.new_zeros(int(size)))
        if parts := json.loads(bytes(sent.tolist())):
            raise UsageError(*parts)

    def all(self, holds: bool, device: str) -> bool:
        """Whether `holds` is true in every process."""
        import torch

        return bool(self.total(torch.tensor([float(not holds)], device=device)) == 0)


_HINT = "`torchrun` sets WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT: use it, or unset WORLD_SIZE"


def check_environment() -> None:
    """Raises UsageError if WORLD_SIZE and RANK are not those of one of several processes, nor of one alone."""
    size, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK", "0")
    if not (size.isascii() and size.isdecimal()):
        raise UsageError(f"WORLD_SIZE: expected a whole number, got `{size}`", _HINT)
    if are_several() and not (rank.isascii() and rank.isdecimal() and int(rank) < int(size)):
        last = int(size) - 1
        raise UsageError(
            f"RANK: expected a number from 0 to {last}, as WORLD_SIZE is {size}, got `{rank}`", _HINT
        )


def are_several() -> bool:
    """Whether several processes share the work."""
    size = os.environ.get("WORLD_SIZE") or "1"
    return size.isdecimal() and int(size) > 1


def is_first() -> bool:
    """Whether this is the process that writes files and messages."""
    return os.environ.get("RANK", "0") == "0" or not are_several()


@contextmanager
def alone() -> Generator[None]:
    """Makes this process the only one, for work that is not shared: nothing in it waits for others."""
    count = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = count


def is_first_here() -> bool:
    """Whether this is the process that fills the store of its machine."""
    return is_first() or os.environ.get("LOCAL_RANK", "0") == "0"


def join(device: str) -> tuple[Ranks, str]:
    """The ranks and the device of this process: `cuda` means one GPU per process. Gloo joins CPUs, NCCL GPUs.

    Raises:
        UsageError: what the processes need to find each other is not in the environment.
        InputError: another process has ended.
    """
    check_environment()
    if not are_several():
        return Ranks(), device
    from torch import distributed

    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not distributed.is_initialized():
        import atexit

        if missing := [each for each in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(each)]:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and there is no {', '.join(missing)}", _HINT
            )
        with _together():
            distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(distributed.destroy_process_group)
    return Ranks(distributed.get_rank(), distributed.get_world_size()), device


def wait() -> None:
    """Waits until all processes have reached this call."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        with _together():
            distributed.barrier()


@contextmanager
def _together() -> Generator[None]:
    """Turns the failure of a collective operation into one clear error."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        interrupts.check()
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} lost the others: {reason}",
            "look at the error of another process",
        ) from error


def usable_device(name: str) -> str:
    """The name of the device, after a check that torch can use it.

    Raises:
        UsageError: it cannot.
    """
    name = str(name)  # it may be a `torch.device`
    if name == "cpu":
        return name
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        wanted = name.partition(":")[0]
        if wanted not in ("cuda", "mps", "xpu"):
            what = f"device: expected `cpu`, `cuda`, or `cuda:1` for the second GPU, got `{name}`"
            raise UsageError(what) from error
        seen = torch.cuda.device_count() if wanted == "cuda" else 0
        raise UsageError(
            f"device `{name}`: cannot be used here: torch sees {seen or 'no'} GPU{'s' if seen > 1 else ''}",
            "`cpu` always works",
        ) from error
    return name
