"""A CLIP in a folder of open_clip becomes one of transformers, with the activation and the image processing that its configuration says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli import ModelPool, fetch, merge
from mergecli.clip.config import read_config
from mergecli.clip.model import features, load_clip
from mergecli.clip.network import TextModel, VisionModel
from mergecli.clip.processor import read_processor
from mergecli.formats.open_clip_config import NAME, transformers_config
from mergecli.formats.open_clip_names import renaming
from mergecli.formats.opening import model_path
from mergecli.runtime.errors import InputError, MergecliError, MergecliWarning
from mergecli.storage.sources import parse_source
from tests.conftest import Run
from tests.formats.test_convert import as_open_clip
from tests.support.tiny_clip import make_tiny_clip

TINY: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 77, "vocab_size": 514, "width": 16, "heads": 2, "layers": 2, "mlp_ratio": 2.0},
}  # fmt: skip


def write(folder: Path, model: dict[str, Any], processing: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": processing or {}}))
    return folder


def open_clip_folder(base: Path, folder: Path, **model: Any) -> Path:
    """A whole CLIP as open_clip saves it for a hub: its names and configuration, and a tokenizer of transformers."""
    write(folder, {**TINY, **model})
    theirs = as_open_clip(load_file(base / "model.safetensors"))
    save_file(
        {name: each.contiguous() for name, each in theirs.items()}, folder / "open_clip_model.safetensors"
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, folder)
    return folder


def test_values_that_are_not_said_are_open_clip_s_own(tmp_path: Path) -> None:
    made = transformers_config(write(tmp_path, {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}))
    for name, content in made.items():
        (tmp_path / name).write_text(content)
    config, processor = read_config(tmp_path / "config.json"), read_processor(tmp_path)
    vision = config.vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.patch_size) == (768, 3072, 16)
    assert (vision.num_attention_heads, vision.hidden_act, vision.layer_norm_eps) == (12, "gelu", 1e-5)
    assert (config.text_config.eos_token_id, config.text_config.num_attention_heads) == (2, 8)
    assert processor.size == {"shortest_edge": 224}
    assert (processor.do_center_crop, processor.resample) == (True, 3)


def test_sizes_that_are_no_round_factor_and_images_that_are_squashed(tmp_path: Path) -> None:
    model = {
        "embed_dim": 1280, "quick_gelu": True, "text_cfg": {"width": 1280, "heads": 20, "layers": 32},
        "vision_cfg": {"image_size": [384, 384], "layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231,
                       "patch_size": 14, "norm_kwargs": {"eps": 1e-6}},
    }  # fmt: skip
    processing = {"mean": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
    for name, content in transformers_config(write(tmp_path, model, processing)).items():
        (tmp_path / name).write_text(content)
    vision, processor = read_config(tmp_path / "config.json").vision_config, read_processor(tmp_path)
    assert (vision.intermediate_size, vision.num_attention_heads, vision.image_size) == (8192, 16, 384)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-6)
    assert (processor.size, processor.do_center_crop) == ({"height": 384, "width": 384}, False)
    assert (processor.resample, processor.image_mean) == (2, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("model", "processing", "problems"),
    [
        ({"vision_cfg": {"pool_type": "avg", "no_ln_pre": True}}, {}, ["vision_cfg.pool_type` is \"avg\"", "vision_cfg.no_ln_pre` is true"]),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, {}, ["vision_cfg.layers` is [3, 4, 6, 3]"]),
        ({"vision_cfg": {"timm_model_name": "vit"}, "init_logit_bias": -10}, {}, ["vision_cfg.timm_model_name`", "init_logit_bias` is -10"]),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}, "pool_type": "eos"}}, {}, ["text_cfg.tokenizer_kwargs`", "pool_type` is \"eos\""]),
        ({}, {"resize_mode": "longest"}, ["preprocess_cfg.resize_mode` is \"longest\""]),
        ({}, {"interpolation": "random"}, ["preprocess_cfg.interpolation` is \"random\""]),
    ],
)  # fmt: skip
def test_what_is_not_openai_s_architecture_is_listed(
    tmp_path: Path, model: dict[str, Any], processing: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        transformers_config(write(tmp_path, model, processing))
    assert caught.value.message.startswith(f"{tmp_path / NAME}: is not of OpenAI's architecture")
    assert all(problem in caught.value.message for problem in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"model_cfg": {"vision_cfg": {"image_size": "large"}}}', "has values that cannot be used"),
        ('{"model_cfg": {"vision_cfg": {"width": "large"}}}', "has values that cannot be used"),
        ('{"model_cfg": {"vision_cfg": {"head_width": 0}}}', "has values that cannot be used"),
    ],
)
def test_a_damaged_configuration_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(InputError, match=message):
        transformers_config(tmp_path)


@pytest.mark.usefixtures("own_store")
def test_a_folder_of_open_clip_is_a_base_with_the_activation_that_it_says(tmp_path: Path) -> None:
    base = make_tiny_clip(tmp_path / "base")
    folder = open_clip_folder(base, tmp_path / "laion", quick_gelu=False)
    fetch(folder)
    ready = model_path(parse_source(str(folder), Path()))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    config = json.loads((base / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["hidden_act"] = "gelu"
    quick = features(load_clip(base), pixels)
    (base / "config.json").write_text(json.dumps(config))
    found = features(load_clip(ready), pixels)
    assert torch.equal(found, features(load_clip(base), pixels))
    assert not torch.equal(found, quick)
    pool = ModelPool({"base": folder})
    assert pool.load_model().config.hidden_act == "gelu"
    assert pool.load_processor().tokenizer("a")["input_ids"]
    assert load_clip(ready).processor == load_clip(base).processor
    other = open_clip_folder(base, tmp_path / "openai", quick_gelu=True)
    fetch(other)
    with pytest.warns(MergecliWarning, match='`a`: `hidden_act` is "quick_gelu", not "gelu"'):
        merge({"a": other}, base=folder, method="average", output=tmp_path / "m.safetensors")


@pytest.mark.usefixtures("own_store")
def test_weights_that_have_our_names_already_get_the_configuration_too(tmp_path: Path, run: Run) -> None:
    base = make_tiny_clip(tmp_path / "base")
    (base / "config.json").unlink()
    write(base, {**TINY, "quick_gelu": True})
    with pytest.raises(InputError, match=r"has no `config\.json`") as caught:
        load_clip(base)
    assert caught.value.hint == f"`mergecli fetch {base}` makes it of its `open_clip_config.json`"
    fetch(base)
    assert (
        load_clip(model_path(parse_source(str(base), Path()))).model.config.vision_config.hidden_act
        == "quick_gelu"
    )
    write(base, {**TINY, "vision_cfg": {**TINY["vision_cfg"], "pool_type": "avg"}})
    ended = run("fetch", base)
    assert ended.status == 3
    assert "is not of OpenAI's architecture, and cannot be evaluated:\n  `vision_cfg.pool_type`" in ended.err


@pytest.mark.slow
def test_every_configuration_of_open_clip_fits_its_own_model_or_is_refused(tmp_path: Path) -> None:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"open_clip is not installed: {error}")
    known: list[str] = []
    for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        model = json.loads(file.read_text())
        try:
            made = transformers_config(write(tmp_path, model))
        except MergecliError:
            continue
        (tmp_path / "config.json").write_text(made["config.json"])
        config = read_config(tmp_path / "config.json")
        (tmp_path / "config.json").unlink()
        with torch.device("meta"):
            model.pop("custom_text", None)
            theirs: Any = open_clip.CLIP(**model)
            ours = {**VisionModel(config).state_dict(), **TextModel(config).state_dict()}
        shapes = {name: tuple(each.shape) for name, each in theirs.state_dict().items()}
        plan = renaming(tmp_path, shapes, opened=False)
        assert {name: origin.shape_of(shapes[origin.name]) for name, origin in plan.origins.items()} == {
            name: tuple(each.shape) for name, each in ours.items()
        }
        block = theirs.visual.transformer.resblocks[0]
        assert block.attn.num_heads == config.vision_config.num_attention_heads
        assert ("QuickGELU" in type(block.mlp.gelu).__name__) == (
            config.vision_config.hidden_act == "quick_gelu"
        )
        known.append(file.stem)
    assert {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"} <= set(known)
