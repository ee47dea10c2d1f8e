"""Dual encoders other than CLIP, such as SigLIP: transformers' own classes, with the parts that a CLIP's two halves have.

transformers calls a model a dual encoder when it has `get_image_features` and `get_text_features`. A class for which this
holds can be evaluated if its image processor resizes, crops and normalizes as a CLIP's does, its weights have `vision_model.`
and `text_model.` before their names, and it has a `logit_scale`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli.clip.config import expect_weights
from mergecli.clip.processor import ImageProcessor, expect_fit, processor_of
from mergecli.runtime.errors import InputError, quoted
from mergecli.storage.checkpoint import TEXT, VISION, Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_PROCESSORS = ("CLIPImageProcessor", "ChineseCLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
"""Image processors of transformers that resize, crop and normalize, and do nothing else."""
_PATCHES = "Siglip2ImageProcessor"
"""The one of NaFlex, which cuts images into patches and keeps their aspect ratio; here it makes squares."""
_SIGMOID = ("siglip", "siglip2")
"""Kinds that were trained on lower-case prompts, all padded to one length."""
_SIZES = ("hidden_size", "intermediate_size", "num_channels", "patch_size")
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is fetched, and no code that lies beside weights is run or asked about."""
_HINT = (
    "images are classified by a CLIP, or another dual encoder with a CLIP's image processing, such as SigLIP"
)


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Without what transformers says of configurations and tokenizers that are as they were published."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_dual_encoder(kind: str) -> bool:
    """Whether transformers has a model of that `model_type` that gives features of images and of texts."""
    return (found := _class_of(kind)) is not None and all(
        hasattr(found, f"get_{each}_features") for each in ("image", "text")
    )


def _class_of(kind: str) -> Any:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    found: Any = MODEL_MAPPING.get(CONFIG_MAPPING[kind], None)  # pyright: ignore[reportArgumentType]
    return found


class _ImageHalf:
    """What makes a model of transformers one from images to features."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, D) features of (B, C, H, W) pixels."""
        model: Any = self
        return _features(model.get_image_features(pixel_values=pixel_values))


class _ImageHalfOfPatches:
    """The same of NaFlex, which gets patches of images that may have other shapes."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, D) features of (B, C, H, W) pixels."""
        import torch

        model: Any = self
        side = model.config.vision_config.patch_size
        cut = pixel_values.unfold(2, side, side).unfold(3, side, side)  # (B, C, rows, columns, side, side)
        count, _, rows, columns = cut.shape[:4]
        patches = cut.permute(0, 2, 3, 4, 5, 1).reshape(count, rows * columns, -1)
        found = model.get_image_features(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device),
            spatial_shapes=torch.tensor([[rows, columns]] * count, device=patches.device),
        )
        return _features(found)


class _TextHalf:
    """What makes a model of transformers one from tokens to features."""

    def forward(self, **tokens: Tensor) -> Tensor:
        """(B, D) features of what the tokenizer gives."""
        model: Any = self
        return _features(model.get_text_features(**tokens))


def _features(found: Any) -> Tensor:
    return getattr(found, "pooler_output", found)  # older versions give the tensor itself


_TOKENIZER_HINT = (
    "fetch or copy the whole repository of the base; a tokenizer without `tokenizer.json` may need "
    "`pip install sentencepiece`"
)


class LibraryTokenizer:
    """Prompts to tokens by the tokenizer that transformers makes of the folder, by the rules of the model."""

    def __init__(self, folder: Path, config: Any) -> None:
        """Raises InputError if a file is missing or damaged, or a library that the tokenizer needs is not installed."""
        from transformers import AutoTokenizer

        try:
            with _silent():
                self._library: Any = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        except Exception as error:  # the library raises anything
            raise InputError(
                f"{folder}: its tokenizer cannot be read: {_said(error)}",
                _TOKENIZER_HINT,
            ) from error
        # a class that does not find its file makes a tokenizer without words
        words = self._library("a photo of a cat", add_special_tokens=False)["input_ids"]
        if not set(words) - {self._library.unk_token_id}:
            raise InputError(
                f"{folder}: its tokenizer, a {type(self._library).__name__}, knows no words: its vocabulary is missing",
                _TOKENIZER_HINT,
            )
        self._lower = config.model_type in _SIGMOID
        length = config.text_config.max_position_embeddings
        self.limit = min(length, self._library.model_max_length)
        self._padding = (
            {"padding": "max_length", "max_length": length}
            if self._lower
            else {"padding": True, "return_attention_mask": True}
        )
        taken = inspect.signature(_class_of(config.model_type).get_text_features).parameters
        self._taken = {"input_ids", *taken}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` (N, S) int64, and what else the model takes of what the tokenizer gives."""
        texts = [each.lower() for each in prompts] if self._lower else list(prompts)
        found = self._library(texts, return_tensors="pt", truncation=False, **self._padding)
        return {name: each for name, each in found.items() if name in self._taken}


class ImageHalf(NamedTuple):
    """A dual encoder without its text tower, and what goes into it."""

    model: Any
    processor: ImageProcessor
    shapes: Mapping[str, tuple[int, ...]]
    """Of all weights of the file that the model uses."""


def read_image_half(path: Path, stored: Checkpoint, kind: str) -> ImageHalf:
    """The model in a folder as transformers has it, in float32, from images to features.

    Raises:
        InputError: it is of another kind than those that can be evaluated, or parts do not fit.
    """
    config = _config(path)
    lacking = [name for name in _SIZES if not isinstance(getattr(config.vision_config, name, None), int)]
    if lacking:
        raise InputError(
            f"{path}: is a model of the kind `{kind}`, whose vision tower has no {quoted(lacking)}", _HINT
        )
    processor, takes_patches = _processor(path, config)
    if not hasattr(config, "projection_dim"):
        config.projection_dim = config.vision_config.hidden_size
    half = _ImageHalfOfPatches if takes_patches else _ImageHalf
    model = _made(half, config)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    foreign = [
        each for each in ("logit_scale", VISION, TEXT) if not any(name.startswith(each) for name in shapes)
    ]
    if foreign:
        raise InputError(f"{path}: is a model of the kind `{kind}`, which has no {quoted(foreign)}", _HINT)
    expect_weights(path, shapes, stored)
    expect_fit(processor, path, config.vision_config)
    _drop(model, text=True)
    return ImageHalf(_filled(model, stored), processor, shapes)


def read_text_half(path: Path, stored: Checkpoint) -> Any:
    """The same model from tokens to features."""
    model = _made(_TextHalf, _config(path))
    _drop(model, text=False)
    return _filled(model, stored)


def read_whole(path: Path, stored: Checkpoint) -> Any:
    """The same model as transformers has it."""
    return _filled(_made(None, _config(path)), stored)


def vision_class(folder: Path) -> tuple[Any, Any]:
    """The configuration of the vision tower in a folder, and the class that transformers has for it."""
    from transformers import MODEL_MAPPING, AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, **_LOCAL)
    config = getattr(config, "vision_config", config)
    return config, MODEL_MAPPING[type(config)]


def library_version() -> str:
    """What computes the features, as a part of digests."""
    import transformers

    return f"transformers {transformers.__version__}"


def _config(path: Path) -> Any:
    import torch
    from transformers import AutoConfig

    try:
        with _silent():
            config: Any = AutoConfig.from_pretrained(path, **_LOCAL)
        parts = (config, config.vision_config, config.text_config)
    except Exception as error:  # the library raises anything
        raise InputError(f"{path / 'config.json'}: cannot be used: {_said(error)}") from error
    for each in parts:
        each.dtype = torch.float32
    return config


def _processor(path: Path, config: Any) -> tuple[ImageProcessor, bool]:
    """What becomes of images, and whether the tower gets patches; sets `image_size` where it is not fixed."""
    from transformers import AutoImageProcessor

    try:
        with _silent():
            found: Any = AutoImageProcessor.from_pretrained(path, **_LOCAL)
        known: dict[str, Any] = found.to_dict()
    except Exception as error:  # the library raises anything
        raise InputError(f"{path}: its image processor cannot be read: {_said(error)}") from error
    name = type(found).__name__.removesuffix("Pil").removesuffix("Fast")
    if name not in (*_PROCESSORS, _PATCHES):
        raise InputError(
            f"{path}: is a model of the kind `{config.model_type}`, whose images are prepared by `{name}`",
            _HINT,
        )
    known = {**known, "do_center_crop": known.get("do_center_crop") or False}
    if name == _PATCHES:
        side = math.isqrt(found.max_num_patches) * config.vision_config.patch_size
        known["size"] = {"height": side, "width": side}
        config.vision_config.image_size = side
    elif not isinstance(getattr(config.vision_config, "image_size", None), int):
        raise InputError(f"{path}: `image_size` of its vision tower: expected a whole number", _HINT)
    return processor_of(known, path), name == _PATCHES


def _made(half: type | None, config: Any) -> Any:
    """A model whose weights are not set: memory that nobody has touched takes no room."""
    from transformers.initialization import no_init_weights

    found = _class_of(config.model_type)
    kind = type(found.__name__, (half, found), {"__module__": __name__}) if half else found
    with no_init_weights(), _silent():
        return kind(config)


def _drop(model: Any, *, text: bool) -> None:
    """Takes out the parts of the text half, or of the other."""
    for name, _ in list(model.named_children()):
        if name.startswith("text_") == text:
            delattr(model, name)


def _filled(model: Any, stored: Checkpoint) -> Any:
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(stored.read(name).to(torch.float32))
    return model.requires_grad_(False).eval()


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
