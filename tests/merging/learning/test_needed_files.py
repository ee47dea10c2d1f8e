"""Masks that were learned: applied in another way, and taken over by another learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.merging.merge import merge
from mergecli.merging.sweep_points import merge_sweep, points_of
from mergecli.runtime.errors import InputError, UsageError
from tests.conftest import assert_same
from tests.support.adapted_world import SHORT, AdaptedWorld, learn, make_adapted_world, stopping

pytestmark = pytest.mark.usefixtures("own_store")

TASK_ARITHMETIC, ADA = "concrete_task_arithmetic", "concrete_ada_merging"
MASKS = ("sample", "expected", "discrete")
FULL: dict[str, Any] = {"batch_size": 20, "learning_rate": 1e-2, "mask_rate": 1e-2}
"""All images in each step, so that which come first matters little."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("masks"))


def applied(world: AdaptedWorld, folder: Path, method: str, **settings: Any) -> dict[str, torch.Tensor]:
    """The tower that `learned.safetensors` in the folder gives with these settings."""
    merge(
        world.recipe, method=method, settings=settings, output=folder / "applied.safetensors",
        coefficients=folder / "learned.safetensors",
    )  # fmt: skip
    return load_file(folder / "applied.safetensors")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("method", "more"), [(TASK_ARITHMETIC, {}), (ADA, {"mask_steps": 4, "steps": 0})])
def test_another_mask_of_a_file_is_what_learning_with_it_gives(
    world: AdaptedWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    more: dict[str, Any],
    mask: str,
) -> None:
    learn(world, tmp_path, method, **more)
    got = applied(world, tmp_path, method, mask=mask)
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    learn(world, tmp_path, method, mask=mask, **more)
    want = load_file(tmp_path / "merged.safetensors")
    assert all(got[name].equal(value) for name, value in want.items())


def test_coefficients_are_applied_under_another_mask_than_their_own(
    world: AdaptedWorld, tmp_path: Path
) -> None:
    learn(world, tmp_path, ADA, mask_steps=3, steps=3, mask_rate=0.1)
    got, learned = applied(world, tmp_path, ADA, mask="expected"), load_file(tmp_path / "learned.safetensors")
    want = dict(world.base)
    for column, (name, base) in enumerate(world.base.items()):
        mask = learned[f"logits.{name}"].double().sigmoid()
        vectors = [tower[name].double() - base.double() for tower in world.tuned]
        added = sum(c * v for c, v in zip(learned["coefficients"][:, column].tolist(), vectors, strict=True))
        want[name] = base.double() + mask / mask.mean() * added
    assert_same({name: value.double() for name, value in got.items()}, want, 1e-6)


def test_what_was_learned_once_serves_every_mask(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(world, tmp_path, TASK_ARITHMETIC)
    told = list[str]()
    second = learn(
        world, tmp_path, TASK_ARITHMETIC, mask="expected", progress=lambda text, *_: told.append(text)
    )
    merged = (tmp_path / "merged.safetensors").read_bytes()
    assert not [text for text in told if text.startswith("adapting")]
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    assert learn(world, tmp_path, TASK_ARITHMETIC, mask="expected") == second
    assert (tmp_path / "merged.safetensors").read_bytes() == merged


@pytest.mark.parametrize("given", [False, True])
def test_a_sweep_over_masks_learns_once_or_not_at_all(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    want = dict[str, dict[str, torch.Tensor]]()
    for mask in MASKS:
        learn(world, tmp_path, TASK_ARITHMETIC, mask=mask)
        want[mask] = load_file(tmp_path / "merged.safetensors")
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    changes = [] if given else [f"method.{key}={value}" for key, value in SHORT.items()]
    points = points_of(
        world.recipe, [f"method.mask={','.join(MASKS)}"], method=TASK_ARITHMETIC, changes=changes
    )
    steps = list[int]()
    merge_sweep(
        points, tmp_path / "swept", coefficients=tmp_path / "learned.safetensors" if given else None,
        progress=lambda text, step, _: steps.append(step) if text.startswith("adapting") else None,
    )  # fmt: skip
    assert steps == ([] if given else [1, 2, 3, 4, 5, 6])
    for mask in MASKS:
        got = load_file(tmp_path / "swept" / f"{TASK_ARITHMETIC},mask-{mask}.safetensors")
        assert all(got[name].equal(value) for name, value in want[mask].items())
    assert not all(want["sample"][name].equal(value) for name, value in want["expected"].items())


@pytest.mark.parametrize("mask", ["sample", "expected"])
def test_coefficients_are_learned_under_masks_of_a_file(
    world: AdaptedWorld, tmp_path: Path, mask: str
) -> None:
    whole = {**FULL, "mask_steps": 4, "mask": mask}
    learn(world, tmp_path, ADA, **{**whole, "steps": 3})
    both = load_file(tmp_path / "learned.safetensors")
    learn(world, tmp_path / "first", ADA, **{**whole, "steps": 0})
    file = tmp_path / "first" / "learned.safetensors"
    before = file.read_bytes()
    learn(world, tmp_path / "then", ADA, **{**FULL, "steps": 3, "mask": mask, "masks": str(file)})
    found = load_file(tmp_path / "then" / "learned.safetensors")
    assert len(found["trace.entropies"]) == 3
    names = [name for name in both if name.startswith("logits.") or name == "mask_means"]
    assert all(found[name].equal(both[name]) for name in names)
    matter = [place for place, name in enumerate(world.base) if not name.endswith("k_proj.bias")]
    assert (found["coefficients"] - both["coefficients"])[:, matter].abs().max() < 1e-5
    assert (found["coefficients"] - 0.3).abs().max() > 1e-2
    with pytest.raises(UsageError, match="the output would replace an input"):
        merge(
            world.recipe, method=ADA, settings={**FULL, "masks": str(file)}, output=tmp_path / "m.safetensors",
            save_coefficients=file,
        )  # fmt: skip
    assert file.read_bytes() == before


def test_masks_of_task_arithmetic_serve_too_and_an_interrupted_run_goes_on(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(world, tmp_path / "first", TASK_ARITHMETIC)
    file = tmp_path / "first" / "learned.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(world, tmp_path, ADA, masks=str(file), progress=stopping(3))
    resumed = learn(world, tmp_path, ADA, masks=str(file))
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    moved = tmp_path / "elsewhere" / "learned.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    assert learn(world, tmp_path, ADA, masks=str(moved)) == resumed
    learned, masks = load_file(tmp_path / "learned.safetensors"), load_file(file)
    assert all(learned[name].equal(value) for name, value in masks.items() if name.startswith("logits."))
    shown = applied(world, tmp_path, ADA)
    assert_same(shown, load_file(tmp_path / "merged.safetensors"))


def test_masks_that_do_not_fit_are_refused_before_any_work(world: AdaptedWorld, tmp_path: Path) -> None:
    def refused(message: str, file: Path, own: AdaptedWorld = world, **more: Any) -> None:
        with pytest.raises(InputError, match=message):
            learn(own, tmp_path / "out", ADA, masks=str(file), **more)
        assert not (tmp_path / "out").exists()

    learn(world, tmp_path / "ada", steps=1)
    learn(world, tmp_path / "ours", TASK_ARITHMETIC, steps=1)
    good = tmp_path / "ours" / "learned.safetensors"
    refused("no such file", tmp_path / "gone.safetensors")
    refused("holds no masks", tmp_path / "ada" / "learned.safetensors")
    refused("holds no masks", world.folder / "one.safetensors")
    less = make_adapted_world(tmp_path / "less")
    less.recipe.write_text(less.recipe.read_text().replace('two = "two.safetensors"\n', ""))
    refused("holds masks for other models", good, less)
    other = make_adapted_world(tmp_path / "other")
    tower = load_file(other.folder / "two.safetensors")
    tower["vision_model.post_layernorm.bias"] += 1
    save_file(tower, other.folder / "two.safetensors")
    refused("its masks were learned on other weights of `two`", good, other)
