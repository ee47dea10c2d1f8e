"""TSV-C: each task's matrices kept as their leading singular vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergecli.methods._base import Group, PerTensor
from mergecli.methods._mixture import SAME, Part, Read
from mergecli.methods._settings import Fraction
from mergecli.methods._sim import FindsTask
from mergecli.methods._svd import PositionEmbedding, decompose, is_matrix_named

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TsvC(FindsTask, PerTensor):
    """theta_t = theta_0 + U_t S_t V_t^T,  the tower of task t, matrix by matrix:

    U_t S_t V_t^T is tau_t cut to its k largest singular values; k = max(1, r // T), r the smaller side of the matrix

    Other tensors, and matrices whose factors would take no less room than tau_t, keep tau_t whole. With k = r // T the
    factors of all tasks together take at most the room of two such matrices, however many tasks there are up to r.
    """

    prefixes = ("left.", "right.", "deltas.", *FindsTask.prefixes)
    title: ClassVar[str] = "each task's matrices compressed to their leading singular vectors"
    paper: ClassVar[str] = "Gargiulo et al., Task singular vectors, CVPR 2025, arXiv 2412.00081"
    also_called: ClassVar[Mapping[str, str]] = {"tsvc": ""}
    work: ClassVar[str] = "a singular value decomposition of each matrix of each model"

    rank_fraction: Fraction | None = None
    """k as a share of the smaller side, to the nearest whole number, at least 1; r // T if it is not given."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, kept whole like other tensors, or a matrix as in
    FusionBench."""

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        own = {name: Part(SAME, shape)}
        if not self._is_matrix(name, shape):
            return own | {f"deltas.{name}": Part(SAME, (tasks, *shape))}
        rank = self._rank(shape, tasks)
        if rank is None:
            return own | {f"left.{name}": Part(SAME, (tasks, *shape))}
        left, right = (tasks, shape[0], rank), (tasks, rank, shape[1])
        return own | {f"left.{name}": Part(SAME, left), f"right.{name}": Part(SAME, right)}

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        import torch

        del learned
        name, deltas, shape = group.name, group.deltas, tuple(group.shape)
        own = {name: group.base.clone()}
        if not self._is_matrix(name, shape):
            return own | {f"deltas.{name}": deltas}
        rank = self._rank(shape, group.tasks)
        if rank is None:
            return own | {f"left.{name}": deltas}
        triplets = [decompose(delta, rank) for delta in deltas]
        left = torch.stack([(u * s).float() for u, s, _ in triplets])
        right = torch.stack([v.T.float() for _, _, v in triplets])
        return own | {f"left.{name}": left, f"right.{name}": right}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        base = read(name).float()
        if not self._is_matrix(name, tuple(base.shape)):
            return read(f"deltas.{name}")[index] + base
        left = read(f"left.{name}")[index].float()
        if left.shape == base.shape:  # kept whole: the right factor would be the identity
            return left + base
        return left @ read(f"right.{name}")[index].float() + base

    def _is_matrix(self, name: str, shape: tuple[int, ...]) -> bool:
        return is_matrix_named(name, shape, self.position_embedding)

    def _rank(self, shape: tuple[int, ...], tasks: int) -> int | None:
        """k of a matrix, or None where it is kept whole."""
        smaller = min(shape)
        k = smaller // tasks if self.rank_fraction is None else round(self.rank_fraction * smaller)
        k = max(1, k)
        return k if k * sum(shape) < shape[0] * shape[1] else None
