"""Two small CLIPs, a tower, its task vector, and two tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.data.tasks import TaskTable
from mergecli.recipe.schema import Recipe
from mergecli.storage.checkpoint import TASK_VECTOR
from mergecli.storage.sources import parse_source
from tests.support.tiny_clip import make_image_task, make_tiny_clip

TEMPLATES = ("a photo of something {}.", "{}")
RECIPE = """
base = "base"
method.name = "ties"

[tuned]
tints = "tints-tower.safetensors"
more = "more-tower.safetensors"

[tasks]
tints = {data = "tints", templates = ["a photo of something {}.", "{}"]}
more = {data = "more", templates = ["a photo of something {}.", "{}"]}
"""


@pytest.fixture(autouse=True)
def quiet_machine(own_store: None) -> None:
    """An empty store and one thread: for so small a model a second one only waits."""


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two CLIPs (`base` and `other`) of one text tower, the second's vision tower, its task vector, two tasks, and a recipe that merges
    two fine-tuned towers, one for each task."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_tiny_clip(folder / "base")
    make_tiny_clip(folder / "other", seed=1)
    make_image_task(folder / "tints")
    make_image_task(folder / "more", test=20, seed=1)
    whole = {name: load_file(folder / name / "model.safetensors") for name in ("base", "other")}
    base, other = (
        {k: v for k, v in each.items() if k.startswith("vision_model.")} for each in whole.values()
    )
    save_file(whole["base"] | other, folder / "other" / "model.safetensors", {"format": "pt"})
    save_file(other, folder / "tower.safetensors", {"kind": "checkpoint", "method": "ties"})
    vector = {name: other[name] - base[name] for name in base}
    save_file(vector, folder / "vector.safetensors", {"kind": TASK_VECTOR})
    for seed, name in enumerate(("tints", "more")):
        noise = torch.Generator().manual_seed(seed)
        tuned = {key: each + 0.3 * torch.randn(each.shape, generator=noise) for key, each in base.items()}
        save_file(tuned, folder / f"{name}-tower.safetensors", {"format": "pt"})
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def recipe(place: Path) -> Recipe:
    tables = {
        name: TaskTable(data=parse_source(str(place / name), Path()), templates=TEMPLATES)
        for name in ("tints", "more")
    }
    return Recipe(
        base=parse_source(str(place / "base"), Path()),
        tasks=tables,
        eval_tasks=("tints", "more"),
        batch_size=8,
    )


@pytest.fixture
def recipe_file(place: Path) -> Path:
    """The recipe of `place` that merges."""
    return place / "recipe.toml"
