"""Methods of singular values: against full decompositions in float64, to 1e-6."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergecli.methods._kinds import Group
from mergecli.methods._spectra import decompose, gram, is_matrix, polar
from tests.conftest import Weights, World, assert_same
from tests.golden import naive, naive_spectral
from tests.support.merging import merged, with_models
from tests.support.layered_world import MATRICES, layered_world

ALL = ("tsv_m", "iso_c", "iso_cts", "wudi", "ace_merging")


@pytest.fixture
def layered(tmp_path: Path) -> World:
    return layered_world(tmp_path)


def with_steps(weights: Weights, world: World) -> Weights:
    return {**weights, "steps": world.base["steps"]}


@pytest.mark.parametrize("shape", [(9, 9), (20, 6), (6, 20), (1, 5), (5, 1), (0, 3), (3, 0)])
def test_a_decomposition_through_the_gram_matrix_is_the_full_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = decompose(matrix)
    want = torch.linalg.svdvals(matrix.double())
    assert float((values - want).abs().sum()) < 1e-10
    assert float(((left * values) @ right.T - matrix).abs().sum()) < 1e-10
    if min(shape):
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert float((polar(matrix)[0] - u @ v).abs().max()) < 1e-10
    first = decompose(matrix, 1)
    assert first[0].shape == (shape[0], min(1, *shape))


def test_singular_values_over_five_orders_of_magnitude_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 30, generator=generator).double())[0] for n in (40, 30))
    want = torch.logspace(0, -5, 30, dtype=torch.float64)
    left, values, right = decompose((u * want) @ v.T)
    assert float((values / want - 1).abs().max()) < 1e-5
    assert float((left.T @ left - torch.eye(30)).abs().max()) < 1e-5
    assert float((right.T @ right - torch.eye(30)).abs().max()) < 1e-10


def test_directions_of_negligible_singular_values_are_left_out() -> None:
    column = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    matrix = column @ column[:5].T
    left, values, right = decompose(matrix)
    assert values.count_nonzero() == 2
    assert left.any(0).tolist() == right.any(0).tolist() == [True, True, False, False, False]
    factor, _ = polar(matrix)
    assert float((factor @ factor.T @ factor - factor).abs().max()) < 1e-10
    assert torch.linalg.matrix_rank(factor) == 2
    assert not polar(torch.zeros(4, 3))[0].any()


def test_half_a_gram_matrix_is_enough() -> None:
    matrix = torch.randn(30, 300, generator=torch.Generator().manual_seed(1)).double()
    assert float((gram(matrix) - matrix.T @ matrix).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("embeddings.position_embedding.weight", True), ("visual.positional_embedding", True),
        ("pos_embed", True), ("layers.0.fc.weight", False), ("embed_positions.fc.weight", False),
    ],
)  # fmt: skip
def test_a_table_of_positions_is_known_by_its_name(name: str, table: bool) -> None:
    group = Group(name, None, torch.zeros(1, 3, 4), (True,), ("t1",))
    assert is_matrix(group, "table") is not table
    assert is_matrix(group, "matrix")


@pytest.mark.parametrize("tasks", [1, 2, 3, 13])
def test_tsv_m_equals_the_naive_one(tmp_path: Path, tasks: int) -> None:
    world = layered_world(tmp_path, tasks)
    want = naive_spectral.tsv_m(world.base, list(world.tuned.values()), 0.9)
    assert_same(merged(world, "tsv_m", scaling_factor=0.9), with_steps(want, world), atol=1e-6)


@pytest.mark.parametrize("tasks", [1, 3, 13])
def test_iso_c_equals_the_naive_one(tmp_path: Path, tasks: int) -> None:
    world = layered_world(tmp_path, tasks)
    want = naive_spectral.iso_c(world.base, list(world.tuned.values()), 1.5)
    assert_same(merged(world, "iso_c", scaling_factor=1.5), with_steps(want, world), atol=1e-6)


@pytest.mark.parametrize(("tasks", "common_space"), [(1, 0.5), (2, 0.8), (3, 0.3), (3, 1.0), (4, 0.0)])
def test_iso_cts_equals_the_naive_one(tmp_path: Path, tasks: int, common_space: float) -> None:
    world = layered_world(tmp_path, tasks)
    want = naive_spectral.iso_cts(world.base, list(world.tuned.values()), 1.1, common_space)
    got = merged(world, "iso_cts", scaling_factor=1.1, common_space=common_space)
    assert_same(got, with_steps(want, world), atol=1e-6)


def test_wudi_equals_autograd_with_torchs_own_adam(layered: World) -> None:
    want = naive_spectral.wudi(layered.base, list(layered.tuned.values()), 60, 1e-3)
    got = merged(layered, "wudi", steps=60, learning_rate=1e-3)
    assert_same(got, with_steps(want, layered), atol=1e-5)


def test_doge_ta_equals_autograd_with_torchs_own_adam(layered: World) -> None:
    tuned = list(layered.tuned.values())
    want = naive_spectral.doge_ta(layered.base, tuned, MATRICES, 0.07, 0.3, 3, 60, 1e-3)
    got = merged(layered, "doge_ta", subspace_divisor=3, steps=60, learning_rate=1e-3)
    assert_same(got, with_steps(want, layered), atol=1e-5)
    plain = merged(layered, "doge_ta", steps=0)
    assert float((plain[MATRICES[0]] - got[MATRICES[0]]).abs().max()) > 1e-3


@pytest.mark.parametrize("lengths", [[0.1, 0.1, 0.1], [1e-3, 0.1, 1.0]])
def test_ace_merging_equals_the_authors_formula(tmp_path: Path, lengths: list[float]) -> None:
    """With alike norms, and with norms so unlike that the spectrum is refined."""
    world = layered_world(tmp_path, 3, lengths)
    want = naive_spectral.ace_merging(world.base, list(world.tuned.values()), 0.8, 0.01, 0.3, 0.5)
    got = merged(world, "ace_merging", scaling_factor=0.8, spectral_share=0.5)
    assert_same(got, with_steps(want, world), atol=1e-5)
    if lengths[0] != lengths[1]:
        bare = merged(world, "ace_merging", scaling_factor=0.8, spectral_share=0)
        assert float((bare[MATRICES[2]] - got[MATRICES[2]]).abs().max()) > 1e-3


def test_ace_merging_with_a_large_ridge_averages_the_centred_task_vectors(layered: World) -> None:
    got = merged(layered, "ace_merging", ridge=1e6, heterogeneity=1e9)
    centred = [
        {
            k: layered.base[k] + (d := v - layered.base[k]) - (d.mean(0) if k in MATRICES else 0)
            if v.is_floating_point() else v
            for k, v in model.items()
        }
        for model in layered.tuned.values()
    ]  # fmt: skip
    assert_same(got, with_steps(naive.average(centred), layered), atol=2e-6)


def test_a_task_equal_to_the_base_changes_no_matrix_in_ace_merging_and_wudi(layered: World) -> None:
    tuned = list(layered.tuned.values())
    for method, settings in (("ace_merging", {}), ("wudi", {"steps": 20})):
        want = merged(with_models(layered, layered.base, *tuned), method, **settings)
        got = merged(with_models(layered, layered.base, layered.base, *tuned), method, **settings)
        assert_same({n: got[n] for n in MATRICES}, {n: want[n] for n in MATRICES}, atol=1e-6)


def test_one_task_is_that_task_in_the_methods_that_keep_its_spectrum(layered: World) -> None:
    for method in ("tsv_m", "wudi"):
        assert_same(merged(layered, method, ["t1"]), layered.tuned["t1"], atol=2e-6)


def test_repeated_tasks_and_tasks_equal_to_the_base_change_nothing_in_tsv_m(layered: World) -> None:
    """Two tasks of rank 2, each given twice among one that is zero: the sum of the two, as if they were alone."""
    base = {"w": torch.zeros(12, 10)}
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0] for n in (12, 10))
    one, two = (
        {"w": left[:, i : i + 2] @ torch.diag(torch.tensor([3.0, 2])) @ right[:, i : i + 2].T} for i in (0, 2)
    )
    other = with_models(layered, base, one, one, base, two, two)
    assert_same(merged(other, "tsv_m"), {"w": one["w"] + two["w"]}, atol=2e-6)


def test_iso_cts_with_only_common_directions_is_iso_c(layered: World) -> None:
    assert_same(merged(layered, "iso_cts", common_space=1), merged(layered, "iso_c"), atol=1e-6)


def test_all_singular_values_of_iso_c_are_equal_and_have_the_summed_ones_mean(layered: World) -> None:
    got = merged(layered, "iso_c")
    for name in MATRICES:
        summed = sum(model[name] - layered.base[name] for model in layered.tuned.values())
        mean = torch.linalg.svdvals(summed).mean()
        assert float((torch.linalg.svdvals(got[name] - layered.base[name]) - mean).abs().max()) < 1e-5


def test_wudi_without_steps_is_task_arithmetic_on_matrices_and_lowers_its_loss(layered: World) -> None:
    def loss(name: str, weights: Weights) -> float:
        deltas = [model[name] - layered.base[name] for model in layered.tuned.values()]
        moved = weights[name] - layered.base[name]
        return sum(float(((moved - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)

    start = merged(layered, "wudi", steps=0)
    sums = merged(layered, "task_arithmetic", scaling_factor=1)
    assert_same({n: start[n] for n in MATRICES}, {n: sums[n] for n in MATRICES}, atol=1e-6)
    ended = merged(layered, "wudi", steps=200, learning_rate=1e-3)
    assert all(loss(name, ended) < 0.7 * loss(name, start) for name in MATRICES)


@pytest.mark.parametrize("method", ALL)
def test_the_position_embedding_is_averaged_unless_it_is_called_a_matrix(layered: World, method: str) -> None:
    name = "embeddings.position_embedding.weight"
    few = {"steps": 3} if method == "wudi" else {}
    average = merged(layered, "average")[name]
    assert_same({name: merged(layered, method, **few)[name]}, {name: average}, atol=1e-6)
    as_matrix = merged(layered, method, position_embedding="matrix", **few)
    assert float((as_matrix[name] - average).abs().max()) > 1e-3


def test_doge_ta_without_correction_is_scaled_trimmed_task_arithmetic_on_layer_weights_only(
    layered: World,
) -> None:
    got = merged(layered, "doge_ta", ["t1"], steps=0, density=1, scaling_factor=0.5)
    for name, value in naive.floats(layered.base).items():
        delta = layered.tuned["t1"][name] - value
        want = value + 0.5 * delta / delta.norm() if name in MATRICES else value
        assert_same({name: got[name]}, {name: want}, atol=1e-6)
