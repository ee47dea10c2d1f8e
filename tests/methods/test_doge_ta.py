"""DOGE-TA."""

from __future__ import annotations

from tests.conftest import World, assert_same
from tests.methods.reference._weights import floats
from tests.methods.reference.doge_ta import doge_ta
from tests.support.layered_world import MATRICES
from tests.support.merging import merged, with_integers


def test_doge_ta_equals_autograd_with_torchs_own_adam(layered: World) -> None:
    tuned = list(layered.tuned.values())
    want = doge_ta(layered.base, tuned, MATRICES, 0.07, 0.3, 3, 60, 1e-3)
    got = merged(layered, "doge_ta", subspace_divisor=3, steps=60, learning_rate=1e-3)
    assert_same(got, with_integers(want, layered), atol=1e-5)
    plain = merged(layered, "doge_ta", steps=0)
    assert float((plain[MATRICES[0]] - got[MATRICES[0]]).abs().max()) > 1e-3


def test_doge_ta_without_correction_is_scaled_trimmed_task_arithmetic_on_layer_weights_only(
    layered: World,
) -> None:
    got = merged(layered, "doge_ta", ["t1"], steps=0, density=1, scaling_factor=0.5)
    for name, value in floats(layered.base).items():
        delta = layered.tuned["t1"][name] - value
        want = value + 0.5 * delta / delta.norm() if name in MATRICES else value
        assert_same({name: got[name]}, {name: want}, atol=1e-6)
