"""Worlds of matrices, of images and of a CLIP, made once for all tests of methods that only read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Weights, World
from tests.methods.reference._linear_layers import inputs_of
from tests.methods.reference._vision_model import Called
from tests.support.adapted_world import AdaptedWorld, make_adapted_world
from tests.support.exact_clip import ExactClip, make_exact_clip
from tests.support.image_zoo import Zoo, make_zoo
from tests.support.layered_world import layered_world


@pytest.fixture
def layered(tmp_path: Path) -> World:
    """Three models with matrices in numbered layers, of the test alone."""
    return layered_world(tmp_path)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Towers and training images; nothing in its folder may be changed."""
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def layer_inputs(zoo: Zoo) -> list[Weights]:
    """What goes into each linear layer of each tower of the zoo, for 20 images of its own task."""
    found: list[Weights] = []
    for task, weights in zoo.tuned.items():
        called = Called(zoo.clip().tower)
        called.load_state_dict(weights)
        images = zoo.pixels(task, 20, shuffle=True)
        found.append(inputs_of(called, lambda called=called, images=images: called.vision_model(images)))
    return found


@pytest.fixture(scope="session")
def adapted_world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    """Towers and images to learn from; nothing in its folder may be changed."""
    return make_adapted_world(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="session")
def clip(adapted_world: AdaptedWorld) -> ExactClip:
    """The adapted world's CLIP in float64."""
    return make_exact_clip(adapted_world)
