"""Every shipped recipe, from a hub to a report: fetched from servers with tiny stand-ins for its models, adapters and
data sets, then worked with while no hub can be reached, from its lock alone."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load, load_file, save, save_file
from torch import nn

import mergecli
from mergecli.data.tasks import Task, expand, find
from mergecli.recipe.lock import lock_path, read_lock
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import MergecliWarning
from tests.conftest import Weights
from tests.formats.test_convert import as_open_clip
from tests.hub.servers import HuggingFaceServer, ModelScopeServer, Repository
from tests.support.tiny_clip import make_tiny_clip

FOLDER = Path(__file__).parents[2] / "recipes"
LIKE_OTHERS = re.compile(r"(patch16|patch14)-(tall|ta)-pool|-tall-pool-14")
"""Recipes that differ from tried ones in names only, which `tests/contracts/test_recipes.py` looks at."""
RECIPES = sorted(
    path for path in FOLDER.glob("*.toml") if path.stem != "toy" and not LIKE_OTHERS.search(path.stem)
)
PICKLED = [path for path in RECIPES if "-pool" in path.stem]
IMAGES = 2
"""Of each split."""


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (12, 12, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def rows(task: Task, split: str) -> bytes:
    """A Parquet file as the hub has them for the task: its own column names, its own kind of label."""
    labels = [number * (len(task.classes or ()) - 1) for number in range(IMAGES)]
    images = [{"bytes": picture(hash_of(task.name, split, number)), "path": None} for number in range(IMAGES)]
    columns: dict[str, list[object]] = {
        task.image_column: list(images),
        task.label_column: [bool(label) if task.name == "pcam" else label for label in labels],
    }
    if task.name == "fer2013":
        columns |= {"__key__": ["a", "b"], "__url__": ["x", "y"]}
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def hash_of(*parts: object) -> int:
    return sum(
        ord(character) * 31**place % 65521 for place, character in enumerate(" ".join(map(str, parts)))
    )


def data_set(task: Task, splits: tuple[str, ...]) -> dict[str, bytes]:
    inside = f"{task.config}/" if task.config else "data/"
    every = dict.fromkeys((task.train_split, task.split, *splits))
    files = {f"{inside}{split}-00000-of-00001.parquet": rows(task, split) for split in every}
    if task.config:  # another configuration, which nobody asked for
        files |= {f"other/{task.split}-00000-of-00001.parquet": rows(task, "other")}
    return {"README.md": b"", **files}


def tower(clip: Path, seed: int) -> dict[str, bytes]:
    """A fine-tuned tower of the tiny CLIP, as the published ones are stored."""
    base = load_file(clip / "model.safetensors")
    torch.manual_seed(seed)
    weights = {
        name: each + 0.02 * torch.randn_like(each)
        for name, each in base.items()
        if name.startswith("vision_model.") and each.is_floating_point()
    }
    return {"config.json": b'{"model_type": "clip_vision_model"}', "model.safetensors": save(weights)}


def encoder(clip: Path, seed: int) -> Weights:
    """The same as open_clip's encoders are published: a state dict with names of open_clip."""
    projection = {
        "visual_projection.weight": load_file(clip / "model.safetensors")["visual_projection.weight"]
    }
    weights = load(tower(clip, seed)["model.safetensors"]) | projection
    return {
        name: each.contiguous() for name, each in as_open_clip(weights, "model.", tower_only=True).items()
    }


def module(weights: Weights) -> nn.Module:
    """A module that has these weights."""
    found = nn.Module()
    for name, each in weights.items():
        *path, last = name.split(".")
        inner = found
        for step in path:
            if not hasattr(inner, step):
                inner.add_module(step, nn.Module())
            inner = getattr(inner, step)
        inner.register_parameter(last, nn.Parameter(each))
    return found


def pickled(weights: Weights) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def adapter(clip: Path, seed: int) -> dict[str, bytes]:
    """A LoRA adapter on the queries and values, as the published ones are stored."""
    config = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}'
    names = [
        name.removeprefix("vision_model.").removesuffix(".weight")
        for name in load_file(clip / "model.safetensors")
        if name.startswith("vision_model.") and name.endswith(("q_proj.weight", "v_proj.weight"))
    ]
    torch.manual_seed(seed)
    factors = {f"base_model.model.{name}.lora_A.weight": torch.randn(2, 16) for name in names}
    factors |= {f"base_model.model.{name}.lora_B.weight": 0.02 * torch.randn(16, 2) for name in names}
    return {"adapter_config.json": config, "adapter_model.safetensors": save(factors)}


def linearized(clip: Path, folder: Path, seed: int) -> None:
    """The same as a linearized adapter is published."""
    files = adapter(clip, seed)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(files["adapter_config.json"])
    (folder / "plain.safetensors").write_bytes(files["adapter_model.safetensors"])
    factors = load_file(folder / "plain.safetensors")
    (folder / "plain.safetensors").unlink()
    tensors: dict[str, torch.Tensor] = {}
    for name, each in factors.items():
        module, _, which = name.removesuffix(".weight").rpartition(".")
        tensors[f"{module}.model.{which}.default.weight"] = each
        tensors[f"{module}.params0_values.{2 if which == 'lora_A' else 3}"] = (
            each.clone() if which == "lora_A" else torch.zeros_like(each)
        )
    save_file(tensors, folder / "linearized_adapter_model.safetensors")


def repositories(recipes: Mapping[str, Recipe], clip: Path) -> dict[str, dict[str, bytes]]:
    """Everything that the recipes name: repository -> files."""
    whole = {file.name: file.read_bytes() for file in clip.iterdir()}
    found: dict[str, dict[str, bytes]] = {}
    for recipe in recipes.values():
        assert recipe.base is not None
        found[recipe.base.name] = whole
        for number, source in enumerate(recipe.tuned.values()):
            if source.inside:
                file = {source.inside: pickled(encoder(clip, hash_of(source.inside)))}
                found[source.name] = {**found.get(source.name, {}), **file}
            elif source.kind == "hf" and source.name not in found:
                make = adapter if "lora" in source.name else tower
                found[source.name] = make(clip, hash_of(source.name) + number)
        for name in expand(recipe.eval_tasks, recipe):
            task = find(name, recipe)
            files = data_set(task, recipe.splits)
            found[f"datasets/{task.data.name}"] = {**found.get(f"datasets/{task.data.name}", {}), **files}
    return found


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all recipes and their locks; their store is in place, and no hub answers any more."""
    folder = tmp_path_factory.mktemp("recipes")
    clip = make_tiny_clip(folder / "tiny-clip", tokens=200)
    for path in RECIPES:
        shutil.copy(path, folder)
    recipes = {path.name: recipe_of(folder / path.name) for path in RECIPES}
    for number, task in enumerate(recipes["clip-vit-base-patch16-l-lora.toml"].tuned):
        linearized(clip, folder / "l-lora" / task, number)
    for number, source in enumerate(recipes["clip-vit-base-patch32-ta-pool.toml"].tuned.values()):
        assert source.path is not None
        source.path.parent.mkdir(parents=True)
        torch.save(module(encoder(clip, number)), source.path)
    every = repositories(recipes, clip)
    for name in [name for name in every if name.startswith("openai/")]:
        every[name.replace("openai/", "openai-mirror/")] = every[name]
    with pytest.MonkeyPatch.context() as patch:
        with ExitStack() as servers:
            hf = servers.enter_context(
                HuggingFaceServer({name: Repository(each) for name, each in every.items()})
            )
            ms = servers.enter_context(
                ModelScopeServer({name: Repository(each, "master") for name, each in every.items()})
            )
            own = {"MERGECLI_HOME": "store", "HF_HOME": "hf", "MODELSCOPE_HOME": "ms"}
            for name, value in own.items():
                patch.setenv(name, str(folder / value))
            for name, value in {**hf.environment, **ms.environment, "NO_PROXY": "127.0.0.1"}.items():
                patch.setenv(name, value)
            for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN"):
                patch.delenv(name, raising=False)
            mergecli.fetch([folder / path.name for path in RECIPES if path not in PICKLED])
            mergecli.fetch([folder / path.name for path in PICKLED], allow_pickle=True)
            again = folder / "from-modelscope" / "clip-vit-base-patch32-ta8.toml"
            again.parent.mkdir()
            shutil.copy(folder / again.name, again)
            mergecli.fetch(again, platform="ms", into=again.parent / "store", only=["models"])
        yield folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_goes_from_its_lock_to_a_report_without_a_network(
    path: Path, fetched: Path, tmp_path: Path
) -> None:
    file = fetched / path.name
    recipe = recipe_of(file)
    assert lock_path(file).is_file()
    assert recipe.base is not None
    assert recipe.base.pinned is not None
    if recipe.tuned:
        vectors = mergecli.taskvector(file, output=tmp_path / "vectors")
        assert len(vectors) == len(recipe.tuned)
        merged = mergecli.merge(file, method="task_arithmetic", output=tmp_path / "merged.safetensors").path
        by_vectors = mergecli.merge(
            {vector.stem: vector for vector in vectors}, base=mergecli.fetch(str(recipe.base), offline=True).paths[0],
            method="task_arithmetic", output=tmp_path / "again.safetensors",
        ).path  # fmt: skip
        for name, each in load_file(by_vectors).items():
            torch.testing.assert_close(load_file(merged)[name], each, rtol=0, atol=1e-6)
    else:
        merged = recipe.base
    may_know = "-tall-pool" in path.stem
    with pytest.warns(MergecliWarning, match="images of `dtd`") if may_know else nullcontext():
        (result,) = mergecli.evaluate(str(merged), recipe=recipe, output=tmp_path / "result.json")
    assert result.pool == (
        recipe.pool or ("fusion_bench" if "l-lora" not in path.stem and recipe.tuned else None)
    )
    tasks = expand(recipe.eval_tasks, recipe)
    assert tuple(result.tasks) == tasks
    assert {score.images for score in result.tasks.values()} == {IMAGES}
    table = mergecli.report([tmp_path / "result.json"])
    assert [column.name for column in table.columns if column.name in tasks] == list(tasks)


def test_every_file_of_a_pool_in_one_repository_is_pinned_with_its_hash(fetched: Path) -> None:
    lock = read_lock(lock_path(fetched / "clip-vit-base-patch32-tall-pool-20.toml"))
    models = {
        key[1]: each for key, each in lock.sources.items() if key[1].startswith("hf:nik-dim/tall_masks#")
    }
    assert len(models) == 20
    assert len({each.commit for each in models.values()}) == 1
    for source, each in models.items():
        files = {file.path: file for file in each.files}
        assert source.partition("#")[2] in files
        (converted,) = [file for file in files.values() if file.made_from == source.partition("#")[2]]
        assert converted.sha256


def test_the_corrupted_splits_of_the_robustness_recipe_are_there(fetched: Path) -> None:
    recipe = recipe_of(fetched / "clip-vit-base-patch32-robustness.toml")
    assert recipe.base is not None
    for split in recipe.splits:
        (result,) = mergecli.evaluate(str(recipe.base), recipe=recipe, split=split)
        assert {score.split for score in result.tasks.values()} == {split}


def test_both_platforms_give_the_same_models(
    fetched: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = fetched / "clip-vit-base-patch32-ta8.toml"
    again = fetched / "from-modelscope" / file.name
    assert 'fetched = "ms:openai-mirror/clip-vit-base-patch32"' in lock_path(again).read_text()
    ours = mergecli.merge(file, method="average", output=tmp_path / "hf.safetensors")
    monkeypatch.setenv("MERGECLI_HOME", str(again.parent / "store"))
    theirs = mergecli.merge(again, method="average", output=tmp_path / "ms.safetensors")
    assert ours.inputs == theirs.inputs
    assert ours.path.read_bytes() == theirs.path.read_bytes()
