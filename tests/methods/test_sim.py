"""SiM: the task of an image, found by the features of the pre-trained tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli import methods
from mergecli.clip.model import features
from mergecli.formats.mixture import mixture_of
from mergecli.merging.learning.measure import measure
from mergecli.merging.merge import merge
from mergecli.methods._sim import BASES, MEANS, PROJECTION, subspace
from mergecli.methods._sim_tower import nearest_task
from mergecli.runtime.errors import UsageError
from mergecli.storage.checkpoint import VISION, open_checkpoint
from tests.support.image_zoo import Zoo

pytestmark = pytest.mark.usefixtures("own_store")
NAMES = ("emr", "tall_mask", "tsv_c")
SIM = {"router": "sim", "router_examples": 5}


def unit(count: int, size: int, seed: int) -> Tensor:
    values = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=1)


def file_of(zoo: Zoo, method: str, **settings: Any) -> Path:
    output = zoo.folder / "sim.safetensors"
    merge(zoo.recipe, method=method, settings={**SIM, **settings}, output=output)
    return output


def pixels(zoo: Zoo) -> Tensor:
    return torch.cat([zoo.pixels(task, 3, shuffle=False) for task in zoo.tuned])


def naive_choice(zoo: Zoo, images: Tensor) -> list[int]:
    """Image by image, from full decompositions of what the CLIP gives."""
    clip, known = zoo.clip(), []
    for task in zoo.tuned:
        own = features(clip, zoo.pixels(task, 5, shuffle=True)).double()
        own = own / own.norm(dim=1, keepdim=True)
        size = own.shape[1]
        _, _, right = torch.linalg.svd(own - own.mean(0))
        known.append((own.mean(0), right[: min(max(1, round(0.1 * size)), 5)]))
    found = []
    for image in images:
        f = features(clip, image[None])[0].double()
        f = f / f.norm()
        errors = [float(((f - mean) - rows.T @ (rows @ (f - mean))).norm()) for mean, rows in known]
        found.append(errors.index(min(errors)))
    return found


def test_a_support_image_lies_in_its_own_subspace() -> None:
    tasks = [unit(4, 40, seed) for seed in (1, 2, 3)]
    known = [subspace(each, 4) for each in tasks]
    means, bases = (torch.stack(each) for each in zip(*known, strict=True))
    for number, (own, (mean, basis)) in enumerate(zip(tasks, known, strict=True)):
        apart = own - mean
        assert float((apart - apart @ basis.T @ basis).norm()) < 1e-9
        assert nearest_task(own, means, bases).tolist() == [number] * 4
        assert torch.allclose(basis[:3] @ basis[:3].T, torch.eye(3).double(), atol=1e-9)
        assert not bool(basis[3].any()), "four images less their mean span three directions"


def test_the_order_of_tasks_only_numbers_them() -> None:
    known = [subspace(unit(9, 12, seed), 3) for seed in (1, 2, 3)]
    order, images = [2, 0, 1], unit(20, 12, 7)
    means, bases = (torch.stack(each) for each in zip(*known, strict=True))
    one, other = nearest_task(images, means, bases), nearest_task(images, means[order], bases[order])
    assert [order[each] for each in other.tolist()] == one.tolist()


@pytest.mark.parametrize("method", NAMES)
@torch.no_grad()
def test_each_image_goes_through_the_told_tower_of_the_task_that_is_found(zoo: Zoo, method: str) -> None:
    path = file_of(zoo, method)
    images = pixels(zoo)
    with open_checkpoint(path) as stored:
        mixture = mixture_of(stored)
        towers = [zoo.clip().tower for _ in zoo.tuned]
        for tower, task in zip(towers, zoo.tuned, strict=True):
            own = mixture.of_task(task)
            tower.load_state_dict({name.removeprefix(VISION): own.read(name) for name in own.entries})
        tower = zoo.clip().tower
        tower.load_state_dict(
            {name.removeprefix(VISION): stored.read(name) for name in mixture.shared.entries}
        )
        base = tower(pixel_values=images)
        installed = mixture.install(tower, "sample")
        got = tower(pixel_values=images)
        chosen = installed.chosen
        assert chosen is not None
        assert chosen.tolist() == naive_choice(zoo, images)
        assert len(set(chosen.tolist())) > 1
        want = torch.cat(
            [towers[task](pixel_values=image[None]) for task, image in zip(chosen, images, strict=True)]
        )
        assert torch.allclose(got, want, atol=1e-5)
        assert installed.routes()["tower"].argmax(1).equal(chosen)
        installed.remove()
        assert torch.allclose(tower(pixel_values=images), base, atol=1e-6)


def test_the_towers_are_those_of_a_file_without_router(zoo: Zoo) -> None:
    with_router = load_file(file_of(zoo, "emr"))
    merge(zoo.recipe, method="emr", output=zoo.folder / "told.safetensors")
    told = load_file(zoo.folder / "told.safetensors")
    assert with_router.keys() - told.keys() == {MEANS, BASES, PROJECTION}
    assert all(with_router[name].equal(value) for name, value in told.items())


def test_measured_images_serve_all_three_methods_and_depend_on_no_model(zoo: Zoo, tmp_path: Path) -> None:
    done = measure(zoo.recipe, method="emr", settings=SIM, output=tmp_path / "s")
    assert done.new == ("a", "b", "c")
    assert measure(zoo.recipe, method="tsv_c", settings=SIM, output=tmp_path / "s").new == ()
    swapped = dict(zip(zoo.recipe.tuned, reversed(zoo.recipe.tuned.values()), strict=True))
    other = replace(zoo.recipe, tuned=swapped)
    assert measure(other, method="tall_mask", settings=SIM, output=tmp_path / "s").new == ()
    merge(
        zoo.recipe, method="emr", settings=SIM, statistics=tmp_path / "s", output=tmp_path / "m.safetensors"
    )
    assert (tmp_path / "m.safetensors").read_bytes() == file_of(zoo, "emr").read_bytes()


@pytest.mark.parametrize("key", ["router_examples", "feature_size"])
def test_settings_of_a_router_need_one(key: str) -> None:
    with pytest.raises(methods.SettingsError) as caught:
        methods.create("emr", {key: 4}, ("a", "b"))
    assert caught.value.problems == ((key, "is for a router, and `router` is not given"),)


def test_one_tasks_tower_has_no_router() -> None:
    with pytest.raises(methods.SettingsError) as caught:
        methods.create("tall_mask", {"router": "sim", "task": "a"}, ("a", "b"))
    assert caught.value.problems == (("router", "is for the towers of all tasks, and `task` asks for one"),)


def test_features_have_the_size_of_the_bases(zoo: Zoo) -> None:
    size = zoo.clip().model.config.projection_dim
    with pytest.raises(UsageError) as caught:
        file_of(zoo, "emr", feature_size=size + 1)
    assert caught.value.message == f"`method.feature_size`: is {size + 1}, the base's features have {size}"
