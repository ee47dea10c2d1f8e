"""TALL masks: each task's model, cut out of the summed task vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._bitmasks import pack, packed_size, unpack
from mergecli.methods._mixture import SAME, Part, Read
from mergecli.methods._settings import Range
from mergecli.methods._sim import FindsTask
from mergecli.runtime.errors import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TallMask(FindsTask, PerTensor):
    """theta_t = theta_0 + m_t tau,  tau = sum_i tau_i,  m_t = 1 where |tau_t| > mask_threshold |tau - tau_t|, else 0

    The result holds the towers of all tasks: theta_0, tau and masks of one bit an entry. With `task` it is that task's
    tower alone, a plain model, worth little on the others; `consensus` merges them into one.
    FusionBench compares theta_0 in place of 0 with tau_t, which makes its masks nearly all 1; this is the paper's.
    """

    elementwise: ClassVar[bool] = True
    prefixes = ("summed.", "masks.", *FindsTask.prefixes)
    title: ClassVar[str] = "each task's model, cut out of the summed task vector by that task's mask"
    paper: ClassVar[str] = "Wang et al., Localizing task information, ICML 2024, arXiv 2405.07813, equation 5"
    also_called: ClassVar[Mapping[str, str]] = {"talls_mask": ""}

    task: str | None = None
    """The one task whose model is wanted, by its name in `[tuned]`; all tasks' are if it is not given."""
    mask_threshold: Annotated[float, Range(0)] = 0.6
    """How much larger than the other tasks' sum an entry must be to be kept; 0 keeps all where tau_t is not 0."""

    @property
    def is_mixture(self) -> bool:
        return self.task is None

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        name = settings.get("task")
        found = super().check(tasks, settings)
        if name is not None and settings.get("router") is not None:
            found.append(("router", "is for the towers of all tasks, and `task` asks for one"))
        if name is None or name in tasks:
            return found
        return [
            *found,
            ("task", f"there is no model `{name}`{did_you_mean(name, tasks)}; there are {', '.join(tasks)}"),
        ]

    def merge(self, group: Group, /) -> Tensor:
        assert self.task is not None, "`expand` is for all tasks"
        deltas = group.deltas
        merged = total(deltas)
        mask = self._mask(deltas[group.names.index(self.task)], merged)
        return merged.masked_fill_(~mask, 0).add_(group.base)

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        masks = Part("U8", (tasks, packed_size(prod(shape))), packed=True)
        return {name: Part(SAME, shape), f"summed.{name}": Part(SAME, shape), f"masks.{name}": masks}

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        import torch

        del learned
        deltas = group.deltas
        summed = total(deltas)
        masks = torch.cat([pack(self._mask(own, summed)[None]) for own in deltas])
        return {group.name: group.base.clone(), f"summed.{group.name}": summed, f"masks.{group.name}": masks}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        summed = read(f"summed.{name}").float()
        mask = unpack(read(f"masks.{name}")[index], summed.numel()).view(summed.shape)
        return summed.masked_fill(~mask, 0).add_(read(name))

    def _mask(self, own: Tensor, summed: Tensor) -> Tensor:
        """(...) bool, the entries of the summed task vector that one task keeps."""
        return own.abs() > (summed - own).abs_().mul_(self.mask_threshold)
