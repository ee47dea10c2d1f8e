"""Trainings whose numbers are lost on the way: they stop, say why, and what was good stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.errors import InputError, UsageError
from mergecli.finetuning import finetune
from mergecli.recipe import Recipe, TaskTable
from mergecli.sources import parse_source
from mergecli.training.settings import Settings
from tests.tiny import make_image_task, make_tiny_clip

pytestmark = pytest.mark.usefixtures("own_store")

SHORT: dict[str, Any] = {
    "task": "tints",
    "steps": 6,
    "batch_size": 6,
    "schedule": "constant",
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("diverging")
    data = parse_source(str(make_image_task(folder / "tints", train=40)), Path())
    base = parse_source(str(make_tiny_clip(folder / "base", seed=1)), Path())
    return Recipe(base=base, tasks={"tints": TaskTable(data=data, templates=("something {}",))})


@pytest.fixture
def leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes one step, counted from 0, so long that its weights give no numbers."""

    def make(at: int) -> None:
        monkeypatch.setattr(Settings, "rate", lambda _, step: 1e30 if step == at else 1e-3)

    return make


def test_the_weights_that_are_kept_are_the_last_ones_that_gave_numbers(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None]
) -> None:
    finetune(recipe, output=tmp_path / "three.safetensors", **{**SHORT, "steps": 3})
    leap(3)
    target, state = tmp_path / "t.safetensors", tmp_path / ".t.resume.safetensors"
    with pytest.raises(InputError) as caught:
        finetune(recipe, output=target, save_every=1, **SHORT)
    assert caught.value.message == f"{target}: the loss of `tints` is nan at step 5"
    assert caught.value.hint == (
        f"lower `learning_rate` (it is 0.001); the weights of step 3 stay in {state} until that output is trained again"
    )
    assert not target.exists()
    kept, want = load_file(state), load_file(tmp_path / "three.safetensors")
    for name, value in want.items():
        assert kept[f"weights.{name.removeprefix('vision_model.')}"].equal(value)


@pytest.mark.parametrize("validate_every", [0, 6, 2])
def test_what_the_last_step_made_is_looked_at_too(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None], validate_every: int
) -> None:
    leap(5)
    with pytest.raises(InputError, match="the loss of `tints` is nan at step 7"):
        finetune(recipe, output=tmp_path / "t.safetensors", validate_every=validate_every, **SHORT)
    assert not (tmp_path / "t.safetensors").exists()


def test_the_best_weights_of_a_validation_are_kept(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None]
) -> None:
    leap(4)
    with pytest.raises(InputError, match=r"the weights of step [24] stay in"):
        finetune(recipe, output=tmp_path / "t.safetensors", validate_every=2, **SHORT)
    kept = load_file(tmp_path / ".t.resume.safetensors")
    assert any(name.startswith("best.") for name in kept)
    assert all(value.isfinite().all() for value in kept.values())


def test_before_the_first_step_it_is_not_the_learning_rate(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.base is not None
    assert recipe.base.path is not None
    shutil.copytree(recipe.base.path, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = torch.nan
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is nan at step 1") as caught:
        finetune(recipe, base=tmp_path / "base", output=tmp_path / "t", **SHORT)
    assert caught.value.hint == "look at the base with `mergecli info`"


@pytest.mark.parametrize("more", [{}, {"lora": True, "rank": 2}])
def test_weights_that_float16_cannot_hold_are_not_written(
    recipe: Recipe, tmp_path: Path, more: dict[str, Any]
) -> None:
    target = tmp_path / "t"
    with pytest.raises(InputError, match="would have NaN or infinity as float16") as caught:
        finetune(
            recipe, output=target, dtype="float16", **{**SHORT, "steps": 1, "learning_rate": 1e5}, **more
        )
    assert caught.value.hint == "train with a lower learning rate, or write float32 or bfloat16"
    assert not target.exists()


def test_seeds_and_rates_that_torch_cannot_take_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        finetune(recipe, output=tmp_path / "t", **{**SHORT, "seed": 1 << 63, "learning_rate": 1e38})
    assert caught.value.message.splitlines()[1:] == [
        f"  `seed`: expected a whole number from 0 to 2^63 - 1, got {1 << 63}",
        "  `learning_rate`: expected a number above 0, at most 1e+30, got 1e+38",
    ]


def stopped(description: str, done: int, total: int) -> None:
    if done == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("other", ["text", "processing", "nothing"])
def test_a_state_is_taken_up_with_the_same_head_and_processing_only(
    recipe: Recipe, tmp_path: Path, other: str
) -> None:
    assert recipe.base is not None
    assert recipe.base.path is not None
    base, target = tmp_path / "base", tmp_path / "t.safetensors"
    shutil.copytree(recipe.base.path, base)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, base=base, output=target, progress=stopped, **SHORT)
    if other == "text":
        weights = load_file(base / "model.safetensors")
        save_file({**weights, "text_projection.weight": weights["text_projection.weight"] / 2},
                  base / "model.safetensors", {"format": "pt"})  # fmt: skip
    elif other == "processing":
        file = base / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    done = finetune(recipe, base=base, output=target, **SHORT)
    assert done.resumed_from == (3 if other == "nothing" else 0)


def test_a_folder_is_written_whole_and_old_shards_go(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"):
        (folder / name).write_text("{}")
    finetune(recipe, output=folder, **SHORT)
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "notes.txt", "preprocessor_config.json"]


def test_a_trace_beside_an_adapter_whose_name_has_a_dot_is_written_again(
    recipe: Recipe, tmp_path: Path
) -> None:
    for _ in range(2):
        finetune(recipe, output=tmp_path / "a.v1", trace=tmp_path / "t.csv", lora=True, rank=2, **SHORT)
    assert (tmp_path / "a.v1" / "adapter_config.json").exists()


def test_a_missing_split_is_called_as_the_user_calls_it(recipe: Recipe, tmp_path: Path) -> None:
    data = make_image_task(tmp_path / "data")
    (data / "train-00000-of-00001.parquet").replace(data / "val-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="has no split `train`"):
        finetune(recipe, data=data, output=tmp_path / "t", validate_every=1, **SHORT)
