"""The towers against transformers' own: the same weights give the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergecli.clip.config import ClipConfig, TextConfig, VisionConfig
from mergecli.clip.network import Attention, TextModel, VisionModel, product, quick_gelu
from mergecli.methods._routed_linears import put

# heads of the vision tower, width of a head, heads of the text tower, patches a side, activation
SHAPES = {
    "OpenAI ViT-B/32": (12, 4, 8, 3, "quick_gelu"),
    "OpenAI ViT-B/16": (12, 4, 8, 5, "quick_gelu"),
    "OpenAI ViT-L/14": (16, 4, 12, 4, "quick_gelu"),
    "OpenAI ViT-L/14, 336 pixels": (16, 4, 12, 6, "quick_gelu"),
    "LAION ViT-B/32": (12, 4, 8, 3, "gelu"),
    "LAION ViT-H/14": (16, 5, 16, 4, "gelu"),
    "LAION ViT-g/14": (16, 11, 16, 4, "gelu"),
    "LAION ViT-bigG/14": (16, 13, 20, 4, "gelu"),
    "open_clip tanh": (4, 8, 2, 2, "gelu_pytorch_tanh"),
}
REAL = {
    "ViT-B/32": (768, 3072, 12, 32, 224, 512, 8, 512, "quick_gelu"),
    "ViT-B/16": (768, 3072, 12, 16, 224, 512, 8, 512, "gelu"),
    "ViT-L/14": (1024, 4096, 16, 14, 224, 768, 12, 768, "quick_gelu"),
    "ViT-L/14-336": (1024, 4096, 16, 14, 336, 768, 12, 768, "quick_gelu"),
    "ViT-H/14": (1280, 5120, 16, 14, 224, 1024, 16, 1024, "gelu"),
    "ViT-g/14": (1408, 6144, 16, 14, 224, 1024, 16, 1024, "gelu"),
    "ViT-bigG/14": (1664, 8192, 16, 14, 224, 1280, 20, 1280, "gelu"),
}


class Pair:
    """A random CLIP as transformers has it, and as we do."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], dim: int) -> None:
        from transformers import CLIPConfig, CLIPModel

        torch.manual_seed(0)
        config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=dim)
        self.theirs: Any = CLIPModel(config).eval().requires_grad_(False)
        for parameter in self.theirs.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.2)
        ours = ClipConfig(VisionConfig(**vision), TextConfig(**text), dim)
        self.vision = VisionModel(ours).requires_grad_(False).eval()
        self.text = TextModel(ours).requires_grad_(False).eval()
        state = self.theirs.state_dict()
        for own in (self.vision, self.text):
            own.load_state_dict({name: state[name] for name in own.state_dict()})
        side = vision["image_size"]
        self.pixels = torch.randn(4, 3, side, side)
        end, start = text["vocab_size"] - 1, text["vocab_size"] - 2
        tokens = torch.randint(0, start, (5, 9))
        tokens[:, 0] = start
        for row, length in enumerate((9, 4, 7, 3, 6)):
            tokens[row, length - 1 :] = end
        self.tokens = tokens
        self.mask = torch.arange(9) <= (tokens == end).int().argmax(1)[:, None]

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = (each / each.norm(dim=1, keepdim=True) for each in (image, text))
        return self.theirs.logit_scale.exp() * image @ text.T

    def expect_equal(self) -> None:
        with torch.no_grad():
            image = self.theirs.get_image_features(self.pixels).pooler_output
            text = self.theirs.get_text_features(self.tokens, attention_mask=self.mask).pooler_output
            ours = self.vision(self.pixels), self.text(self.tokens)
            got, want = self.logits(*ours), self.logits(image, text)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
        assert got.argmax(1).equal(want.argmax(1))


def tiny(
    heads: int = 4, width: int = 4, text_heads: int = 2, patches: int = 2, act: str = "gelu", **text: Any
) -> Pair:
    common = {"num_hidden_layers": 2, "hidden_act": act}
    size = heads * width
    vision = {"hidden_size": size, "intermediate_size": 3 * size, "num_attention_heads": heads, "patch_size": 3,
              "image_size": 3 * patches}  # fmt: skip
    own = {"hidden_size": 4 * text_heads, "intermediate_size": 8 * text_heads, "num_attention_heads": text_heads,
           "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 39, **text}  # fmt: skip
    return Pair(common | vision, common | own, 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_images_and_prompts_get_the_logits_that_transformers_gives_them(shape):
    tiny(*SHAPES[shape]).expect_equal()


@pytest.mark.slow
@pytest.mark.parametrize("shape", REAL)
def test_two_layers_of_the_real_sizes_give_the_logits_of_transformers(shape):
    width, inner, heads, patch, side, text_width, text_heads, dim, act = REAL[shape]
    common = {"num_hidden_layers": 2, "hidden_act": act}
    vision = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "patch_size": patch,
              "image_size": side}  # fmt: skip
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": text_heads,
            "vocab_size": 500, "eos_token_id": 499}  # fmt: skip
    Pair(common | vision, common | text, dim).expect_equal()


def test_a_prompt_ends_at_its_largest_token_where_the_configuration_is_an_old_one():
    tiny(eos_token_id=2).expect_equal()


def test_modules_and_tensors_have_the_names_and_the_order_of_transformers():
    pair = tiny()
    ours = [*pair.vision.state_dict(), *pair.text.state_dict()]
    assert set(ours) == set(pair.theirs.state_dict())
    for part in ("vision_model", "text_model"):
        want, got = (
            getattr(pair.theirs, part),
            dict([*pair.vision.named_children(), *pair.text.named_children()])[part],
        )
        assert [*got.state_dict()] == [*want.state_dict()]
        assert [name for name, each in got.named_modules() if isinstance(each, nn.Linear | nn.LayerNorm)] == [
            name for name, each in want.named_modules() if isinstance(each, nn.Linear | nn.LayerNorm)
        ]


def test_gradients_of_every_weight_are_those_of_transformers():
    pair = tiny(act="quick_gelu")
    theirs, ours = (
        pair.theirs.vision_model.requires_grad_(True),
        pair.vision.vision_model.requires_grad_(True),
    )
    theirs(pair.pixels).pooler_output.square().sum().backward()
    ours(pair.pixels).square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, each in ours.named_parameters():
        assert each.grad is not None
        assert torch.allclose(each.grad, wanted[name].grad, rtol=1e-4, atol=1e-5), name


def test_half_precision_stays_half_precision():
    pair = tiny(act="quick_gelu")
    tower = pair.vision.vision_model
    want = tower(pair.pixels)
    got = tower.to(torch.bfloat16)(pair.pixels)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), want, atol=0.1)


def joined(attention: Attention) -> bool:
    """Whether queries, keys and values are one product."""
    first = attention.q_proj.weight
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [each.weight.data_ptr() for each in parts] == [
        first.data_ptr() + number * first.nbytes for number in range(3)
    ]


def test_queries_keys_and_values_are_one_matrix_whatever_happened_to_the_tower():
    vision = tiny().vision
    attention = vision.vision_model.encoder.layers[0].self_attn
    assert not joined(attention)  # until it is moved or copied
    parameters = [*attention.parameters()]
    for each in (vision.float(), vision.double(), copy.deepcopy(vision), vision.float()):
        assert joined(each.vision_model.encoder.layers[1].self_attn)
    assert all(old is new for old, new in zip(parameters, attention.parameters(), strict=True))


def test_one_matrix_gives_what_three_give():
    pair = tiny()
    three = pair.vision(pair.pixels)
    pair.vision.float()
    assert torch.allclose(pair.vision(pair.pixels), three, atol=1e-6)


def test_weights_that_are_replaced_for_one_call_are_used():
    pair = tiny()
    pair.vision.float()
    other = {name: each * 1.1 for name, each in pair.vision.vision_model.named_parameters()}
    got = torch.func.functional_call(pair.vision.vision_model, other, (pair.pixels,))
    want = torch.func.functional_call(pair.theirs.vision_model, other, (pair.pixels,)).pooler_output
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "layer", ["self_attn.k_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm2"]
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_hook_on_a_layer_sees_all_tokens_and_what_it_gives_is_used(layer, number):
    pair = tiny()
    pair.vision.float()
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def take(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            seen[name] = inputs[0].clone()
            return output + 0.5

        return take

    path = f"encoder.layers.{number}.{layer}"
    pair.vision.vision_model.get_submodule(path).register_forward_hook(hook("ours"))
    pair.theirs.vision_model.get_submodule(path).register_forward_hook(hook("theirs"))
    pair.expect_equal()
    assert seen["ours"].shape == (4, 5, *seen["ours"].shape[2:])
    assert torch.allclose(seen["ours"], seen["theirs"], atol=1e-5)


def test_another_layer_in_the_place_of_one_is_used():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert input.shape[1] == 5
            return 2 * super().forward(input)

    pair = tiny()
    pair.vision.float()
    for tower in (pair.vision.vision_model, pair.theirs.vision_model):
        for path in ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc2"):
            own = tower.get_submodule(path)
            layer = Doubled(own.in_features, own.out_features)
            layer.load_state_dict(own.state_dict())
            put(tower, path, layer.requires_grad_(False))
    pair.expect_equal()


def test_the_activation_is_not_computed_in_place_where_a_gradient_needs_its_input():
    inputs = torch.randn(5, requires_grad=True)
    want = inputs.detach() * torch.sigmoid(1.702 * inputs.detach())
    assert torch.allclose(quick_gelu(inputs * 1), want)
    given = inputs.detach().clone()
    assert torch.allclose(quick_gelu(given), want, atol=1e-6)


def test_a_product_of_nothing_is_nothing():
    assert product(torch.zeros(0, 3), torch.zeros(2, 3), torch.zeros(2)).shape == (0, 2)
