"""Dual encoders other than CLIP: two layers, a tokenizer of bytes, and the image processor of their kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 16
TOKENS = 48
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581")


def make_tiny_dual_encoder(folder: Path, kind: str = "siglip", seed: int = 0) -> Path:
    """The folder, in which there is now a random model of a kind, as `save_pretrained` writes it."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    tokenizer = _byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "projection_size": 16,
        "pad_token_id": 0,
    }
    vision: dict[str, Any] = {"patch_size": SIDE // 2}
    vision |= {"num_patches": 4} if kind == "siglip2" else {"image_size": SIDE}
    more = {} if kind.startswith("siglip") else {"projection_dim": 8}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, text_config=_LAYERS | text, vision_config=_LAYERS | vision, **more)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "logit" in name:
                parameter.fill_(2.0)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    _image_processor(kind).save_pretrained(folder)
    return folder


def _image_processor(kind: str) -> Any:
    import transformers

    if kind == "siglip2":
        return transformers.Siglip2ImageProcessorPil(patch_size=SIDE // 2, max_num_patches=4)
    if kind == "siglip":
        return transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    if kind == "owlvit":
        return transformers.OwlViTImageProcessorPil()
    size = {"height": SIDE, "width": SIDE}
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)


def _byte_tokenizer() -> Any:
    """A byte is a token; upper case is no other token than lower case only where prompts are made lower-case."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*_SPECIAL, *letters])}
    library = Tokenizer(models.BPE(words, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=library, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids"], model_max_length=TOKENS,
    )  # fmt: skip
