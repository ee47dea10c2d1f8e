"""LiNeS on top of other methods."""

from __future__ import annotations

import pytest

from tests.conftest import World, assert_same
from tests.methods.reference.lines import lines
from tests.support.layered_world import DEPTHS
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize("of", ["task_arithmetic", "ties", "average", "iso_c"])
def test_lines_equals_the_scaling_by_depth_of_what_a_method_merges(layered: World, of: str) -> None:
    want = lines(layered.base, merged(layered, of), DEPTHS, 0.4, 1.2)
    got = merged(layered, "lines", of={"name": of}, first_layer=0.4, increase=1.2)
    assert_same(got, with_integers(want, layered), atol=2e-6)


def test_lines_at_its_ends_is_the_method_itself_or_the_base(layered: World) -> None:
    assert_same(merged(layered, "lines", first_layer=1, increase=0), merged(layered, "task_arithmetic"))
    assert_same(merged(layered, "lines", first_layer=0, increase=0), layered.base, atol=1e-6)
