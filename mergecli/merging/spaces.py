"""Coordinates of low rank in which adapters are merged: a method sees small matrices, and what it gives is lifted back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from mergecli.formats.lora import AdaptedCheckpoint, LowRank
from mergecli.merging.models import Models
from mergecli.methods._base import DataDriven, Method
from mergecli.methods._calibrated import measured_by
from mergecli.methods._mixture import Mixture
from mergecli.recipe.schema import Recipe
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError, UsageError, listed
from mergecli.runtime.notes import note
from mergecli.runtime.progress import Progress
from mergecli.storage.checkpoint import TASK_VECTOR, Checkpoint, TensorEntry
from mergecli.storage.checksums import ChunkHashes
from mergecli.storage.lazy_checkpoint import LazyCheckpoint
from mergecli.storage.scratch import Scratch, TensorShelf

if TYPE_CHECKING:
    from torch import Tensor

NEGLIGIBLE = 1e-13
"""Singular values up to this share of the largest are rounding errors of float64, and span nothing."""

Scaled = tuple["Tensor", "Tensor", float]
"""(O, r) B, (r, I) A and s of an adapter's change s B A."""


class Coordinates(NamedTuple):
    """The changes of one weight by T adapters, in p x q coordinates: change = left K right."""

    left: Tensor
    """(O, p) orthonormal columns."""
    right: Tensor | None
    """(q, I) orthonormal rows; None where q is I, and K is not multiplied."""
    cores: list[Tensor]
    """T times (p, q): K of each adapter; 0 where it does not change the weight."""

    def lift(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """(O, k) and (k, I) factors of the change that a merged (p, q) core stands for, k the smaller of p and q."""
        if self.right is None:
            return self.left, core
        if core.shape[0] <= core.shape[1]:
            return self.left, core @ self.right
        return self.left @ core, self.right


def core_space(changes: Sequence[Scaled | None]) -> Coordinates:
    """Core Space (Panariello, Marczak et al., NeurIPS 2025, arXiv 2509.17786): K_t = s_t (U^T B_t) (A_t V^T), U the left
    singular vectors of [B_1 ... B_T] and V the right ones of [A_1; ...; A_T]. Nothing is lost: U K_t V = s_t B_t A_t."""
    import torch

    there = [each for each in changes if each is not None]
    left = _basis(torch.cat([b for b, _, _ in there], dim=1))
    right = _basis(torch.cat([a for _, a, _ in there]).T)
    zero = left.new_zeros(left.shape[1], right.shape[1])
    cores = [zero if each is None else (left.T @ each[0]) @ (each[1] @ right) * each[2] for each in changes]
    return Coordinates(left, right.T, cores)


def knots(changes: Sequence[Scaled | None]) -> Coordinates:
    """KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735): [s_1 B_1 A_1 ... s_T B_T A_T] = U S [V_1 ... V_T], merged are the
    S V_t. The decomposition is that of a small matrix: the factors are made triangular first."""
    import torch

    there = [each for each in changes if each is not None]
    outer = torch.linalg.qr(torch.cat([b * s for b, _, s in there], dim=1))
    inner = [torch.linalg.qr(a.T) for _, a, _ in there]
    ranks = [len(a) for _, a, _ in there]
    small = torch.cat(
        [part @ each.R.T for part, each in zip(outer.R.split(ranks, dim=1), inner, strict=True)], dim=1
    )
    u, values, v = torch.linalg.svd(small, full_matrices=False)
    kept = _kept(values)
    left, v = outer.Q @ u[:, :kept], values[:kept, None] * v[:kept]
    signs = _signs(left)
    parts = (signs[:, None] * v).split([each.R.shape[0] for each in inner], dim=1)
    lifted = iter([part @ each.Q.T for part, each in zip(parts, inner, strict=True)])
    zero = left.new_zeros(left.shape[1], there[0][1].shape[1])
    return Coordinates(left * signs, None, [zero if each is None else next(lifted) for each in changes])


def _basis(columns: Tensor) -> Tensor:
    """(n, R) left singular vectors of (n, m) columns, largest first: a basis of what they span, at least one vector."""
    import torch

    thin = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(thin.R, full_matrices=False)
    basis = thin.Q @ u[:, : _kept(values)]
    return basis * _signs(basis)


def _kept(values: Tensor) -> int:
    """How many singular values, largest first, are not negligible."""
    return max(1, int((values > NEGLIGIBLE * values[:1]).sum()))


def _signs(basis: Tensor) -> Tensor:
    """(R,) the sign of each column's largest entry: with it that is positive, whatever the decomposition has chosen."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))[0]
    return (largest >= 0).to(basis.dtype).mul_(2).sub_(1)


_KINDS: Mapping[str, Callable[[Sequence[Scaled | None]], Coordinates]] = {"core": core_space, "knots": knots}


@dataclass(frozen=True, kw_only=True)
class SpaceModels(Models):
    """Adapters in coordinates of low rank: the base is 0 there, and each model a task vector whose weights are its cores."""

    whole: Models
    """The same models as they are."""
    changes: Mapping[str, LowRank]
    """Weight -> how one of the adapters that change it has that."""
    shelf: TensorShelf
    bases: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Weight -> shapes of `left` and `right` of its coordinates; () where there is none. Biases have no coordinates: their
    changes are merged as they are."""

    @property
    def dense(self) -> Models:
        return self.whole

    def digests(self) -> dict[str, str]:
        """Input -> digest; of an adapter, that of its own file."""
        assert self.whole.base is not None
        adapters = {name: cast("AdaptedCheckpoint", each).adapter for name, each in self.whole.tuned.items()}
        return {
            "base": self.whole.base.digest(),
            **{name: each.stored.digest() for name, each in adapters.items()},
        }

    def lift(self, name: str, core: Tensor) -> tuple[Tensor, Tensor]:
        """(O, k) and (k, I) float64 factors of the change that a merged core of a weight stands for."""
        left, right = (
            self.shelf.get(f"{side} {name}").view(shape).double() if shape else None
            for side, shape in zip(("left", "right"), self.bases[name], strict=True)
        )
        assert left is not None
        return Coordinates(left, right, []).lift(core.double())


def space_of(recipe: Recipe, method: Method, models: Models) -> str:
    """The space that the recipe means, for these models: by default `dense`, and `core` where the output is an adapter and
    nothing speaks against it.

    Raises:
        UsageError: the recipe names a space that the method cannot work in. InputError: or the models.
    """
    if recipe.space == "dense" or not (recipe.space or recipe.as_adapter):
        return "dense"
    of_models = [
        f"`{name}` {why}" for name, each in models.tuned.items() if (why := _why_dense(each, models))
    ]
    of_method = _why_whole_weights(method)
    if not of_models and not of_method:
        return recipe.space or "core"
    why = f"`{recipe.method}` {of_method}" if of_method else of_models[0]
    if not recipe.space:
        note(f"the merge is dense, and then cut to an adapter: {why}")
        return "dense"
    hint = 'use `space = "dense"`' + (
        ", whose result `--as-adapter` cuts to a rank" if recipe.as_adapter else ""
    )
    if of_method:
        raise UsageError(f'space = "{recipe.space}": {why}', hint)
    raise InputError(f'space = "{recipe.space}" is for LoRA adapters:\n{listed(of_models)}', hint)


def _why_dense(model: Checkpoint, models: Models) -> str:
    """Why the model has no coordinates of low rank; empty if it has."""
    if not isinstance(model, AdaptedCheckpoint):
        return "is no adapter"
    base = models.base
    if base is None or (model.base.files != base.files and model.base.vision().digest() != base.digest()):
        return f"is added to another base, {model.base.path}"
    return model.more_than_low_rank


def _why_whole_weights(method: Method) -> str:
    """Why the method has to see whole weights; empty if it has not."""
    if isinstance(method, Mixture) and method.is_mixture:
        return "writes more than one tower"
    if isinstance(method, DataDriven) or measured_by(method):
        return "looks at images, and what it measures on them is of whole weights"
    if any(
        each.fuses for each in (method, *(end for line in method.layers for end in (line.first, line.last)))
    ):
        return "merges queries, keys and values as one matrix (`method.fuse_qkv`), which have coordinates of their own"
    return ""


def in_space(models: Models, space: str, scratch: Scratch, report: Progress | None) -> SpaceModels:
    """The adapters in coordinates, which are kept in files of `scratch`.

    Raises:
        InputError: an adapter has NaN or infinity.
    """
    import torch

    assert models.base is not None
    base, kind = models.base, _KINDS[space]
    adapters = {
        name: {weight: change for weight, change in each.changes.items() if weight in base.entries}
        for name, each in models.tuned.items()
        if isinstance(each, AdaptedCheckpoint)
    }
    changes = {
        weight: next(each[weight] for each in adapters.values() if weight in each)
        for weight in base.entries
        if any(weight in each for each in adapters.values())
    }
    biases = {
        name for each in models.tuned.values() if isinstance(each, AdaptedCheckpoint) for name in each.biases
    }
    shelf = TensorShelf(scratch)
    bases: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums round by the number of threads
    try:
        for number, weight in enumerate(changes, 1):
            interrupts.check()
            found = kind([_scaled(name, weight, each.get(weight), models) for name, each in adapters.items()])
            shelf.put(f"left {weight}", found.left.float())
            if found.right is not None:
                shelf.put(f"right {weight}", found.right.float())
            for name, core in zip(adapters, found.cores, strict=True):
                shelf.put(f"{name} {weight}", core.float())
            right = () if found.right is None else tuple(found.right.shape)
            bases[weight], shapes[weight] = (tuple(found.left.shape), right), tuple(found.cores[0].shape)
            if report:
                report("projecting", number, len(changes))
        for bias in sorted(biases & base.entries.keys()):
            interrupts.check()
            shapes[bias], own = base.entries[bias].shape, base.read(bias).float()
            for name, each in models.tuned.items():
                shelf.put(f"{name} {bias}", each.read(bias).float() - own)
    finally:
        torch.set_num_threads(threads)
    shapes = {name: shapes[name] for name in base.entries if name in shapes}
    zeros = _checkpoint(shapes, dict.fromkeys(shapes, _zeros), base)
    tuned = {
        name: _checkpoint(
            shapes,
            {weight: partial(_core, shelf, f"{name} {weight}") for weight in shapes},
            each,
            TASK_VECTOR,
        )
        for name, each in models.tuned.items()
    }
    return SpaceModels(
        zeros, tuned, models.seed, models.device, whole=models, changes=changes, shelf=shelf, bases=bases
    )


def _scaled(name: str, weight: str, change: LowRank | None, models: Models) -> Scaled | None:
    if change is None:
        return None
    left, right, _ = change.load()
    if not (bool(left.isfinite().all()) and bool(right.isfinite().all())):
        raise InputError(
            f"{models.tuned[name].path}: {name}: the factors of `{weight}` have NaN or infinity",
            "its training diverged, or the file is damaged: leave the adapter out, or take an earlier checkpoint",
        )
    return left.double(), right.double(), change.scaling


def _checkpoint(
    shapes: Mapping[str, tuple[int, ...]],
    readers: Mapping[str, Callable[[int, int, Tensor], object]],
    origin: Checkpoint,
    kind: str = "checkpoint",
) -> LazyCheckpoint:
    """Float32 tensors that are computed by `readers`, in place of the checkpoint that they stand for."""
    stored = origin.adapter.stored if isinstance(origin, AdaptedCheckpoint) else origin
    return LazyCheckpoint(
        path=origin.path,
        entries={name: TensorEntry("F32", shape, number, 0) for number, (name, shape) in enumerate(shapes.items())},
        metadata={"kind": kind},
        files=origin.files,
        descriptors=(),
        hashes=ChunkHashes(),
        states=(),
        readers=tuple(readers[name] for name in shapes),
        sources=(stored,),
        stored=stored,
    )  # fmt: skip


def _zeros(start: int, stop: int, into: Tensor) -> None:
    del start, stop
    into.zero_()


def _core(shelf: TensorShelf, key: str, start: int, stop: int, into: Tensor) -> None:
    into.copy_(shelf.get(key)[start:stop])
