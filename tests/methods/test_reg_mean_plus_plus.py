"""RegMean++."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Weights, assert_same
from tests.methods.reference.average import average
from tests.methods.reference.reg_mean import reg_mean
from tests.methods.reference.reg_mean_plus_plus import reg_mean_plus_plus
from tests.support.image_zoo import Zoo, measured_merge
from tests.support.statistics_in_memory import LINEAR

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("ratio", [0.95, 0.3])
def test_reg_mean_plus_plus_is_reg_mean_on_inputs_of_whole_half_merged_models(
    zoo: Zoo, layer_inputs: list[Weights], ratio: float
) -> None:
    got = measured_merge(zoo, "reg_mean_plus_plus", reduce_non_diagonal_ratio=ratio)
    pixels = [zoo.pixels(task, 20, shuffle=True) for task in zoo.tuned]
    want = reg_mean_plus_plus(zoo.clip().tower, list(zoo.tuned.values()), pixels, ratio)
    assert_same(got, want, atol=1e-5)
    first, second = (LINEAR.replace(".0.", f".{number}.") for number in (0, 1))
    plain = reg_mean(list(zoo.tuned.values()), layer_inputs, ratio)
    assert not torch.allclose(plain[second], want[second], atol=1e-3)
    assert not torch.allclose(plain[first], want[first], atol=1e-3)  # embeddings in front of it are merged


def test_the_norm_behind_the_layers_is_the_bases_on_request(zoo: Zoo) -> None:
    got = measured_merge(zoo, "reg_mean_plus_plus")
    published = measured_merge(zoo, "reg_mean_plus_plus", post_layernorm="base")
    mean = average(list(zoo.tuned.values()))
    for name, value in got.items():
        own = "post_layernorm" in name
        assert published[name].equal(zoo.base[name] if own else value), name
        assert not own or value.equal(mean[name]), name
