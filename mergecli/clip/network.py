"""The two towers of a CLIP in plain torch.

Modules and parameters have the names that they have in transformers, so that files fit, methods find layers by name, and
adapters and layers that route can take a layer's place. What is computed is the same but for rounding. It is faster, since
queries, keys and values are one product, activations overwrite their input, matrix products are oneDNN's on a processor,
and the last layer computes only the class token where nobody looks at the others.

Letters in shapes: B images or prompts, S tokens, D the tower's width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergecli.clip.config import ClipConfig, TextConfig, TransformerConfig, VisionConfig


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed with them."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product of float32 with weights in their usual layout, where this torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    operators: Any = torch.ops.mkldnn
    return getattr(operators, "_linear_pointwise", None)


_ONEDNN = _onednn()


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., m) of (..., n) inputs, (m, n) weight and (m,) bias.

    In float32 on a processor torch calls MKL, which on AMD's processors is slower than oneDNN by a sixth. oneDNN's operator
    has no gradient.
    """
    if (
        _ONEDNN is None
        or inputs.dtype != torch.float32
        or inputs.device.type != "cpu"
        or weight.dtype != torch.float32
        or not inputs.numel()
        or torch.is_autocast_enabled("cpu")
        or needs_gradient(inputs, weight)
    ):
        return functional.linear(inputs, weight, bias)
    return _ONEDNN(inputs, weight, bias, "none", [], "")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is one of this file's or torch's own, and nobody hooked on to it: others may compute in its place."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not any(getattr(module, each) for each in _HOOKS)
    )


def linear(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(..., m) what the layer gives for (..., n) inputs."""
    if is_plain(layer, nn.Linear):
        return product(inputs, layer.weight, layer.bias)  # pyright: ignore[reportArgumentType]
    return layer(inputs)


def quick_gelu(inputs: Tensor) -> Tensor:
    """(...) x sigmoid(1.702 x), which may overwrite the inputs."""
    if needs_gradient(inputs):
        return inputs * torch.sigmoid(1.702 * inputs)
    return functional.silu(inputs.mul_(1.702), inplace=True).div_(1.702)


def tanh_gelu(inputs: Tensor) -> Tensor:
    """(...) GELU by its approximation with tanh."""
    return functional.gelu(inputs, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": functional.gelu,
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
}


class Attention(nn.Module):
    """Attention of several heads. The weights of queries, keys and values are neighbors in memory: one matrix."""

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) of (B, S, D)."""
        queries, keys, values = self._projected(hidden)
        found = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        return linear(self.out_proj, found.transpose(1, 2).flatten(2))

    def of_first_token(self, hidden: Tensor) -> Tensor:
        """(B, 1, D) of (B, S, D): what `forward` gives for the first token."""
        keys, values = (linear(each, hidden) for each in (self.k_proj, self.v_proj))
        queries = linear(self.q_proj, hidden[:, :1])
        found = functional.scaled_dot_product_attention(
            self._by_head(queries), self._by_head(keys), self._by_head(values)
        )
        return linear(self.out_proj, found.transpose(1, 2).flatten(2))

    def _by_head(self, states: Tensor) -> Tensor:
        """(B, H, S, D / H) of (B, S, D)."""
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _projected(self, hidden: Tensor) -> Iterator[Tensor]:
        """(B, H, S, D / H) queries, keys and values."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if not all(is_plain(each, nn.Linear) for each in layers):
            return (self._by_head(linear(each, hidden)) for each in layers)
        weight, bias = (_joined([getattr(each, name) for each in layers]) for name in ("weight", "bias"))
        if weight is None or bias is None:
            return (self._by_head(linear(each, hidden)) for each in layers)
        return iter(product(hidden, weight, bias).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))

    def _apply(self, fn: Any, recurse: bool = True) -> Attention:
        """What `to` and its like call; new memory is joined again."""
        super()._apply(fn, recurse)
        self.join()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What copying calls; copies are joined again."""
        super().__setstate__(state)
        self.join()

    def join(self) -> None:
        """Moves the weights of queries, keys and values next to each other; the parameters stay the same objects."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if all(type(each) is nn.Linear for each in layers):
            for name in ("weight", "bias"):
                own = [getattr(each, name) for each in layers]
                if own[0].is_meta or _joined([each.data for each in own]) is not None:
                    continue
                together = torch.cat([each.data for each in own])
                for each, data in zip(own, together.chunk(3), strict=True):
                    each.data = data


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The parts as one tensor, without a copy; None where they are no neighbors in memory, or need gradients of their own."""
    first = parts[0]
    if needs_gradient(*parts) or not first.is_contiguous():
        return None
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for number, each in enumerate(parts):
        if (
            each.shape != first.shape
            or each.dtype != first.dtype
            or each.data_ptr() != start + number * first.nbytes
            or each.untyped_storage().data_ptr() != storage
        ):
            return None
    return first.detach().as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation_fn = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) of (..., D)."""
        return linear(self.fc2, self.activation_fn(linear(self.fc1, hidden)))


class Layer(nn.Module):
    """One layer of a transformer."""

    def __init__(self, config: TransformerConfig, *, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(config, causal=causal)
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, mask: None = None) -> Tensor:
        """(B, S, D) of (B, S, D). Layers of transformers must be told that there is no mask; these may be told."""
        del mask
        return self._rest(hidden, self.self_attn(self.layer_norm1(hidden)))

    def of_first_token(self, hidden: Tensor) -> Tensor:
        """(B, 1, D) of (B, S, D): what `forward` gives for the first token."""
        return self._rest(hidden[:, :1], self.self_attn.of_first_token(self.layer_norm1(hidden)))

    def _rest(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + attended
        return hidden + self.mlp(self.layer_norm2(hidden))

    @property
    def is_unobserved(self) -> bool:
        """Whether nobody can tell which tokens it computes."""
        own = {Layer, Attention, Mlp, nn.Linear, nn.LayerNorm}
        return all(type(each) in own and is_plain(each, type(each)) for each in self.modules())


class Encoder(nn.Module):
    """The layers of a tower."""

    def __init__(self, config: TransformerConfig, *, causal: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(config, causal=causal) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) of (B, S, D)."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def first_token(self, hidden: Tensor) -> Tensor:
        """(B, D) the first token of what `forward` gives."""
        layers: list[nn.Module] = list(self.layers)
        last: Layer | None = None
        if layers and isinstance(found := layers[-1], Layer) and found.is_unobserved:
            last = found
            layers.pop()
        for layer in layers:
            hidden = layer(hidden)
        return (hidden if last is None else last.of_first_token(hidden))[:, 0]


def _embedding(rows: int, width: int) -> nn.Embedding:
    """A table of zeros. To fill one with random numbers on the device `meta`, where modules are made before their weights
    are read, torch imports its compiler, which takes as long as all of torch."""
    return nn.Embedding(rows, width, _weight=torch.zeros(rows, width))


class VisionEmbeddings(nn.Module):
    """Patches and the class token, with their positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = _embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, S, D) of (B, C, H, W), the class token first."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Images to features."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, D) the class token after the last layer and its norm, of (B, C, H, W) pixels."""
        return self.post_layernorm(self.encoder.first_token(self.embedded(pixel_values)))

    def embedded(self, pixel_values: Tensor) -> Tensor:
        """(B, S, D) the inputs of the first layer."""
        return self.pre_layrnorm(self.embeddings(pixel_values))


class TextEmbeddings(nn.Module):
    """Tokens, with their positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, S, D) of (B, S) tokens."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTower(nn.Module):
    """Prompts to features."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.end = config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) the features of (B, S) tokens, padded behind their ends: each token sees only those before it, so that the
        padding changes nothing. A prompt's feature is that of its first end."""
        hidden = self.final_layer_norm(self.encoder(self.embeddings(tokens)))
        end = tokens.argmax(dim=1) if self.end == 2 else (tokens == self.end).int().argmax(dim=1)
        return hidden[torch.arange(len(tokens), device=tokens.device), end]


class TextModel(nn.Module):
    """The text tower with its projection into the space of the features."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.text_model = TextTower(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, projection_dim) of (B, S) tokens."""
        return self.text_projection(self.text_model(tokens))


class VisionModel(nn.Module):
    """The vision tower with its projection, and the logit scale."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.vision_model = VisionTower(config.vision_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=False
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, projection_dim) of (B, C, H, W) pixels."""
        return self.visual_projection(self.vision_model(pixel_values))


class BehindLayers(nn.Module):
    """What makes features of the last layer's output. The visual projection is a part of it, the norm before that is not."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.visual_projection = model.visual_projection
        self._norm = (model.vision_model.post_layernorm,)  # in a tuple modules are no parts

    def forward(self, hidden: Tensor, _: Tensor | None = None) -> Tensor:
        """(B, projection_dim) of (B, S, D)."""
        return self.visual_projection(self._norm[0](hidden[:, 0]))
