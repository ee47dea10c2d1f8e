"""ProDistill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergecli.methods._base import uniform
from mergecli.methods.pro_distill import ProDistill
from tests.conftest import assert_same
from tests.methods.reference.pro_distill import pro_distill, states
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.image_zoo import Zoo, measured_merge

pytestmark = pytest.mark.usefixtures("own_store")


def order(prefix: str, epoch: int, count: int) -> Tensor:
    """The order of an epoch, as the product draws it."""
    return uniform(0, prefix, f"pro_distill epoch {epoch}", 0, count).argsort(stable=True)


def test_pro_distill_is_adam_on_every_entry_of_a_layer_after_the_other(zoo: Zoo) -> None:
    got = measured_merge(zoo, "pro_distill", epochs=2)
    pixels = [zoo.pixels(task, 20, shuffle=True) for task in zoo.tuned]
    want = pro_distill(
        zoo.clip().tower, dict(zoo.base), list(zoo.tuned.values()), pixels, order, epochs=2, batch=7
    )
    # Adam makes whole steps of what is noise: the biases of keys change nothing, and their gradient is rounding alone
    names = [name for name in got if not name.endswith("k_proj.bias")]
    plain = task_arithmetic(dict(zoo.base), list(zoo.tuned.values()), 0.3)
    far = torch.cat([(got[name].double() - want[name]).abs().view(-1) for name in names])
    assert far.quantile(0.999) < 1e-5
    assert far.max() < 0.02, "an entry whose gradient is 0 but for rounding"
    inner = [name for name in names if ".layers." in name]
    assert all((got[name] - plain[name]).abs().max() > 1e-3 for name in inner)
    assert_same(
        {n: got[n] for n in names if n not in inner}, {n: plain[n] for n in names if n not in inner}, 1e-6
    )


def test_without_epochs_it_is_task_arithmetic(zoo: Zoo) -> None:
    got = measured_merge(zoo, "pro_distill", epochs=0, start=0.4)
    assert_same(got, task_arithmetic(dict(zoo.base), list(zoo.tuned.values()), 0.4), 1e-6)


class OneModel:
    """A probe of one model, the same as its base but for steps of 1/64, so that differences are exact."""

    tasks = 1

    def __init__(self, layer: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        self.old = {name: (64 * each.detach()).round() / 64 for name, each in layer.named_parameters()}
        self.new = {
            name: each + torch.randint(-3, 4, each.shape, generator=generator) / 64
            for name, each in self.old.items()
        }

    def base(self, name: str) -> Tensor:
        return self.old[name.removeprefix("layers.0.")]

    def tuned(self, task: int, name: str) -> Tensor:
        return self.new[name.removeprefix("layers.0.")].clone()


def test_a_single_model_with_all_of_its_task_vector_has_nothing_to_learn(zoo: Zoo) -> None:
    layer: Any = zoo.clip().tower.encoder.layers[0]  # type: ignore[union-attr]
    probe: Any = OneModel(layer)
    inputs = torch.randn(1, 5, len(layer.layer_norm1.weight), generator=torch.Generator().manual_seed(1))
    layer.load_state_dict(probe.new)
    method, names = ProDistill(start=1.0, epochs=3), list(probe.new)
    with torch.no_grad():
        wanted = layer(inputs, None)
    found = method._learned(probe, "layers.0", layer, names, [inputs], [wanted])  # pyright: ignore[reportPrivateUsage]
    for name in (
        names
    ):  # targets are computed without gradients, and round otherwise: Adam makes three steps of nothing
        own = probe.new[name]
        assert bool(
            (
                (found[name] - own).abs() <= 3.1 * method.learning_rate * (own - probe.old[name]).abs() + 1e-6
            ).all()
        )


def test_learning_a_layer_brings_its_outputs_nearer(zoo: Zoo) -> None:
    pixels = [zoo.pixels(task, 20, shuffle=True) for task in zoo.tuned]

    def far(merged: dict[str, Tensor]) -> float:
        return sum(
            float((states(zoo.clip().tower, merged, images)[-1] - states(zoo.clip().tower, own, images)[-1]).square().sum())
            for own, images in zip(zoo.tuned.values(), pixels, strict=True)
        )  # fmt: skip

    plain = task_arithmetic(dict(zoo.base), list(zoo.tuned.values()), 0.3)
    assert far(measured_merge(zoo, "pro_distill", epochs=5)) < 0.8 * far(plain)


def test_excluded_tensors_keep_the_bases_values(zoo: Zoo) -> None:
    got = measured_merge(zoo, "pro_distill", epochs=1, exclude=[r".*mlp", r".*post_layernorm"])
    for name, value in got.items():
        same = value.equal(zoo.base[name])
        assert same == ("mlp" in name or "post_layernorm" in name), name
