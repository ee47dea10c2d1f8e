"""The memory of this process: when garbage is looked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from mergecli.runtime import interrupts, memory


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_no_garbage_is_looked_for_between_the_start_and_the_first_long_loop() -> None:
    memory.start()
    assert not gc.isenabled()
    interrupts.check()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000  # what the start made is not looked through again


def test_a_program_that_does_not_want_garbage_looked_for_is_left_alone() -> None:
    gc.disable()
    interrupts.check()
    assert not gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_most_memory_held_is_at_least_that_of_python() -> None:
    assert memory.peak_memory() > 10_000_000
