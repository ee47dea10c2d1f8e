"""Encoders of open_clip whose visual projection was fine-tuned too: it is merged, evaluated and exported with the tower."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli import ModelPool, cos_sim, evaluate, extract, measure, merge, taskvector
from mergecli.clip.model import features, load_clip, set_tower
from mergecli.data.images import load_images
from mergecli.data.tasks import find
from mergecli.evaluation.counting import ModelSlot
from mergecli.formats.export import export
from mergecli.formats.mixture import mixture_of
from mergecli.formats.opening import open_source
from mergecli.recipe.reading import recipe_of as read
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.sources import parse_source
from tests.clip.test_other_parts import adapter
from tests.conftest import Run, Weights, assert_same
from tests.formats.test_convert import as_open_clip
from tests.support.processor import pixel_values
from tests.support.tiny_clip import make_image_task, make_tiny_clip

PROJECTION = "visual_projection.weight"
TASKS = ("a", "b")


def encoder_of(whole: Weights) -> Weights:
    """The parts of a CLIP that make image features."""
    return {name: each for name, each in whole.items() if name.startswith(("vision_model.", "visual_"))}


def save_encoder(whole: Weights, file: Path) -> None:
    """A CLIP as the repositories of task arithmetic save image encoders: open_clip's names, and what is left of the text tower."""
    theirs = as_open_clip(whole, "model.")
    save_file(
        {
            name: each.contiguous()
            for name, each in theirs.items()
            if not name.startswith("model.transformer.")
        },
        file,
    )


class World:
    """A CLIP, and two encoders that were fine-tuned from it, projections included."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, make_tiny_clip(folder / "base", seed=3)
        self.whole = load_file(self.base / "model.safetensors")
        self.tuned: dict[str, Weights] = {}
        lines, tables = ["schema = 1", 'base = "base"', "[tuned]"], list[str]()
        for number, task in enumerate(TASKS):
            generator = torch.Generator().manual_seed(number)
            self.tuned[task] = {
                name: each + 0.1 * torch.randn(each.shape, generator=generator)
                for name, each in encoder_of(self.whole).items()
            }
            save_encoder(self.whole | self.tuned[task], folder / f"{task}.safetensors")
            make_image_task(folder / f"data-{task}", train=10, test=9, seed=number)
            lines.append(f'{task} = "{task}.safetensors"')
            tables += [f"[tasks.{task}]", f'data = "data-{task}"', 'templates = ["a {}."]']
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text("\n".join([*lines, *tables]) + "\n")

    @property
    def own(self) -> Weights:
        """The base's encoder."""
        return encoder_of(self.whole)

    @property
    def deltas(self) -> list[Weights]:
        return [{name: each - self.own[name] for name, each in own.items()} for own in self.tuned.values()]

    def by_hand(self, weights: Weights, folder: Path) -> Path:
        """A whole CLIP with this image encoder."""
        shutil.copytree(self.base, folder)
        save_file(self.whole | weights, folder / "model.safetensors")
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("encoders"))


def merged(world: World, output: Path, method: str = "task_arithmetic", **more: Any) -> Weights:
    merge(world.recipe, method=method, output=output, **more)
    return load_file(output)


def losses(results: Any) -> dict[str, tuple[int, float]]:
    (result,) = results
    return {task: (each.correct, each.loss) for task, each in result.tasks.items()}


@pytest.mark.parametrize(
    ("method", "of"),
    [
        ("average", lambda base, deltas: base + sum(deltas) / 2),
        ("task_arithmetic", lambda base, deltas: base + 0.3 * sum(deltas)),
    ],
)
def test_a_merge_is_that_of_the_whole_encoder_and_so_is_its_evaluation(
    world: World, tmp_path: Path, method: str, of: Callable[[Any, Any], Any]
) -> None:
    got = merged(world, tmp_path / "m.safetensors", method)
    want = {name: of(each, [own[name] for own in world.deltas]) for name, each in world.own.items()}
    assert_same(got, want, atol=2e-6)
    whole = world.by_hand(got, tmp_path / "whole")
    found = evaluate([tmp_path / "m.safetensors"], recipe=world.recipe, cache=False)
    assert losses(found) == losses(evaluate([whole], recipe=world.recipe, clip=whole, cache=False))
    tower = {name: each for name, each in got.items() if name != PROJECTION}
    save_file(tower, tmp_path / "tower.safetensors")
    alone = evaluate([tmp_path / "tower.safetensors"], recipe=world.recipe, cache=False)
    assert losses(found) != losses(alone)


def test_fine_tuned_models_are_evaluated_with_their_own_projections_and_others_with_the_base_s_after_them(
    world: World, tmp_path: Path
) -> None:
    found = losses(evaluate(individual=True, recipe=world.recipe, cache=False))
    for task, own in world.tuned.items():
        whole = world.by_hand(own, tmp_path / task)
        want = losses(evaluate([whole], recipe=world.recipe, clip=whole, tasks=[task], cache=False))
        assert found[task] == want[task]
    after = evaluate(
        {"a": world.folder / "a.safetensors", "base": world.base}, recipe=world.recipe, cache=False
    )
    before = evaluate([world.base], recipe=world.recipe, cache=False)
    assert losses(after[1:]) == losses(before)
    assert after[1].checkpoint["digest"] == before[0].checkpoint["digest"]
    assert after[1].checkpoint["method"] == "pretrained"
    assert [each.relative_size for each in after] == [1, 1]


def test_a_clip_has_its_own_projection_again_where_the_next_tower_has_none(world: World) -> None:
    clip = load_clip(world.base)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = features(clip, pixels)
    with open_source(parse_source(str(world.folder / "a.safetensors"), Path())) as opened:
        set_tower(clip, opened)
        assert torch.equal(clip.model.visual_projection.weight, world.tuned["a"][PROJECTION])
        assert not torch.equal(features(clip, pixels), before)
    with open_source(parse_source(str(world.base), Path())) as opened:
        set_tower(clip, opened.vision())
    assert torch.equal(features(clip, pixels), before)


def test_projections_that_are_the_base_s_change_no_byte(world: World, tmp_path: Path) -> None:
    for folder in (tmp_path / "towers", tmp_path / "encoders", tmp_path / "half"):
        folder.mkdir()
        (folder / "base").symlink_to(world.base)
    for task, own in world.tuned.items():
        tower = {name: each for name, each in own.items() if name != PROJECTION}
        save_file(tower, tmp_path / "towers" / f"{task}.safetensors")
        save_encoder(world.whole | tower, tmp_path / "encoders" / f"{task}.safetensors")
        rounded = {PROJECTION: world.own[PROJECTION].bfloat16()}
        save_file(tower | rounded, tmp_path / "half" / f"{task}.safetensors")
    written: set[bytes] = set()
    for folder in ("towers", "encoders", "half"):
        models = {task: tmp_path / folder / f"{task}.safetensors" for task in TASKS}
        out = tmp_path / folder / "m.safetensors"
        merge(models, base=tmp_path / folder / "base", method="ties", output=out)
        written.add(out.read_bytes())
        assert PROJECTION not in load_file(out)
    assert len(written) == 1


def test_a_model_without_a_projection_has_the_base_s_and_a_note_names_it(
    world: World, tmp_path: Path, run: Run
) -> None:
    tower = {name: each for name, each in world.tuned["b"].items() if name != PROJECTION}
    save_file(tower, tmp_path / "b.safetensors")
    ended = run(
        "merge", "--base", world.base, world.folder / "a.safetensors", "b.safetensors", "--method", "average",
        "-o", "m.safetensors",
    )  # fmt: skip
    assert (ended.status, ended.err) == (
        0,
        "note: `b`: no visual projection in the file, and other models have fine-tuned theirs: it has the base's\n",
    )
    want = (world.tuned["a"][PROJECTION] + world.own[PROJECTION]) / 2
    got = load_file(tmp_path / "m.safetensors")[PROJECTION]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    with open_source(parse_source(str(tmp_path / "m.safetensors"), Path())) as opened:
        inputs = json.loads(opened.metadata["inputs"])
    with (
        open_source(parse_source(str(tmp_path / "b.safetensors"), Path())) as b,
        open_source(parse_source(str(world.base), Path())) as base,
    ):
        assert (inputs["b"], inputs["base"]) == (b.digest(), base.vision().digest())


def test_a_base_without_a_projection_leaves_them_out_with_a_warning(world: World, tmp_path: Path) -> None:
    tower = {name: each for name, each in world.own.items() if name != PROJECTION}
    save_file(tower, tmp_path / "tower.safetensors")
    models = {task: world.folder / f"{task}.safetensors" for task in TASKS}
    with pytest.warns(MergecliWarning) as caught:
        merge(
            models, base=tmp_path / "tower.safetensors", method="average", output=tmp_path / "m.safetensors"
        )
    assert [str(each.message) for each in caught] == [
        "`a`, `b` have visual projections of their own, left out of the merge: the base has none; name the whole CLIP that "
        "they were fine-tuned from"
    ]
    assert PROJECTION not in load_file(tmp_path / "m.safetensors")
    merge(models, method="average", output=tmp_path / "no-base.safetensors")
    want = sum(own[PROJECTION] for own in world.tuned.values()) / 2
    torch.testing.assert_close(load_file(tmp_path / "no-base.safetensors")[PROJECTION], want)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(4, 16), "a: `visual_projection.weight` has shape (4, 16), the base has (8, 16)"),
        (torch.full((8, 16), torch.nan), "a: `visual_projection.weight` has NaN"),
    ],
)
def test_a_projection_that_cannot_be_merged_is_one_error(
    world: World, tmp_path: Path, value: torch.Tensor, message: str
) -> None:
    save_encoder(world.whole | world.tuned["a"] | {PROJECTION: value}, tmp_path / "a.safetensors")
    models = {"a": tmp_path / "a.safetensors", "b": world.folder / "b.safetensors"}
    with pytest.raises(InputError) as caught:
        merge(models, base=world.base, method="average", output=tmp_path / "m.safetensors")
    assert message in caught.value.message
    with pytest.raises(
        InputError, match=r"has shape \(4, 16\), the base has|NaN or infinite logits on task `a`"
    ):
        evaluate({"a": models["a"]}, recipe=world.recipe, tasks=["a"], cache=False)


def test_a_projection_with_another_number_of_dimensions_is_no_clip_s(world: World, tmp_path: Path) -> None:
    theirs = load_file(world.folder / "a.safetensors")
    save_file(theirs | {"model.visual.proj": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match=r"`model.visual.proj` has shape \(3,\), two dimensions were expected"
    ):
        merge(
            {"a": tmp_path / "a.safetensors"},
            base=world.base,
            method="average",
            output=tmp_path / "m.safetensors",
        )


def test_a_conversion_by_a_version_that_left_it_out_is_refused(world: World, tmp_path: Path) -> None:
    about = {"mergecli": "0.1.0", "kind": "checkpoint", "converted_from": "a.pt"}
    tower = {name: each for name, each in world.tuned["a"].items() if name != PROJECTION}
    save_file(tower, "old.safetensors", {**about, "left_out": '["model.logit_scale", "model.visual.proj"]'})
    save_file(
        tower, "new.safetensors", {**about, "left_out": '["model.logit_scale", "model.text_projection"]'}
    )
    with pytest.raises(InputError) as caught:
        open_source(parse_source("old.safetensors", tmp_path))
    assert (caught.value.message, caught.value.hint) == (
        f"{tmp_path / 'old.safetensors'}: was converted by an earlier version, which left the visual projection out",
        "delete it, then run `mergecli fetch --allow-pickle old.safetensors` again",
    )
    open_source(parse_source("new.safetensors", tmp_path)).close()


def test_task_vectors_have_it_and_cosines_count_it(world: World, tmp_path: Path) -> None:
    files = taskvector(world.recipe, output=tmp_path / "vectors")
    for file, delta in zip(files, world.deltas, strict=True):
        assert_same(load_file(file), delta, atol=1e-6)
    flat = torch.stack(
        [torch.cat([each.flatten() for _, each in sorted(delta.items())]) for delta in world.deltas]
    )
    want = torch.nn.functional.cosine_similarity(flat[0].double(), flat[1].double(), dim=0)
    for given in (world.recipe, dict(zip(TASKS, files, strict=True))):
        assert cos_sim(given).cosines[0][1] == pytest.approx(float(want), abs=1e-6)
    again = tmp_path / "of-vectors.safetensors"
    merge(dict(zip(TASKS, files, strict=True)), base=world.base, method="task_arithmetic", output=again)
    assert_same(load_file(again), merged(world, tmp_path / "m.safetensors"), atol=1e-6)
    (alone,) = evaluate({"a": files[0]}, recipe=world.recipe, tasks=["a"], cache=False)
    (tuned,) = evaluate({"a": world.folder / "a.safetensors"}, recipe=world.recipe, tasks=["a"], cache=False)
    assert alone.tasks["a"].loss == pytest.approx(tuned.tasks["a"].loss, abs=1e-5)


def test_it_is_exported_and_loaded_as_transformers_has_it(world: World, tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    got = merged(world, tmp_path / "m.safetensors")
    export(tmp_path / "m.safetensors", clip=world.base, output=tmp_path / "o.safetensors")
    want = {name: each.contiguous() for name, each in as_open_clip(world.whole | got).items()}
    assert_same(load_file(tmp_path / "o.safetensors"), want)
    merge(world.recipe, method="task_arithmetic", output=tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architectures"] == ["CLIPVisionModelWithProjection"]
    assert "CLIPVisionModelWithProjection.from_pretrained" in (tmp_path / "folder" / "README.md").read_text()
    model: Any = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "folder")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = load_clip(world.base)
    with open_source(parse_source(str(tmp_path / "m.safetensors"), Path())) as opened, torch.no_grad():
        set_tower(clip, opened)
        torch.testing.assert_close(
            model(pixel_values=pixels).image_embeds, features(clip, pixels), atol=1e-5, rtol=0
        )
        whole = ModelPool(world.recipe).load_clip_model("a")
    assert torch.equal(whole.visual_projection.weight, world.tuned["a"][PROJECTION])


def test_an_adapter_has_no_place_for_it_and_says_so(world: World, tmp_path: Path) -> None:
    found = extract(world.folder / "a.safetensors", base=world.base, rank=2, output=tmp_path / "lora")
    assert PROJECTION in found.dropped
    with pytest.raises(UsageError, match="has no linear layer `visual_projection`"):
        extract(
            world.folder / "a.safetensors", base=world.base, rank=2, modules=["visual_projection"],
            output=tmp_path / "other",
        )  # fmt: skip


def test_adapters_that_change_it_become_one_adapter_that_changes_it(world: World, tmp_path: Path) -> None:
    for module in ("visual_projection", "vision_model.encoder.layers.0.mlp.fc1"):
        adapter(tmp_path / module.rpartition(".")[2], module, world.whole)
    models = {name: tmp_path / name for name in ("visual_projection", "fc1")}
    merge(models, base=world.base, method="average", output=tmp_path / "m.safetensors")
    want = world.own[PROJECTION] + 0.5
    torch.testing.assert_close(load_file(tmp_path / "m.safetensors")[PROJECTION], want)
    done = merge(models, base=world.base, method="average", output=tmp_path / "lora", as_adapter=True)
    assert done.error == pytest.approx(0, abs=1e-6)
    with open_source(parse_source("lora", tmp_path), parse_source(str(world.base), Path())) as opened:
        torch.testing.assert_close(opened.read(PROJECTION), want)


def test_a_chain_has_it_from_its_first_step_on(world: World, tmp_path: Path) -> None:
    a, b = (world.folder / f"{task}.safetensors" for task in TASKS)
    method: dict[str, Any] = {"base": world.base, "method": "task_arithmetic"}
    merge({"a": a}, output=tmp_path / "1.safetensors", onto=world.base, method="task_arithmetic")
    merge({"b": b}, output=tmp_path / "2.safetensors", onto=tmp_path / "1.safetensors", base=world.base)
    assert_same(load_file(tmp_path / "2.safetensors"), merged(world, tmp_path / "m.safetensors"), atol=1e-6)
    tower = {name: each for name, each in world.tuned["a"].items() if name != PROJECTION}
    save_file(tower, tmp_path / "a.safetensors")
    merge({"a": tmp_path / "a.safetensors"}, output=tmp_path / "3.safetensors", onto=world.base, **method)
    with pytest.warns(
        MergecliWarning, match="`b` has a visual projection of its own, left out of the merge: the merge"
    ):
        merge({"b": b}, output=tmp_path / "4.safetensors", onto=tmp_path / "3.safetensors", base=world.base)
    assert PROJECTION not in load_file(tmp_path / "4.safetensors")


def test_a_base_with_another_projection_is_another_base(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.base, other)
    changed = world.whole | {PROJECTION: world.whole[PROJECTION] + 1}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    a, b = (world.folder / f"{task}.safetensors" for task in TASKS)
    first = tmp_path / "1.safetensors"
    merge({"a": a}, output=first, onto=world.base, method="task_arithmetic")
    with pytest.raises(
        InputError, match=r"other: has another visual projection \(xxh3:.*\) than xxh3:.*chain's base"
    ):
        merge({"b": b}, output=tmp_path / "2.safetensors", onto=first, base=other)
    assert not (tmp_path / "2.safetensors").exists()
    vector, _ = taskvector(world.recipe, output=tmp_path / "vectors")
    added = merge({"a": vector}, output=tmp_path / "3.safetensors", base=other, method="task_arithmetic")
    assert "`a` is a task vector of another base: another visual projection (xxh3:" in added.warnings[0]


def test_reg_mean_measures_what_goes_into_it(world: World, tmp_path: Path) -> None:
    settings = {"examples": 6, "batch_size": 4, "reduce_non_diagonal_ratio": 1.0, "ridge": 0.1}
    got = merged(world, tmp_path / "m.safetensors", "reg_mean", settings=settings, statistics=tmp_path / "s")
    clip, recipe = load_clip(world.base), read(world.recipe)
    left, right = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(8, 16, dtype=torch.float64)
    for task, own in world.tuned.items():
        images = load_images(find(task, recipe), "train")
        order = torch.randperm(10, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        with open_source(parse_source(str(world.folder / f"{task}.safetensors"), Path())) as opened:
            set_tower(clip, opened)
        pooled = clip.tower(pixel_values(clip, [images[row][0] for row in order[:6]])).double()
        gram = load_file(tmp_path / "s" / f"{task}.safetensors")[f"{PROJECTION}.gram"].double()
        torch.testing.assert_close(gram, pooled.T @ pooled / 6, atol=1e-4, rtol=1e-4)
        left, right = left + gram, right + own[PROJECTION].double() @ gram
    ridge = 0.1 * left.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    mean = sum(own[PROJECTION].double() for own in world.tuned.values()) / 2
    want = (right + mean @ ridge) @ torch.linalg.inv(left + ridge)
    torch.testing.assert_close(got[PROJECTION].double(), want, atol=1e-4, rtol=0)


def test_a_model_without_one_is_measured_as_it_is_merged_also_alone(world: World, tmp_path: Path) -> None:
    tower = {name: each for name, each in world.tuned["b"].items() if name != PROJECTION}
    save_file(tower, tmp_path / "b.safetensors")
    text = world.recipe.read_text().replace('"b.safetensors"', f'"{tmp_path / "b.safetensors"}"')
    recipe = world.folder / "mixed.toml"
    recipe.write_text(text)
    how: dict[str, Any] = {"method": "reg_mean", "settings": {"examples": 6, "batch_size": 4}}
    alone = {name: source for name, source in read(recipe).tuned.items() if name == "b"}
    merge(replace(read(recipe), tuned=alone), output=tmp_path / "alone.safetensors", **how)
    merge(recipe, output=tmp_path / "store.safetensors", **how)  # not with what was measured for another pool
    for only in TASKS:
        measure(recipe, output=tmp_path / "s", only=[only], **how)
    merge(recipe, output=tmp_path / "files.safetensors", statistics=tmp_path / "s", **how)
    want = load_file(tmp_path / "store.safetensors")
    assert_same(load_file(tmp_path / "files.safetensors"), want)
    assert PROJECTION in want


def test_ada_merging_learns_a_coefficient_for_it(world: World, tmp_path: Path) -> None:
    settings = {"steps": 3, "batch_size": 3, "learning_rate": 0.01}
    file = tmp_path / "learned.safetensors"
    got = merged(world, tmp_path / "m.safetensors", "ada_merging", settings=settings, save_coefficients=file)
    names, coefficients = sorted(world.own), load_file(file)["coefficients"]
    assert coefficients.shape == (2, len(names))
    column = coefficients[:, names.index(PROJECTION)]
    assert (column != 0.3).all()
    want = world.own[PROJECTION] + sum(
        share * delta[PROJECTION] for share, delta in zip(column, world.deltas, strict=True)
    )
    torch.testing.assert_close(got[PROJECTION], want, atol=1e-6, rtol=0)


def test_a_method_that_keeps_the_base_s_says_so(world: World, tmp_path: Path) -> None:
    with pytest.warns(MergecliWarning) as caught:
        merge(world.recipe, method="smile", settings={"rank": 2}, output=tmp_path / "m.safetensors")
    assert [str(each.message) for each in caught] == [
        "`smile` keeps the base's visual projection: those that the models have fine-tuned are not merged"
    ]
    assert torch.equal(load_file(tmp_path / "m.safetensors")[PROJECTION], world.own[PROJECTION])


@pytest.mark.parametrize(
    ("method", "settings"),
    [("mass", {"threshold": 0.9}), ("emr", {"router": "sim", "router_examples": 4, "feature_size": 8})],
)
def test_a_tower_that_finds_the_task_of_an_image_has_the_projection_of_that_task(
    world: World, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    merged(world, tmp_path / "m.safetensors", method, settings=settings)
    pixels = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    slot, other = ModelSlot(load_clip(world.base)), load_clip(world.base)
    with open_source(parse_source(str(tmp_path / "m.safetensors"), Path())) as opened, torch.no_grad():
        slot.take(opened, "a")
        got = features(slot.clip, pixels)
        assert slot.installed is not None
        chosen = slot.installed.chosen
        assert chosen is not None
        assert set(chosen.tolist()) == {0, 1}
        for number, task in enumerate(TASKS):
            set_tower(other, mixture_of(opened).of_task(task))
            rows = chosen == number
            torch.testing.assert_close(got[rows], features(other, pixels)[rows], atol=1e-4, rtol=1e-4)
        whole: Any = ModelPool({"base": world.base, "m": tmp_path / "m.safetensors"}).load_clip_model("m")
        found = whole.visual_projection(whole.vision_model(pixels).pooler_output)
        torch.testing.assert_close(found, got, atol=1e-4, rtol=1e-4)
        slot.release()
        assert isinstance(slot.clip.model.visual_projection, torch.nn.Linear)


IMAGES = {"examples": 6, "batch_size": 4}
STEPS = {"steps": 2, "batch_size": 3}
CASES: dict[str, dict[str, Any]] = {
    "fisher": IMAGES, "reg_mean_plus_plus": IMAGES, "lot": IMAGES, "esm": IMAGES, "esm_plus_plus": IMAGES,
    "pro_distill": {**IMAGES, "epochs": 1}, "trust_region": {"gradients": "images", "gradient_examples": 3},
    "concrete_task_arithmetic": STEPS, "ada_rank": STEPS, "sy_merge": STEPS, "pwe_moe": STEPS, "fw_merging": {},
    "weight_ensembling_moe": STEPS, "efficient_weight_ensembling_moe": STEPS, "rank_one_moe": STEPS,
    "emr": {}, "tall_mask": {}, "tsv_c": {}, "svc": {"of": {"name": "tsv_m"}},
    "larv": {"of": {"name": "task_arithmetic"}}, "lines": {"of": {"name": "ties"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_every_kind_of_method_merges_it_and_what_it_writes_can_be_evaluated(
    world: World, tmp_path: Path, method: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MergecliWarning)
        got = merged(world, tmp_path / "m.safetensors", method, settings=CASES[method])
    (result,) = evaluate([tmp_path / "m.safetensors"], recipe=world.recipe, tasks=["a"], cache=False)
    assert result.tasks["a"].images == 9
    if method in ("emr", "tall_mask", "tsv_c"):
        for task, own in world.tuned.items():
            with open_source(parse_source(f"{tmp_path / 'm.safetensors'}#{task}", Path())) as opened:
                near = torch.nn.functional.cosine_similarity(
                    (opened.read(PROJECTION).float() - world.own[PROJECTION]).flatten(),
                    (own[PROJECTION] - world.own[PROJECTION]).flatten(),
                    dim=0,
                )
            assert near > 0.5
    else:
        assert not torch.equal(got[PROJECTION], world.own[PROJECTION])
