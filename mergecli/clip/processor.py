"""A CLIP's image processor as its folder writes it: read, checked, and said in one way."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

from mergecli.data.decoding import ResizeAndCrop
from mergecli.runtime.errors import InputError, MergecliWarning, did_you_mean, listed, toml_text

_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""PIL's filters; each one's place is its number."""
_MOST = 50.0
"""Towers are trained on numbers near 1; pixels that were not divided by 255 give some hundreds."""
_HINT = "copy `preprocessor_config.json` of the model that the tower was made from"


def pil_processor() -> Any:
    """The image processor class that works with PIL, under whichever name this transformers has it."""
    import transformers

    for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"):
        with contextlib.suppress(AttributeError, ImportError):
            found = getattr(transformers, name)
            if not getattr(found, "is_fast", False):
                return found
    from transformers.models.clip import image_processing_clip

    return image_processing_clip.CLIPImageProcessor


def read_processor(folder: Path) -> Any:
    """The image processor in a folder, with `resample` as PIL's number, a mean and a divisor for each channel, and no
    crop where there is no size of one, however the file writes them.

    Raises:
        InputError: a value cannot be used; all of them are listed.
    """
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file() and not isinstance(_json(file), dict):
            raise InputError(f"{file}: expected a table of JSON: how images are prepared", _HINT)
    known = pil_processor().from_pretrained(folder, local_files_only=True)
    if problems := list(_settled(known)):
        raise InputError(f"{folder}: its image processor cannot be used:\n{listed(problems)}", _HINT)
    return known


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _settled(known: Any) -> Iterator[str]:
    """Writes the processor's values in one way; what is wrong with them."""
    if isinstance(known.resample, str) and known.resample.lower() in _FILTERS:
        known.resample = _FILTERS.index(known.resample.lower())
    if known.do_resize and known.resample not in range(len(_FILTERS)):
        near = did_you_mean(known.resample, _FILTERS) if isinstance(known.resample, str) else ""
        yield f"`resample`: expected a number from 0 to 5 or one of {', '.join(_FILTERS)}, got {_said(known.resample)}{near}"
    if known.crop_size is None:
        known.do_center_crop = False
    if known.do_rescale and not _positive(known.rescale_factor):
        yield f"`rescale_factor`: expected a number above 0, got {_said(known.rescale_factor)}"
    if known.do_normalize:
        for name, smallest in (("image_mean", -math.inf), ("image_std", 0.0)):
            value = getattr(known, name)
            if _number(value):
                value = (float(value),) * 3
                setattr(known, name, value)
            every: Sequence[object] = (
                cast("Sequence[object]", value) if isinstance(value, list | tuple) else ()
            )
            if len(every) != 3 or not all(_number(each) and each > smallest for each in every):
                above = " above 0" if not smallest else ""
                yield f"`{name}`: expected three numbers{above}, one for each channel, got {_said(value)}"


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _said(value: object) -> str:
    return "nothing" if value is None else toml_text(value)


def framing_of(known: Any, path: Path) -> tuple[ResizeAndCrop, tuple[int, int]]:
    """What a processor does before it rescales, and the height and width that come out.

    Raises:
        InputError: it does something else than a CLIP's, or gives images of several sizes.
    """
    size, crop = known.size, known.crop_size
    fixed = (size.height, size.width) if size and known.do_resize and size.height and size.width else None
    shorter = size.shortest_edge if size and known.do_resize and not fixed else None
    cut = (crop.height, crop.width) if known.do_center_crop and crop.height and crop.width else None
    result = cut or fixed
    if result is None and shorter:
        raise InputError(
            f"{path}: its image processor crops nothing, so that images of several sizes come out",
            "`preprocessor_config.json` should have `do_center_crop`, and `crop_size` of the size that the tower takes",
        )
    if result is None or known.do_pad or (known.do_resize and (not (fixed or shorter) or size.longest_edge)):
        raise InputError(
            f"{path}: its image processor is not one of CLIP's",
            "`preprocessor_config.json` should have `size` with `shortest_edge`, and `crop_size`",
        )
    return ResizeAndCrop(shorter, fixed, int(known.resample or 0), cut), result


def expect_fit(known: Any, path: Path, vision: Any) -> None:
    """Compares a processor with the configuration of the vision tower that gets its images.

    Raises:
        InputError: the tower takes images of another size, or not of three channels.
    """
    height, width = framing_of(known, path)[1]
    side, channels = vision.image_size, vision.num_channels
    if channels != 3:
        raise InputError(f"{path}: `num_channels` of its vision tower: expected 3, got {channels}")
    if (height, width) != (side, side):
        raise InputError(
            f"{path}: its image processor gives {height} x {width} pixels, its vision tower takes {side} x {side}",
            f"{_HINT}; or set `size` and `crop_size` in it",
        )
    if (largest := _largest(known)) > _MOST:
        warnings.warn(
            f"{path}: its image processor makes {largest:,.0f} of a pixel; expected numbers near 1: `do_rescale`, "
            "`rescale_factor`, `image_mean` and `image_std` may not be those that the tower was trained with",
            MergecliWarning,
            stacklevel=2,
        )


def _largest(known: Any) -> float:
    """The largest number, whatever its sign, that a pixel becomes."""
    ends = [0.0, 255.0 * (known.rescale_factor if known.do_rescale else 1.0)]
    mean, std = (known.image_mean, known.image_std) if known.do_normalize else ((0.0,), (1.0,))
    return max(abs((end - m) / s) for end in ends for m, s in zip(mean, std, strict=True))
