from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.clip import heads
from mergecli.clip.heads import cached_head, clip_digests, logits, zero_shot_head
from mergecli.clip.model import Clip, load_clip
from mergecli.runtime.errors import InputError, MergecliWarning
from tests.support.processor import pixel_values
from tests.support.tiny_clip import make_tiny_clip, tinted

NAMES = ("red", "a very long name", "{}")
TEMPLATES = ("a photo of a {}.", "the {}", "something that has to do with {} and more")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(make_tiny_clip(tmp_path_factory.mktemp("heads") / "clip"))


def of_transformers(clip):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(clip.path).requires_grad_(False)
    return model, CLIPTokenizer.from_pretrained(clip.path)


def test_the_head_is_the_mean_of_the_normalized_prompts_normalized_again(clip):
    whole, tokenizer = of_transformers(clip)
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    assert head.shape == (3, 8)
    for name, row in zip(NAMES, head, strict=True):
        every = []
        for template in TEMPLATES:  # one at a time, without any padding
            batch = tokenizer(template.replace("{}", name), return_tensors="pt")
            text = whole.get_text_features(**batch).pooler_output[0]
            every.append(text / text.norm())
        mean = torch.stack(every).mean(dim=0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)


def test_the_logits_are_those_of_the_whole_model(clip):
    head = zero_shot_head(clip, NAMES[:2], TEMPLATES[:1])
    batch = pixel_values(clip, [tinted(label, (label,)) for label in range(3)])
    model, tokenizer = of_transformers(clip)
    prompts = tokenizer(
        [TEMPLATES[0].replace("{}", name) for name in NAMES[:2]], padding=True, return_tensors="pt"
    )
    whole = model(pixel_values=batch, **prompts).logits_per_image
    assert torch.allclose(logits(clip, head, batch), whole, atol=1e-4)


def test_a_head_needs_no_gradient_but_the_logits_pass_it_to_the_tower(clip):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    assert not head.requires_grad
    weight = clip.model.vision_model.post_layernorm.weight.requires_grad_(True)
    logits(clip, head, pixel_values(clip, [tinted(0, (0,))])).sum().backward()
    assert weight.grad is not None
    weight.requires_grad_(False)


def test_a_prompt_that_is_too_long_is_named(clip):
    with pytest.raises(InputError, match=r"class `x{90}`: a prompt has \d+ tokens, the text tower takes 77"):
        zero_shot_head(clip, ["x" * 90], TEMPLATES)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_head_comes_out_of_the_cache_as_it_went_in(clip, home, monkeypatch):
    text = clip_digests(clip.path).text
    made = cached_head(clip, NAMES, TEMPLATES, text, 10**9)
    assert torch.equal(made, zero_shot_head(clip, NAMES, TEMPLATES))
    monkeypatch.setattr(heads, "zero_shot_head", lambda *_: pytest.fail("the text tower was used"))
    assert torch.equal(cached_head(clip, NAMES, TEMPLATES, text, 10**9), made)


def test_other_classes_prompts_and_texts_have_heads_of_their_own(clip, home):
    text = clip_digests(clip.path).text
    for number, given in enumerate(
        [(NAMES, TEMPLATES, text), (NAMES[::-1], TEMPLATES, text), (NAMES, TEMPLATES[:1], text), (NAMES, TEMPLATES, "")], 1
    ):  # fmt: skip
        assert torch.equal(cached_head(clip, *given, 10**9), zero_shot_head(clip, *given[:2]))
        assert len(list((home / "cache" / "heads").iterdir())) == number


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (b"", "is empty, a safetensors file was expected"),
        (b"no safetensors", "is not a safetensors file"),
    ],
)
def test_a_damaged_head_is_made_anew(clip, home, damage, what):
    made = cached_head(clip, NAMES, TEMPLATES, "text", 10**9)
    (file,) = (home / "cache" / "heads").iterdir()
    file.write_bytes(damage)
    with pytest.warns(MergecliWarning, match=f"{file}: {what}; it is made again"):
        assert torch.equal(cached_head(clip, NAMES, TEMPLATES, "text", 10**9), made)


def test_without_a_cache_a_head_is_made_every_time(clip, home):
    assert torch.equal(cached_head(clip, NAMES, TEMPLATES, "text", 0), zero_shot_head(clip, NAMES, TEMPLATES))
    home.parent.joinpath("home").write_text("a file where the folder should be")
    assert cached_head(clip, NAMES, TEMPLATES, "text", 10**9).shape == (3, 8)


def test_the_digests_tell_vision_text_and_the_rest_apart(clip, tmp_path):
    before = clip_digests(clip.path)
    for part, name in (
        ("vision", "vision_model.post_layernorm.weight"),
        ("text", "text_model.final_layer_norm.weight"),
        ("text", "text_projection.weight"),
        ("rest", "visual_projection.weight"),
        ("rest", "logit_scale"),
    ):
        copy = shutil.copytree(clip.path, tmp_path / name)
        weights = load_file(copy / "model.safetensors")
        weights[name] = weights[name] + 1
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        after = clip_digests(copy)
        assert [each for each in before._fields if getattr(before, each) != getattr(after, each)] == [part]


def test_another_tokenizer_makes_another_text_digest(clip, tmp_path):
    copy = shutil.copytree(clip.path, tmp_path / "copy")
    assert clip_digests(copy) == clip_digests(clip.path)
    words = json.loads((copy / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"a": words["model"]["vocab"]["b"], "b": words["model"]["vocab"]["a"]}
    (copy / "tokenizer.json").write_text(json.dumps(words))
    assert clip_digests(copy).text != clip_digests(clip.path).text


def test_a_token_that_the_text_tower_has_no_row_for_is_named(clip, tmp_path):
    shutil.copytree(clip.path, tmp_path / "more")
    other = load_clip(tmp_path / "more")
    other.tokenizer.add_tokens(["wren"])
    with pytest.raises(InputError) as caught:
        zero_shot_head(other, ("robin", "wren"), ("a {}.", "a photo of a {}."))
    assert str(caught.value) == (
        "class `wren`: a prompt has token 514, the text tower knows tokens up to 513: `a wren.`\n"
        "hint: the tokenizer is another model's, or has tokens that were added to it: copy the base's own"
    )
    assert zero_shot_head(other, ("robin",), ("a {}.",)).equal(zero_shot_head(clip, ("robin",), ("a {}.",)))


@pytest.mark.parametrize(("end", "said"), [(77, "token 77"), (2, "the largest token")])
def test_a_prompt_whose_end_the_text_tower_would_not_find_is_refused(clip, tmp_path, end, said):
    shutil.copytree(clip.path, tmp_path / "other")
    config = json.loads((clip.path / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": end}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    other = load_clip(tmp_path / "other")
    if end == 2:
        zero_shot_head(other, ("robin",), ("a {}.",))  # the end is the largest token
        other.tokenizer.eos_token_id = 0
    with pytest.raises(InputError) as caught:
        zero_shot_head(other, ("robin",), ("a {}.",))
    assert caught.value.message == (
        f"class `robin`: the text tower does not find the end of a prompt, {said}: `a robin.`"
    )
