"""Statistics as files: found again, refused where they do not fit, taken up where they were left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergecli.merging.learning.measure import measure
from mergecli.merging.merge import merge
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError
from tests.support.image_zoo import Zoo, make_zoo
from tests.support.kept_files import save_checked
from tests.support.tiny_clip import make_image_task
from tests.support.tiny_dual_encoders import make_tiny_dual_encoder

pytestmark = pytest.mark.usefixtures("own_store")

FEW = {"examples": 8, "batch_size": 4}
NAMES = ("fisher", "reg_mean", "reg_mean_plus_plus")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("made"))


@pytest.fixture
def zoo(made: Zoo, tmp_path: Path) -> Zoo:
    """A zoo of one's own, to change."""
    shutil.copytree(made.folder, tmp_path / "zoo")
    from mergecli.recipe.reading import recipe_of

    return replace(made, folder=tmp_path / "zoo", recipe=recipe_of(tmp_path / "zoo" / "zoo.toml"))


def merged(zoo: Zoo, method: str, recipe: Recipe | None = None, **more: Any) -> bytes:
    """The bytes of a merge with statistics in the zoo's `stats`, unless another folder is said."""
    output = zoo.folder / "merged.safetensors"
    settings = {**FEW, **more.pop("settings", {})}
    folder = more.pop("statistics", zoo.folder / "stats")
    merge(recipe or zoo.recipe, method=method, settings=settings, output=output, statistics=folder, **more)
    return output.read_bytes()


def files(folder: Path) -> dict[str, int]:
    """Name -> time of every file in it."""
    return {each.name: each.stat().st_mtime_ns for each in sorted(folder.rglob("*")) if each.is_file()}


@pytest.mark.parametrize("method", NAMES)
def test_with_statistics_no_image_is_needed_and_the_bytes_are_the_same(zoo: Zoo, method: str) -> None:
    want = merged(zoo, method)
    shutil.rmtree(zoo.folder / "images")
    assert merged(zoo, method) == want
    nameless = replace(zoo.recipe, tasks={})
    assert merged(zoo, method, nameless) == want
    with pytest.raises(InputError, match="no such file or folder"):
        merged(zoo, method, statistics=zoo.folder / "others")


@pytest.mark.parametrize("method", NAMES)
def test_what_was_measured_is_found_again_by_content(zoo: Zoo, tmp_path: Path, method: str) -> None:
    want = merged(zoo, method, statistics=None)
    store = tmp_path / "home" / "statistics" / method
    before = files(store)
    assert len(before) == (1 if method == "reg_mean_plus_plus" else 3)
    shutil.copytree(zoo.folder, tmp_path / "moved")
    from mergecli.recipe.reading import recipe_of

    assert merged(zoo, method, recipe_of(tmp_path / "moved" / "zoo.toml"), statistics=None) == want
    assert files(store) == before
    merged(zoo, method, statistics=None, settings={"examples": 9})
    assert len(files(store)) == 2 * len(before)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fisher", {"minimal": 0.1, "normalize": False, "exclude": ["vision_model.pre"]}),
        ("reg_mean", {"reduce_non_diagonal_ratio": 0.2, "ridge": 0.1, "exclude": ["vision_model.pre"]}),
        ("reg_mean_plus_plus", {"post_layernorm": "base"}),
    ],
)
def test_settings_that_only_the_merge_looks_at_measure_nothing_again(
    zoo: Zoo, method: str, settings: dict[str, Any]
) -> None:
    first = merged(zoo, method)
    before = files(zoo.folder / "stats")
    assert merged(zoo, method, settings=settings) != first
    assert files(zoo.folder / "stats") == before


def test_a_seed_matters_only_where_images_are_drawn(zoo: Zoo) -> None:
    other = replace(zoo.recipe, seed=1)
    assert merged(zoo, "fisher")[-1000:] == merged(zoo, "fisher", other)[-1000:]
    with pytest.raises(InputError, match=r"`measured.settings.shuffle`"):
        merged(zoo, "fisher", settings={"shuffle": True})
    merged(zoo, "reg_mean", statistics=zoo.folder / "grams")
    with pytest.raises(InputError, match=r"`measured.settings.seed`: expected 1, got 0"):
        merged(zoo, "reg_mean", other, statistics=zoo.folder / "grams")


def changed(file: Path, **values: Any) -> None:
    """Changes keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("method", NAMES)
def test_a_base_that_prepares_images_otherwise_is_measured_again(
    zoo: Zoo, tmp_path: Path, method: str
) -> None:
    first = merged(zoo, method, statistics=None)
    store = tmp_path / "home" / "statistics" / method
    before = files(store)
    changed(zoo.folder / "clip" / "preprocessor_config.json", image_mean=[0.9, 0.9, 0.9])
    second = merged(zoo, method, statistics=None)
    assert second != first
    assert len(files(store)) == 2 * len(before)
    config = json.loads((zoo.folder / "clip" / "config.json").read_text())
    changed(
        zoo.folder / "clip" / "config.json", vision_config={**config["vision_config"], "hidden_act": "relu"}
    )
    assert merged(zoo, method, statistics=None) != second
    assert len(files(store)) == 3 * len(before)


@pytest.mark.parametrize("method", NAMES)
def test_the_text_tower_and_its_words_matter_only_where_there_is_a_head(zoo: Zoo, method: str) -> None:
    merged(zoo, method)
    clip = zoo.folder / "clip"
    words = json.loads((clip / "tokenizer.json").read_text())
    changed(clip / "tokenizer.json", model={**words["model"], "vocab": {"a": 0}})
    config = json.loads((clip / "config.json").read_text())
    changed(clip / "config.json", text_config={**config["text_config"], "hidden_act": "relu"})
    weights = load_file(clip / "model.safetensors")
    weights["text_projection.weight"] += 1
    save_file(weights, clip / "model.safetensors")
    if method == "fisher":
        refused(zoo, r"`measured\.clip\.head`: expected")
    else:
        merged(zoo, method)


def test_statistics_serve_a_base_that_is_a_tower_alone(zoo: Zoo) -> None:
    want = merged(zoo, "fisher")
    save_file(dict(zoo.base), zoo.folder / "tower.safetensors")
    merge(
        {name: zoo.folder / f"{name}.safetensors" for name in "abc"}, base=zoo.folder / "tower.safetensors",
        method="fisher", settings=FEW, output=zoo.folder / "x.safetensors", statistics=zoo.folder / "stats",
    )  # fmt: skip
    (zoo.folder / "want.safetensors").write_bytes(want)
    got = load_file(zoo.folder / "x.safetensors")
    assert all(got[name].equal(each) for name, each in load_file(zoo.folder / "want.safetensors").items())


def refused(zoo: Zoo, match: str, method: str = "fisher", **more: Any) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        merged(zoo, method, **more)
    assert str(zoo.folder / "stats") in str(caught.value)
    return caught.value


def test_statistics_of_other_settings_models_data_prompts_or_methods_are_refused(zoo: Zoo) -> None:
    merged(zoo, "fisher")
    error = refused(zoo, "`measured.settings.examples`: expected 9, got 8", settings={"examples": 9})
    assert "delete the file" in error.hint
    refused(zoo, '`measured.method`: expected "reg_mean", got "fisher"', method="reg_mean")
    prompts = {name: replace(table, templates=("{}!",)) for name, table in zoo.recipe.tasks.items()}
    refused(zoo, r"`measured.tasks.a.templates`", recipe=replace(zoo.recipe, tasks=prompts))
    tasks = {
        **zoo.recipe.tasks,
        "a": replace(
            zoo.recipe.tasks["a"], data=zoo.recipe.tasks["b"].data, classes=("red", "green", "blue")
        ),
    }
    with pytest.raises(InputError):
        merged(zoo, "fisher", replace(zoo.recipe, tasks=tasks))
    swapped = {"a": zoo.recipe.tuned["c"], "b": zoo.recipe.tuned["b"], "c": zoo.recipe.tuned["a"]}
    refused(zoo, r"`inputs.a`: expected \"xxh3:", recipe=replace(zoo.recipe, tuned=swapped))
    images = zoo.folder / "images"
    (images / "a").rename(images / "old")
    shutil.copytree(images / "c", images / "a")
    refused(zoo, r"`measured.tasks.a.data`")


def test_a_refusal_comes_before_anything_is_measured(zoo: Zoo) -> None:
    measure(zoo.recipe, method="fisher", settings=FEW, only=["c"], output=zoo.folder / "stats")
    refused(zoo, "c.safetensors: is of another measurement than this merge needs", settings={"examples": 9})
    assert [*files(zoo.folder / "stats")] == ["c.safetensors"]


def test_damaged_and_foreign_files_are_refused(zoo: Zoo) -> None:
    merged(zoo, "reg_mean")
    file = zoo.folder / "stats" / "a.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    file.write_bytes(whole[:-4])
    refused(zoo, "cut short", method="reg_mean")
    file.write_bytes(b"nothing")
    refused(zoo, "is not a safetensors file", method="reg_mean")
    shutil.copy(zoo.folder / "a.safetensors", file)
    refused(zoo, "are no statistics", method="reg_mean")
    save_file(tensors, file, {"kind": "statistics"})
    refused(zoo, "has no checksums", method="reg_mean")
    save_checked(tensors, file, {"kind": "statistics"})
    refused(zoo, "does not say what it was measured on", method="reg_mean")
    name = sorted(tensors)[0]
    save_checked({key: value for key, value in tensors.items() if key != name}, file, about)
    refused(zoo, f"`{name}`", method="reg_mean")
    tensors[name][0, 0] = torch.nan
    save_checked(tensors, file, about)
    refused(zoo, "has NaN or infinity", method="reg_mean")
    assert not list(zoo.folder.glob(".merged*"))


def test_statistics_are_no_model(zoo: Zoo) -> None:
    merged(zoo, "fisher")
    with pytest.raises(InputError, match="expected checkpoint, task vector or mixture, got `statistics`"):
        merge(
            {"a": zoo.folder / "stats" / "a.safetensors"},
            base=zoo.folder / "clip",
            method="average",
            output=zoo.folder / "x.safetensors",
        )


def test_a_model_that_gives_nan_is_refused_and_leaves_nothing(zoo: Zoo) -> None:
    broken = {name: torch.full_like(value, 1e30) for name, value in zoo.tuned["c"].items()}
    save_file(broken, zoo.folder / "c.safetensors")
    with pytest.raises(InputError, match=r"c: `.*` comes out as NaN or infinity"):
        merged(zoo, "fisher")
    assert [*files(zoo.folder / "stats")] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("method", NAMES)
def test_interrupted_measuring_leaves_only_whole_files_and_goes_on(zoo: Zoo, method: str) -> None:
    whole = measure(zoo.recipe, method=method, settings=FEW, output=zoo.folder / "whole")
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith("b:") or (what.startswith("3 tasks:") and done == total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(zoo.recipe, method=method, settings=FEW, output=zoo.folder / "stats", progress=progress)
    joint = method == "reg_mean_plus_plus"
    assert [*files(zoo.folder / "stats")] == ([] if joint else ["a.safetensors"])
    done = measure(zoo.recipe, method=method, settings=FEW, output=zoo.folder / "stats")
    assert done.new == ((method,) if joint else ("b", "c"))
    for name, path in done.paths.items():
        assert path.read_bytes() == whole.paths[name].read_bytes()
    assert measure(zoo.recipe, method=method, settings=FEW, output=zoo.folder / "stats").new == ()
    assert len(set(told)) == (1 if joint else 2)


def test_some_tasks_need_the_models_and_images_of_those_only(zoo: Zoo) -> None:
    whole = measure(zoo.recipe, method="reg_mean", settings=FEW, output=zoo.folder / "whole")
    (zoo.folder / "a.safetensors").unlink()
    shutil.rmtree(zoo.folder / "images" / "a")
    done = measure(zoo.recipe, method="reg_mean", settings=FEW, output=zoo.folder / "s", only=["c", "b"])
    assert [*done.paths] == ["b", "c"]
    for name, path in done.paths.items():
        assert path.read_bytes() == whole.paths[name].read_bytes()


def test_all_images_are_looked_at_where_there_are_fewer(zoo: Zoo) -> None:
    done = measure(zoo.recipe, method="fisher", settings={"examples": 500}, output=zoo.folder / "s")
    with safe_open(done.paths["a"], "pt") as opened:
        about = json.loads(opened.metadata()["measured"])
    assert about["tasks"]["a"]["images"] == 26
    assert about["settings"] == {
        "examples": 500, "batch_size": 32, "split": "train", "shuffle": False, "per_example": False,
    }  # fmt: skip


@pytest.mark.parametrize(("split", "count"), [("test", 4), ("validation", 2), ("train", 26)])
def test_images_of_another_split_can_be_taken(zoo: Zoo, split: str, count: int) -> None:
    settings = {"examples": 50, "split": split}
    done = measure(zoo.recipe, method="fisher", settings=settings, output=zoo.folder / "s", only=["a"])
    with safe_open(done.paths["a"], "pt") as opened:
        facts = json.loads(opened.metadata()["measured"])["tasks"]["a"]
    assert (facts["split"], facts["images"]) == (split, count)


def test_a_merge_says_what_was_measured(zoo: Zoo) -> None:
    from mergecli.storage.checkpoint import open_checkpoint

    merged(zoo, "reg_mean")
    with safe_open(zoo.folder / "merged.safetensors", "pt") as opened:
        about = opened.metadata()
    inputs = json.loads(about["inputs"])
    assert [*inputs] == ["base", "a", "b", "c", "statistics of a", "statistics of b", "statistics of c"]
    with open_checkpoint(zoo.folder / "stats" / "b.safetensors") as stored:
        assert inputs["statistics of b"] == stored.digest()
    facts = json.loads(about["measured"])
    assert [*facts] == ["a", "b", "c"]
    assert (facts["a"]["split"], facts["a"]["images"]) == ("train", 8)


def test_a_wrong_call_is_answered_before_any_work(zoo: Zoo) -> None:
    with pytest.raises(UsageError, match="`average` measures nothing") as caught:
        measure(zoo.recipe, method="average", output=zoo.folder / "s")
    assert "`fisher`, `lot`, `pro_distill`, `reg_mean`, `reg_mean_plus_plus`" in caught.value.hint
    with pytest.raises(UsageError, match="cannot measure some tasks only"):
        measure(zoo.recipe, method="reg_mean_plus_plus", only=["a"], output=zoo.folder / "s")
    with pytest.raises(UsageError, match="the recipe has no model `d`"):
        measure(zoo.recipe, method="fisher", only=["d"], output=zoo.folder / "s")
    with pytest.raises(UsageError, match="has no split `holdout`"):
        measure(zoo.recipe, method="fisher", settings={"split": "holdout"}, output=zoo.folder / "s")
    with pytest.raises(UsageError, match="unknown task `a`"):
        measure(replace(zoo.recipe, tasks={}), method="fisher", output=zoo.folder / "s")
    with pytest.raises(UsageError, match=r"`method.examples`: expected a whole number at least 1, got 0"):
        measure(zoo.recipe, method="fisher", settings={"examples": 0}, output=zoo.folder / "s")
    assert not (zoo.folder / "s").exists()


def test_the_linear_layers_of_a_siglip_are_measured_by_their_names_and_its_head_is_the_mean(
    tmp_path: Path,
) -> None:
    from mergecli.clip.model import load_clip
    from mergecli.clip.pixels import batches
    from mergecli.data.images import load_images
    from mergecli.data.tasks import find
    from mergecli.recipe.reading import recipe_of

    lines = ['base = "base"', "[tuned]", 'a = "a.safetensors"', 'b = "b.safetensors"', "[tasks]"]
    make_tiny_dual_encoder(tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        make_tiny_dual_encoder(tmp_path / name, seed=seed)
        whole = load_file(tmp_path / name / "model.safetensors")
        tower = {key: each for key, each in whole.items() if key.startswith("vision_model.")}
        save_file(tower, tmp_path / f"{name}.safetensors")
        make_image_task(tmp_path / f"data-{name}", train=8, seed=seed)
        lines.append(f'{name} = {{data = "data-{name}", templates = ["{{}}"]}}')
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    recipe = recipe_of(tmp_path / "recipe.toml")
    merge(recipe, method="reg_mean", settings={"examples": 8}, output=tmp_path / "merged.safetensors")
    got = load_file(tmp_path / "merged.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    grams: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    for task in "ab":
        clip, seen = load_clip(tmp_path / task), []
        clip.tower.encoder.layers[1].mlp.fc1.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1).double())
        )
        found = find(task, recipe)
        for batch in batches(clip, load_images(found, found.train_split), 8):
            clip.model(batch)
        gram = torch.cat(seen).T @ torch.cat(seen) / len(torch.cat(seen))
        grams.append(0.95 * gram + 0.05 * torch.diag(gram.diag()))
        weights.append(load_file(tmp_path / task / "model.safetensors")[name].double())
    want = torch.linalg.solve(sum(grams), sum(g @ w.T for g, w in zip(grams, weights, strict=True))).T
    torch.testing.assert_close(got[name].double(), want, atol=1e-4, rtol=1e-4)
    probe = "vision_model.head.probe"
    both = [load_file(tmp_path / task / "model.safetensors")[probe] for task in "ab"]
    torch.testing.assert_close(got[probe], (both[0] + both[1]) / 2)
