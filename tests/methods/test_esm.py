"""ESM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.merging.learning.measure import measure
from mergecli.merging.merge import merge
from mergecli.methods._base import Group
from mergecli.methods.esm import Esm
from mergecli.runtime.errors import InputError
from tests.conftest import Weights, assert_same
from tests.methods.reference.esm import esm, esm_matrix
from tests.support.image_zoo import FEW, Zoo, measured_merge
from tests.support.merging import same_bytes
from tests.support.statistics_in_memory import LINEAR, Given, grams

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("fuse", [True, False])
def test_esm_equals_full_decompositions_of_outputs_in_float64(
    zoo: Zoo, layer_inputs: list[Weights], fuse: bool
) -> None:
    want = esm(dict(zoo.base), list(zoo.tuned.values()), layer_inputs, 0.8, fuse=fuse)
    assert_same(measured_merge(zoo, "esm", scaling_factor=0.8, fuse_qkv=fuse), want, atol=2e-4)


def test_statistics_of_reg_mean_serve_esm_and_the_other_way_round(zoo: Zoo, tmp_path: Path) -> None:
    done = measure(zoo.recipe, method="reg_mean", settings=FEW, output=tmp_path / "s")
    assert measure(zoo.recipe, method="esm", settings=FEW, output=tmp_path / "s").new == ()
    other = measure(zoo.recipe, method="esm", settings=FEW, output=tmp_path / "t")
    for task, path in done.paths.items():
        assert path.read_bytes() == other.paths[task].read_bytes()
    same_bytes(measured_merge(zoo, "esm", tmp_path / "s"), measured_merge(zoo, "esm"))


def test_statistics_of_more_images_than_esm_looks_at_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    measure(zoo.recipe, method="reg_mean", settings=FEW, output=tmp_path / "s")
    with pytest.raises(InputError, match=r"`measured\.settings\.examples`: expected 8, got 20"):
        measured_merge(zoo, "esm", tmp_path / "s", examples=8)


def test_a_sweep_over_the_scaling_factor_surveys_once_and_gives_single_merges(zoo: Zoo) -> None:
    from mergecli.merging.sweep_points import merge_sweep, points_of

    settings = [f"method.{key}={value}" for key, value in FEW.items()]
    points = points_of(
        zoo.folder / "zoo.toml", ["method.scaling_factor=0.5,1"], base=None, method="esm", changes=settings
    )
    for each, alpha in zip(merge_sweep(points, zoo.folder / "swept"), (0.5, 1.0), strict=True):
        same_bytes(load_file(each.path), measured_merge(zoo, "esm", scaling_factor=alpha))
    assert not [path for path in zoo.folder.iterdir() if path.name.startswith("tmp")], (
        "nothing is left behind"
    )


def test_what_is_excluded_keeps_the_bases_values(zoo: Zoo) -> None:
    got = measured_merge(zoo, "esm", exclude=["vision_model.encoder.layers.0"])
    kept = [name for name in got if "layers.0." in name]
    assert kept
    assert all(got[name].equal(zoo.base[name]) for name in kept)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(deltas: list[Tensor], squares: list[Tensor], **settings: Any) -> Tensor:
    """M of one matrix, before the factor of its layer."""
    rows = torch.stack([delta.float() for delta in deltas])
    names = tuple(f"t{number}" for number in range(len(deltas)))
    group = Group(LINEAR, torch.zeros(rows.shape[1:]), rows, (True,) * len(rows), names)
    given: Given = grams(*(each.float() for each in squares))
    found = Esm(**settings)._matrix(group, given)
    assert found is not None
    return found.double()


SHAPES = [(12, 4), (4, 12), (6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_and_their_gram_matrices_give_the_same(shape: tuple[int, int]) -> None:
    deltas = [some(*shape, seed=seed) for seed in (1, 2)]
    inputs = [some(40, shape[1], seed=seed) for seed in (3, 4)]
    got = solved(deltas, [x.T @ x for x in inputs])
    assert torch.allclose(got, esm_matrix(deltas, inputs), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_singular_value_is_the_product_of_two_means(shape: tuple[int, int]) -> None:
    deltas = [some(*shape, seed=seed) for seed in (1, 2)]
    values = torch.linalg.svdvals(solved(deltas, [torch.eye(shape[1]).double()] * 2))
    values = values[values > 1e-5 * values[0]]
    assert torch.allclose(values, values[0].expand_as(values), rtol=1e-5)


def test_task_vectors_grow_inputs_grow_and_orders_change() -> None:
    deltas = [some(6, 6, seed=seed) for seed in (1, 2, 3)]
    squares = [x.T @ x for x in (some(40, 6, seed=seed) for seed in (4, 5, 6))]
    want = solved(deltas, squares)
    assert torch.allclose(solved([3 * d for d in deltas], squares), 3 * want, atol=1e-5)
    assert torch.allclose(solved(deltas, [7 * g for g in squares]), want, atol=1e-5)
    assert torch.allclose(solved(deltas[::-1], squares[::-1]), want, atol=1e-5)


def test_a_task_equal_to_the_base_does_not_count_in_the_mean_of_lengths() -> None:
    deltas, squares = [some(6, 6, seed=1), some(6, 6, seed=2)], [torch.eye(6).double()] * 3
    with_zero = solved([*deltas, torch.zeros(6, 6).double()], squares, task_power=2.0)
    without_weights = solved(
        [d / d.norm() for d in deltas] + [torch.zeros(6, 6).double()], squares, task_power=0.0
    )
    equal = solved([d / d.norm() for d in deltas] + [torch.zeros(6, 6).double()], squares, task_power=2.0)
    assert torch.allclose(equal, without_weights, atol=1e-6)
    assert bool(with_zero.isfinite().all())


def test_after_the_layers_factor_norms_are_cubed(zoo: Zoo) -> None:
    plain, scaled = (measured_merge(zoo, "esm", layer_power=power) for power in (0.0, 2.0))
    names = [f"vision_model.encoder.layers.{layer}.mlp.fc1.weight" for layer in (0, 1)]
    before, after = (
        [float((weights[name] - zoo.base[name]).norm()) for name in names] for weights in (plain, scaled)
    )
    assert after[0] / after[1] == pytest.approx((before[0] / before[1]) ** 3, rel=1e-3)


def test_models_equal_to_the_base_give_the_base(zoo: Zoo, tmp_path: Path) -> None:
    recipe = replace(zoo.recipe, tuned=dict.fromkeys(zoo.recipe.tuned, zoo.recipe.base))  # type: ignore[arg-type]
    merge(recipe, method="esm", settings=FEW, output=tmp_path / "m.safetensors")
    assert_same(load_file(tmp_path / "m.safetensors"), dict(zoo.base))
