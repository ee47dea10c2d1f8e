from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.merging.merge import merge
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from tests.conftest import World, assert_same


def test_a_task_vector_is_tuned_minus_base_and_says_what_it_is(world: World) -> None:
    (path,) = taskvector(
        world.files["t1"], base=world.base_file, output=world.folder / "v" / "t1.safetensors"
    )
    want = {k: v - world.base[k] for k, v in world.tuned["t1"].items() if v.is_floating_point()}
    assert_same(load_file(path), want)
    with open_checkpoint(path) as checkpoint, open_checkpoint(world.base_file) as base:
        assert checkpoint.is_task_vector
        assert checkpoint.metadata["task"] == "t1"
        assert json.loads(checkpoint.metadata["inputs"])["base"] == base.digest()


def test_a_recipe_gives_one_file_a_task_in_order(world: World) -> None:
    recipe = world.folder / "r.toml"
    lines = [f'{name} = "{file.name}"' for name, file in world.files.items()]
    recipe.write_text("\n".join(['base = "base.safetensors"', "[tuned]", *lines]))
    paths = taskvector(recipe, output=world.folder / "tv")
    assert [path.name for path in paths] == ["t1.safetensors", "t2.safetensors", "t3.safetensors"]


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_task_vectors_are_accepted_wherever_a_tuned_model_is(world: World, method: str) -> None:
    (path,) = taskvector(world.files["t2"], base=world.base_file, output=world.folder / "v2.safetensors")
    mixed = world.files | {"t2": path}
    for number, models in enumerate((world.files, mixed)):
        merge(models, base=world.base_file, method=method, output=world.folder / f"{number}.safetensors")
    assert_same(
        load_file(world.folder / "1.safetensors"), load_file(world.folder / "0.safetensors"), atol=1e-6
    )


def test_half_precision_task_vectors_halve_the_file(world: World) -> None:
    (path,) = taskvector(
        world.files["t1"], base=world.base_file, output=world.folder / "h.safetensors", dtype="bfloat16"
    )
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}


def test_a_vector_of_another_base_is_merged_with_a_warning(world: World) -> None:
    (path,) = taskvector(world.files["t1"], base=world.files["t3"], output=world.folder / "v.safetensors")
    merged = merge(
        {"v": path}, base=world.base_file, method="task_arithmetic", output=world.folder / "m.safetensors"
    )
    (warning,) = merged.warnings
    assert "`v` is a task vector of another base (xxh3:" in warning


def test_a_vector_of_a_vector_and_one_without_a_base_are_refused(world: World) -> None:
    (path,) = taskvector(world.files["t1"], base=world.base_file, output=world.folder / "v.safetensors")
    with pytest.raises(InputError, match=r"`v` is a task vector already"):
        taskvector(path, base=world.base_file, output=world.folder / "w.safetensors")
    with pytest.raises(UsageError, match=r"there is no base to subtract"):
        taskvector(world.files["t1"], output=world.folder / "w.safetensors")
    with pytest.raises(UsageError, match=r"there is no base, and `v` is a task vector"):
        merge({"v": path}, method="average", output=world.folder / "m.safetensors")
    with pytest.raises(InputError, match=r"v.safetensors: is a task vector, a base was expected"):
        merge({"t1": world.files["t1"]}, base=path, method="average", output=world.folder / "m.safetensors")


def test_whole_numbers_that_differ_from_the_base_are_refused(world: World) -> None:
    changed = world.tuned["t1"] | {"steps": torch.arange(4) + 1}
    save_file(changed, world.files["t1"])
    with pytest.raises(
        InputError, match=r"t1: `steps` \(I64\) differs from that of the base, and is not averaged"
    ):
        taskvector(world.files["t1"], base=world.base_file, output=world.folder / "v.safetensors")
    assert not Path(world.folder / "v.safetensors").exists()
