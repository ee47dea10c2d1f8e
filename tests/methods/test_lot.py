"""LOT-Merging."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergecli.merging.learning.measure import measure
from tests.conftest import Weights, assert_same
from tests.methods.conftest import Called
from tests.methods.reference.lot import lot
from tests.support.image_zoo import FEW, Zoo, measured_merge
from tests.support.statistics_in_memory import LINEAR, Given, combine, grams, some

pytestmark = pytest.mark.usefixtures("own_store")


def normalized_inputs(zoo: Zoo) -> list[Weights]:
    """(rows, D) what the scale of each norm of each tower multiplies, for 20 images of its own task."""
    found: list[Weights] = []
    for task, weights in zoo.tuned.items():
        seen: dict[str, list[Tensor]] = {}
        called = Called(zoo.clip().tower)
        called.load_state_dict(weights)

        def hook(module: nn.Module, _: object, output: Tensor, seen: dict[str, list[Tensor]] = seen) -> None:
            name = next(name for name, each in called.named_modules() if each is module)  # noqa: B023
            normal = (output - module.bias) / module.weight  # type: ignore[operator]
            seen.setdefault(f"{name}.weight", []).append(normal.reshape(-1, normal.shape[-1]))

        for each in called.modules():
            if isinstance(each, nn.LayerNorm):
                each.register_forward_hook(hook)
        with torch.no_grad():
            called.vision_model(zoo.pixels(task, 20, shuffle=True))
        found.append({name: torch.cat(rows) for name, rows in seen.items()})
    return found


def test_lot_is_the_pseudo_inverse_of_each_tasks_inputs(zoo: Zoo, layer_inputs: list[Weights]) -> None:
    normals = normalized_inputs(zoo)
    assert len(normals[0]) == 2 * 2 + 2, "two norms in each of two layers, one before and one after them"
    want = lot(dict(zoo.base), list(zoo.tuned.values()), layer_inputs, normals, 0.7)
    assert_same(measured_merge(zoo, "lot", scaling_factor=0.7), want, atol=2e-4)


def test_what_lot_measures_holds_a_vector_for_each_norm(zoo: Zoo) -> None:
    done = measure(zoo.recipe, method="lot", settings=FEW, output=zoo.folder / "lot")
    stored = load_file(done.paths["a"])
    normals = normalized_inputs(zoo)[0]
    assert {name.removesuffix(".squares") for name in stored if name.endswith(".squares")} == normals.keys()
    for name, rows in normals.items():
        assert torch.allclose(stored[f"{name}.squares"], rows.square().mean(0), rtol=1e-4, atol=1e-6)


def test_one_task_is_given_back_on_what_its_images_show() -> None:
    rows, x = some(1, 6, 8), some(5, 8, seed=1)
    got = combine("lot", grams(x.T @ x), rows, scaling_factor=1.0)
    assert torch.allclose(x @ got.T, x @ rows[0].T, atol=1e-4)
    unseen = torch.linalg.svd(x).Vh[5:]
    assert torch.allclose(unseen @ got.T, torch.zeros(3, 6), atol=1e-5), "elsewhere the base stays"


def test_inputs_that_do_not_meet_keep_every_task() -> None:
    rows, x, y = some(2, 6, 8), torch.zeros(5, 8), torch.zeros(5, 8)
    x[:, :4], y[:, 4:] = some(5, 4, seed=1), some(5, 4, seed=2)
    got = combine("lot", grams(x.T @ x, y.T @ y), rows, scaling_factor=1.0)
    assert torch.allclose(got[:, :4], rows[0, :, :4], atol=1e-4)
    assert torch.allclose(got[:, 4:], rows[1, :, 4:], atol=1e-4)


def test_equal_inputs_give_the_mean() -> None:
    rows, x = some(3, 6, 4), some(40, 4, seed=3)
    got = combine("lot", grams(*[x.T @ x] * 3), rows, scaling_factor=1.0)
    assert torch.allclose(got, rows.mean(0), atol=1e-5)


def test_a_scale_that_no_image_shows_stays_at_the_base() -> None:
    name = "vision_model.encoder.layers.0.layer_norm1.weight"
    given = Given(*({f"{name}.squares": torch.tensor([0.0, weight])} for weight in (1.0, 3.0)))
    rows = torch.tensor([[5.0, 1.0], [7.0, 2.0]])
    got = combine("lot", given, rows, name, scaling_factor=1.0)
    assert torch.allclose(got, torch.tensor([0.0, 1.75]))
    assert name != LINEAR
