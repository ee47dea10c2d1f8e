"""Trainings whose numbers are lost on the way: they stop, say why, and what was good is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.data.tasks import TaskTable
from mergecli.formats.info import info
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.sources import parse_source
from mergecli.training.finetune import finetune
from mergecli.training.settings import Settings
from tests.conftest import assert_same
from tests.support.tiny_clip import make_image_task, make_tiny_clip
from tests.training.test_loop import stopping

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
        monkeypatch.setattr(Settings, "learning_rate_at", lambda _, step: 1e30 if step == at else 1e-3)

    return make


def hint_of(recipe: Recipe, target: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        finetune(recipe, output=target, **{**SHORT, **more})
    assert caught.value.message == f"{target}: the loss of `tints` is nan at step 5"
    assert not target.exists()
    assert not list(target.parent.glob(".*")), "no state is left: it would lose its numbers again"
    return caught.value.hint


LOWER = "lower `learning_rate` (it is 0.001); "
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "tower": ({}, "t.safetensors", "t.last-good.safetensors"),
    "folder": ({}, "t", "t.last-good/model.safetensors"),
    "adapter": ({"lora": True, "rank": 2}, "t", "t.last-good/adapter_model.safetensors"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save_every", [1, 500])
def test_the_last_weights_that_gave_numbers_are_written_as_the_output_would_have_been(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None], kind: str, save_every: int
) -> None:
    more, name, file = KINDS[kind]
    finetune(recipe, output=tmp_path / "three" / name, **{**SHORT, "steps": 3}, **more)
    leap(3)
    hint = hint_of(recipe, tmp_path / name, save_every=save_every, **more)
    kept = tmp_path / file
    where = kept if kind == "tower" else kept.parent
    assert hint == f"{LOWER}the weights of step 3, the last ones with finite losses, are in {where}"
    want = tmp_path / "three" / name / kept.name if kept.parent != tmp_path else tmp_path / "three" / name
    assert_same(load_file(kept), load_file(want))
    others = {each.name for each in want.parent.iterdir()}
    assert kind == "tower" or {each.name for each in where.iterdir()} == others
    about = info(where)
    assert (about.metadata["method"], about.metadata["last_good_step"]) == (
        "finetune --lora" if more else "finetune",
        "3",
    )


def test_losses_are_written_up_to_the_last_one_that_is_a_number(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None]
) -> None:
    trace, events = tmp_path / "t.csv", tmp_path / "tb"
    leap(3)
    hint_of(recipe, tmp_path / "t.safetensors", trace=trace, tensorboard=events)
    rows = trace.read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]
    assert "nan" not in trace.read_text()
    assert len(list(events.iterdir())) == 1


def test_of_a_training_that_learned_nothing_there_is_nothing_to_keep(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None]
) -> None:
    leap(0)
    with pytest.raises(InputError, match="is nan at step 2") as caught:
        finetune(recipe, output=tmp_path / "t", **SHORT)
    assert caught.value.hint == f"{LOWER}nothing was learned yet"
    assert list(tmp_path.glob("t*")) == []


def test_what_was_stopped_right_before_its_numbers_were_lost_says_that_nothing_is_left(
    recipe: Recipe, tmp_path: Path, leap: Callable[[int], None]
) -> None:
    leap(3)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, output=tmp_path / "t", progress=stopping(4), **SHORT)
    hint = hint_of(recipe, tmp_path / "t")
    assert hint == f"{LOWER}it was resumed at step 4, and no weights with finite losses are left"


def test_last_good_weights_that_float16_cannot_hold_are_told_as_lost(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "learning_rate_at", lambda _, step: 1e30 if step else 1e5)
    with pytest.raises(InputError, match="the loss of `tints` is nan at step 3") as caught:
        finetune(recipe, output=tmp_path / "t", dtype="float16", **SHORT)
    assert "the weights of step 1 are lost: " in caught.value.hint
    assert "would have NaN or infinity as float16" in caught.value.hint


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
    two = finetune(recipe, output=tmp_path / "two.safetensors", validate_every=2, **{**SHORT, "steps": 2})
    leap(3)
    hint = hint_of(recipe, tmp_path / "t.safetensors", validate_every=2)
    kept = tmp_path / "t.last-good.safetensors"
    assert hint == f"{LOWER}the weights of step 2, the best ones, are in {kept}"
    assert two.best_step == 2
    assert_same(load_file(kept), load_file(tmp_path / "two.safetensors"))


def test_before_the_first_step_it_is_not_the_learning_rate(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.base is not None
    assert recipe.base.path is not None
    shutil.copytree(recipe.base.path, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = torch.nan
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is nan at step 1") as caught:
        finetune(recipe, base=tmp_path / "base", output=tmp_path / "t", **SHORT)
    assert caught.value.hint == "the base is damaged: fetch or copy it again; nothing was learned yet"


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


def test_a_folder_is_written_whole_and_old_shards_go(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    folder.mkdir()
    for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"):
        (folder / name).write_text("{}")
    with pytest.warns(MergecliWarning, match="has other files, which stay: `notes.txt`"):
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
