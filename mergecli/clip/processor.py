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
_USUAL: dict[str, Any] = {
    "do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
"""What a CLIP's image processor does where its file does not say."""
_USED_IF = {
    "size": "do_resize", "resample": "do_resize", "crop_size": "do_center_crop", "rescale_factor": "do_rescale",
    "image_mean": "do_normalize", "image_std": "do_normalize",
}  # fmt: skip
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


def processor_differences(own: Path, base: Path) -> Iterator[str]:
    """In what the image processor in one folder differs from that in another, by what they do and not by how their files
    say it. Nothing where a folder has none.

    It is read without transformers, which takes longer to import than a merge takes.
    """
    ours, theirs = _steps(own), _steps(base)
    if ours is not None and theirs is not None:
        for name, value in ours.items():
            if value != theirs[name]:
                yield f"`{name}` is {_said(value)}, not {_said(theirs[name])}"


def _steps(folder: Path) -> dict[str, Any] | None:
    """What the image processor in a folder does; None if there is none, or its file cannot be read."""
    both, own = (_json(folder / name) for name in ("processor_config.json", "preprocessor_config.json"))
    found: Any = cast("dict[str, Any]", both).get("image_processor") if isinstance(both, dict) else None
    given: object = found if isinstance(found, dict) else own
    if not isinstance(given, dict):
        return None
    table = cast("dict[str, Any]", given)
    known = {**_USUAL, **{name: value for name, value in table.items() if name in _USUAL}}
    return {name: _one_spelling(name, known[name]) if known[use] else None for name, use in _USED_IF.items()}


def _one_spelling(name: str, value: Any) -> Any:
    """A value of a processor's file, however it is written: sizes as tables, filters as words, a number for each channel."""
    if name == "resample" and type(value) is int and value in range(len(_FILTERS)):
        return _FILTERS[value]
    if isinstance(value, str):
        return value.lower()
    if name in ("size", "crop_size") and _number(value):
        return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    if name in ("size", "crop_size") and isinstance(value, dict):
        sides = cast("dict[str, Any]", value)
        return {side: sides[side] for side in sorted(sides) if sides[side] is not None}
    if name in ("image_mean", "image_std"):
        return [_rounded(each) for each in (value if isinstance(value, list) else [value] * 3)]
    return _rounded(value)


def _rounded(value: Any) -> Any:
    """A number without the digits that programs write differently."""
    return float(f"{value:.6g}") if _number(value) else value


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
