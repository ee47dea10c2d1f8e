"""What the objective of methods that adapt is made of: batches of every task, and task vectors in main memory."""

from __future__ import annotations

from typing import Any

import torch

from mergecli.merging.learning.objective import OffloadedTensors, TaskBatches


def test_of_vectors_held_elsewhere_only_what_is_asked_for_is_copied_and_nothing_kept() -> None:
    held = {"a": torch.ones(2, 3), "b": torch.zeros(2, 4)}
    moved = OffloadedTensors(held, "meta")
    assert list(moved) == ["a", "b"]
    assert (moved["a"].is_meta, moved["a"].shape) == (True, (2, 3))
    assert not any(each.is_meta for each in held.values())
    assert OffloadedTensors(held, "cpu")["b"] is held["b"], "a copy would take as much again"


def test_every_image_is_looked_at_once_a_round_in_an_order_of_its_own() -> None:
    pixels: Any = range(10)
    one, other = (TaskBatches(0, name, pixels, torch.zeros(1)) for name in ("one", "other"))
    rounds = [
        torch.cat([one.rows(4 * epoch + number, 3, 0) for number in range(4)]).tolist() for epoch in range(3)
    ]
    assert [sorted(each) for each in rounds] == [list(range(10))] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    assert len(one.rows(3, 3, 0)) == 1
    assert one.rows(0, 10, 0).tolist() != other.rows(0, 10, 0).tolist()
    assert one.rows(0, 10, 0).tolist() != one.rows(0, 10, 1).tolist()
    assert sorted(one.rows(5, 99, 0).tolist()) == list(range(10))
