from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.formats.info import info
from mergecli.formats.opening import open_source
from mergecli.formats.quantized import KEY, quantized_models
from mergecli.merging.taskvector import taskvector
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source


def opened(path: Path) -> dict[str, Tensor]:
    with open_source(parse_source(str(path), Path())) as found:
        return {name: found.read(name) for name in found.entries}


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as stored:
        return load_file(path), dict(stored.metadata())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two quantized task vectors, residuals to their mean in `residual/`, and one by itself in `plain.safetensors`."""
    rng = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(64, 80, generator=rng), "b": torch.randn(64, generator=rng)}
    save_file(base, tmp_path / "base.safetensors")
    for name in ("x", "y"):
        tuned = {key: value + 0.01 * torch.randn(value.shape, generator=rng) for key, value in base.items()}
        save_file(tuned, tmp_path / f"{name}.safetensors")
    recipe = tmp_path / "r.toml"
    recipe.write_text('base = "base.safetensors"\n[tuned]\nx = "x.safetensors"\ny = "y.safetensors"\n')
    taskvector(recipe, output=tmp_path / "residual", quantize=2, residual=True)
    taskvector(
        tmp_path / "x.safetensors",
        base=tmp_path / "base.safetensors",
        output=tmp_path / "plain.safetensors",
        quantize=4,
    )
    return tmp_path


def test_a_file_of_codes_is_read_as_float32_under_the_models_names(folder: Path) -> None:
    tensors, metadata = contents(folder / "plain.safetensors")
    assert {name: (str(each.dtype), tuple(each.shape)) for name, each in tensors.items()} == {
        "w.codes": ("torch.uint8", (64 * 80 // 2,)),
        "w.scale": ("torch.float32", (64,)),
        "w.zero": ("torch.uint8", (64,)),
        "b": ("torch.float32", (64,)),
    }
    assert json.loads(metadata[KEY]) == {"bits": 4, "per": "row", "shapes": {"w": [64, 80]}}
    found = opened(folder / "plain.safetensors")
    exact = {
        key: value - load_file(folder / "base.safetensors")[key]
        for key, value in load_file(folder / "x.safetensors").items()
    }
    assert found["b"].equal(exact["b"])
    bound = tensors["w.scale"][:, None] * 0.5001
    assert bool(((found["w"] - exact["w"]).abs() <= bound).all())
    error = float((found["w"] - exact["w"]).norm()) / float(
        torch.cat([exact["w"].flatten(), exact["b"]]).norm()
    )
    assert float(metadata["error"]) == pytest.approx(error, rel=1e-5)


def test_a_residual_is_the_sum_of_its_codes_and_those_of_the_mean(folder: Path) -> None:
    _, metadata = contents(folder / "residual" / "x.safetensors")
    shared = json.loads(metadata[KEY])["shared"]
    with open_checkpoint(folder / "residual" / "shared" / "mean.safetensors") as mean:
        assert shared == {"file": "shared/mean.safetensors", "digest": mean.digest()}
    with pytest.raises(InputError, match=r"got `shared part of task vectors`"):
        opened(folder / "residual" / "shared" / "mean.safetensors")
    _, about = contents(folder / "residual" / "shared" / "mean.safetensors")
    assert json.loads(about[KEY])["bits"] == 3
    assert sorted(json.loads(about["inputs"])) == ["base", "x", "y"]


def test_info_says_bits_error_and_what_is_shared(folder: Path) -> None:
    plain, residual = info(folder / "plain.safetensors"), info(folder / "residual" / "x.safetensors")
    assert plain.quantized["bits"] == "4 an entry, a step for each row"
    assert re.fullmatch(r"\d\.\d\d% of the task vector, at most 0\.0\d+ an entry", plain.quantized["error"])
    assert plain.parameters == 64 * 81
    assert residual.quantized["shared part"].startswith("shared/mean.safetensors (xxh3:")
    assert residual.files == 2
    mean = info(folder / "residual" / "shared" / "mean.safetensors")
    assert (mean.kind, mean.is_model) == ("shared part of task vectors", False)


def text(value: str) -> Callable[[dict[str, str]], None]:
    return lambda metadata: metadata.update({KEY: value})


def table(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, str]], None]:
    def changed(metadata: dict[str, str]) -> None:
        scheme = json.loads(metadata[KEY])
        change(scheme)
        metadata[KEY] = json.dumps(scheme)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (text("{"), "its quantization: it cannot be read"),
        (text("[]"), "its quantization: it cannot be read"),
        (text("[" * 9999), "its quantization: it cannot be read"),
        (table(lambda s: s.update(bits=5)), "its quantization: bits: expected 8, 4, 3 or 2, got 5"),
        (table(lambda s: s.update(bits="4")), 'its quantization: bits: expected 8, 4, 3 or 2, got "4"'),
        (table(lambda s: s.update(bits=True)), "its quantization: bits: expected 8, 4, 3 or 2, got true"),
        (
            table(lambda s: s.update(per="column")),
            'its quantization: per: expected row or tensor, got "column"',
        ),
        (
            table(lambda s: s.update(shapes={"w": [64, -80]})),
            "its quantization: shapes: expected whole numbers",
        ),
        (table(lambda s: s.update(shapes={"w": 5120})), "its quantization: it cannot be read"),
        (
            table(lambda s: s.update(shapes={"w": [64, 88]})),
            "is not what its quantization says:\n  `w.codes` has shape (2560,), expected (2816,)",
        ),
        (
            table(lambda s: s.update(bits=3)),
            "is not what its quantization says:\n  `w.codes` has shape (2560,), expected (1920,)",
        ),
        (
            table(lambda s: s.update(shapes={"w": [64, 80], "v": [64, 80]})),
            "is not what its quantization says:\n  lacks tensor `v.codes`",
        ),
        (
            table(lambda s: s.update(shared={"file": "../x.safetensors", "digest": "xxh3:0"})),
            "its quantization: shared: expected a file beside this one, and its digest",
        ),
    ],
)
def test_damaged_metadata_are_refused(
    folder: Path, change: Callable[[dict[str, str]], object], message: str
) -> None:
    tensors, metadata = contents(folder / "plain.safetensors")
    change(metadata)
    save_file(tensors, folder / "bad.safetensors", metadata)
    with pytest.raises(InputError) as error:
        opened(folder / "bad.safetensors")
    assert error.value.message.startswith(f"{folder / 'bad.safetensors'}: {message}")
    assert error.value.hint.startswith("it is damaged, or was written by a later version")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("w.scale", float("nan"), "`w.scale`: expected numbers that are not below 0"),
        ("w.scale", -1.0, "`w.scale`: expected numbers that are not below 0"),
        ("w.zero", 16, "`w.zero`: expected codes of 4 bits"),
    ],
)
def test_steps_that_are_none_are_refused(folder: Path, key: str, value: float, message: str) -> None:
    tensors, metadata = contents(folder / "plain.safetensors")
    tensors[key][5] = value
    save_file(tensors, folder / "bad.safetensors", metadata)
    with pytest.raises(InputError, match=re.escape(message)):
        opened(folder / "bad.safetensors")


def test_a_residual_without_what_it_is_added_to_is_refused(folder: Path) -> None:
    vector, mean = folder / "residual" / "x.safetensors", folder / "residual" / "shared" / "mean.safetensors"
    tensors, metadata = contents(mean)
    tensors["w.codes"][0] += 1
    save_file(tensors, mean, metadata)
    with pytest.raises(
        InputError, match=r"is a residual to .*mean.safetensors of another digest: expected xxh3:"
    ):
        opened(vector)
    save_file(load_file(folder / "base.safetensors"), mean)
    with pytest.raises(
        InputError, match=r"is a residual, and .*mean.safetensors is not what it is to be added to"
    ):
        opened(vector)
    mean.unlink()
    with pytest.raises(
        InputError, match=r"is a residual, and there is no .*mean.safetensors to add it to"
    ) as error:
        opened(vector)
    assert "copy it from where x.safetensors was made" in error.value.hint


def test_metadata_of_other_programs_are_none_of_ours(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors", {KEY: "int4"})
    assert opened(tmp_path / "w.safetensors")["w"].equal(torch.ones(3))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"a": {"bits": 4, "error": 0.1}, "b": {"bits": 4, "error": 0.2}}', "2 task vectors of 4 bits (errors 10.00% to 20.00%)"),
        ('{"a": {"bits": 4, "error": 0.1}, "b": {"bits": 2}}', "1 task vector of 4 bits (error 10.00%), 1 task vector of 2 bits"),
        ("{}", ""),
        ("[", ""),
        ('{"a": 4}', ""),
    ],
)  # fmt: skip
def test_what_a_merge_was_made_of_is_said_in_a_line(text: str, want: str) -> None:
    assert quantized_models({"quantized": text}) == want
