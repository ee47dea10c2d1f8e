"""A CLIP's own image processor: what it makes of images, against which ours is held, and other configurations of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mergecli.clip.model import Clip
from mergecli.clip.processor import read_processor


def pixel_values(clip: Clip, images: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) float32: the images resized, cropped and normalized as the checkpoint's own config says."""
    return their_processor(clip)(images=list(images), return_tensors="pt")["pixel_values"].to(torch.float32)


def their_processor(clip: Clip) -> Any:
    """The image processor that transformers makes of the checkpoint's config."""
    from transformers import CLIPImageProcessorPil

    known: Any = CLIPImageProcessorPil.from_pretrained(clip.path)
    ours = clip.processor  # what transformers cannot read is written plainly
    known.resample, known.do_center_crop = ours.resample, ours.do_center_crop
    known.image_mean, known.image_std = ours.image_mean, ours.image_std
    return known


def configured(clip: Clip, folder: Path, **given: object) -> Clip:
    """The CLIP with another configuration of its image processor."""
    shutil.copytree(clip.path, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    return replace(clip, path=folder, processor=read_processor(folder))
