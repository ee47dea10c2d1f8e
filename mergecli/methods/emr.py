"""EMR-merging: one task vector for all tasks, and a mask and a number for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, ClassVar

from mergecli.methods._base import RUN, Group, Groups, TwoPass, total
from mergecli.methods._bitmasks import pack, packed_size, unpack
from mergecli.methods._mixture import SAME, Part, Read
from mergecli.methods._sim import FindsTask

if TYPE_CHECKING:
    from torch import Tensor

RESCALERS = "rescalers"
"""(T,) what each task's masked vector is multiplied by."""


@dataclass(frozen=True)
class Emr(FindsTask, TwoPass):
    """theta_t = theta_0 + r_t m_t tau,  the tower of task t

    elect    s = 1 where sum_i tau_i > 0, else -1;  tau = s max_i |tau_i| over the tasks whose sign is s, else 0
    mask     m_t = 1 where tau_t has the sign s, else 0
    rescale  r_t = sum_n mean |tau_t,n| / sum_n mean |m_t,n tau_n|,  n the tensors

    r_t is FusionBench's, where small tensors count as much as large ones; the paper's formula sums over all entries.
    Entries whose sum is 0 take the sign -1, as there. A task whose masks are all 0 has the base's tower.
    """

    elementwise: ClassVar[bool] = True
    prefixes = ("unified.", "masks.", "rescalers", *FindsTask.prefixes)
    title: ClassVar[str] = "one task vector for all tasks; each has a mask of its signs, and a rescaler"
    paper: ClassVar[str] = "Huang et al., EMR-Merging, NeurIPS 2024, arXiv 2405.17461"
    published = "EMR-Merging"

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        masks = Part("U8", (tasks, packed_size(prod(shape))), packed=True)
        return {name: Part(SAME, shape), f"unified.{name}": Part(SAME, shape), f"masks.{name}": masks}

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        return {RESCALERS: Part("F32", (tasks,)), **super().extras(tensors, tasks)}

    def survey(self, groups: Groups, /) -> Tensor:
        """(T,) float64 rescalers."""
        import torch

        result = torch.zeros(2, 1, dtype=torch.float64)
        for _, blocks in groupby(groups.map(_sums), key=lambda block: block[0]):
            each = list(blocks)
            # (2, T, runs), summed at once: the bits do not depend on where the blocks begin
            sums = torch.tensor([run for _, _, runs in each for run in runs], dtype=torch.float64).movedim(
                0, -1
            )
            result = result + sums.sum(-1) / max(sum(entries for _, entries, _ in each), 1)
        own, kept = result
        return torch.where(kept > 0, own / kept, 1.0)

    def expand(self, group: Group, learned: Tensor, /) -> dict[str, Tensor]:
        del learned
        aligned, sign = _aligned(group)
        return {
            group.name: group.base.clone(),
            f"masks.{group.name}": pack(aligned > 0),
            f"unified.{group.name}": aligned.amax(0).clamp_(min=0).mul_(sign),
        }

    def values(self, learned: Tensor, /) -> dict[str, Tensor]:
        return {RESCALERS: learned.float()}

    def refitted(self, tensors: Sequence[str], exact: Read, kept: Read, /) -> dict[str, Tensor]:
        import torch

        old = exact(RESCALERS).double()
        sums = torch.zeros(2, len(old), dtype=torch.float64)  # of mean |m_t tau| before and after
        for name in tensors:
            masks = exact(f"masks.{name}")
            for row, read in zip(sums, (exact, kept), strict=True):
                magnitudes = read(f"unified.{name}").float().abs().flatten()
                for task, mask in enumerate(masks):
                    kept_entries = magnitudes * unpack(mask, len(magnitudes))
                    row[task] += kept_entries.sum(dtype=torch.float64) / max(len(magnitudes), 1)
        before, after = sums
        return {RESCALERS: torch.where(after > 0, old * before / after, old).float()}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        unified = read(f"unified.{name}").float()
        mask = unpack(read(f"masks.{name}")[index], unified.numel()).view(unified.shape)
        return unified.mul(mask).mul_(read(RESCALERS)[index]).add_(read(name))


def _aligned(group: Group) -> tuple[Tensor, Tensor]:
    """(T, ...) the task vectors times the elected signs, in the group's own rows, and (...) the signs, 1 or -1."""
    import torch

    deltas = group.deltas
    sign = torch.where(total(deltas) > 0, 1.0, -1.0)
    return deltas.mul_(sign), sign


def _sums(group: Group) -> tuple[str, int, list[list[list[float]]]]:
    """The tensor's name, the block's entries, and for each run of them and each task the sums of |tau_t| and |m_t tau|."""
    import torch

    aligned, _ = _aligned(group)
    rows = aligned.view(group.tasks, -1)
    runs: list[list[list[float]]] = []
    for part in rows.split(RUN, dim=1):
        magnitude = part.amax(0).clamp_(min=0)
        own = [float(row.abs().sum(dtype=torch.float64)) for row in part]
        runs.append([own, [float((magnitude * (row > 0)).sum(dtype=torch.float64)) for row in part]])
    return group.name, rows.shape[1], runs
