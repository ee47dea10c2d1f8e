"""Adapters that are extracted load in plain peft, and lose what the singular values say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.formats import info as inspection
from mergecli.merging.extract import extract
from mergecli.merging.merge import merge
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import VISION
from tests.conftest import Run
from tests.formats.test_lora import merged_by_peft, pytestmark, read, tower, write_tower

__all__ = ["pytestmark"]

LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def is_linear(name: str) -> bool:
    return "encoder.layers" in name and name.endswith(tuple(f"{end}.weight" for end in LINEAR))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tower(tmp_path / "base.safetensors")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    model, step = tower(), tower(1)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), step.parameters(), strict=True):
            parameter.add_(0.1 * other)
    return write_tower(tmp_path / "tuned.safetensors", model)


def change(base: Path, tuned: Path) -> dict[str, Tensor]:
    before = load_file(base)
    return {name: tensor - before[name] for name, tensor in load_file(tuned).items()}


def test_an_adapter_of_full_rank_in_plain_peft_has_the_linear_layers_and_the_bases_rest(
    tmp_path: Path, base: Path, tuned: Path
) -> None:
    found = extract(tuned, base=base, rank=16, output=tmp_path / "adapter")
    before, after, got = load_file(base), load_file(tuned), merged_by_peft(tmp_path / "adapter")
    for name, tensor in got.items():
        want = after[name] if is_linear(name) else before[name]
        torch.testing.assert_close(tensor, want, atol=1e-5, rtol=0, msg=name)
    assert set(found.ranks.values()) == {16}
    assert len(found.ranks) == 12
    assert set(found.dropped) == {name for name in after if not is_linear(name)}
    assert found.error_of_modules < 1e-6


@pytest.mark.parametrize("source", ["tuned", "vector"])
def test_what_a_rank_loses_is_the_tail_of_the_singular_values(
    tmp_path: Path, base: Path, tuned: Path, source: str
) -> None:
    vector = tmp_path / "vector.safetensors"
    taskvector(tuned, base=base, output=vector)
    what, on = (tuned, base) if source == "tuned" else (vector, None)
    found = extract(what, base=on, rank=3, output=tmp_path / "adapter")
    squares: dict[str, tuple[float, float]] = {}
    for name, delta in change(base, tuned).items():
        values = torch.linalg.svdvals(delta.double()).square() if is_linear(name) else delta.double().square()
        lost = values[3:].sum() if is_linear(name) else values.sum()
        squares[name] = (float(lost), float(values.sum()))
        assert found.errors[name] == pytest.approx(math.sqrt(squares[name][0] / squares[name][1]), rel=1e-5)
    for error, chosen in (
        (found.error, list(squares)),
        (found.error_of_modules, [name for name in squares if is_linear(name)]),
    ):
        lost, all_of_it = (sum(squares[name][i] for name in chosen) for i in (0, 1))
        assert error == pytest.approx(math.sqrt(lost / all_of_it), rel=1e-5)


def test_the_reported_error_is_that_of_the_tower_with_the_adapter(
    tmp_path: Path, base: Path, tuned: Path
) -> None:
    found = extract(tuned, base=base, rank=5, dtype="bfloat16", output=tmp_path / "adapter")
    got, want = read(base, tmp_path / "adapter"), load_file(tuned)
    for name, delta in change(base, tuned).items():
        error = float((got[name] - want[name]).norm() / delta.norm())
        assert found.errors[name] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_an_energy_takes_the_least_rank_that_keeps_it(
    tmp_path: Path, base: Path, tuned: Path, energy: float
) -> None:
    found = extract(tuned, base=base, energy=energy, output=tmp_path / "adapter")
    assert len(set(found.ranks.values())) > 1 or energy == 1
    for name, delta in change(base, tuned).items():
        if is_linear(name):
            squares = torch.linalg.svdvals(delta.double()).square()
            rank = found.ranks[name.removeprefix(VISION).removesuffix(".weight")]
            share = squares.cumsum(0) / squares.sum()
            assert share[rank - 1] >= energy - 1e-12
            assert rank == 1 or share[rank - 2] < energy
    got = merged_by_peft(tmp_path / "adapter")
    for name, tensor in read(base, tmp_path / "adapter").items():
        torch.testing.assert_close(tensor, got[name], atol=1e-6, rtol=0, msg=name)


def test_chosen_modules_alone_are_in_it(tmp_path: Path, base: Path, tuned: Path) -> None:
    modules = ["v_proj", "encoder.layers.1.mlp.fc1"]
    found = extract(tuned, base=base, rank=2, modules=modules, output=tmp_path / "adapter")
    assert sorted(found.ranks) == [
        "encoder.layers.0.self_attn.v_proj",
        "encoder.layers.1.mlp.fc1",
        "encoder.layers.1.self_attn.v_proj",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(found.ranks)  # `fc1` alone would name one more
    got = merged_by_peft(tmp_path / "adapter")
    assert {name for name, tensor in load_file(base).items() if not tensor.equal(got[name])} == {
        f"{VISION}{module}.weight" for module in found.ranks
    }


def test_the_sizes_are_those_of_the_files(tmp_path: Path, base: Path, tuned: Path) -> None:
    found = extract(
        tuned, base=base, rank=2, modules=["q_proj"], dtype="float16", output=tmp_path / "adapter"
    )
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in stored.values()) == 2 * 2 * 2 * 16
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert found.size == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert found.tower_size == sum(tensor.numel() * 4 for tensor in load_file(base).values())


def test_the_same_model_gives_the_same_bytes_and_says_where_it_is_from(
    tmp_path: Path, base: Path, tuned: Path
) -> None:
    for name in ("a", "b"):
        extract(tuned, base=base, energy=0.7, output=tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    found = inspection.info(tmp_path / "a")
    assert found.kind == "adapter"
    assert found.inputs["base"] == inspection.info(base).digest
    assert found.inputs["tuned"] == inspection.info(tuned).digest
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base.safetensors"


def test_a_layer_that_was_not_changed_has_an_adapter_of_zeros(tmp_path: Path, base: Path) -> None:
    found = extract(base, base=base, energy=0.9, output=tmp_path / "adapter")
    assert (found.error, found.dropped, set(found.ranks.values())) == (0.0, (), {1})
    got = read(base, tmp_path / "adapter")
    assert all(tensor.equal(got[name]) for name, tensor in load_file(base).items())


def test_a_merge_shared_as_an_adapter_can_be_merged_again(tmp_path: Path, base: Path, tuned: Path) -> None:
    merge({"a": tuned}, base=base, method="task_arithmetic", output=tmp_path / "m.safetensors")
    extract(tmp_path / "m.safetensors", base=base, rank=4, output=tmp_path / "adapter")
    merge({"a": tmp_path / "adapter"}, base=base, method="average", output=tmp_path / "again.safetensors")
    want = read(base, tmp_path / "adapter")
    assert all(tensor.equal(want[name]) for name, tensor in load_file(tmp_path / "again.safetensors").items())


def test_wrong_settings_are_refused_before_anything_is_written(
    tmp_path: Path, base: Path, tuned: Path
) -> None:
    target = tmp_path / "adapter"
    for settings, message in (
        ({}, "expected either a rank or an energy"),
        ({"rank": 1, "energy": 0.5}, "expected either a rank or an energy"),
        ({"rank": 0}, "rank: expected a whole number, at least 1, got 0"),
        ({"rank": 8.0}, "rank: expected a whole number, at least 1, got 8.0"),
        ({"rank": 17}, "rank: expected at most 16, the smaller side of `encoder.layers.0.mlp.fc1`, got 17"),
        ({"energy": 1.5}, r"energy: expected a number in \(0, 1\], got 1.5"),
        ({"energy": math.nan}, "energy: expected"),
        ({"rank": 1, "dtype": "int8"}, "dtype: expected one of"),
        ({"rank": 1, "modules": ["qproj"]}, r"no linear layer `qproj` \(did you mean `q_proj`\?\)"),
        ({"rank": 1, "modules": ["position_embedding"]}, "no linear layer `position_embedding`"),
    ):
        with pytest.raises(UsageError, match=message):
            extract(tuned, base=base, output=target, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no base"):
        extract(tuned, rank=1, output=target)
    with pytest.raises(UsageError, match="an adapter is a folder"):
        extract(tuned, base=base, rank=1, output=tmp_path / "a.safetensors")
    assert not target.exists()


def test_a_folder_with_a_model_is_not_made_an_adapters(tmp_path: Path, base: Path, tuned: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tower(folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"has a `model\.safetensors`, which would be read instead"):
        extract(tuned, base=base, rank=1, output=folder)


def test_a_model_without_layers_says_so_and_nan_is_told(tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    save_file({"layers.0.x.weight": torch.full((2, 2), math.nan)}, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="no linear layers in an encoder"):
        extract(tmp_path / "a.safetensors", base=tmp_path / "a.safetensors", rank=1, output=tmp_path / "x")
    with pytest.raises(InputError, match=r"`layers\.0\.x\.weight` has NaN"):
        extract(tmp_path / "b.safetensors", base=tmp_path / "b.safetensors", rank=1, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_program_says_error_and_size_whatever_is_dropped_and_info_says_the_error(
    tmp_path: Path, base: Path, tuned: Path, run: Run
) -> None:
    part = run("extract", tuned, "--base", base, "--rank", 2, "--json", "-o", tmp_path / "part")
    told = json.loads(part.out)
    assert part.err == (
        f"warning: {len(told['dropped'])} tensors changed and are not in the adapter: its distance to the model is "
        f"{told['error']:.2%} of the whole change, in its own modules {told['error_of_modules']:.2%}\n"
        f"note: the adapter has {told['size']:,} bytes, the tower {told['tower_size']:,}\n"
    )
    about = inspection.info(tmp_path / "part")
    assert float(about.metadata["error"]) == pytest.approx(told["error"], rel=1e-5)
    assert float(about.metadata["error_of_modules"]) == pytest.approx(told["error_of_modules"], rel=1e-5)
    assert about.adapter["error"] == f"{about.metadata['error']} of the change it was extracted from"
    linear = load_file(base)
    linear |= {name: each for name, each in load_file(tuned).items() if is_linear(name)}
    save_file(linear, tmp_path / "linear.safetensors")
    whole = run(
        "extract", tmp_path / "linear.safetensors", "--base", base, "--rank", 16, "-o", tmp_path / "whole"
    )
    first, second = whole.err.splitlines()
    assert (whole.status, whole.out) == (0, f"{tmp_path / 'whole'}\n")
    assert first == (
        "note: every tensor that changed is in the adapter: its distance to the model is 0.00% of the whole change"
    )
    assert second.startswith("note: the adapter has ")
    assert second.endswith(", which is less: take a lower rank or energy")
