"""MASS: a first pass finds the tasks that an image may be of, and TSV-M of those tasks sees it in a second one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor
from mergecli.methods._depth import layer_of
from mergecli.methods._mixture import SAME, Installed, Part, Read, Routed, Routing
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, decompose, is_matrix_named
from mergecli.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

_FC1 = re.compile(r"(^|\.)fc1\.weight$")
_PUBLISHED = {12: 9, 24: 20}
"""Layers of a tower -> the layer by whose input the authors find tasks."""


@dataclass(frozen=True)
class Mass(Routed, PerTensor):
    """theta(x) = TSV-M of the tasks S(x),  of what is kept of tau_i: U_i S_i V_i^T, its k = max(1, r // T) largest values

    S(x)  the tasks with p_i > `threshold`, at most the `tasks_per_image` likeliest; the likeliest if there are none
    p     softmax of z,  z_i = (mean e - e_i) / (sd e + 1e-6),  sd with T - 1
    e_i   |h - V_i V_i^T h|,  V_i of `fc1` in one layer,  h the class token that goes into it in TSV-M of all tasks

    r is the smaller side of a matrix; other tensors are the base's plus the mean of tau_i over S(x). Nothing is learned and
    no image is looked at. An image passes twice, the first time up to that layer; no other image matters to it.

    The authors take the head of whichever task of S(x) has the largest logit. Here heads are told the task, as everywhere, and
    results say for how many images it was the likeliest. Where tasks do not differ in that `fc1`, as adapters of other
    weights do not, nothing tells them apart.
    """

    own_tower: ClassVar[str] = "that task's tower, its matrices cut to their largest singular values"
    routes_batches: ClassVar[bool] = False
    prefixes = ("left.", "right.", "deltas.")
    title: ClassVar[str] = "merges, for each image, the few tasks that it may be of, as TSV-M does"
    paper: ClassVar[str] = "Crisostomi et al., MASS, arXiv 2504.05342"
    also_called: ClassVar[Mapping[str, str]] = {}
    work: ClassVar[str] = "a singular value decomposition of each matrix of each model"

    layer: Annotated[int, Range(0)] | None = None
    """The layer, counted from 0, whose `fc1` tells tasks apart; if it is not given 9 of 12 and 20 of 24, as published, and of
    other towers the one at four fifths."""
    threshold: Annotated[float, Range(0, 1)] = 0.2
    """Tasks with a greater probability are merged."""
    tasks_per_image: Annotated[int, Range(1)] = 3
    """How many tasks are merged for an image, at most; with 1 every image has the tower of the likeliest."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in
    FusionBench."""

    @property
    def sends_on(self) -> bool:
        return True

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        own = {name: Part(SAME, shape)}
        if not is_matrix_named(name, shape, self.position_embedding):
            return own | {f"deltas.{name}": Part(SAME, (tasks, *shape))}
        rank = _rank(shape, tasks)
        left, right = Part(SAME, (tasks, shape[0], rank)), Part(SAME, (tasks, rank, shape[1]))
        return own | {f"left.{name}": left, f"right.{name}": right}

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        """None: but a layer that tells tasks apart there must be."""
        del tasks
        self.telling(tensors)
        return {}

    def telling(self, names: Iterable[str]) -> str:
        """The weight that tells tasks apart, among a tower's tensors.

        Raises:
            InputError: there is none.
        """
        weights = {
            layer: name for name in names if _FC1.search(name) and (layer := layer_of(name)) is not None
        }
        depth = len(weights)
        chosen = _PUBLISHED.get(depth, 4 * depth // 5) if self.layer is None else self.layer
        if chosen not in weights:
            which = f"in layer {chosen}; it has layers 0 to {depth - 1}" if depth else "in any layer"
            raise InputError(
                f"the tower has no weight `fc1` {which}: by its input `mass` tells tasks apart",
                "choose another with `--set method.layer=N`" if depth else "`smile` needs no such layer",
            )
        return weights[chosen]

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        import torch

        del learned
        name, deltas, shape = group.name, group.deltas, tuple(group.shape)
        own = {name: group.base.clone()}
        if not is_matrix_named(name, shape, self.position_embedding):
            return own | {f"deltas.{name}": deltas}
        triplets = [decompose(delta, _rank(shape, group.tasks)) for delta in deltas]
        left = torch.stack([(u * s).float() for u, s, _ in triplets])
        right = torch.stack([v.T.float() for _, _, v in triplets])
        return own | {f"left.{name}": left, f"right.{name}": right}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        own = read(name).float()
        if not is_matrix_named(name, tuple(own.shape), self.position_embedding):
            return own + read(f"deltas.{name}")[index].float()
        return own + read(f"left.{name}")[index].float() @ read(f"right.{name}")[index].float()

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        from mergecli.methods._mass_tower import Factors, MassTower

        del tasks, routing
        factors: dict[str, Factors] = {}
        deltas: dict[str, Tensor] = {}
        for name, own in tower.named_parameters():
            key = f"{prefix}{name}"
            if is_matrix_named(key, tuple(own.shape), self.position_embedding):
                left, right = (read(f"{each}.{key}").to(own.device) for each in ("left", "right"))
                factors[name] = Factors(left, right)
            else:
                deltas[name] = read(f"deltas.{key}").to(own.device)
        return MassTower.around(
            tower, factors, deltas, self.telling(factors), self.threshold, self.tasks_per_image
        )

    def projection(self, installed: Installed, own: nn.Linear, read: Read, name: str, /) -> nn.Module:
        from mergecli.methods._mass_tower import Factors, MassTower, merged
        from mergecli.methods._task_towers import ImageProjections

        assert isinstance(installed, MassTower)
        factors = Factors(*(read(f"{each}.{name}").to(own.weight.device) for each in ("left", "right")))
        return ImageProjections(
            own, lambda: installed.merged, lambda tasks: merged(name, own.weight, {name: factors}, {}, tasks)
        )


def _rank(shape: tuple[int, ...], tasks: int) -> int:
    """k of a matrix."""
    return min(max(1, min(shape) // tasks), *shape)
