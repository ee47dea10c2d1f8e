"""Models that differ from the base outside of the vision tower: `merge` and `eval` say so once, and how to use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Run, Weights
from tests.support.tiny_clip import make_image_folder, make_tiny_clip

MERGED = (
    "warning: these models differ from base outside of the vision tower, and only vision towers are merged:"
)
EVALUATED = (
    "warning: these models differ from base outside of the vision tower, and are evaluated with its text tower and other "
    "parts:"
)
NAMES = {
    "text tower": "text_model.encoder.layers.1.mlp.fc1.weight",
    "text projection": "text_projection.weight",
    "logit scale": "logit_scale",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip") / "base")


@pytest.fixture
def base(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "base")


def tuned(base: Path, folder: Path, *names: str, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of the base with other vision weights, in which the named tensors are others too."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    for name in ("vision_model.post_layernorm.weight", *names):
        weights[name] = weights[name] + 0.01
    save_file({name: each.to(dtype) for name, each in weights.items()}, folder / "model.safetensors")
    return folder


def merged(run: Run, *models: str, base: str = "base") -> list[str]:
    ended = run("merge", "--base", base, *models, "--method", "average", "-o", "m.safetensors")
    assert ended.status == 0
    return ended.err.splitlines()


@pytest.mark.parametrize("part", NAMES)
def test_a_merge_names_the_part_that_differs_and_how_to_use_it(
    base: Path, tmp_path: Path, run: Run, part: str
) -> None:
    tuned(base, tmp_path / "birds", NAMES[part])
    assert merged(run, "birds") == [
        MERGED,
        f"  `birds`: {part} (to use them: `mergecli eval ... --clip birds`)",
    ]


def test_several_models_are_one_warning_and_those_that_differ_in_nothing_are_not_named(
    base: Path, tmp_path: Path, run: Run
) -> None:
    tuned(base, tmp_path / "birds", *NAMES.values())
    tuned(base, tmp_path / "cars")
    tuned(base, tmp_path / "dogs", NAMES["logit scale"])
    assert merged(run, "birds", "cars", "dogs") == [
        MERGED,
        "  `birds`: text tower, text projection, logit scale (to use them: `mergecli eval ... --clip birds`)",
        "  `dogs`: logit scale (to use them: `mergecli eval ... --clip dogs`)",
        "warning: `cars` has the weights of `birds`: they count twice",
        "warning: `dogs` has the weights of `birds`: they count twice",
    ]


def test_where_the_base_is_a_tower_the_first_whole_clip_stands_for_it(
    base: Path, tmp_path: Path, run: Run
) -> None:
    tuned(base, tmp_path / "birds")
    tuned(base, tmp_path / "cars", NAMES["logit scale"])
    tower = {
        name: each
        for name, each in load_file(base / "model.safetensors").items()
        if name.startswith("vision")
    }
    save_file(tower, tmp_path / "tower.safetensors")
    assert merged(run, "birds", "cars", base="tower.safetensors") == [
        MERGED.replace("base", "`birds`", 1),
        "  `cars`: logit scale (to use them: `mergecli eval ... --clip cars`)",
        "warning: `cars` has the weights of `birds`: they count twice",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounding_to_another_dtype_is_no_difference(
    base: Path, tmp_path: Path, run: Run, dtype: torch.dtype
) -> None:
    tuned(base, tmp_path / "birds", dtype=dtype)
    assert merged(run, "birds") == []
    tuned(base, tmp_path / "cars", NAMES["text tower"], dtype=dtype)
    assert len(merged(run, "cars")) == 2


def test_another_activation_than_the_base_s_is_a_difference(base: Path, tmp_path: Path, run: Run) -> None:
    config = json.loads((tuned(base, tmp_path / "birds") / "config.json").read_text())
    config["vision_config"] |= {"hidden_act": "gelu", "num_attention_heads": 4}
    (tmp_path / "birds" / "config.json").write_text(json.dumps(config))
    assert merged(run, "birds")[1] == (
        '  `birds`: `hidden_act` is "gelu", not "quick_gelu", `num_attention_heads` is 4, not 2 '
        "(to use them: `mergecli eval ... --clip birds`)"
    )


MEANS = "[0.481455, 0.457827, 0.408211]"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, f"`image_mean` is [0.5, 0.5, 0.5], not {MEANS}"),
        ({"image_mean": 0.5, "resample": 2},
         f'`resample` is "bilinear", not "bicubic", `image_mean` is [0.5, 0.5, 0.5], not {MEANS}'),
        ({"size": {"height": 16, "width": 16}},
         "`size` is { height = 16, width = 16 }, not { shortest_edge = 16 }"),
        ({"crop_size": None, "do_center_crop": False}, "`crop_size` is nothing, not { height = 16, width = 16 }"),
        ({"do_rescale": False}, "`rescale_factor` is nothing, not 0.00392157"),
    ],
)  # fmt: skip
def test_another_image_processor_than_the_base_s_is_a_difference_and_the_base_s_is_used(
    base: Path, tmp_path: Path, run: Run, given: dict[str, Any], said: str
) -> None:
    file = tuned(base, tmp_path / "birds") / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    assert merged(run, "birds") == [
        MERGED,
        f"  `birds`: image processor ({said}; that of base is used) (to use them: `mergecli eval ... --clip birds`)",
    ]


def test_an_image_processor_that_another_version_wrote_otherwise_is_the_same(
    base: Path, tmp_path: Path, run: Run
) -> None:
    file = tuned(base, tmp_path / "birds") / "preprocessor_config.json"
    file.write_text(
        json.dumps(
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16, "do_resize": True,
             "do_center_crop": True, "do_normalize": True, "resample": "bicubic"}
        )
    )  # fmt: skip
    assert merged(run, "birds") == []
    file.rename(file.with_name("processor_config.json"))
    nested = {"image_processor": {"size": 16, "crop_size": {"height": 16, "width": 16}}, "tokenizer": {}}
    file.with_name("processor_config.json").write_text(json.dumps(nested))
    assert merged(run, "birds") == []


def test_a_tower_with_an_image_processor_of_its_own_is_evaluated_with_the_base_s(
    base: Path, tmp_path: Path, run: Run
) -> None:
    folder = tuned(base, tmp_path / "birds")
    tower = {
        name: each
        for name, each in load_file(folder / "model.safetensors").items()
        if name.startswith("vision")
    }
    save_file(tower, folder / "model.safetensors")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": 0}))
    assert merged(run, "birds")[1] == (
        '  `birds`: image processor (`resample` is "nearest", not "bicubic"; that of base is used) '
        "(to use them: write what differs into a copy of the base's folder; then `mergecli eval ... --clip FOLDER`)"
    )


def test_a_file_alone_needs_a_folder_to_be_evaluated_with(base: Path, tmp_path: Path, run: Run) -> None:
    tuned(base, tmp_path / "birds", NAMES["logit scale"])
    shutil.move(tmp_path / "birds" / "model.safetensors", tmp_path / "b.safetensors")
    assert merged(run, "b.safetensors")[1] == (
        "  `b`: logit scale (to use them: put the file into a copy of the base's folder; then "
        "`mergecli eval ... --clip FOLDER`)"
    )


def adapter(folder: Path, module: str, weights: Weights) -> Path:
    """An adapter of rank 1 for one module of a whole CLIP."""
    rows, columns = weights[f"{module}.weight"].shape
    folder.mkdir()
    factors = {"A": torch.ones(1, columns), "B": torch.ones(rows, 1)}
    named = {f"base_model.model.{module}.lora_{part}.weight": each for part, each in factors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("module", "said"),
    [("text_model.encoder.layers.0.mlp.fc1", True), ("vision_model.encoder.layers.0.mlp.fc1", False)],
)
def test_an_adapter_of_the_text_tower_is_named(
    base: Path, tmp_path: Path, run: Run, module: str, said: bool
) -> None:
    adapter(tmp_path / "lora", module, load_file(base / "model.safetensors"))
    lines = [
        MERGED,
        "  `lora`: text tower (to use them: merge the adapter with peft (`merge_and_unload`) and save it with the base's "
        "tokenizer and processor; then `mergecli eval ... --clip FOLDER`)",
    ]
    assert merged(run, "lora") == (lines if said else [])


def test_an_evaluation_says_it_once_and_counts_with_the_base_s_parts_unless_asked(
    base: Path, tmp_path: Path, run: Run
) -> None:
    tuned(base, tmp_path / "birds", *NAMES.values())
    make_image_folder(tmp_path / "data" / "test")
    (tmp_path / "r.toml").write_text(
        'base = "base"\n[tuned]\ntints = "birds"\n[tasks.tints]\ndata = "data"\ntemplates = ["a {}."]\n'
    )
    ended = run("eval", "--recipe", "r.toml", "--model", "tints", "-o", "r.json")
    assert ended.status == 0
    assert [line for line in ended.err.splitlines() if not line.startswith("note")][:2] == [
        EVALUATED,
        "  `tints`: text tower, text projection, logit scale (to use them: `--clip birds`)",
    ]
    ended = run("eval", "--recipe", "r.toml", "--model", "tints", "--clip", "birds", "-o", "own.json")
    assert ended.status == 0
    assert "differ" not in ended.err
