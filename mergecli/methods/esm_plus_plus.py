"""ESM++: the tower that ESM merges, and for each task low-rank changes of it that each image chooses by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group
from mergecli.methods._calibrated import Layout, Probe, Shapes
from mergecli.methods._essential import essential_directions
from mergecli.methods._fused import stacks
from mergecli.methods._gram_statistics import gram_of
from mergecli.methods._least_squares import Grams, is_linear, owner, within
from mergecli.methods._mixture import SAME, Installed, Part, Read, Routed, Routing
from mergecli.methods._settings import Range
from mergecli.methods.esm import Esm, Surveyed
from mergecli.runtime.errors import InputError, quoted

if TYPE_CHECKING:
    from torch import Tensor, nn

_ATTENTION = re.compile(r"\b[qkv]_proj\.weight$")
_ROUTED = re.compile(r"\b([qkv]_proj|fc1)\.weight$")


@dataclass(frozen=True)
class EsmPlusPlus(Routed, Esm):
    """y = W x + b + B_t A_t x,  t = argmax_i cos(mean of the image's tokens x, q_i),  theta = (W, b) of ESM:

    B_i  the first `lora_rank` eigenvectors of (W_i - W) G_i (W_i - W)^T, G_i the Gram matrix of inputs;  A_i = B_i^T (W_i - W)
    q_i  the mean of task i's inputs, every token of every image in model i, at length 1

    for the weights of queries, keys and values, which are one matrix and take one decision, and of `fc1`. Each layer decides
    anew. All other tensors, and biases, are ESM's: the settings that it has too say which tower that is. Nothing is
    learned. Heads are told the task, as everywhere.

    Each image is routed by itself, as the paper describes it. Routing by batches (`eval --routing batch`) is what the
    authors' code does with towers that have tokens first: every position of a token decides for the whole batch, by the mean
    over its images. There a batch holds images of one task, so that it leaks the task.
    """

    own_tower: ClassVar[str] = "the merged tower with that task's low-rank changes"
    prefixes = ("left.", "right.", "prototypes.")
    title: ClassVar[str] = (
        "low-rank changes of ESM's tower, among which each image chooses; nothing is trained"
    )
    paper: ClassVar[str] = "Li et al., Essential subspace routing, arXiv 2606.19164"
    published = "ESM++ (rank {lora_rank})"
    also_called: ClassVar[Mapping[str, str]] = {"esmpp": "", "essential_subspace_routing": ""}
    work: ClassVar[str] = f"{Esm.work}, and one more of each matrix that routes"
    measured_as: ClassVar[str] = ""
    merge_time: ClassVar[frozenset[str]] = Esm.merge_time | {"lora_rank"}

    lora_rank: Annotated[int, Range(1)] = 32
    """Columns of B, at most the smaller side; the paper also has 8."""

    def layout(self, shapes: Shapes, /) -> Layout:
        stacked = {member for _, members in stacks(shapes) for member in members}
        attention = [
            name for name, shape in shapes.items() if _is_routed(name, shape) and _ATTENTION.search(name)
        ]
        if self.fuse_qkv and (apart := [name for name in attention if name not in stacked]):
            raise InputError(
                f"{quoted(apart)}: expected the weights of queries, keys and values of a layer as matrices of one shape",
                "with `--set method.fuse_qkv=false` each is a matrix of its own",
            )
        found = super().layout(shapes)
        for name, shape in shapes.items():
            if _is_routed(name, shape):
                found[f"{owner(name)}.mean"] = ("F32", (shape[1],))
        return found

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        states = probe.activations(self.batch_size)
        for prefix, layer in chain(probe.layers(), probe.behind()):
            with Grams(layer) as grams:
                states.step(layer)
            for name, mean in grams.mean_inputs():
                if _ROUTED.search(f"{name}.weight"):
                    yield f"{prefix}.{name}.weight.mean", mean
            for name, gram in grams.means():
                yield f"{within(prefix, name)}.weight.gram", gram

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        own = {name: Part(SAME, shape)}
        if not _is_routed(name, shape):
            return own
        rows = 3 * shape[0] if self.fuse_qkv and _ATTENTION.search(name) else shape[0]
        rank = min(self.lora_rank, rows, shape[1])
        own[f"left.{name}"] = Part(SAME, (tasks, shape[0], rank))
        if self._first(name) == name:
            own[f"right.{name}"] = Part(SAME, (tasks, rank, shape[1]))
            own[f"prototypes.{name}"] = Part("F32", (tasks, shape[1]))
        return own

    def _first(self, name: str) -> str:
        """The weight whose name A and q have in the file."""
        return _ATTENTION.sub("q_proj.weight", name) if self.fuse_qkv else name

    def expand(self, group: Group, learned: Surveyed, /) -> dict[str, Tensor]:
        import torch

        first, merged = group.members[0] if group.members else group.name, self.merge(group, learned)
        own = group.named(merged)
        if not _is_routed(first, tuple(group.shape)):
            return own
        rank, shift = min(self.lora_rank, *group.shape), merged - group.base
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        prototypes: list[Tensor] = []
        for task, delta in enumerate(group.deltas):
            change = torch.zeros_like(delta) if self.excludes(first) else delta - shift
            directions, _ = essential_directions(change, gram_of(group, learned.statistics, task), rank)
            lefts.append(directions.float())
            rights.append((directions.T @ change.double()).float())
            prototypes.append(learned.statistics.read(task, f"{owner(first)}.mean"))
        left = torch.stack(lefts)
        members = group.members or (group.name,)
        for name, part in zip(members, left.chunk(len(members), dim=1), strict=True):
            own[f"left.{name}"] = part.contiguous()
        own[f"right.{first}"] = torch.stack(rights)
        own[f"prototypes.{first}"] = torch.nn.functional.normalize(torch.stack(prototypes), dim=1)
        return own

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        own = read(name).float()
        if not _is_routed(name, tuple(own.shape)):
            return own
        return own + read(f"left.{name}")[index].float() @ read(f"right.{self._first(name)}")[index].float()

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        from torch.nn import Linear

        from mergecli.methods._essential_layers import EssentialLinear, EssentialRouter, EssentialTower
        from mergecli.methods._routed_linears import put

        del tasks
        linear = {path: layer for path, layer in tower.named_modules() if isinstance(layer, Linear)}
        replaced = {
            path: layer
            for path, layer in linear.items()
            if _is_routed(f"{prefix}{path}.weight", tuple(layer.weight.shape))
        }
        routers: dict[str, EssentialRouter] = {}
        for path, layer in replaced.items():
            name, like = f"{prefix}{path}.weight", layer.weight
            first = self._first(name)
            asked = first.removeprefix(prefix).removesuffix(".weight")
            if asked not in routers:
                right, prototypes = (
                    read(f"{each}.{first}").to(like.device) for each in ("right", "prototypes")
                )
                routers[asked] = EssentialRouter(right.to(like), prototypes, routing)
            put(tower, path, EssentialLinear(layer, read(f"left.{name}").to(like), routers[asked]))
        return EssentialTower(tower, replaced, routers)


def _is_routed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a weight that routes."""
    return is_linear(name, shape) and _ROUTED.search(name) is not None
