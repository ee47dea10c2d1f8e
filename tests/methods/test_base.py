"""What methods see of one tensor of all models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mergecli.methods._base import RUN, Group, PerTensor, merge_group
from mergecli.methods._mixture import SAME, Conditioned, Part, outcomes
from mergecli.runtime.errors import UsageError


def test_random_numbers_depend_on_seed_names_and_entry_only() -> None:
    count = RUN + 500
    whole = Group("w", None, torch.zeros(2, count), (False, False), ("a", "b"), seed=1)
    part = Group("w", None, torch.zeros(2, 300), (False, False), ("b", "a"), seed=1, start=RUN - 100)
    assert part.uniform(1).equal(whole.uniform(0)[RUN - 100 : RUN + 200])
    assert not whole.uniform(0).equal(whole.uniform(1))
    for name, seed in (("v", 1), ("w", 2)):
        other = Group(name, None, torch.zeros(2, count), (False, False), ("a", "b"), seed=seed)
        assert not other.uniform(0).equal(whole.uniform(0))
    assert 0.49 < float(whole.uniform(0).mean()) < 0.51


def test_task_vectors_and_weights_are_the_same_group() -> None:
    base, tuned = torch.randn(5), torch.randn(2, 5)
    rows = torch.stack([tuned[0], tuned[1] - base])
    group = Group("w", base, rows.clone(), (False, True), ("a", "b"))
    torch.testing.assert_close(group.deltas, tuned - base)
    torch.testing.assert_close(Group("w", base, rows.clone(), (False, True), ("a", "b")).tuned, tuned)


@dataclass(frozen=True)
class Turned(PerTensor):
    def merge(self, group: Group, /) -> Any:
        return group.base.T if group.name == "w" else None


@dataclass(frozen=True)
class Halved(Conditioned, PerTensor):
    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        return {name: Part(SAME, shape), f"own.{name}": Part(SAME, (tasks, *shape))}

    def expand(self, group: Group, learned: Any, /) -> dict[str, torch.Tensor]:
        return {group.name: group.base, f"own.{group.name}": group.deltas[:1]}


def test_a_method_that_gives_another_shape_is_told_which_was_expected() -> None:
    group = Group("w", torch.zeros(2, 3), torch.zeros(4, 2, 3), (False,) * 4, ("a", "b", "c", "d"))
    here = "tests/methods/test_base.py"
    with pytest.raises(UsageError) as error:
        merge_group(Turned(), group, None)
    assert str(error.value) == f"{here}: `merge` of `w`: expected a tensor of shape (2, 3), got (3, 2)"
    with pytest.raises(UsageError) as error:
        merge_group(Turned(), Group("v", torch.zeros(2), torch.zeros(1, 2), (False,), ("a",)), None)
    assert str(error.value) == f"{here}: `merge` of `v`: expected a tensor of shape (2,), got nothing"
    with pytest.raises(UsageError) as error:
        outcomes(Halved(), group, None)
    assert (
        str(error.value)
        == f"{here}: `expand` of `own.w`: expected a tensor of shape (4, 2, 3), got (1, 2, 3)"
    )
