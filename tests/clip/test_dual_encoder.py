"""SigLIP and its like give the logits that transformers gives; what is no such model is refused by its kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mergecli.clip.heads import check_prompts, logits, zero_shot_head
from mergecli.clip.model import Clip, load_clip, save_tower, set_tower
from mergecli.clip.preprocessing import Normalization, resize_and_crop_of
from mergecli.clip.towers import load_processor, load_tower, load_whole
from mergecli.data.decoding import resized_and_cropped
from mergecli.evaluation.counting import ModelSlot
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import TASK_VECTOR, open_checkpoint
from tests.support.tiny_clip import CLASSES, tinted
from tests.support.tiny_dual_encoders import TOKENS, make_tiny_dual_encoder

KINDS = ("siglip", "siglip2", "chinese_clip", "clipseg", "metaclip_2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind that was asked for, made when it is first needed."""
    return tmp_path_factory.mktemp("kinds")


def made(folders: Path, kind: str) -> Path:
    return folders / kind if (folders / kind).exists() else make_tiny_dual_encoder(folders / kind, kind)


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Path:
    """A SigLIP to change."""
    return Path(shutil.copytree(made(folders, "siglip"), tmp_path / "copy"))


def pixels(clip: Clip, images: list[Image.Image]) -> torch.Tensor:
    """(B, 3, H, W) float32 of images, as an evaluation makes them."""
    crop, _ = resize_and_crop_of(clip)
    decoded = [torch.from_numpy(np.asarray(resized_and_cropped(each, crop))) for each in images]
    return Normalization(clip)(torch.stack(decoded))


def theirs(folder: Path, images: list[Image.Image], prompts: list[str], **padding: Any) -> torch.Tensor:
    """(B, C) logits as transformers has them."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, return_tensors="pt", **padding)
    values = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, **values).logits_per_image


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_but_for_the_bias(folders: Path, kind: str) -> None:
    folder = made(folders, kind)
    clip = load_clip(folder)
    images = [tinted(number, (number,)) for number in range(5)]
    head = zero_shot_head(clip, CLASSES, ("a photo of something {}.",))
    got = logits(clip, head, pixels(clip, images))
    prompts = [f"a photo of something {name}." for name in CLASSES]
    sigmoid = kind.startswith("siglip")
    rule = {"padding": "max_length"} if sigmoid else {"padding": True, "return_attention_mask": True}
    want = theirs(folder, images, prompts, **rule)
    bias = 2.0 if sigmoid else 0.0  # one number for all classes, which moves no prediction
    torch.testing.assert_close(got, want - bias, atol=2e-6, rtol=1e-5)
    assert got.std(dim=0).max() > 1e-4, "images are told apart"


def test_images_of_any_shape_are_prepared_as_by_siglips_own_processor(folders: Path) -> None:
    from transformers import AutoImageProcessor

    folder = made(folders, "siglip")
    images = [tinted(number, (number,), side=20).resize((20, 33)) for number in range(2)]
    want = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels(load_clip(folder), images), want)


def test_prompts_of_siglip_are_lower_case_and_all_of_one_length(folders: Path) -> None:
    tokenizer: Any = load_clip(made(folders, "siglip")).tokenizer
    tokens = tokenizer(["A Photo", "a photo", "b"])["input_ids"]
    assert tokens.shape == (3, TOKENS)
    assert torch.equal(tokens[0], tokens[1])


def test_other_prompts_keep_their_case_and_have_a_mask(folders: Path) -> None:
    tokenizer: Any = load_clip(made(folders, "chinese_clip")).tokenizer
    found = tokenizer(["A", "a", "abc"])
    assert found["attention_mask"].sum(dim=1).tolist() == [2, 2, 4]
    assert not torch.equal(found["input_ids"][0], found["input_ids"][1])


def test_a_prompt_that_is_too_long_is_refused_before_the_work(folders: Path) -> None:
    clip = load_clip(made(folders, "siglip"))
    message = rf"a prompt has 61 tokens, the text tower takes {TOKENS}: `x{{60}}`"
    with pytest.raises(InputError, match=message):
        check_prompts(clip, ["x" * 60], ["{}"])


def test_a_tower_and_a_task_vector_are_put_in_and_written_out(folders: Path, tmp_path: Path) -> None:
    clip = load_clip(made(folders, "siglip"))
    base = {name: tensor.clone() for name, tensor in clip.tower.state_dict().items()}
    save_file(
        {f"vision_model.{name}": torch.full_like(each, 0.5) for name, each in base.items()},
        tmp_path / "vector.safetensors",
        {"kind": TASK_VECTOR},
    )
    with open_checkpoint(tmp_path / "vector.safetensors") as vector:
        set_tower(clip, vector)
    assert all(torch.equal(each, base[name] + 0.5) for name, each in clip.tower.state_dict().items())
    save_tower(clip, tmp_path / "tower", {})
    with open_checkpoint(tmp_path / "tower") as stored:
        again = load_tower(tmp_path / "tower", stored)
    assert type(again).__name__ == "SiglipVisionModel"
    assert all(torch.equal(each, base[name] + 0.5) for name, each in again.state_dict().items())


def test_a_second_slot_has_a_tower_of_its_own_and_shares_the_rest(folders: Path) -> None:
    first = ModelSlot(load_clip(made(folders, "siglip")))
    second = first.another()
    images = torch.rand(2, 3, 16, 16)
    before = first.clip.model(images)
    with torch.no_grad():
        for each in second.clip.tower.parameters():
            each.zero_()
    assert torch.equal(first.clip.model(images), before)
    assert not torch.equal(second.clip.model(images), before)


def test_python_gets_the_models_own_classes(folders: Path) -> None:
    folder = made(folders, "siglip")
    clip = load_clip(folder)
    with torch.no_grad():
        for each in clip.tower.parameters():
            each.fill_(0.25)
    whole = load_whole(clip)
    assert type(whole).__name__ == "SiglipModel"
    assert all(bool((each == 0.25).all()) for each in whole.vision_model.parameters())
    text = load_file(folder / "model.safetensors")
    assert all(
        torch.equal(each, text[f"text_model.{name}"]) for name, each in whole.text_model.state_dict().items()
    )
    assert type(load_processor(folder)).__name__ == "SiglipProcessor"


def test_weights_that_do_not_fit_the_config_are_listed(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["logit_bias"]
    weights["logit_scale"] = torch.zeros(2)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_clip(copy)
    assert str(caught.value) == (
        f"{copy}: the weights do not fit `config.json`:\n"
        "  lacks tensor `logit_bias`\n"
        "  `logit_scale` has another shape than its config says"
    )


def test_a_model_whose_images_are_prepared_otherwise_is_refused(copy: Path) -> None:
    from transformers import OwlViTImageProcessorPil

    OwlViTImageProcessorPil().save_pretrained(copy)
    with pytest.raises(InputError) as caught:
        load_clip(copy)
    assert str(caught.value) == (
        f"{copy}: is a model of the kind `siglip`, whose images are prepared by `OwlViTImageProcessor`\n"
        "hint: images are classified by a CLIP, or another dual encoder with a CLIP's image processing, such as SigLIP"
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"config\.json: cannot be used: "),
        ("preprocessor_config.json", "copy: its image processor cannot be read: "),
    ],
)
def test_a_damaged_file_is_named_in_one_line(copy: Path, file: str, message: str) -> None:
    kept = '{"model_type": "siglip", "vision_config": 3}' if file == "config.json" else "{"
    (copy / file).write_text(kept)
    with pytest.raises(InputError, match=message) as caught:
        load_clip(copy)
    assert "\n" not in caught.value.message


def test_a_tokenizer_whose_vocabulary_is_missing_is_refused(copy: Path) -> None:
    """The class makes one of five tokens then, to which every prompt is the same."""
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    with pytest.raises(InputError) as caught:
        check_prompts(load_clip(copy), CLASSES, ["{}"])
    assert (caught.value.message, caught.value.hint) == (
        f"{copy}: its tokenizer, a GemmaTokenizer, knows no words: its vocabulary is missing",
        "fetch or copy the whole repository of the base; a tokenizer without `tokenizer.json` may need `pip install sentencepiece`",
    )


def test_a_damaged_tokenizer_is_named_when_a_prompt_is_read(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="copy: its tokenizer cannot be read: "):
        check_prompts(load_clip(copy), CLASSES, ["{}"])
