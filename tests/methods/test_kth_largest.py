"""The k-th largest magnitude of whole task vectors, found in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.merging.merge import merge
from mergecli.methods import _kth_largest
from mergecli.methods._base import Group
from mergecli.methods._kth_largest import (
    Rank,
    Tally,
    keep_largest,
    kth_largest,
    kth_largest_by_tensor,
    packed,
)
from tests.conftest import World, assert_same
from tests.methods.reference._weights import Weights
from tests.methods.reference.pcb import pcb
from tests.methods.reference.ties import ties
from tests.support.merging import merged, with_integers, with_models

Result = TypeVar("Result")
HALF = [torch.bfloat16, torch.float16]


@dataclass
class InBlocks:
    """Passes over task vectors in memory, a block of entries at a time."""

    deltas: dict[str, Tensor]
    block: int = 1000

    @property
    def tensors(self) -> Sequence[str]:
        return list(self.deltas)

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        for name, rows in self.deltas.items():
            for start in range(0, rows.shape[1], self.block):
                part = rows[:, start : start + self.block : sample].clone()
                names = tuple(f"t{task}" for task in range(len(rows)))
                yield Group(name, None, part, (True,) * len(rows), names, 0, start)

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        return map(look, self(sample))


def coarse(world: World, dtype: torch.dtype) -> tuple[World, Weights, list[Weights]]:
    """The world in half precision, so near to its base that many entries tie, and its models as float32."""

    def rounded(weights: Weights) -> Weights:
        return {name: each.to(dtype) if each.is_floating_point() else each for name, each in weights.items()}

    def near(model: Weights) -> Weights:
        return {
            name: world.base[name] + (each - world.base[name]) * 0.05 if each.is_floating_point() else each
            for name, each in model.items()
        }

    base, *tuned = (rounded(each) for each in (world.base, *map(near, world.tuned.values())))
    plain = [
        {k: v.float() if v.is_floating_point() else v for k, v in each.items()} for each in (base, *tuned)
    ]
    return with_models(world, base, *tuned), plain[0], plain[1:]


def merged_as_float32(world: World, method: str, **settings: object) -> Weights:
    output = world.folder / "merged.safetensors"
    changes = ["dtype=float32"]
    merge(world.files, base=world.base_file, method=method, settings=settings, changes=changes, output=output)
    return load_file(output)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("trim", ["model", "tensor", "fusion_bench"])
@pytest.mark.parametrize("density", [0.03, 0.2, 0.9])
def test_ties_of_half_precision_keeps_all_entries_that_tie(
    world: World, dtype: torch.dtype, trim: str, density: float
) -> None:
    other, base, tuned = coarse(world, dtype)
    magnitudes = (tuned[0]["zz.long"] - base["zz.long"]).abs()
    assert len(magnitudes.unique()) < len(magnitudes) / 10  # many tie
    want = ties(base, tuned, 0.3, density, "sum", trim)
    got = merged_as_float32(other, "ties", density=density, trim=trim)
    assert_same(got, with_integers(want, world), atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_pcb_of_half_precision_is_that_of_the_authors_program(
    world: World, dtype: torch.dtype, density: float
) -> None:
    other, base, tuned = coarse(world, dtype)
    want = pcb(base, tuned, 1.2, density)
    assert_same(merged_as_float32(other, "pcb", density=density), with_integers(want, world), atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_breadcrumbs_of_half_precision_keep_the_entries_that_tie_with_a_kept_one(
    world: World, dtype: torch.dtype
) -> None:
    other, base, tuned = coarse(world, dtype)
    got = merged_as_float32(other, "breadcrumbs", scaling_factor=1, drop_smallest=0.6, drop_largest=0.1)
    for name in ("layer.0.weight", "zz.long"):
        want = base[name].clone()
        for model in tuned:
            delta = model[name] - base[name]
            ordered = delta.abs().reshape(-1).sort().values
            smallest = ordered[int(0.6 * len(ordered))]
            largest = ordered[len(ordered) - int(0.1 * len(ordered)) - 1]
            want += torch.where((delta.abs() >= smallest) & (delta.abs() <= largest), delta, 0)
        assert_same({name: got[name]}, {name: want}, atol=1e-6)


def tied(entries: int) -> Tensor:
    """(2, entries) of which nearly all have one of three magnitudes, in any order."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 3, (2, entries), generator=generator) * 2.0**-13
    odd = torch.rand(2, entries, generator=generator)
    return torch.where(odd < 0.01, odd * 2.0**-6, steps)


@pytest.mark.parametrize("k", [1, 500, 20_000, 39_500, 60_000, 99_999, 100_000])
def test_the_k_th_largest_of_many_that_tie_is_exact(k: int) -> None:
    deltas = tied(100_000)
    want = deltas.abs().sort(dim=1, descending=True).values[:, k - 1]
    groups = InBlocks({"a": deltas[:, :70_000], "b": deltas[:, 70_000:]})
    (found,) = kth_largest(groups, [Rank(k / 100_000, lambda _: k)], lambda group: group.deltas.abs_())
    assert found.equal(want)
    (of_tensor,) = kth_largest_by_tensor(InBlocks({"all": deltas}), [lambda _: k])
    assert of_tensor["all"].equal(want)


def test_of_many_that_tie_only_the_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    add = _kth_largest.Near.add

    def counted(near: _kth_largest.Near, *found: object) -> None:
        add(near, *found)  # pyright: ignore[reportArgumentType]
        kept.append(len(found[-1].values) // 4)  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(_kth_largest.Near, "add", counted)
    deltas = tied(100_000)
    for share in (0.1, 0.2, 0.395, 0.6, 0.9):
        kept.clear()
        rank = Rank(share, lambda entries, share=share: int(entries * share))
        kth_largest(InBlocks({"all": deltas}), [rank], lambda group: group.deltas.abs_())
        assert sum(kept[-2 * 100 :]) < 0.02 * deltas.numel()  # of the last pass over 100 blocks of 2 tasks
        kept.clear()
        kth_largest_by_tensor(InBlocks({"all": deltas}), [rank.kept])
        assert sum(kept) < 0.02 * deltas.numel()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.99, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_threshold_of_a_tensor_is_exact_although_its_sample_misleads(share: float, scale: float) -> None:
    """Just the entries that are looked at have another scale, so that brackets lie above or below what is sought."""
    deltas = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0)) + 1
    for start in range(0, 20_000, 1000):
        deltas[:, start : start + 1000 : _kth_largest.THIN] *= scale
    rest = torch.arange(40.0).view(2, 20)  # a small tensor, of which all is kept
    (found,) = kth_largest_by_tensor(InBlocks({"a": deltas, "b": rest}), [lambda n: int(share * n)])
    for name, rows in (("a", deltas), ("b", rest)):
        k = int(share * rows.shape[1])
        ordered = rows.sort(dim=1, descending=True).values
        want = ordered[:, k - 1] if k else torch.full((2,), torch.inf)
        assert found[name].equal(want)


def test_values_that_are_equal_are_kept_once_with_their_number() -> None:
    several, alone = torch.tensor([3.0, 1.0, 3.0, 3.0, 1.0]).numpy(), torch.tensor([5.0, 2.0, 4.0]).numpy()
    tally = Tally()
    tally.add(packed(several))
    assert len(tally.distinct) == len(tally.counts) == 2 * 4
    tally.add(packed(alone[:0]))
    tally.add(packed(alone))
    assert tally.size == 8
    assert sorted(tally.values().tolist()) == [1, 1, 2, 3, 3, 3, 4, 5]


def test_the_k_th_largest_of_quantized_values_is_exact() -> None:
    steps = torch.rand(100, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    codes = torch.randint(-8, 8, (2, 100, 500), generator=torch.Generator().manual_seed(2))
    deltas = (codes * steps).flatten(1)
    for k in (1, 10_000, 25_001, 50_000):
        want = deltas.abs().sort(dim=1, descending=True).values[:, k - 1]
        (found,) = kth_largest(
            InBlocks({"a": deltas}), [Rank(k / 50_000, lambda _, k=k: k)], lambda group: group.deltas.abs_()
        )
        assert found.equal(want)


def test_the_threshold_is_exact_although_the_sample_misleads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of very different scales, and a bracket far too narrow for the sample: it must be widened."""
    monkeypatch.setattr("mergecli.methods._kth_largest.MARGIN", 1e-6)
    tuned = [
        {k: (v + (10.0**i) * (v - world.base[k])) if v.is_floating_point() else v for k, v in model.items()}
        for i, model in enumerate(world.tuned.values())
    ]
    other = with_models(world, world.base, *tuned)
    want = ties(world.base, tuned, 0.3, 0.2, "sum")
    assert_same(merged(other, "ties"), with_integers(want, world), atol=1e-5)


def test_entries_below_their_tasks_threshold_become_zero() -> None:
    deltas = torch.tensor([[1.0, -2, 3], [1, -2, 3]])
    assert keep_largest(deltas, torch.tensor([2.0, torch.inf])).tolist() == [[0, -2, 3], [0, 0, 0]]


def test_values_are_kept_whole_whatever_the_first_of_them_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kth_largest, "PROBE", 4)
    different, equal = np.arange(20, dtype=np.float32), np.full(20, 7, np.float32)
    for values, counted in (
        (np.concatenate([equal, equal + 1]), True),
        (np.concatenate([equal[:4], different]), False),  # the first few are equal, most are not
        (np.concatenate([different[:4], equal]), False),  # the other way round: only more memory
    ):
        found = packed(values)
        assert bool(found.counts) == counted
        tally = Tally()
        tally.add(found)
        assert tally.size == len(values)
        assert sorted(tally.values().tolist()) == sorted(values.tolist())
