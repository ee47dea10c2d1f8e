"""Tiny worlds for tests: a CLIP of two layers with a real tokenizer, and image tasks of a few pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("red", "green", "blue")


def make_tiny_clip(folder: Path, seed: int = 0, side: int = 16, tokens: int = 77) -> Path:
    """The folder, in which there is now a random CLIP as `save_pretrained` writes it: about 40 k parameters."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    vocabulary = _byte_tokens()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "max_position_embeddings": tokens,
        "vocab_size": len(vocabulary),
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    torch.manual_seed(seed)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model = CLIPModel(
        CLIPConfig(
            text_config=layers | text,
            vision_config=layers | {"image_size": side, "patch_size": side // 2},
            projection_dim=8,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    return folder


def make_image_task(
    folder: Path, classes: Sequence[str] = CLASSES, train: int = 30, test: int = 12, seed: int = 0
) -> Path:
    """The folder, in which there are now `train` and `test` as Parquet files: noise, tinted by its class."""
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(classes)))
    folder.mkdir(parents=True, exist_ok=True)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for number, (split, count) in enumerate((("train", train), ("test", test))):
        labels = [index % len(classes) for index in range(count)]
        rows = {
            "image": [_png(label, (seed, number, index)) for index, label in enumerate(labels)],
            "label": labels,
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    if not bars:
        datasets.enable_progress_bars()
    return folder


def make_image_folder(folder: Path, classes: Sequence[str] = CLASSES, images: int = 2) -> Path:
    """The folder, in which there is now `<class>/<number>.png` for each class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            (folder / name / f"{index}.png").write_bytes(_png(label, (label, index))["bytes"])
    return folder


def tinted(label: int, seed: Sequence[int], side: int = 20) -> Image.Image:
    """A picture of noise in which the channel number `label` modulo three is the brightest."""
    noise = np.random.default_rng(list(seed)).integers(0, 120, (side, side, 3))
    noise[:, :, label % 3] += 100
    return Image.fromarray(noise.astype(np.uint8))


def _png(label: int, seed: Sequence[int]) -> dict[str, bytes]:
    buffer = io.BytesIO()
    tinted(label, seed).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


def _byte_tokens() -> dict[str, int]:
    """The vocabulary of a byte-level tokenizer without merges: every byte inside and at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}
