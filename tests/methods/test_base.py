"""What methods see of one tensor of all models."""

from __future__ import annotations

import torch

from mergecli.methods._base import RUN, Group


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
