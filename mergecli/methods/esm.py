"""ESM: task vectors merged in the directions in which they change what layers give on the tasks' own images."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from mergecli.methods._base import Group, Groups, Shelf, total
from mergecli.methods._calibrated import Statistics
from mergecli.methods._essential import essential_directions
from mergecli.methods._gram_statistics import GramStatistics, gram_of
from mergecli.methods._least_squares import is_linear
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, is_matrix, polar, polar_times
from mergecli.methods.tsv_m import TsvM

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(NamedTuple):
    """The merged task vectors of all matrices of layers, what each is multiplied by, and the statistics."""

    merged: Shelf
    factors: dict[str, float]
    statistics: Statistics


@dataclass(frozen=True)
class Esm(GramStatistics):
    """theta = theta_0 + alpha b M,  for the weight (O, I) of each linear layer but `out_proj`,  k = max(1, O // T):

    p_ij, l_ij  eigenvectors and eigenvalues of tau_i G_i tau_i^T, the largest first, G_i RegMean's Gram matrix of inputs
    g_ij = (l_ij / mean_j l_ij)^0.15, divided by its mean over j;  a_i = (|tau_i| / mean_i |tau_i|)^2;  j = 1 ... k
    U = [g_ij p_ij] (O, T k),  V = [a_i g_ij p_ij^T tau_i] (T k, I);  column c of V times (|V_c| / mean_c |V_c|)^2
    M = 2 s(U) s(V) P(U) P(V),  s the mean singular value, P the polar factor
    b = (|M| / mean |M|)^2, the mean over all layers' weights of this kind

    `out_proj`: theta = theta_0 + b tau of TSV-M; other matrices, without b, the same. Everything else:
    theta = theta_0 + (1 / T) sum_i tau_i. The Gram matrices are those that `reg_mean` measures: statistics of either serve
    both, where they look at as many images.

    Where we depart from the authors' code: |tau_i| is the norm itself, which is theirs on B/16 and L/14 (on B/32 they complete
    a basis with columns of the identity); directions with l below 1e-10 of the largest, which are rounding, have g = 0; task
    vectors that are 0 do not count in the mean of |tau_i|. Their images are of the validation part; here `split` says.
    """

    title: ClassVar[str] = (
        "task vectors merged in the directions that change outputs on 32 unlabeled images a task"
    )
    paper: ClassVar[str] = "Li et al., Model merging in the essential subspace, CVPR 2026, arXiv 2602.20208"
    published = "ESM"
    work: ClassVar[str] = "eigendecompositions of each matrix of each model, and two of what they make"
    passes: ClassVar[int] = 2
    merge_time: ClassVar[frozenset[str]] = GramStatistics.merge_time | {
        "scaling_factor", "eigenvalue_power", "task_power", "column_power", "layer_power", "gain", "fuse_qkv",
        "position_embedding",
    }  # fmt: skip

    examples: Annotated[int, Range(1)] = 32
    """Images of each task that are looked at, without labels; all where a task has fewer."""
    scaling_factor: Annotated[float, Range()] = 1.0
    """alpha, of the weights that M merges; the authors search it in [0, 2] on validation images."""
    eigenvalue_power: Annotated[float, Range(0)] = 0.15
    """The exponent of l in g; 0 weighs all directions the same."""
    task_power: Annotated[float, Range(0)] = 2.0
    """The exponent of |tau_i| in a; 0 weighs all tasks the same."""
    column_power: Annotated[float, Range(0)] = 2.0
    """The exponent of the columns' norms of V; 0 leaves them."""
    layer_power: Annotated[float, Range(0)] = 2.0
    """The exponent in b; 0 leaves the layers as they are."""
    gain: Annotated[float, Range(0)] = 2.0
    """The factor of M: 2 is the authors' code, 1 the paper's formula."""
    fuse_qkv: bool = True
    """Whether queries, keys and values of a layer are one matrix, as the authors have it, or three."""
    position_embedding: PositionEmbedding = "matrix"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as the authors
    have it."""

    @property
    def fuses(self) -> bool:
        return self.fuse_qkv

    def survey_with(self, groups: Groups, learned: Statistics, /) -> Surveyed:
        """Merges every matrix of a layer, and keeps it: how large it becomes depends on all others of its kind."""
        shelf, sizes, kinds = groups.shelf(), dict[str, float](), defaultdict[str, list[str]](list)
        for name, merged in groups.map(lambda group: (group.name, self._matrix(group, learned))):
            if merged is not None:
                shelf.put(name, merged)
                sizes[name] = float(merged.norm())
                kinds[_LAYER.sub(".", name)].append(name)
        factors: dict[str, float] = {}
        for names in kinds.values():
            mean = sum(sizes[name] for name in names) / len(names)
            for name in names:
                factors[name] = (sizes[name] / mean) ** self.layer_power if mean else 1.0
        return Surveyed(shelf, factors, learned)

    def merge(self, group: Group, learned: Surveyed, /) -> Tensor:
        if self.excludes(group.members[0] if group.members else group.name):
            return group.base.clone()
        if group.name in learned.factors:
            scale = learned.factors[group.name]
            if not _is_output(group.name):
                scale *= self.scaling_factor
            return learned.merged.get(group.name).view(group.shape).mul_(scale).add_(group.base)
        if is_matrix(group, self.position_embedding):
            return TsvM(position_embedding="matrix").merge(group)
        return total(group.deltas).div_(group.tasks).add_(group.base)

    def _matrix(self, group: Group, learned: Statistics) -> Tensor | None:
        """(O, I) float32 M of a weight of a layer, None of other tensors."""
        import torch

        if not is_linear(group.name, tuple(group.shape)):
            return None
        if _is_output(group.name):
            return TsvM().merge(group).sub_(group.base)
        deltas, rank = group.deltas, max(1, group.shape[0] // group.tasks)
        sizes = deltas.flatten(1).double().norm(dim=1)
        mean = float(sizes.sum()) / max(1, int((sizes > 0).sum()))
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for task, delta in enumerate(deltas):
            directions, values = essential_directions(delta, gram_of(group, learned, task), rank)
            weights = torch.where(values > 0, values / (values.sum() / rank).clamp(min=1e-300), 0.0)
            weights = torch.where(values > 0, weights**self.eigenvalue_power, 0.0)
            weights /= (weights.sum() / rank).clamp(min=1e-300)
            share = float(sizes[task] / mean) ** self.task_power if mean else 0.0
            lefts.append(directions * weights)
            rights.append((directions.T @ delta.double()) * (share * weights)[:, None])
        left, right = torch.cat(lefts, dim=1), torch.cat(rights)
        columns = right.norm(dim=0)
        if float(columns.sum()):
            right *= (columns / columns.mean()) ** self.column_power
        second, other = polar(right)
        merged, spread = polar_times(left, second)
        # directions that are left out are columns of U and rows of V all the same: they count in the means
        counts = min(len(left), rank * group.tasks) * min(rank * group.tasks, right.shape[1])
        gain = self.gain * float(spread.sum() * other.sum()) / counts
        return merged.mul_(gain).float()


_LAYER = re.compile(r"\.\d+\.")


def _is_output(name: str) -> bool:
    """Whether it is the last weight of an attention, whose inputs the authors do not look at."""
    return "out_proj" in name
