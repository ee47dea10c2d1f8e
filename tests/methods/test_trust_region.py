"""Trust-region task arithmetic."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from mergecli.clip.heads import logits, zero_shot_head
from mergecli.merging.merge import merge
from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference._vision_model import Called
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.methods.reference.trust_region import measured_gradients, trust_region
from tests.support.image_zoo import CLASSES, TEMPLATES, Zoo
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("density", [0.99, 0.5])
def test_trust_region_is_task_arithmetic_without_the_entries_where_tasks_meet(
    world: World, density: float
) -> None:
    want = trust_region(world.base, list(world.tuned.values()), 0.3, density)
    assert_same(merged(world, "trust_region", density=density), with_integers(want, world), atol=1e-6)


def test_a_density_of_one_leaves_out_nothing_but_the_largest(world: World) -> None:
    base = {"w": torch.zeros(5)}
    tuned = [torch.tensor([1.0, 2, 3, 4, 0]), torch.tensor([4.0, 3, -3, 1, 7])]
    other = with_models(world, base, *({"w": each} for each in tuned))
    got = merged(other, "trust_region", density=1, scaling_factor=1)["w"]
    assert got.tolist() == [5.0, 5.0, 0.0, 5.0, 7.0], "|3| |-3| is the largest product"


def test_of_one_task_everything_is_kept(world: World) -> None:
    got = merged(world, "trust_region", ["t1"])
    want = task_arithmetic(world.base, [world.tuned["t1"]], 0.3)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_entries_that_only_one_task_changes_are_kept_however_few_others_are(world: World) -> None:
    base = {"w": torch.zeros(6)}
    tuned = [torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 1, 1])]
    other = with_models(world, base, *({"w": each} for each in tuned))
    got = merged(other, "trust_region", density=0.5, scaling_factor=1)["w"]
    assert got.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_with_images_the_gradients_of_the_base_take_the_place_of_task_vectors(zoo: Zoo) -> None:
    clip = zoo.clip()
    called = Called(clip.tower)
    gradients = [
        measured_gradients(
            called,
            partial(logits, clip, zero_shot_head(clip, CLASSES[task], TEMPLATES)),
            zoo.pixels(task, 5, shuffle=True),
        )
        for task in zoo.tuned
    ]
    settings = {"gradients": "images", "gradient_examples": 5, "density": 0.6}
    output, kept = zoo.folder / "t.safetensors", zoo.folder / "s"
    merge(zoo.recipe, method="trust_region", settings=settings, output=output, statistics=kept)
    for task, want in zip(zoo.tuned, gradients, strict=True):
        got = load_file(kept / f"{task}.safetensors")
        assert_same({name.removesuffix(".gradient"): each for name, each in got.items()}, want, atol=1e-5)
    exact = [
        {
            name.removesuffix(".gradient"): each
            for name, each in load_file(kept / f"{task}.safetensors").items()
        }
        for task in zoo.tuned
    ]
    tuned = list(zoo.tuned.values())
    want = trust_region(dict(zoo.base), tuned, 0.3, 0.6, exact)
    assert_same(load_file(output), want, atol=1e-6)
    other = trust_region(dict(zoo.base), tuned, 0.3, 0.6)
    assert not all(each.equal(want[name]) for name, each in other.items())


def test_gradients_on_images_belong_to_the_whole_model(zoo: Zoo) -> None:
    for changes, message in (
        (
            {"name": "dare", "of": {"name": "trust_region", "gradients": "images"}},
            "looks at images with these settings",
        ),
        ({"name": "trust_region", "gradient_examples": 4}, "is for `gradients = "),
    ):
        name = changes.pop("name")
        with pytest.raises(UsageError, match=message):
            merge(zoo.recipe, method=str(name), settings=changes, output=zoo.folder / "x.safetensors")
