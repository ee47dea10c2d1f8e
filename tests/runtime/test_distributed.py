"""Which process writes and talks, and sums in a process alone."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from mergecli.runtime.distributed import Ranks, is_first, is_first_here, join, usable_device
from mergecli.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("rank", "local", "count", "first", "first_here"),
    [
        ("0", "0", "2", True, True),
        ("1", "1", "2", False, False),
        ("2", "0", "4", False, True),
        ("1", "1", "1", True, True),
    ],
)
def test_the_first_process_talks_and_the_first_of_a_machine_fills_its_store(
    monkeypatch: pytest.MonkeyPatch, rank: str, local: str, count: str, first: bool, first_here: bool
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": count}.items():
        monkeypatch.setenv(name, value)
    assert (is_first(), is_first_here()) == (first, first_here)


def test_a_process_alone_is_the_first_and_its_sums_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert is_first()
    assert is_first_here()
    ranks, device = join("cpu")
    assert (ranks, device) == (Ranks(0, 1), "cpu")
    tensor = torch.tensor([1.0, 2.0])
    assert ranks.total(tensor).tolist() == ranks.broadcast(tensor).tolist() == [1.0, 2.0]
    assert (ranks.all(True, "cpu"), ranks.all(False, "cpu")) == (True, False)
    ranks.raise_first_error(None, "cpu")
    with pytest.raises(UsageError, match="wrong\nhint: mend"):
        ranks.raise_first_error(UsageError("wrong", "mend"), "cpu")


def test_a_process_that_cannot_find_the_others_says_which_variables_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "")
    assert join("cpu") == (Ranks(0, 1), "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, and there is no RANK, MASTER_ADDR, MASTER_PORT\n"):
        join("cpu")


def test_a_device_that_torch_does_not_have_is_refused() -> None:
    assert usable_device("cpu") == usable_device(cast("str", torch.device("cpu"))) == "cpu"
    with pytest.raises(
        UsageError, match="device: expected `cpu`, `cuda`, or `cuda:1` for the second GPU, got `nowhere`"
    ):
        usable_device("nowhere")
