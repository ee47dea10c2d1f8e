"""Rank-One-MoE: WEMoE whose experts are single directions of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._mixture import SAME, Part, Read
from mergecli.methods._settings import Range
from mergecli.methods._svd import decompose
from mergecli.methods._wemoe import ROUTER, WeightEnsembling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankOneMoe(WeightEnsembling):
    """theta = theta_0 + sum_i sum_k l_ik s_ik u_ik v_ik^T  for the weights of the MLPs,  theta_0 + lambda sum_i tau_i elsewhere

    s_ik, u_ik, v_ik the k-th singular value and vectors of tau_i, k = 1 ... `rank`;  l = mean over the tokens h of r(h),
    r(h) = A h + b

    one router r a layer with T `rank` outputs, the same l for both weights of the layer's MLP. The routers minimize the mean
    entropy of predictions on unlabeled images, by Adam. A routing weight of 1 for all directions of a task gives that task's
    weights of MLPs, cut to `rank`. No weight is put together for an image: what the directions add is two thin products.

    The published code takes one l for a whole batch of images of one task, which tells the model the task; here each image
    has its own unless evaluation is asked for `routing = "batch"`.

    FusionBench stops where a task vector of an MLP is 0; here it adds nothing.
    """

    title: ClassVar[str] = (
        "directions of task vectors that routers weigh for each image, learned on unlabeled images"
    )
    paper: ClassVar[str] = (
        "FusionBench's rankone_moe, after Tang et al., Weight-ensembling mixture of experts, arXiv 2402.00433"
    )
    also_called: ClassVar[Mapping[str, str]] = {"rankone_moe": "", "rank_one_wemoe": ""}

    prefixes = ("left.", "right.", ROUTER)
    own_tower: ClassVar[str] = (
        "that task's MLPs, their weights cut to `rank` directions; the rest is shared by all tasks"
    )

    rank: Annotated[int, Range(1)] = 32
    """Directions of each task and weight, largest first, at most the smaller side."""
    best_directions: Annotated[int, Range(0)] = 0
    """How many of a layer's T `rank` directions count for an image, those of the largest l; the others are faded out by
    sigmoid(100 (l - the smallest of them)). 0: all, as published."""
    router_layers: Annotated[int, Range(0, 2)] = 1
    """1: as above; 2: r(h) = A_2 relu(A_1 h + b_1) + b_2; 0: a constant."""

    @property
    def best_routes(self) -> int:
        return self.best_directions

    def is_put_together(self, name: str) -> bool:
        return super().is_put_together(name) and name.endswith("weight")

    def routes_of(self, shape: tuple[int, ...], tasks: int) -> int:
        return tasks * min(self.rank, *shape)

    def expert_parts(self, name: str, shape: tuple[int, ...], tasks: int) -> dict[str, Part]:
        rank = min(self.rank, *shape)
        return {
            f"left.{name}": Part(SAME, (tasks, shape[0], rank)),
            f"right.{name}": Part(SAME, (tasks, rank, shape[1])),
        }

    def expert_values(self, name: str, deltas: Tensor) -> dict[str, Tensor]:
        import torch

        found = [decompose(delta, self.rank) for delta in deltas]
        return {
            f"left.{name}": torch.stack([(left * values).float() for left, values, _ in found]),
            f"right.{name}": torch.stack([right.T.float() for _, _, right in found]),
        }

    def expert(self, name: str, index: int, shape: Sequence[int], read: Read) -> Tensor:
        del shape
        return read(f"left.{name}")[index].float() @ read(f"right.{name}")[index].float()

    def linear_part(self, name: str, layer: Any, read: Read) -> Any:
        from mergecli.methods._wemoe_layers import RankOnes

        left, right = (read(f"{side}.{name}.weight").to(layer.weight) for side in ("left", "right"))
        return RankOnes(left.transpose(1, 2).flatten(0, 1).contiguous(), right.flatten(0, 1).contiguous())
