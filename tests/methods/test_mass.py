"""MASS."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergecli
from mergecli.formats.mixture import mixture_of
from mergecli.merging.merge import merge
from mergecli.methods import _mass_tower
from mergecli.methods._mass_tower import chosen_tasks, core, task_probabilities
from mergecli.methods.mass import Mass
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import VISION, open_checkpoint
from tests.conftest import Weights, assert_same
from tests.methods.reference.mass import mass, merged
from tests.methods.reference.tsv_m import tsv_m
from tests.support.image_zoo import Zoo
from tests.support.merging import same_bytes

pytestmark = pytest.mark.usefixtures("own_store")


def written(zoo: Zoo, models: dict[str, Any] | None = None, **settings: Any) -> Weights:
    recipe = zoo.recipe if models is None else replace(zoo.recipe, tuned=models)
    merge(recipe, method="mass", settings=settings, output=zoo.folder / "mass.safetensors")
    return load_file(zoo.folder / "mass.safetensors")


def installed(zoo: Zoo) -> Any:
    """A float64 tower with the file's routing, and its handle."""
    tower = copy.deepcopy(zoo.clip().tower).double()
    with open_checkpoint(zoo.folder / "mass.safetensors") as stored:
        found = mixture_of(stored)
        weights = {name.removeprefix(VISION): found.shared.read(name) for name in found.shared.entries}
        tower.load_state_dict(weights)
        return tower, found.install(tower, "sample")


def task_tower(zoo: Zoo, task: str) -> Weights:
    with open_checkpoint(zoo.folder / "mass.safetensors") as stored:
        tower = mixture_of(stored).of_task(task)
        return {name: tower.read(name) for name in tower.entries}


def pixels(zoo: Zoo) -> Tensor:
    return torch.cat([zoo.pixels(task, 3, shuffle=False) for task in zoo.tuned]).double()


@torch.no_grad()
@pytest.mark.parametrize(("layer", "threshold", "most"), [(None, 0.2, 3), (0, 0.3, 2), (0, 0.9, 3)])
def test_mass_equals_full_decompositions_image_by_image(
    zoo: Zoo, layer: int | None, threshold: float, most: int
) -> None:
    settings = {
        "threshold": threshold,
        "tasks_per_image": most,
        **({} if layer is None else {"layer": layer}),
    }
    written(zoo, **settings)
    tower, handle = installed(zoo)
    got = tower(pixel_values=pixels(zoo))
    plain = copy.deepcopy(zoo.clip().tower).double()
    of_two_layers = 1 if layer is None else layer
    models = list(zoo.tuned.values())
    for place, image in enumerate(pixels(zoo)):
        want = mass(plain, VISION, dict(zoo.base), models, image, of_two_layers, threshold, most)
        assert list(handle.merged[place]) == want.tasks
        assert torch.allclose(got[place], want.pooled, atol=1e-4)
        assert want.probabilities[int(handle.chosen[place])] == max(want.probabilities)
        shares = [float(task in want.tasks) / len(want.tasks) for task in range(3)]
        assert handle.routes()["tower"][place].tolist() == pytest.approx(shares)
    if layer is None:
        assert len({tuple(each) for each in handle.merged}) > 1


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch_and_the_tower_comes_back(zoo: Zoo) -> None:
    written(zoo)
    tower, handle = installed(zoo)
    together = tower(pixel_values=pixels(zoo))
    alone = torch.cat([tower(pixel_values=each[None]) for each in pixels(zoo)])
    assert torch.allclose(together, alone, atol=1e-9)
    assert not handle.keeps_batches_whole
    assert handle.parameters == {}
    names = [name.removeprefix(VISION) for name in zoo.base]
    assert sorted(tower.state_dict()) == sorted(names)
    handle.remove()
    plain = copy.deepcopy(zoo.clip().tower).double()
    want = plain(pixel_values=pixels(zoo))
    assert torch.allclose(tower(pixel_values=pixels(zoo)), want, atol=1e-9)


def test_a_task_alone_has_the_tower_of_its_share_of_the_rank(zoo: Zoo) -> None:
    written(zoo)
    for number, task in enumerate(zoo.tuned):
        want = merged(dict(zoo.base), list(zoo.tuned.values()), [number])
        assert_same(task_tower(zoo, task), {name: each.float() for name, each in want.items()}, atol=1e-5)


@torch.no_grad()
def test_one_task_is_its_whole_model(zoo: Zoo) -> None:
    written(zoo, {"a": zoo.recipe.tuned["a"]})
    assert_same(task_tower(zoo, "a"), zoo.tuned["a"], atol=1e-5)
    tower, handle = installed(zoo)
    plain = copy.deepcopy(zoo.clip().tower).double()
    plain.load_state_dict({name.removeprefix(VISION): each for name, each in zoo.tuned["a"].items()})
    got, want = (each(pixel_values=pixels(zoo)) for each in (tower, plain))
    assert torch.allclose(got, want, atol=1e-4)
    assert set(handle.merged) == {(0,)}


@torch.no_grad()
def test_models_equal_to_the_base_and_copies_of_one_model_are_merged(zoo: Zoo) -> None:
    base, one = zoo.recipe.base, zoo.recipe.tuned["a"]
    file = written(zoo, {"a": base, "b": base})
    assert not any(bool(each.any()) for name, each in file.items() if name.startswith(("left.", "deltas.")))
    tower, handle = installed(zoo)
    plain = copy.deepcopy(zoo.clip().tower).double()
    got, want = (each(pixel_values=pixels(zoo)) for each in (tower, plain))
    assert torch.allclose(got, want, atol=1e-9)
    written(zoo, {"a": one, "b": one, "c": one})
    tower, handle = installed(zoo)
    assert bool(tower(pixel_values=pixels(zoo)).isfinite().all())
    assert set(handle.merged) == {(0, 1, 2)}


@torch.no_grad()
def test_the_order_of_tasks_changes_nothing_but_the_last_bits(zoo: Zoo) -> None:
    found: list[Tensor] = []
    for order in ("abc", "cab"):
        written(zoo, {task: zoo.recipe.tuned[task] for task in order})
        tower, _ = installed(zoo)
        found.append(tower(pixel_values=pixels(zoo)))
    assert torch.allclose(*found, atol=1e-5)


def test_the_first_pass_is_tsv_m_of_all_tasks(zoo: Zoo) -> None:
    written(zoo, layer=1)
    _, handle = installed(zoo)
    want = tsv_m(dict(zoo.base), list(zoo.tuned.values()), 1.0)
    got = {f"{VISION}{name}": each.float() for name, each in handle.all_tasks.items()}
    assert_same(got, {name: want[name] for name in got}, atol=1e-5)
    assert len(got) == len(want)


def test_what_sets_of_tasks_need_is_held_for_those_that_were_used_last(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(zoo)
    _, handle = installed(zoo)
    monkeypatch.setattr(_mass_tower, "LEAST", 2)
    first = handle._cores_of((0,))
    assert handle._cores_of((0,)) is first
    assert [handle._cores_of(each) for each in ((1,), (0, 1), (0, 2), (0, 1, 2))]
    assert (0,) in handle._cores, "all are small beside the tower"
    monkeypatch.setattr(handle.body, "parameters", list)
    handle._cores_of((1, 2))
    assert list(handle._cores) == [(0, 1, 2), (1, 2)]


def test_a_small_matrix_between_the_factors_is_the_merge() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (4, 7)))
    right = torch.linalg.qr(right.T)[0].T.contiguous()
    values = left.norm(dim=0).double()
    (u, _, v), (p, _, q) = (
        torch.linalg.svd(each.double(), full_matrices=False) for each in (left / values, right)
    )
    want = (u @ v) @ torch.diag(values) @ (p @ q)
    assert torch.allclose(left.double() @ core(left, right) @ right.double(), want, atol=1e-6)
    left[:, 2], right[2] = 0, 0
    assert bool(core(left, right).isfinite().all())
    assert not bool(core(left, right)[2].any())


def test_likely_tasks_are_chosen_and_one_in_any_case() -> None:
    likely = torch.tensor([[0.5, 0.1, 0.4], [0.3, 0.3, 0.3], [0.1, 0.1, 0.15]])
    assert chosen_tasks(likely, 0.2, 3) == [(0, 2), (0, 1, 2), (2,)]
    assert chosen_tasks(likely, 0.2, 2) == [(0, 2), (0, 1), (2,)]
    assert chosen_tasks(likely, 0.2, 1) == [(0,), (0,), (2,)]
    assert task_probabilities(torch.ones(2, 3), torch.eye(1, 3)[None]).tolist() == [[1.0], [1.0]]


def test_towers_of_other_depths_and_layers_that_there_are_not() -> None:
    def names(depth: int) -> list[str]:
        return [f"encoder.layers.{number}.mlp.fc1.weight" for number in range(depth)]

    for depth, layer in ((12, 9), (24, 20), (2, 1), (1, 0)):
        assert Mass().telling(names(depth)) == f"encoder.layers.{layer}.mlp.fc1.weight"
    with pytest.raises(InputError) as caught:
        Mass(layer=2).telling(names(2))
    assert caught.value.message == (
        "the tower has no weight `fc1` in layer 2; it has layers 0 to 1: by its input `mass` tells tasks apart"
    )
    assert caught.value.hint == "choose another with `--set method.layer=N`"
    with pytest.raises(InputError, match="no weight `fc1` in any layer"):
        Mass().extras({"fc.weight": (3, 2)}, 2)


def test_a_layer_that_the_models_do_not_have_is_an_error_of_the_merge(zoo: Zoo) -> None:
    with pytest.raises(InputError, match="it has layers 0 to 1"):
        written(zoo, layer=7)


def test_a_position_embedding_is_a_matrix_if_it_is_said_to_be(zoo: Zoo) -> None:
    name = f"{VISION}embeddings.position_embedding.weight"
    assert f"deltas.{name}" in written(zoo)
    assert f"right.{name}" in written(zoo, position_embedding="matrix")
    tower, _ = installed(zoo)
    with torch.no_grad():
        assert bool(tower(pixel_values=pixels(zoo)).isfinite().all())


def test_results_say_how_often_the_likeliest_task_was_the_right_one(zoo: Zoo, tmp_path: Path) -> None:
    written(zoo)
    file = zoo.folder / "mass.safetensors"
    (result,) = mergecli.evaluate({"m": file}, recipe=zoo.folder / "zoo.toml", routes=tmp_path / "routes")
    assert result.checkpoint["routing"] == "sample"
    assert all(0 <= (score.task_found or 0) <= 1 for score in result.tasks.values())
    assert None not in {score.task_found for score in result.tasks.values()}
    assert (tmp_path / "routes" / "m.csv").read_text().startswith("task,layer,a,b,c\na,tower,")
    with pytest.raises(UsageError, match="--features: `m`: each image goes through"):
        mergecli.evaluate({"m": file}, recipe=zoo.folder / "zoo.toml", features=tmp_path / "f")


def test_threads_change_no_byte(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    want = written(zoo)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    same_bytes(written(zoo), want)
