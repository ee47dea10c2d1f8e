"""E-WEMoE: weight ensembling with one router, and task vectors of which little is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._adapted import Objective
from mergecli.methods._bitmasks import kept, pack, packed_size
from mergecli.methods._learned import State
from mergecli.methods._mixture import SAME, Part, Read
from mergecli.methods._settings import Range
from mergecli.methods._wemoe import WeightEnsembling

if TYPE_CHECKING:
    from torch import Tensor

HALF = 0.5
"""The density above which task vectors take less memory with every entry than with the position of each."""


@dataclass(frozen=True)
class EfficientWeightEnsemblingMoe(WeightEnsembling):
    """theta = theta_0 + sum_i l_i (m_i tau_i) in the MLPs,  theta_0 + lambda sum_i tau_i elsewhere

    m_i = 1 where |tau_i| is above its quantile 1 - `density`, tensor by tensor;  l = mean over the tokens h of r(h),
    r(h) = A_2 relu(A_1 h + b_1) + b_2, one router for all layers

    Of the task vectors only what is kept is written, with a bit an entry that says where it belongs. The published 90 %
    are the share that is cut off: `density = 0.1`. Routing is that of `weight_ensembling_moe`; a routing weight of 1
    gives that task's MLPs, pruned.
    """

    title: ClassVar[str] = "weight ensembling with one router for all layers and pruned task vectors"
    published = "Efficient Weight-Ensembling MoE (90%)"
    paper: ClassVar[str] = (
        "Shen et al., Efficient and effective weight-ensembling MoE, arXiv 2410.21804, section 4"
    )
    also_called: ClassVar[Mapping[str, str]] = {"e_wemoe": "", "sparse_we_moe": ""}

    prefixes = (*WeightEnsembling.prefixes, "masks.")
    own_tower: ClassVar[str] = "that task's MLPs, pruned; the rest is shared by all tasks"

    density: Annotated[float, Range(0, 1, open_low=True)] = 0.1
    """Fraction of entries kept of each task vector of each tensor."""
    shared_router: bool = True
    """Whether all layers have one router, or each its own."""
    position_encoding: Annotated[int, Range(0)] = 0
    """How many sines and cosines of the layer's number are put before each token that a router gets, so that a shared
    router can tell layers apart; 0, as in the published tables, puts none. FusionBench's switch `position_encoding` is
    off or 8."""
    router_density: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    """Fraction of the entries of each router's weights that is kept after learning, the largest; the others become 0 and
    take as much room in the file as before. FusionBench's `gate_prune_ratio`, with `post_sparse_gate` on, is 1 minus this;
    the published tables prune none."""

    @property
    def shares_router(self) -> bool:
        return self.shared_router

    @property
    def position_size(self) -> int:
        return self.position_encoding if self.router_layers else 0

    def expert_parts(self, name: str, shape: tuple[int, ...], tasks: int) -> dict[str, Part]:
        entries = math.prod(shape)
        return {
            f"experts.{name}": Part(SAME, (tasks, kept_of(entries, self.density))),
            f"masks.{name}": Part("U8", (tasks, packed_size(entries))),
        }

    def expert_values(self, name: str, deltas: Tensor) -> dict[str, Tensor]:
        import torch

        rows = deltas.flatten(1)
        masks = torch.stack([above_quantile(row.abs(), self.density) for row in rows])
        values = torch.zeros(len(rows), kept_of(rows.shape[1], self.density), device=rows.device)
        for row, mask, left in zip(rows, masks, values, strict=True):
            own = row[mask]
            left[: len(own)] = own
        return {f"experts.{name}": values, f"masks.{name}": pack(masks)}

    def expert(self, name: str, index: int, shape: Sequence[int], read: Read) -> Tensor:
        bits, values = read(f"masks.{name}")[index], read(f"experts.{name}")[index].float()
        return _filled(kept(f"masks.{name}", bits, values, math.prod(shape)), shape)

    def experts(self, name: str, like: Tensor, read: Read) -> Any:
        from mergecli.methods._wemoe_layers import Dense, Pruned

        if self.density > HALF:
            return Dense(self.dense(name, like, read))
        rows, columns = like.shape
        return Pruned(self._kept(name, like, read), rows, columns)

    def dense(self, name: str, like: Tensor, read: Read) -> Tensor:
        import torch

        return torch.stack([_filled(each, like.shape) for each in self._kept(name, like, read)])

    def _kept(self, name: str, like: Tensor, read: Read) -> list[tuple[Tensor, Tensor]]:
        """For each task the positions that are kept, and their values."""
        key = f"masks.{name}"
        rows = zip(read(key).to(like.device), read(f"experts.{name}").to(like), strict=True)
        return [kept(key, bits, values, like.numel()) for bits, values in rows]

    def finish(self, objective: Objective, state: State, /) -> State:
        found = super().finish(objective, state)
        for key, value in found.items():
            if key.endswith(".weight") and self.router_density < 1:
                value *= above_quantile(value.abs().flatten(), self.router_density).view_as(value)
        return found


def _filled(kept: tuple[Tensor, Tensor], shape: Sequence[int]) -> Tensor:
    """(...) the values at their positions, and 0 elsewhere."""
    positions, values = kept
    return values.new_zeros(math.prod(shape)).index_copy_(0, positions, values).view(*shape)


def kept_of(entries: int, density: float) -> int:
    """How many entries lie above the quantile, if no two are equal."""
    if density >= 1 or not entries:
        return entries
    return entries - 1 - math.floor((1 - density) * (entries - 1))


def above_quantile(magnitudes: Tensor, density: float) -> Tensor:
    """(n,) bool: where (n,) magnitudes are above their quantile 1 - density, which lies between two of them in
    proportion; all of them if density is 1."""
    entries = len(magnitudes)
    if density >= 1 or not entries:
        return magnitudes >= 0
    rank = (1 - density) * (entries - 1)
    low = math.floor(rank)
    lower = float(magnitudes.kthvalue(low + 1).values)
    upper = float(magnitudes.kthvalue(min(low + 2, entries)).values)
    return magnitudes > lower + (rank - low) * (upper - lower)
