from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.clip.model import check_tower, features, load_clip, save_tower, set_tower
from mergecli.formats.opening import open_source
from mergecli.runtime.distributed import usable_device
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import TASK_VECTOR, open_checkpoint
from mergecli.storage.sources import parse_source
from tests.conftest import assert_same
from tests.support.processor import pixel_values
from tests.support.tiny_clip import make_tiny_clip, tinted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("model") / "clip")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def tower_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if name.startswith("vision_model.")
    }


def test_a_clip_is_loaded_in_float32_ready_to_use_and_without_a_word(folder, capfd):
    clip = load_clip(folder)
    assert {parameter.dtype for part in (clip.model, clip.text) for parameter in part.parameters()} == {
        torch.float32
    }
    assert not clip.model.training
    assert not any(each.requires_grad for part in (clip.model, clip.text) for each in part.parameters())
    assert capfd.readouterr() == ("", "")


def test_half_precision_weights_are_loaded_as_float32(copy):
    save_file(
        {k: v.half() for k, v in load_file(copy / "model.safetensors").items()}, copy / "model.safetensors"
    )
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    clip = load_clip(copy)
    assert {parameter.dtype for part in (clip.model, clip.text) for parameter in part.parameters()} == {
        torch.float32
    }


def test_loading_opens_no_socket(folder, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_clip(folder)


def test_a_tokenizer_of_two_files_knows_the_same_tokens(folder, copy):
    kept = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(kept["vocab"]))
    (copy / "merges.txt").write_text("#version: 0.2\n")
    want, got = load_clip(folder).tokenizer, load_clip(copy).tokenizer
    assert got(["a photo, of 3 Cats"]).tolist() == want(["a photo, of 3 Cats"]).tolist()


def test_pixels_are_resized_cropped_and_normalized_as_the_config_says(copy):
    config = json.loads((copy / "preprocessor_config.json").read_text())
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    (copy / "preprocessor_config.json").write_text(
        json.dumps(config | {"image_mean": mean, "image_std": std})
    )
    image = tinted(0, (3,), side=40).resize((40, 30))
    got = pixel_values(load_clip(copy), [image, image])
    assert got.shape == (2, 3, 16, 16)
    assert got.dtype == torch.float32
    small = np.asarray(image.resize((21, 16), resample=3), np.float32)[:, 2:18] / 255
    want = torch.from_numpy((small - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1)
    assert torch.allclose(got[1], want, atol=1e-6)


def test_sizes_written_as_plain_numbers_are_understood(folder, copy):
    config = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(config | {"size": 16, "crop_size": 16}))
    image = [tinted(0, (3,))]
    assert torch.equal(pixel_values(load_clip(copy), image), pixel_values(load_clip(folder), image))


def test_features_are_the_model_s_own(folder):
    from transformers import CLIPModel

    clip = load_clip(folder)
    batch = pixel_values(clip, [tinted(0, (1,)), tinted(1, (2,))])
    with torch.no_grad():
        want = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=batch).pooler_output
    assert torch.allclose(features(clip, batch), want, atol=1e-6)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_a_tower_is_put_in_whether_its_keys_have_the_prefix_or_not(folder, other, tmp_path, prefix):
    weights = tower_of(other)
    file = tmp_path / "tower.safetensors"
    save_file({prefix + name.removeprefix("vision_model."): value for name, value in weights.items()}, file)
    clip = load_clip(folder)
    with open_checkpoint(file) as checkpoint:
        set_tower(clip, checkpoint)
    for name, value in clip.tower.state_dict().items():
        assert torch.equal(value, weights[f"vision_model.{name}"])


def test_of_a_whole_clip_only_the_vision_tower_is_taken(folder, other):
    clip, text = load_clip(folder), load_clip(folder).text.text_projection.weight
    with open_checkpoint(other) as checkpoint:
        set_tower(clip, checkpoint)
    assert torch.equal(clip.text.text_projection.weight, text)
    assert torch.equal(
        clip.tower.state_dict()["pre_layrnorm.weight"], tower_of(other)["vision_model.pre_layrnorm.weight"]
    )


def test_a_task_vector_is_added_to_the_base_s_own_tower_each_time(folder, other, tmp_path):
    base, tuned = tower_of(folder), tower_of(other)
    file = tmp_path / "vector.safetensors"
    save_file({name: tuned[name] - base[name] for name in base}, file, {"kind": TASK_VECTOR})
    clip = load_clip(folder)
    with open_checkpoint(file) as vector:
        set_tower(clip, vector)
        set_tower(clip, vector)
    for name, value in clip.tower.state_dict().items():
        assert torch.allclose(value, tuned[f"vision_model.{name}"], atol=1e-6)


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_changes(folder, other, tmp_path):
    weights = tower_of(other)
    del weights["vision_model.post_layernorm.bias"]
    weights["vision_model.extra"] = torch.zeros(2)
    weights["vision_model.pre_layrnorm.weight"] = torch.zeros(3)
    weights["vision_model.pre_layrnorm.bias"] = torch.zeros(16, dtype=torch.int8)
    save_file(weights, tmp_path / "bad.safetensors")
    clip = load_clip(folder)
    before = {name: value.clone() for name, value in clip.tower.state_dict().items()}
    with open_checkpoint(tmp_path / "bad.safetensors") as checkpoint, pytest.raises(InputError) as caught:
        set_tower(clip, checkpoint)
    assert caught.value.message.splitlines()[1:] == [
        "  lacks tensor `vision_model.post_layernorm.bias`",
        "  has an extra tensor `vision_model.extra`",
        "  `vision_model.pre_layrnorm.weight` has shape (3,), the base has (16,)",
        "  `vision_model.pre_layrnorm.bias` has dtype I8, the base has floating point",
    ]
    assert all(torch.equal(value, before[name]) for name, value in clip.tower.state_dict().items())


def test_a_saved_folder_is_loaded_by_plain_transformers(folder, tmp_path):
    from transformers import CLIPVisionModel
    from transformers.utils import logging

    clip = load_clip(folder)
    save_tower(clip, tmp_path / "saved", {"format": "pt"})
    logging.disable_progress_bar()
    model, found = CLIPVisionModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    batch = pixel_values(clip, [tinted(0, (1,))])
    assert torch.allclose(model(pixel_values=batch).pooler_output, clip.tower(batch), atol=1e-6)


def test_a_saved_file_has_the_prefix_the_metadata_and_the_wanted_dtype(folder, tmp_path):
    save_tower(
        load_clip(folder),
        tmp_path / "half.safetensors",
        {"format": "pt", "kind": "checkpoint"},
        torch.float16,
    )
    with open_checkpoint(tmp_path / "half.safetensors") as checkpoint:
        assert checkpoint.metadata["kind"] == "checkpoint"
    stored, want = load_file(tmp_path / "half.safetensors"), tower_of(folder)
    assert stored.keys() == want.keys()
    assert all(torch.equal(stored[name], want[name].half()) for name in want)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "has no `model.safetensors`"),
        ("config.json", "has no `config.json`"),
        ("preprocessor_config.json", "has no `preprocessor_config.json`"),
        ("tokenizer.json", "has no `tokenizer.json`"),
    ],
)
def test_a_file_that_a_clip_lacks_is_named(copy, missing, message):
    (copy / missing).unlink()
    with pytest.raises(InputError, match=message):
        load_clip(copy)


def test_a_vision_tower_alone_is_no_clip(folder, tmp_path):
    save_tower(load_clip(folder), tmp_path / "tower", {})
    with pytest.raises(InputError, match="is not a whole CLIP"):
        load_clip(tmp_path / "tower")


@pytest.mark.parametrize("kind", ["bert", "vit", "llava", "no-such-kind"])
def test_a_model_that_is_no_dual_encoder_is_named(copy, kind):
    (copy / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(InputError) as caught:
        load_clip(copy)
    assert str(caught.value) == (
        f"{copy}: is a model of the kind `{kind}`, not a CLIP or another dual encoder\n"
        "hint: `merge`, `taskvector` and `cos-sim` take any weights; images are classified by dual encoders only"
    )


def test_weights_that_do_not_fit_the_config_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks tensor `text_projection\.weight`"):
        load_clip(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "clip_vision_model"}'])
def test_a_damaged_config_is_refused_in_one_line(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(InputError, match="copy: cannot be loaded as a CLIP"):
        load_clip(copy)


def test_a_device_that_is_not_there_is_refused():
    assert usable_device("cpu") == "cpu"
    with pytest.raises(
        UsageError, match=r"^device: expected `cpu`, `cuda`, or `cuda:1` for the second GPU, got `abacus`$"
    ):
        usable_device("abacus")


@pytest.mark.parametrize("lead", ["module.", "model.clip.", "_orig_mod."])
def test_a_base_under_a_wrapper_s_names_is_the_same_clip(folder, tmp_path, lead):
    shutil.copytree(folder, tmp_path / "wrapped")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {lead + name: each for name, each in weights.items()}, tmp_path / "wrapped" / "model.safetensors"
    )
    got, want = (load_clip(each).model.state_dict() for each in (tmp_path / "wrapped", folder))
    assert_same(got, want)


def test_a_head_is_left_out_where_the_recipe_says_so(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    tower = {name: each for name, each in weights.items() if name.startswith("vision_model.")}
    save_file(tower | {"classifier.weight": torch.ones(3, 16)}, tmp_path / "a.safetensors")
    source = parse_source(str(tmp_path / "a.safetensors"), Path())
    with (
        open_source(source) as opened,
        pytest.raises(InputError, match=r'hint: `leave_out = \["classifier."\]` in the recipe'),
    ):
        check_tower(load_clip(folder), opened)
    with open_source(replace(source, leave_out=("classifier.",))) as opened:
        check_tower(load_clip(folder), opened)
