"""What adapted methods learn, as files: written, read back, refused; and runs that stop and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergecli.merging.merge import merge
from mergecli.runtime.errors import InputError, MergecliError, MergecliWarning, UsageError
from tests.support.adapted_world import CASES, SHORT, AdaptedWorld, learn, make_adapted_world
from tests.support.kept_files import save_checked
from tests.support.tiny_clip import make_image_task

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("adapting"))


def test_a_whole_number_is_as_good_as_one_with_a_point(world: AdaptedWorld, tmp_path: Path) -> None:
    learned = learn(world, tmp_path, steps=2, start=1)
    assert learn(world, tmp_path, steps=2, start=1.0) == learned
    masks = {"mask_steps": 1, "steps": 1, "inner_rate": 1, "initial_logits": 3, "temperature": 1}
    learn(world, tmp_path, "concrete_ada_merging", start=1, **masks)


def test_what_was_learned_before_is_found_again_by_content(world: AdaptedWorld, tmp_path: Path) -> None:
    first, told = learn(world, tmp_path), list[str]()
    assert learn(world, tmp_path, progress=lambda text, *_: told.append(text)) == first
    assert not [text for text in told if text.startswith("adapting")]
    learn(world, tmp_path, steps=2)
    learn(world, tmp_path, changes=["seed=3"])
    assert len(list((tmp_path / "home" / "coefficients").rglob("*.safetensors"))) == 3


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_a_file_is_applied_without_images_or_text_tower_to_the_same_bytes(
    world: AdaptedWorld, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    learn(world, tmp_path, method, **settings)
    save_file(world.base, bare / "base.safetensors")
    for name in ("one", "two", "three"):
        shutil.copy(world.folder / f"{name}.safetensors", bare)
    text = world.recipe.read_text().partition("[tasks")[0].replace('"base"', '"base.safetensors"')
    (bare / "recipe.toml").write_text(text)
    merge(
        bare / "recipe.toml", method=method, output=bare / "merged.safetensors",
        coefficients=tmp_path / "learned.safetensors",
    )  # fmt: skip
    got, want = load_file(bare / "merged.safetensors"), load_file(tmp_path / "merged.safetensors")
    assert all(got[name].equal(value) for name, value in want.items())
    merge(
        world.recipe, method=method, settings={**SHORT, **settings}, output=bare / "merged.safetensors",
        coefficients=tmp_path / "learned.safetensors",
    )  # fmt: skip
    assert (bare / "merged.safetensors").read_bytes() == (tmp_path / "merged.safetensors").read_bytes()


def test_the_file_says_which_images_were_looked_at(world: AdaptedWorld, tmp_path: Path) -> None:
    learn(world, tmp_path, split="validation", adapt_on=["two"])
    with safe_open(tmp_path / "learned.safetensors", "pt") as file:
        looked = json.loads(file.metadata()["adapted_on"])
    assert list(looked) == ["two"]
    assert (looked["two"]["split"], looked["two"]["images"]) == ("validation", 2)


def test_a_task_of_one_class_stands_in_the_trace(tmp_path: Path) -> None:
    own = make_adapted_world(tmp_path / "world")
    make_image_task(tmp_path / "world" / "data-two", ("cat",))
    with pytest.warns(MergecliWarning, match="there is one class alone, `cat`, and every answer is right"):
        learn(own, tmp_path, trace=tmp_path / "t.csv")
    head, *rows = (tmp_path / "t.csv").read_text().splitlines()
    assert head.startswith("step,entropy,entropy one,entropy two,entropy three,")
    values = [float(value) for value in rows[0].split(",")]
    assert values[3] == 0
    assert values[1] == pytest.approx((values[2] + values[4]) / 3, rel=1e-4)


def test_the_trace_has_a_row_a_step_and_only_the_tasks_looked_at(world: AdaptedWorld, tmp_path: Path) -> None:
    learn(world, tmp_path, adapt_on=["one", "three"], trace=tmp_path / "t.csv", plot=tmp_path / "t.png")
    head, *rows = (tmp_path / "t.csv").read_text().splitlines()
    assert head == (
        "step,entropy,entropy one,entropy three,coefficient one,coefficient two,coefficient three"
    )
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    first = [float(value) for value in rows[0].split(",")]
    assert first[1] == pytest.approx((first[2] + first[3]) / 2, rel=1e-4)
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.size == (1280, 1040)


def test_tensorboard_reads_what_the_trace_says(world: AdaptedWorld, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn(world, tmp_path, trace=tmp_path / "trace.csv", tensorboard=tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    header, *rows = [line.split(",") for line in (tmp_path / "trace.csv").read_text().splitlines()]
    column = header.index("entropy one")
    assert [(each.step, f"{each.value:.4g}") for each in events.Scalars("entropy/one")] == [
        (int(row[0]), f"{float(row[column]):.4g}") for row in rows
    ]


def test_a_trace_of_no_steps_and_one_of_masks_are_written(world: AdaptedWorld, tmp_path: Path) -> None:
    learn(world, tmp_path, steps=0, trace=tmp_path / "none.csv", plot=tmp_path / "none.svg")
    assert len((tmp_path / "none.csv").read_text().splitlines()) == 1
    learn(world, tmp_path, "concrete_task_arithmetic", trace=tmp_path / "m.csv", plot=tmp_path / "m.pdf")
    assert (tmp_path / "m.csv").read_text().splitlines()[0].endswith(",entropy three,mask probability")
    assert (tmp_path / "m.pdf").read_bytes().startswith(b"%PDF")


def changed(file: Path, **tensors: Any) -> None:
    """Replaces tensors of a file (None removes), and keeps its metadata; `metadata` changes that."""
    with safe_open(file, "pt") as stored:
        metadata = {**stored.metadata(), **tensors.pop("metadata", {})}
    every = {**load_file(file), **tensors}
    kept = {name: value for name, value in every.items() if value is not None}
    save_checked(kept, file, {key: value for key, value in metadata.items() if value is not None})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"coefficients": torch.zeros(3, 2)}, r"`coefficients` has shape \(3, 2\), expected \(3, 39\)"),
    ({"coefficients": None}, r"lacks tensor `coefficients`"),
    ({"coefficients": torch.full((3, 39), torch.nan)}, "`coefficients` has NaN or infinity"),
    ({"metadata": {"kind": None}}, "holds no coefficients"),
    ({"metadata": {"method": "concrete_ada_merging"}}, "was learned by `concrete_ada_merging`"),
    ({"metadata": {"tasks": None}}, "does not say what it was learned on"),
    ({"metadata": {"tasks": "[[[["}}, "does not say what it was learned on"),
    ({"metadata": {"settings_table": "[1]"}}, "does not say what it was learned on"),
    ({"metadata": {"settings_table": '{"steps": "many"}'}}, "steps"),
    ({"metadata": {"adapted_on": "7"}}, "does not say what it was learned on"),
    ({"metadata": {"adapted_on": None}}, "does not say what it was learned on"),
    ({"metadata": {"tensors": '["other"]'}}, "is for models with other tensors"),
    ({"metadata": {"tasks": '["two", "one", "three"]'}}, "is for the models `two`, `one`, `three`, in this order"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_file_that_does_not_fit_is_refused(
    world: AdaptedWorld, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    learn(world, tmp_path, steps=1)
    changed(tmp_path / "learned.safetensors", **change)
    (tmp_path / "merged.safetensors").unlink()
    with pytest.raises(MergecliError, match=message):
        merge(
            world.recipe, method="ada_merging", output=tmp_path / "merged.safetensors",
            coefficients=tmp_path / "learned.safetensors",
        )  # fmt: skip
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits.vision_model.post_layernorm.bias": torch.full((16,), torch.inf)}, "has NaN or infinity"),
        (
            {"logits.vision_model.post_layernorm.bias": torch.zeros(17)},
            r"has shape \(17,\), expected \(16,\)",
        ),
        ({"logits.vision_model.post_layernorm.bias": None}, "lacks tensor"),
        ({"mask_means": None}, "lacks tensor `mask_means`"),
    ],
)
def test_a_damaged_mask_is_refused_and_nothing_written(
    world: AdaptedWorld, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    learn(world, tmp_path, "concrete_task_arithmetic", steps=1)
    changed(tmp_path / "learned.safetensors", **change)
    with pytest.raises(InputError, match=message):
        merge(
            world.recipe, method="concrete_task_arithmetic", output=tmp_path / "other.safetensors",
            coefficients=tmp_path / "learned.safetensors",
        )  # fmt: skip
    assert not (tmp_path / "other.safetensors").exists()


def test_settings_that_differ_from_those_it_was_learned_with_are_refused(
    world: AdaptedWorld, tmp_path: Path
) -> None:
    learn(world, tmp_path, steps=1)
    with pytest.raises(UsageError, match=r"was learned with `steps = 1`, the recipe says `2`"):
        merge(
            world.recipe, method="ada_merging", settings={"steps": 2}, output=tmp_path / "m.safetensors",
            coefficients=tmp_path / "learned.safetensors",
        )  # fmt: skip


@pytest.mark.parametrize("method", ["ada_merging", "concrete_task_arithmetic", "concrete_ada_merging"])
def test_a_learning_rate_that_diverges_is_told_and_leaves_nothing(
    world: AdaptedWorld, tmp_path: Path, method: str
) -> None:
    rate = "mask_rate" if method == "concrete_ada_merging" else "learning_rate"
    wild = {"ada_merging": {"start": 1e30}}.get(method, {"scaling_factor": 1e30})
    if method == "concrete_ada_merging":
        wild = {"inner_rate": 1e30, "mask_steps": 3}
    with pytest.raises(InputError, match=r"adapting: the entropy is nan in step \d+") as error:
        learn(world, tmp_path, method, **{rate: 1e30}, **wild)
    assert "lower learning rates" in error.value.hint
    assert not (tmp_path / "merged.safetensors").exists()
    assert not list((tmp_path / "home").rglob("*.partial.*"))


def test_a_task_without_images_or_without_a_name_is_told(world: AdaptedWorld, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`method\.adapt_on`: there are no models `four`"):
        learn(world, tmp_path, adapt_on=["four"])
    with pytest.raises(MergecliError, match="has no split `dev`"):
        learn(world, tmp_path, changes=["tasks.two.split=dev"])
    text = world.recipe.read_text().replace("[tasks.two]", "[tasks.another]")
    (world.folder / "unknown.toml").write_text(text)
    with pytest.raises(UsageError, match="unknown task `two`"):
        merge(world.folder / "unknown.toml", method="ada_merging", output=tmp_path / "m.safetensors")


def test_a_base_without_a_text_tower_cannot_be_learned_with(world: AdaptedWorld, tmp_path: Path) -> None:
    save_file(world.base, world.folder / "vision.safetensors")
    text = world.recipe.read_text().replace('base = "base"', 'base = "vision.safetensors"')
    (world.folder / "vision.toml").write_text(text)
    with pytest.raises(InputError, match="is not a whole CLIP"):
        merge(world.folder / "vision.toml", method="ada_merging", output=tmp_path / "m.safetensors")


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_vectors_in_the_machines_memory_change_no_number(
    world: AdaptedWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
) -> None:
    here = learn(world, tmp_path, method, **settings)
    merged = (tmp_path / "merged.safetensors").read_bytes()
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    assert learn(world, tmp_path, method, vectors_on="cpu", **settings) == here
    assert (tmp_path / "merged.safetensors").read_bytes() == merged
    merge(
        world.recipe, method=method, settings={"vectors_on": "cpu"}, output=tmp_path / "merged.safetensors",
        coefficients=tmp_path / "learned.safetensors",
    )  # fmt: skip
    assert (tmp_path / "merged.safetensors").read_bytes() == merged


def test_images_that_are_not_kept_are_decoded_to_the_same_result(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cache = learn(world, tmp_path)
    assert list((tmp_path / "home" / "cache" / "pixels").iterdir())
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    monkeypatch.setenv("MERGECLI_CACHE_SIZE", "0")
    assert learn(world, tmp_path) == with_cache
    assert not (tmp_path / "other home" / "cache").exists()


def test_files_beside_the_merge_replace_no_input_and_not_each_other(
    world: AdaptedWorld, tmp_path: Path
) -> None:
    def with_files(**more: Any) -> None:
        merge(
            world.recipe,
            method="ada_merging",
            settings=SHORT,
            **{"output": tmp_path / "m.safetensors", **more},
        )

    model = world.folder / "one.safetensors"
    before = model.read_bytes()
    with pytest.raises(UsageError, match=r"one\.safetensors: the output would replace an input \(one\)"):
        with_files(save_coefficients=model)
    assert model.read_bytes() == before
    for name in ("m.safetensors", "more/../m.safetensors"):
        with pytest.raises(UsageError, match=r"m\.safetensors: two outputs have this name"):
            with_files(save_coefficients=tmp_path / name)
    assert list(tmp_path.iterdir()) == []
