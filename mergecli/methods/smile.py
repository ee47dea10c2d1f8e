"""SMILE upscaling: each linear layer becomes the base's and low-rank experts, among which each token chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._mixture import SAME, Installed, Part, Read, Routed, Routing
from mergecli.methods._settings import Range
from mergecli.methods._svd import decompose

if TYPE_CHECKING:
    from torch import Tensor, nn

_LINEAR = re.compile(r"(_proj|\bfc[12])\.(?P<kind>weight|bias)$")


@dataclass(frozen=True)
class Smile(Routed, PerTensor):
    """y = W_0 x + b_0 + sum_i p_i(x) (U_i S_i V_i^T x + b_i - b_0),  theta = (W, b), for each linear layer

    U_i S_i V_i^T   W_i - W_0, cut to its `rank` largest singular values; whole where that takes less room
    p(x)            softmax of |V_i^T x|, V_i cut to `gate_rank` columns, over the `experts_per_token` tasks where it
                    is largest; 0 for the others

    Each token of each image chooses for itself: no other image matters, so that routing by batches is routing by
    samples. Nothing is learned. The linear layers are those named `..._proj`, `fc1` and `fc2`; all other tensors are
    the base's.
    """

    own_tower: ClassVar[str] = "that task's linear layers, cut to the experts' rank"
    routes_batches: ClassVar[bool] = False
    prefixes = ("left.", "right.", "deltas.")
    title: ClassVar[str] = "the base's linear layers with low-rank experts, among which each token chooses"
    paper: ClassVar[str] = "Tang et al., SMILE, arXiv 2408.10174"
    published = "SMILE"
    also_called: ClassVar[Mapping[str, str]] = {"smile_upscaling": ""}
    work: ClassVar[str] = "a singular value decomposition of each linear layer of each model"

    rank: Annotated[int, Range(1)] = 128
    """Singular vectors of an expert, at most as many as there are; W_i - W_0 is kept whole where factors would take
    more room."""
    gate_rank: Annotated[int, Range(1)] = 1
    """Singular vectors with which tokens are compared, at most `rank`."""
    experts_per_token: Annotated[int, Range(1)] = 1
    """How many experts each token goes to, at most all."""
    average_others: bool = False
    """Whether tensors of other layers are the mean of the fine-tuned models, or the base's."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        rank, gate = settings.get("rank", cls.rank), settings.get("gate_rank", cls.gate_rank)
        return [("gate_rank", f"expected at most `rank`, {rank}, got {gate}")] if gate > rank else []

    @property
    def keeps_projection(self) -> bool:
        return not self.average_others

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        own, kind = {name: Part(SAME, shape)}, _linear_part(name, shape)
        if kind == "bias":
            return own | {f"deltas.{name}": Part(SAME, (tasks, *shape))}
        if kind is None:
            return own
        rank = self._rank(shape)
        left = Part(SAME, (tasks, shape[0], shape[1] if rank is None else rank))
        right = Part(SAME, (tasks, self._gate(shape) if rank is None else rank, shape[1]))
        return own | {f"left.{name}": left, f"right.{name}": right}

    def _rank(self, shape: tuple[int, ...]) -> int | None:
        """k of a matrix; None where whole matrices and the vectors that tokens are compared with take less room."""
        (rows, columns), rank = shape, min(self.rank, *shape)
        return rank if rank * (rows + columns) <= columns * (rows + self._gate(shape)) else None

    def _gate(self, shape: tuple[int, ...]) -> int:
        return min(self.gate_rank, *shape)

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        import torch

        del learned
        name, deltas, kind = group.name, group.deltas, _linear_part(group.name, tuple(group.shape))
        own = {name: group.base.clone()}
        if kind == "bias":
            return own | {f"deltas.{name}": deltas}
        if kind is None:
            return {name: total(deltas).div_(group.tasks).add_(group.base)} if self.average_others else own
        rank = self._rank(tuple(group.shape))
        triplets = [decompose(delta, self.gate_rank if rank is None else rank) for delta in deltas]
        left = torch.stack([(u * s).float() for u, s, _ in triplets]) if rank is not None else deltas
        right = torch.stack([v.T.float() for _, _, v in triplets])
        return own | {f"left.{name}": left, f"right.{name}": right}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        own = read(name).float()
        kind = _linear_part(name, tuple(own.shape))
        if kind == "bias":
            return own + read(f"deltas.{name}")[index]
        if kind is None:
            return own
        left = read(f"left.{name}")[index].float()
        return own + (
            left if self._rank(tuple(own.shape)) is None else left @ read(f"right.{name}")[index].float()
        )

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        from mergecli.methods._routed_linears import put
        from mergecli.methods._smile_layers import SmileLinear, SmileTower

        del tasks, routing
        replaced = _linear_layers(tower)
        for path, layer in replaced.items():
            key = f"{prefix}{path}"
            biases = read(f"deltas.{key}.bias") if "bias" in layer.state_dict() else None
            left, right = read(f"left.{key}.weight"), read(f"right.{key}.weight")
            put(tower, path, SmileLinear(layer, left, right, biases, self.gate_rank, self.experts_per_token))
        return SmileTower(tower, replaced)


def _linear_part(name: str, shape: tuple[int, ...]) -> str | None:
    """`weight` or `bias` of a linear layer, None for the tensors of other layers."""
    found = _LINEAR.search(name)
    if found is None or len(shape) != {"weight": 2, "bias": 1}[found["kind"]]:
        return None
    return found["kind"]


def _linear_layers(tower: nn.Module) -> dict[str, nn.Linear]:
    """Path -> layer, of the linear layers that are upscaled."""
    from torch.nn import Linear

    layers = {path: layer for path, layer in tower.named_modules() if isinstance(layer, Linear)}
    return {path: layer for path, layer in layers.items() if _LINEAR.search(f"{path}.weight")}
