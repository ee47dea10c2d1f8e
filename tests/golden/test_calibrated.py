"""Fisher, RegMean and RegMean++ against references that hold whole models, and what joins them to the average."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli import methods, models
from mergecli.clip.heads import logits, zero_shot_head
from mergecli.engine import merge
from mergecli.measuring import measure
from mergecli.methods._kinds import Group, merge_group
from tests.conftest import Weights, assert_same
from tests.golden import naive, naive_calibrated
from tests.golden.test_promises import same_bytes
from tests.support.image_zoo import CLASSES, TEMPLATES, Zoo, make_zoo

pytestmark = pytest.mark.usefixtures("own_store")

NAMES = ("fisher", "reg_mean", "reg_mean_plus_plus")
FEW = {"examples": 20, "batch_size": 7}
LINEAR = "vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def merged(zoo: Zoo, method: str, statistics: Path | None = None, **settings: Any) -> Weights:
    output = zoo.folder / "merged.safetensors"
    merge(zoo.recipe, method=method, settings={**FEW, **settings}, output=output, statistics=statistics)
    return load_file(output)


def inputs(zoo: Zoo, examples: int = 20) -> list[Weights]:
    """What goes into each linear layer of each tower, for the images of its own task."""
    found: list[Weights] = []
    for task, weights in zoo.tuned.items():
        called = naive_calibrated.Called(zoo.clip().tower)
        called.load_state_dict(weights)
        images = zoo.pixels(task, examples, shuffle=True)
        found.append(
            naive_calibrated.inputs_of(
                called, lambda called=called, images=images: called.vision_model(images)
            )
        )
    return found


@pytest.mark.parametrize("per_example", [False, True])
def test_fisher_is_the_squared_gradient_that_torch_func_gives(
    zoo: Zoo, tmp_path: Path, per_example: bool
) -> None:
    settings = {**FEW, "per_example": per_example}
    done = measure(zoo.recipe, method="fisher", settings=settings, output=tmp_path / "s")
    for task, path in done.paths.items():
        clip = zoo.clip()
        head = zero_shot_head(clip, CLASSES[task], TEMPLATES)
        called = naive_calibrated.Called(clip.tower)
        called.load_state_dict(zoo.tuned[task])
        images = zoo.pixels(task, 20, shuffle=False)
        want = naive_calibrated.measured_fisher(
            called, partial(logits, clip, head), images.split(7), per_example
        )
        got = load_file(path)
        for name, value in want.items():
            largest = float(
                value.max()
            )  # gradients differ by rounding, which squares and sums of 20 keep small
            assert torch.allclose(got[f"{name}.fisher"], value, rtol=1e-4, atol=1e-6 * largest + 1e-12), name
        squares = [float(got[f"{name}.fisher"].double().square().sum()) for name in sorted(want)]
        assert got["squares"].tolist() == pytest.approx(squares, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"normalize": False}, {"minimal": 0.01}])
def test_fisher_is_the_weighted_mean_of_whole_models(
    zoo: Zoo, tmp_path: Path, settings: dict[str, Any]
) -> None:
    got = merged(zoo, "fisher", tmp_path / "s", **settings)
    fishers = [
        {
            name.removesuffix(".fisher"): value
            for name, value in load_file(tmp_path / "s" / f"{task}.safetensors").items()
            if name != "squares"
        }
        for task in zoo.tuned
    ]
    want = naive_calibrated.fisher(list(zoo.tuned.values()), fishers, **settings)
    assert_same(got, want, atol=1e-6)
    average = naive.average(list(zoo.tuned.values()))
    assert not torch.allclose(got[LINEAR], average[LINEAR], atol=1e-3)


@pytest.mark.parametrize(("ratio", "ridge"), [(0.95, 0.0), (0.5, 0.1), (0.0, 0.0)])
def test_reg_mean_is_the_published_formula(zoo: Zoo, ratio: float, ridge: float) -> None:
    got = merged(zoo, "reg_mean", reduce_non_diagonal_ratio=ratio, ridge=ridge)
    want = naive_calibrated.reg_mean(list(zoo.tuned.values()), inputs(zoo), ratio, ridge)
    assert_same(got, want, atol=5e-6)


def test_reg_mean_without_shrinking_is_one_least_squares_problem(zoo: Zoo) -> None:
    got = merged(zoo, "reg_mean", reduce_non_diagonal_ratio=1)
    found = inputs(zoo)
    for name in found[0]:
        want = naive_calibrated.least_squares(
            [model[name] for model in zoo.tuned.values()], [each[name] for each in found]
        )
        # the matrices are kept as float32: 6e-8, times their condition, which is some 1e3 here
        assert torch.allclose(got[name].double(), want, atol=2e-4), name


@pytest.mark.parametrize("ratio", [0.95, 0.3])
def test_reg_mean_plus_plus_is_reg_mean_on_inputs_of_whole_half_merged_models(zoo: Zoo, ratio: float) -> None:
    got = merged(zoo, "reg_mean_plus_plus", reduce_non_diagonal_ratio=ratio)
    pixels = [zoo.pixels(task, 20, shuffle=True) for task in zoo.tuned]
    want = naive_calibrated.reg_mean_plus_plus(zoo.clip().tower, list(zoo.tuned.values()), pixels, ratio)
    assert_same(got, want, atol=1e-5)
    first, second = (LINEAR.replace(".0.", f".{number}.") for number in (0, 1))
    plain = naive_calibrated.reg_mean(list(zoo.tuned.values()), inputs(zoo), ratio)
    assert not torch.allclose(plain[second], want[second], atol=1e-3)
    assert not torch.allclose(plain[first], want[first], atol=1e-3)  # embeddings in front of it are merged


def test_the_norm_behind_the_layers_is_the_bases_on_request(zoo: Zoo) -> None:
    got = merged(zoo, "reg_mean_plus_plus")
    published = merged(zoo, "reg_mean_plus_plus", post_layernorm="base")
    average = naive.average(list(zoo.tuned.values()))
    for name, value in got.items():
        own = "post_layernorm" in name
        assert published[name].equal(zoo.base[name] if own else value), name
        assert not own or value.equal(average[name]), name


@pytest.mark.parametrize("method", NAMES)
def test_excluded_tensors_are_the_bases(zoo: Zoo, method: str) -> None:
    got = merged(zoo, method, exclude=["vision_model.embeddings", r".*\.0\.mlp\.fc1\.weight"])
    kept = [name for name in got if "embeddings" in name or name == LINEAR]
    assert all(got[name].equal(zoo.base[name]) for name in kept)
    assert len([name for name in got if got[name].equal(zoo.base[name])]) == len(kept) == 4


@pytest.mark.parametrize("method", NAMES)
def test_blocks_threads_and_a_second_merge_change_no_byte(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    want = merged(zoo, method, tmp_path / "s")
    for block, processors in ((7, 1), (999, 3)):
        monkeypatch.setattr(models, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda count=processors: count)
        same_bytes(merged(zoo, method, tmp_path / "s"), want)
    same_bytes(merged(zoo, method), want)


class Given:
    """Statistics in memory."""

    def __init__(self, *files: Mapping[str, Tensor]) -> None:
        self.files = files
        self.names = list(files[0])

    def read(self, file: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.files[file][name].flatten()[start:stop]


def combine(method: str, given: Given, rows: Tensor, name: str = LINEAR, **settings: Any) -> Tensor:
    """The merged weights of one tensor, (T, ...) rows."""
    names = tuple(f"t{number}" for number in range(len(rows)))
    group = Group(name, torch.zeros(rows.shape[1:]), rows.clone(), (False,) * len(rows), names)
    return merge_group(methods.create(method, settings), group, given)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fishers(*values: Tensor) -> Given:
    return Given(
        *({f"{LINEAR}.fisher": value, "squares": value.double().square().sum()[None]} for value in values)
    )


def grams(*values: Tensor) -> Given:
    return Given(*({f"{LINEAR}.gram": value} for value in values))


def test_equal_fishers_and_identity_grams_give_the_average() -> None:
    rows = some(3, 6, 4)
    assert torch.allclose(
        combine("fisher", fishers(*[some(6, 4).square()] * 3), rows), rows.mean(0), atol=1e-7
    )
    for ratio in (0.0, 0.95, 1.0):
        got = combine("reg_mean", grams(*[torch.eye(4)] * 3), rows, reduce_non_diagonal_ratio=ratio)
        assert torch.allclose(got, rows.mean(0), atol=1e-7)


def test_fisher_without_any_information_gives_the_average() -> None:
    rows = some(3, 6, 4)
    got = combine("fisher", fishers(*[torch.zeros(6, 4)] * 3), rows, minimal=0)
    assert torch.allclose(got, rows.mean(0), atol=1e-7)


def test_one_model_and_the_same_model_twice_are_given_back() -> None:
    rows, other = some(1, 6, 4), some(6, 4, seed=1).square()
    assert combine("fisher", fishers(other), rows).equal(rows[0])
    assert combine("reg_mean", grams(other.T @ other), rows).equal(rows[0])
    twice = rows.repeat(2, 1, 1)
    assert combine("fisher", fishers(other, some(6, 4, seed=2).square()), twice).equal(rows[0])
    assert combine("reg_mean", grams(other.T @ other, torch.eye(4)), twice).equal(rows[0])


def test_inputs_that_no_image_shows_keep_the_mean_and_the_rest_is_solved() -> None:
    rows = some(2, 5, 6)
    seen = [some(40, 6, seed=seed) for seed in (1, 2)]
    for each in seen:
        each[:, 2] = 0  # never
        each[:, 4] = 2 * each[:, 3]  # never apart
    got = combine(
        "reg_mean", grams(*(x.T @ x / 40 for x in seen)), rows, reduce_non_diagonal_ratio=1
    ).double()
    middle = rows.double().mean(0)
    assert torch.allclose(got[:, 2], middle[:, 2], atol=1e-7)
    left = [x.double() @ (got - row.double()).T for x, row in zip(seen, rows, strict=True)]
    best = naive_calibrated.least_squares(list(rows), [x.double() for x in seen])
    least = [x.double() @ (best - row.double()).T for x, row in zip(seen, rows, strict=True)]
    assert float(torch.cat(left).square().sum()) == pytest.approx(
        float(torch.cat(least).square().sum()), rel=1e-6
    )
    change = got - middle  # of inputs that are the same in their own spread, each takes half
    assert torch.allclose(change[:, 3], 2 * change[:, 4], atol=1e-5)


def test_fewer_rows_than_inputs_give_what_each_task_gave_if_that_can_be() -> None:
    rows = some(2, 5, 30)
    seen = [some(10, 30, seed=seed) for seed in (1, 2)]
    got = combine("reg_mean", grams(*(x.T @ x / 10 for x in seen)), rows, reduce_non_diagonal_ratio=1)
    for x, row in zip(seen, rows, strict=True):
        assert torch.allclose(x @ got.T, x @ row.T, atol=1e-4)


def test_a_large_ridge_gives_the_average() -> None:
    rows, x = some(2, 5, 6), some(40, 6, seed=1)
    got = combine("reg_mean", grams(x.T @ x, torch.eye(6)), rows, ridge=1e9)
    assert torch.allclose(got, rows.mean(0), atol=1e-6)


@pytest.mark.parametrize("method", NAMES[:2])
def test_the_order_of_tasks_matters_only_to_the_last_bits(method: str) -> None:
    rows = some(3, 6, 4)
    each = [some(40, 4, seed=seed) for seed in (1, 2, 3)]
    given = (
        fishers(*(x[:6].square() for x in each)) if method == "fisher" else grams(*(x.T @ x for x in each))
    )
    turned = Given(*reversed(given.files))
    assert torch.allclose(combine(method, given, rows), combine(method, turned, rows.flip(0)), atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (4, 3), (2, 3, 2, 2)])
def test_fisher_merges_a_group_of_any_shape(shape: tuple[int, ...]) -> None:
    rows = some(3, *shape)
    got = combine("fisher", fishers(*(some(*shape, seed=seed).square() for seed in (1, 2, 3))), rows)
    assert got.shape == shape
    assert got.dtype == torch.float32
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 2, 2), (6, 4)])
@pytest.mark.parametrize("method", NAMES[1:])
def test_what_is_no_weight_of_a_linear_layer_is_the_mean(method: str, shape: tuple[int, ...]) -> None:
    rows = some(3, *shape)
    name = "vision_model.embeddings.position_embedding.weight"
    assert combine(method, Given({}), rows, name).equal((rows[0] + rows[1] + rows[2]) / 3)


def test_keys_queries_and_values_have_one_input(zoo: Zoo, tmp_path: Path) -> None:
    done = measure(zoo.recipe, method="reg_mean", settings=FEW, output=tmp_path / "s")
    found = inputs(zoo)
    for each, path in zip(found, done.paths.values(), strict=True):
        got = load_file(path)
        assert len(got) == 2 * 4
        for name, x in each.items():
            assert torch.equal(x, each[name.replace("q_proj", "k_proj").replace("v_proj", "k_proj")])
            if f"{name}.gram" in got:
                want = x.T @ x / len(x)
                assert torch.allclose(got[f"{name}.gram"].double(), want, atol=1e-6 * float(want.max()))
                assert got[f"{name}.gram"].equal(got[f"{name}.gram"].T)


def test_an_exclusion_that_is_no_pattern_is_refused(zoo: Zoo) -> None:
    from mergecli.errors import UsageError

    with pytest.raises(UsageError, match=r"`method.exclude`|`\(` is not a regular expression"):
        merged(zoo, "fisher", exclude=["("])
