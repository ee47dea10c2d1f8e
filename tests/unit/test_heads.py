from __future__ import annotations

import pytest
import torch

from mergecli.clip.heads import logits, zero_shot_head
from mergecli.clip.model import Clip, load_clip, pixels
from mergecli.errors import InputError
from tests.tiny import make_tiny_clip, tinted

NAMES = ("red", "a very long name", "{}")
TEMPLATES = ("a photo of a {}.", "the {}", "something that has to do with {} and more")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(make_tiny_clip(tmp_path_factory.mktemp("heads") / "clip"))


def test_the_head_is_the_mean_of_the_normalised_prompts_normalised_again(clip):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    assert head.shape == (3, 8)
    for name, row in zip(NAMES, head, strict=True):
        every = []
        for template in TEMPLATES:  # one at a time, without any padding
            batch = clip.tokenizer(template.replace("{}", name), return_tensors="pt")
            text = clip.model.get_text_features(**batch).pooler_output[0]
            every.append(text / text.norm())
        mean = torch.stack(every).mean(dim=0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)


def test_the_logits_are_those_of_the_whole_model(clip):
    head = zero_shot_head(clip, NAMES[:2], TEMPLATES[:1])
    batch = pixels(clip, [tinted(label, (label,)) for label in range(3)])
    prompts = clip.tokenizer(
        [TEMPLATES[0].replace("{}", name) for name in NAMES[:2]], padding=True, return_tensors="pt"
    )
    whole = clip.model(pixel_values=batch, **prompts).logits_per_image
    assert torch.allclose(logits(clip, head, batch), whole, atol=1e-4)


def test_a_head_needs_no_gradient_but_the_logits_pass_it_to_the_tower(clip):
    head = zero_shot_head(clip, NAMES, TEMPLATES)
    assert not head.requires_grad
    weight = clip.model.vision_model.post_layernorm.weight.requires_grad_(True)
    logits(clip, head, pixels(clip, [tinted(0, (0,))])).sum().backward()
    assert weight.grad is not None
    weight.requires_grad_(False)


def test_a_prompt_that_is_too_long_is_named(clip):
    with pytest.raises(InputError, match=r"class `x{90}`: a prompt has \d+ tokens, the text tower takes 77"):
        zero_shot_head(clip, ["x" * 90], TEMPLATES)
