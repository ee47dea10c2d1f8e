"""Methods that change what another method sees or gives."""

from __future__ import annotations

from tests.conftest import World, assert_same
from tests.support.merging import merged


def test_modifiers_of_modifiers_are_methods_too(layered: World) -> None:
    tower = {"name": "dare", "drop_rate": 0.5, "of": {"name": "ties", "density": 0.5}}
    got = merged(layered, "svc", of={"name": "lines", "first_layer": 1.0, "increase": 0.0, "of": tower})
    assert_same(got, merged(layered, "svc", of=tower), atol=1e-6)
