"""AdaMerging and Concrete against autograd through the merge, and the bridges to task arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.merging import models
from mergecli.merging.learning.objective import TaskBatches
from mergecli.merging.merge import merge
from mergecli.methods._base import uniform
from tests.adapted import CLASSES, TEMPLATE, VISION, AdaptedWorld, images_of, make_adapted_world
from tests.conftest import Weights, assert_same
from tests.golden import naive, naive_adapted
from tests.golden.naive_adapted import Found, Sight

pytestmark = pytest.mark.usefixtures("own_store")

BATCH, SEED = 3, 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="module")
def look(world: AdaptedWorld) -> Callable[..., Sight]:
    """Makes what a merged tower is judged by, from transformers alone and in float64."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = world.folder / "base"
    model = CLIPModel.from_pretrained(folder).requires_grad_(False)
    tokenizer, processor = (
        CLIPTokenizer.from_pretrained(folder),
        CLIPImageProcessorPil.from_pretrained(folder),
    )
    heads: list[Tensor] = []
    for classes in CLASSES.values():
        tokens = [tokenizer([TEMPLATE.format(name)], return_tensors="pt") for name in classes]
        rows = torch.cat([model.get_text_features(**each).pooler_output for each in tokens])
        heads.append((rows / rows.norm(dim=-1, keepdim=True)).double())
    model.double()

    def classify(weights: Mapping[str, Tensor], pixels: Tensor, place: int) -> Tensor:
        own = {name.removeprefix(VISION): value for name, value in weights.items()}
        pooled = torch.func.functional_call(model.vision_model, own, (pixels,)).pooler_output
        image = model.visual_projection(pooled)
        return model.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ heads[place].T

    def make(tasks: tuple[str, ...] = tuple(CLASSES), split: str = "test") -> Sight:
        pixels = {
            name: processor(images_of(world, name, split), return_tensors="pt")["pixel_values"].double()
            for name in tasks
        }

        def batches(draw: int) -> list[tuple[int, Tensor]]:
            rows = {
                name: TaskBatches(0, name, each, each).rows(draw, BATCH, SEED)
                for name, each in pixels.items()
            }
            return [(place, pixels[name][rows[name]]) for place, name in enumerate(CLASSES) if name in pixels]

        return Sight(classify, batches)

    return make


def same_numbers(name: str, label: str, like: Tensor) -> Tensor:
    return uniform(SEED, name, label, 0, like.numel()).view(like.shape)


def learnt(world: AdaptedWorld, folder: Path, method: str, **settings: Any) -> tuple[Weights, Weights]:
    """The merged tower, and the file of what was learnt."""
    file = folder / "learnt.safetensors"
    settings = {"batch_size": BATCH, **settings}
    merge(
        world.recipe,
        method=method,
        settings=settings,
        output=folder / "m.safetensors",
        save_coefficients=file,
    )
    return load_file(folder / "m.safetensors"), load_file(file)


def agrees(got: tuple[Weights, Weights], want: Found, rate: float, merged: float) -> None:
    """Entropies, coefficients and mask logits are the reference's, up to a small share of a step of Adam; the merged
    weights at most `merged` apart.

    Adam divides a gradient by its own size. Where it is zero but for rounding the result is noise: for the biases of
    the keys, which change no prediction, and for one entry of the masks in a hundred.
    """
    tower, kept = got
    entropies, every = torch.tensor(want.entropies), kept["trace.entropies"]
    assert (every[:, every.any(0)] - entropies).abs().max() < 1e-5
    matter = [number for number, name in enumerate(want.merged) if not name.endswith("k_proj.bias")]
    if "coefficients" in kept:
        columns = matter if want.coefficients.shape[1] > 1 else [0]
        assert (kept["coefficients"] - want.coefficients)[:, columns].abs().max() < 1e-4 * rate
    names = [list(want.merged)[number] for number in matter]
    if want.logits:
        apart = torch.cat([(kept[f"logits.{name}"] - want.logits[name]).abs().view(-1) for name in names])
        assert apart.quantile(0.99) < 1e-3 * rate
        assert apart.mean() < 1e-4 * rate
    assert_same(
        {name: tower[name].double() for name in names}, {name: want.merged[name] for name in names}, merged
    )


ADA = [
    {"granularity": "task"},
    {"granularity": "layer"},
    {"granularity": "task", "clamp": True, "learning_rate": 0.3},
    {"granularity": "layer", "clamp": True, "learning_rate": 0.3},
    {"granularity": "task", "start": 0.7, "split": "train"},
    {"granularity": "layer", "preprocess": "ties", "density": 0.3},
    {"granularity": "task", "preprocess": "ties"},
    {"granularity": "layer", "adapt_on": ["three", "one"]},
]


@pytest.mark.parametrize("settings", ADA, ids=lambda each: " ".join(map(str, each.values())))
def test_ada_merging_is_adam_through_the_merge(
    world: AdaptedWorld, look: Callable[..., Sight], tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"steps": 6, "learning_rate": 1e-2, **settings}
    got = learnt(world, tmp_path, "ada_merging", **settings)
    other = {
        key: value
        for key, value in settings.items()
        if key not in ("split", "adapt_on", "preprocess", "density")
    }
    if "preprocess" in settings:
        other["density"] = settings.get("density", 0.2)
    sight = look(tuple(settings.get("adapt_on", CLASSES)), settings.get("split", "test"))
    want = naive_adapted.ada_merging(sight, world.base, world.tuned, **other)
    agrees(got, want, settings["learning_rate"], 2e-5 if "clamp" in settings else 2e-6)
    moved = got[1]["coefficients"] - settings.get("start", 0.3)
    assert float(moved.abs().max()) > 5e-3


@pytest.mark.parametrize("mask", ["sample", "expected", "discrete"])
@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_concrete_task_arithmetic_is_adam_through_the_mask(
    world: AdaptedWorld, look: Callable[..., Sight], tmp_path: Path, mask: str, temperature: float
) -> None:
    settings: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "temperature": temperature, "mask": mask}
    got = learnt(world, tmp_path, "concrete_task_arithmetic", **settings)
    want = naive_adapted.concrete_task_arithmetic(look(), world.base, world.tuned, same_numbers, **settings)
    agrees(got, want, 1e-2, 1e-5)


@pytest.mark.parametrize("order", ["corrected", "published"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_concrete_ada_merging_is_two_descents_and_then_adam(
    world: AdaptedWorld, look: Callable[..., Sight], tmp_path: Path, granularity: str, order: str
) -> None:
    settings: dict[str, Any] = {
        "granularity": granularity, "order": order, "mask_steps": 3, "steps": 3, "learning_rate": 1e-2,
        "mask_rate": 1e-2, "inner_rate": 0.05,
    }  # fmt: skip
    got = learnt(world, tmp_path, "concrete_ada_merging", **settings)
    want = naive_adapted.concrete_ada_merging(look(), world.base, world.tuned, same_numbers, **settings)
    agrees(got, want, 1e-2, 1e-4)


def task_arithmetic(world: AdaptedWorld, factor: float) -> Weights:
    return naive.task_arithmetic(world.base, world.tuned, factor)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_no_steps_are_task_arithmetic(world: AdaptedWorld, tmp_path: Path, granularity: str) -> None:
    tower, kept = learnt(world, tmp_path, "ada_merging", steps=0, start=0.4, granularity=granularity)
    assert_same(tower, task_arithmetic(world, 0.4), 1e-6)
    assert kept["trace.entropies"].shape == (0, 3)


def test_no_steps_with_ties_add_what_ties_keeps(world: AdaptedWorld, tmp_path: Path) -> None:
    tower, _ = learnt(world, tmp_path, "ada_merging", steps=0, preprocess="ties", density=0.3)
    assert_same(tower, naive.ties(world.base, world.tuned, 0.3, 0.3, "sum"), 1e-6)


@pytest.mark.parametrize("mask", ["sample", "expected", "discrete"])
def test_a_mask_that_is_one_everywhere_is_task_arithmetic(
    world: AdaptedWorld, tmp_path: Path, mask: str
) -> None:
    settings = {"initial_logits": 60.0, "mask": mask}
    tower, _ = learnt(world, tmp_path, "concrete_task_arithmetic", steps=2, scaling_factor=0.4, **settings)
    assert_same(tower, task_arithmetic(world, 0.4), 1e-6)
    tower, _ = learnt(world, tmp_path, "concrete_ada_merging", steps=0, mask_steps=1, start=0.4, **settings)
    assert_same(tower, task_arithmetic(world, 0.4), 1e-6)


def test_a_mask_that_is_zero_everywhere_is_the_base(world: AdaptedWorld, tmp_path: Path) -> None:
    tower, _ = learnt(world, tmp_path, "concrete_task_arithmetic", steps=2, initial_logits=-1000.0)
    assert_same(tower, world.base)


def test_concrete_ada_merging_under_a_mask_of_ones_is_ada_merging(
    world: AdaptedWorld, tmp_path: Path
) -> None:
    masked, _ = learnt(
        world,
        tmp_path,
        "concrete_ada_merging",
        mask_steps=0,
        steps=4,
        learning_rate=1e-2,
        initial_logits=60.0,
    )
    plain, _ = learnt(world, tmp_path, "ada_merging", steps=4, learning_rate=1e-2)
    assert_same(masked, plain, 1e-5)


def test_random_masks_depend_on_the_seed_and_on_nothing_else(world: AdaptedWorld, tmp_path: Path) -> None:
    def made(seed: int, name: str) -> bytes:
        output = tmp_path / name / "m.safetensors"
        settings = {"steps": 1, "batch_size": BATCH}
        merge(
            world.recipe,
            method="concrete_task_arithmetic",
            settings=settings,
            output=output,
            changes=[f"seed={seed}"],
        )
        return output.read_bytes()

    first = made(7, "first")
    assert made(7, "second") == first
    assert made(8, "third") != first


def test_vectors_in_bfloat16_are_learnt_with_nearly_as_well(world: AdaptedWorld, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "granularity": "task"}
    _, exact = learnt(world, tmp_path, "ada_merging", **settings)
    _, short = learnt(world, tmp_path, "ada_merging", vectors="bfloat16", **settings)
    apart = (exact["coefficients"] - short["coefficients"]).abs().max()
    assert 0 < apart < 4e-3, "a bfloat16 has eight bits, a step of Adam is 1e-2"


APPLIED = ["ada_merging", "concrete_task_arithmetic", "concrete_ada_merging"]


@pytest.mark.parametrize("method", APPLIED)
def test_blocks_change_no_byte_of_the_merge(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings: dict[str, Any] = {"steps": 1, **({"mask_steps": 1} if "concrete_ada" in method else {})}
    settings |= {"preprocess": "ties"} if method == "ada_merging" else {}
    learnt(world, tmp_path, method, **settings)
    want, file = (tmp_path / "m.safetensors").read_bytes(), tmp_path / "learnt.safetensors"
    for block in (7, 999):
        monkeypatch.setattr(models, "BLOCK", block)
        merge(
            world.recipe, method=method, settings={"batch_size": BATCH, **settings},
            output=tmp_path / "m.safetensors", coefficients=file,
        )  # fmt: skip
        assert (tmp_path / "m.safetensors").read_bytes() == want
