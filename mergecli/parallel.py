"""Several processes at one work, as `torchrun` starts them: who this one is, and sums over all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all that do the same work."""

    own: int = 0
    count: int = 1

    def total(self, tensor: Tensor) -> Tensor:
        """(...) the sum over all processes, added in the order of their ranks, the same in each of them."""
        if self.count == 1:
            return tensor
        import torch
        from torch import distributed

        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous())
        result = parts[0]
        for part in parts[1:]:
            result += part
        return result


def is_first() -> bool:
    """Whether this is the process that writes files and talks."""
    return os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", "1")) < 2


def join(device: str) -> tuple[Ranks, str]:
    """This process's ranks, and its own device: `cuda` is one processor a process. Gloo joins CPUs, NCCL GPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return Ranks(), device
    from torch import distributed

    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Ranks(distributed.get_rank(), count), device


def wait() -> None:
    """Waits until all processes have come as far as this one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
