"""What an interrupted training leaves, and who takes it up."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.recipe.schema import Recipe
from mergecli.runtime.distributed import Ranks
from mergecli.runtime.errors import MergecliWarning, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.training.finetune import finetune
from mergecli.training.resume import TrainingState
from tests.training.test_loop import BOTH, SHORT, make_tasks, stopping

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_tasks(tmp_path_factory.mktemp("resuming"))


@pytest.mark.parametrize("after", [3, 4, 7])
def test_an_interrupted_run_with_validations_ends_with_the_bytes_of_one_that_was_not(
    recipe: Recipe, tmp_path: Path, after: int
) -> None:
    more = {**SHORT, "learning_rate": 2e-2, "validate_every": 2, "task": BOTH}
    first = finetune(recipe, output=tmp_path / "a.safetensors", trace=tmp_path / "a.csv", **more)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, output=tmp_path / "b.safetensors", progress=stopping(after), **more)
    done = finetune(recipe, output=tmp_path / "b.safetensors", trace=tmp_path / "b.csv", **more)
    assert (done.resumed_from, done.best_step, done.validation) == (after, first.best_step, first.validation)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


def test_a_run_that_ended_before_its_output_was_written_is_not_trained_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(recipe, task="tints", output=tmp_path / "a.safetensors", validate_every=4, **SHORT)
    target = tmp_path / "b.safetensors"
    with monkeypatch.context() as patch:

        def pressed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("mergecli.clip.model.save_tower", pressed)
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, task="tints", output=target, validate_every=4, **SHORT)
    done = finetune(recipe, task="tints", output=target, validate_every=4, **SHORT)
    assert done.resumed_from == 10
    assert target.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def without(name: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with open_checkpoint(file) as stored:
            metadata = dict(stored.metadata)
        tensors = load_file(file)
        del tensors[next(each for each in tensors if each.startswith(name))]
        save_file(tensors, file, metadata)

    return change


def saying(facts: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with open_checkpoint(file) as stored:
            metadata = {**stored.metadata, "facts": facts}
        save_file(load_file(file), file, metadata)

    return change


def without_work(file: Path) -> None:
    with open_checkpoint(file) as stored:
        metadata = {name: text for name, text in stored.metadata.items() if name != "work"}
    save_file(load_file(file), file, metadata)


def spoilt(file: Path) -> None:
    with open_checkpoint(file) as stored:
        metadata = dict(stored.metadata)
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file, metadata)


ALL = '"step": 7, "updates": 7, "scale": 0, "growth": 0, "best_step"'
DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut short": cut, "empty": emptied, "NaN": spoilt, "without weights": without("weights."),
    "without losses": without("losses"), "facts are no JSON": saying("{"), "facts lack": saying("{}"),
    "facts are no numbers": saying(f'{{{ALL}: "x"}}'), "facts are NaN": saying(f"{{{ALL}: NaN}}"),
    "of another version": without_work, "a best step that was never validated": saying(f"{{{ALL}: 3}}"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_is_damaged_is_not_taken_up(recipe: Recipe, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "t.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, task="tints", output=target, validate_every=2, progress=stopping(7), **SHORT)
    state = tmp_path / ".t.resume.safetensors"
    DAMAGES[damage](state)
    with pytest.warns(MergecliWarning) as caught:
        done = finetune(recipe, task="tints", output=target, validate_every=2, **SHORT)
    assert [str(each.message) for each in caught] == [
        f"{state}: is damaged, or of another version: training starts again"
    ]
    assert done.resumed_from == 0
    assert target.exists()


def test_a_state_that_is_no_longer_finite_does_not_replace_the_last_good_one(tmp_path: Path) -> None:
    work = {"learning_rate": 1e-3, "weight_decay": 0.0}

    def state() -> TrainingState:
        return TrainingState(tmp_path / "t", {"w": torch.nn.Parameter(torch.ones(3))}, work, 1, Ranks())

    first = state()
    for value in (2.0, float("inf")):
        first.losses.append([0.5])
        with torch.no_grad():
            first.parameters["w"].fill_(value)
        first.save()
    again = state()
    assert (first.saved, again.step) == ((1, 0), 1)
    assert again.parameters["w"].tolist() == [2.0, 2.0, 2.0]


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "seed": ({"seed": 4}, ["`seed`: 3 -> 4"]),
    "batches and precision": (
        {"accumulate": 2, "precision": "bfloat16"},
        ["`accumulate`: 1 -> 2", '`precision`: "float32" -> "bfloat16"'],
    ),
    "an adapter": (
        {"lora": True, "rank": 2},
        ["`low_rank.linearized`: none -> false", "`low_rank.rank`: none -> 2"],
    ),
    "validation": (
        {"validate_every": 5},
        ["`validate_every`: 0 -> 5", '`split`: "train" -> "train-without-validation"'],
    ),
    "tasks": ({"task": BOTH}, ['`task`: "tints" -> "tints, shades"']),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_of_other_settings_is_neither_taken_up_nor_lost(
    recipe: Recipe, tmp_path: Path, change: str
) -> None:
    target, state = tmp_path / "t", tmp_path / ".t.resume.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, output=target, progress=stopping(2), **{"task": "tints", **SHORT})
    before = state.read_bytes()
    other, lines = CHANGES[change]
    with pytest.raises(UsageError) as caught:
        finetune(recipe, output=target, **{"task": "tints", **SHORT, **other})
    first, *differing = caught.value.message.splitlines()
    assert first == f"{state}: is the state of a training with other settings, base or images:"
    assert [line for line in lines if f"  {line}" not in differing] == []
    assert caught.value.hint == "give the same ones to resume it, or `--fresh` (`fresh=True`) to start again"
    assert state.read_bytes() == before
    assert finetune(recipe, output=target, **{"task": "tints", **SHORT}).resumed_from == 2


def test_a_fresh_training_begins_anew_and_leaves_nothing_of_the_old_one(
    recipe: Recipe, tmp_path: Path
) -> None:
    target = tmp_path / "t"
    for settings in ({}, {"seed": 4}):
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe, task="tints", output=target, progress=stopping(2), **SHORT)
        done = finetune(recipe, task="tints", output=target, fresh=True, **{**SHORT, **settings})
        assert done.resumed_from == 0
        assert not list(tmp_path.glob(".t*"))


@pytest.mark.parametrize("other", ["text", "processing", "nothing"])
def test_a_state_is_taken_up_with_the_same_head_and_processing_only(
    recipe: Recipe, tmp_path: Path, other: str
) -> None:
    assert recipe.base is not None
    assert recipe.base.path is not None
    base, target = tmp_path / "base", tmp_path / "t.safetensors"
    shutil.copytree(recipe.base.path, base)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, task="tints", base=base, output=target, progress=stopping(3), **SHORT)
    if other == "nothing":
        assert finetune(recipe, task="tints", base=base, output=target, **SHORT).resumed_from == 3
        return
    if other == "text":
        weights = load_file(base / "model.safetensors")
        save_file({**weights, "text_projection.weight": weights["text_projection.weight"] / 2},
                  base / "model.safetensors", {"format": "pt"})  # fmt: skip
        expected = r"`clip\.text`: "
    else:
        file = base / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
        expected = r"`processing\.image_mean`: .* -> \[0\.1, 0\.2, 0\.3\]"
    with pytest.raises(UsageError, match=expected):
        finetune(recipe, task="tints", base=base, output=target, **SHORT)


def steps_in(trace: Path) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader(trace.read_text().splitlines())]


def test_losses_can_be_watched_whenever_the_state_is_saved_and_looked_at_when_it_was_stopped(
    recipe: Recipe, tmp_path: Path
) -> None:
    trace, events = tmp_path / "t.csv", tmp_path / "tb"
    seen: dict[int, list[int]] = {}

    def watching(description: str, done: int, total: int) -> None:
        seen[done] = steps_in(trace) if trace.exists() else []
        if done == 8:
            raise KeyboardInterrupt

    more = {"task": "tints", "trace": trace, "tensorboard": events, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, output=tmp_path / "t", save_every=3, progress=watching, **more)
    assert {done: len(steps) for done, steps in seen.items()} == {
        1: 0, 2: 0, 3: 0, 4: 3, 5: 3, 6: 3, 7: 6, 8: 6,
    }  # fmt: skip
    assert steps_in(trace) == [*range(1, 9)]
    assert len(list(events.iterdir())) == 1
    assert finetune(recipe, output=tmp_path / "t", **more).resumed_from == 8
    finetune(recipe, output=tmp_path / "u", **{**more, "trace": tmp_path / "u.csv"})
    assert trace.read_bytes() == (tmp_path / "u.csv").read_bytes()
