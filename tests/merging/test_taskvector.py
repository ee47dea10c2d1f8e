from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.formats.opening import open_source
from mergecli.merging.merge import merge
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from tests.conftest import World, assert_same
from tests.support.merging import with_models


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


def test_models_with_the_weights_of_the_base_or_of_each_other_are_said(world: World) -> None:
    other = with_models(world, world.base, world.tuned["t1"], world.base, world.tuned["t1"])
    zero = "`t2` has the weights of the base: its task vector is zero"
    twice = "`t3` has the weights of `t1`: they count twice"
    output = world.folder / "m.safetensors"
    assert merge(other.files, base=other.base_file, method="ties", output=output).warnings == (zero, twice)
    assert merge(other.files, base=other.base_file, method="average", output=output).warnings == (twice,)
    chained = merge(other.files, base=other.base_file, method="opcm", output=output)
    assert chained.warnings == (zero, twice)
    with pytest.warns(MergecliWarning, match=f"^{zero}$"):
        taskvector(other.files["t2"], base=other.base_file, output=world.folder / "v.safetensors")


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


@pytest.fixture
def recipe(world: World) -> Path:
    path = world.folder / "r.toml"
    lines = [f'{name} = "{file.name}"' for name, file in world.files.items()]
    path.write_text("\n".join(['base = "base.safetensors"', "[tuned]", *lines]))
    return path


@pytest.mark.parametrize("method", ["average", "ties", "emr", "tsv_c"])
@pytest.mark.parametrize(("bits", "residual"), [(8, False), (4, True)])
def test_quantized_task_vectors_are_merged_like_the_models(
    world: World, recipe: Path, method: str, bits: int, residual: bool
) -> None:
    paths = taskvector(recipe, output=world.folder / "q", quantize=bits, residual=residual)
    every = [world.files, dict(zip(world.files, paths, strict=True))]
    found: list[Tensor] = []
    quantized: dict[str, Any] = {}
    for number, models in enumerate(every):
        merged = world.folder / f"{number}.safetensors"
        merge(models, base=world.base_file, method=method, output=merged)
        tower = f"{merged}#t1" if method in ("emr", "tsv_c") else str(merged)
        with open_source(parse_source(tower, Path())) as opened:
            found.append(opened.read("zz.long") - world.base["zz.long"])
        with open_checkpoint(merged) as checkpoint:
            quantized = json.loads(checkpoint.metadata.get("quantized", "{}"))
    want, got = found
    # near a threshold a rounding decides whether an entry is kept
    assert float((got - want).norm() / want.norm()) < (0.5 if residual else 0.2)
    assert {name: each["bits"] for name, each in quantized.items()} == dict.fromkeys(world.files, bits)


def test_residuals_to_the_mean_of_equal_models_are_zero_but_for_the_mean(world: World) -> None:
    recipe = world.folder / "same.toml"
    recipe.write_text('base = "base.safetensors"\n[tuned]\na = "t1.safetensors"\nb = "t1.safetensors"\n')
    one, two = taskvector(recipe, output=world.folder / "q", quantize=8, residual=True)
    assert load_file(one)["zz.long.codes"].equal(load_file(two)["zz.long.codes"])
    with open_checkpoint(one) as checkpoint:
        assert float(checkpoint.metadata["error"]) < 1e-4  # an error of 8 bits, itself kept by 8 bits


def test_a_task_vector_is_quantized_without_a_base_and_remembers_it(world: World) -> None:
    (vector,) = taskvector(world.files["t1"], base=world.base_file, output=world.folder / "v.safetensors")
    (direct,) = taskvector(
        world.files["t1"],
        base=world.base_file,
        output=world.folder / "d.safetensors",
        quantize=4,
        per="tensor",
    )
    (later,) = taskvector(vector, output=world.folder / "l.safetensors", quantize=4, per="tensor")
    assert_same(load_file(later), load_file(direct))
    with open_checkpoint(later) as one, open_checkpoint(direct) as other:
        assert json.loads(one.metadata["inputs"])["base"] == json.loads(other.metadata["inputs"])["base"]
    with pytest.raises(InputError, match=r"l.safetensors: `l` is quantized to 4 bits already"):
        taskvector(later, output=world.folder / "m.safetensors", quantize=8)
    with pytest.raises(InputError, match=r"l.safetensors: `l` is a task vector already"):
        taskvector(later, base=world.base_file, output=world.folder / "m.safetensors")


def test_zero_vectors_half_precision_and_tensors_that_stay_as_they_are(world: World) -> None:
    save_file(world.base, world.files["t1"])
    (zero,) = taskvector(
        world.files["t1"],
        base=world.base_file,
        output=world.folder / "z.safetensors",
        quantize=2,
        dtype="float16",
    )
    assert not any(bool(value.any()) for value in load_file(zero).values())
    with open_checkpoint(zero) as checkpoint:
        assert checkpoint.metadata["error"] == checkpoint.metadata["largest_error"] == "0.000000e+00"
        assert {name for name in checkpoint.entries if "." not in name} == {
            "scale",
            "empty",
            "conv",
        }  # no `steps`
        assert checkpoint.entries["conv"].dtype == "F16"
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in world.tuned["t1"].items()
    }
    save_file(half, world.files["t1"])
    (path,) = taskvector(
        world.files["t1"], base=world.base_file, output=world.folder / "h.safetensors", quantize=4
    )
    with open_checkpoint(path) as checkpoint:
        assert 0.01 < float(checkpoint.metadata["error"]) < 0.2


def test_nan_and_differences_too_large_for_float32_are_refused(world: World) -> None:
    options: dict[str, Any] = {
        "base": world.base_file,
        "output": world.folder / "v.safetensors",
        "quantize": 4,
    }
    changed = dict(world.tuned["t1"])
    changed["zz.long"] = changed["zz.long"].clone()
    changed["zz.long"][7] = float("nan")
    save_file(changed, world.files["t1"])
    with pytest.raises(InputError, match=r"t1: `zz.long` has NaN"):
        taskvector(world.files["t1"], **options)
    changed["zz.long"][7] = 3e38
    save_file(changed, world.files["t1"])
    save_file({**world.base, "zz.long": torch.full((5000,), -3e38)}, world.base_file)
    with pytest.raises(InputError, match=r"t1: `zz.long`: its differences are too large"):
        taskvector(world.files["t1"], **options)
    assert not (world.folder / "v.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize": 5}, "quantize: expected 8, 4, 3 or 2 bits, got 5"),
        ({"quantize": 4, "per": "rows"}, "per: expected row or tensor, got `rows` (did you mean `row`?)"),
        ({"per": "row"}, "per: is for quantized task vectors"),
        ({"residual": True}, "residual: is for quantized task vectors"),
        ({"quantize": 4, "residual": True}, "residual: is to the mean of several models, and there is one"),
        ({"quantize": 4}, "there is no base, and `t1` is not a task vector"),
    ],
)
def test_options_that_do_not_fit_are_refused(world: World, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        taskvector(world.files["t1"], output=world.folder / "v.safetensors", **given)
    assert error.value.message == message


def test_an_adapter_is_quantized_as_its_change_of_the_base(tmp_path: Path) -> None:
    from mergecli.merging.extract import extract

    extract("toy:digits", base="toy:base", rank=2, modules=["q_proj"], output=tmp_path / "lora")
    (path,) = taskvector(tmp_path / "lora", base="toy:base", output=tmp_path / "v.safetensors", quantize=8)
    with open_checkpoint(path) as checkpoint:
        assert 0 < float(checkpoint.metadata["error"]) < 0.02


def test_differences_that_do_not_fit_a_dtype_are_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.zeros(2, 2)}, "base.safetensors")
    save_file({"w": torch.full((2, 2), 1e5)}, "tuned.safetensors")
    with pytest.raises(InputError) as caught:
        taskvector("tuned.safetensors", base="base.safetensors", output="v.safetensors", dtype="float16")
    assert (caught.value.message, caught.value.hint) == (
        "`w`: the differences do not fit float16",
        "use `--dtype float32` or `bfloat16`",
    )
    assert not Path("v.safetensors").exists()
    taskvector("tuned.safetensors", base="base.safetensors", output="v.safetensors", dtype="bfloat16")
