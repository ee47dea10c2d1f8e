"""A CLIP's image processor as its folder writes it: read, checked, and said in one way."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from mergecli.clip.config import VisionConfig
from mergecli.data.decoding import ResizeAndCrop
from mergecli.runtime.errors import InputError, MergecliWarning, did_you_mean, listed, toml_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


@dataclass(frozen=True)
class ImageProcessor:
    """What becomes of an image before the vision tower gets it, with every value written in one way."""

    do_resize: bool
    size: Mapping[str, int] | None
    resample: int
    """PIL's number of a filter."""
    do_center_crop: bool
    crop_size: Mapping[str, int] | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    do_convert_rgb: bool = True
    do_pad: bool = False

    def levels(self) -> NDArray[np.float32]:
        """(3, 256) float32: what each byte of a channel becomes, in the arithmetic of transformers: the factor in float64,
        the rest in float32."""
        import numpy as np

        values = np.arange(256, dtype=np.float64)
        found = (values * self.rescale_factor if self.do_rescale else values).astype(np.float32)
        every = np.broadcast_to(found, (3, 256))
        if not self.do_normalize:
            return every.copy()
        mean, std = (np.array(each, np.float32)[:, None] for each in (self.image_mean, self.image_std))
        return (every - mean) / std

    def to_json_string(self) -> str:
        """As transformers writes it, so that digests of earlier results stay what they were."""
        table = {"image_processor_type": "CLIPImageProcessor", **asdict(self)}
        if not self.do_pad:
            del table["do_pad"]
        return json.dumps(table, indent=2, sort_keys=True) + "\n"


def read_processor(folder: Path) -> ImageProcessor:
    """The image processor in a folder, with `resample` as PIL's number, a mean and a divisor for each channel, and no
    crop where there is no size of one, however the file writes them.

    Raises:
        InputError: a value cannot be used; all of them are listed.
    """
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file() and not isinstance(_json(file), dict):
            raise InputError(f"{file}: expected a table of JSON: how images are prepared", _HINT)
    given = _table(folder)
    if given is None:
        raise InputError(f"{folder}: has no image processor", _HINT)
    return processor_of(given, folder)


def processor_of(given: Mapping[str, Any], folder: Path) -> ImageProcessor:
    """The image processor that a table means; raises InputError if a value cannot be used."""
    known, problems = _settled(given)
    if problems:
        raise InputError(f"{folder}: its image processor cannot be used:\n{listed(problems)}", _HINT)
    return ImageProcessor(**known)


def _table(folder: Path) -> dict[str, Any] | None:
    """What the folder's file says of its image processor; None if there is no such file, or it cannot be read."""
    both, own = (_json(folder / name) for name in ("processor_config.json", "preprocessor_config.json"))
    found: Any = cast("dict[str, Any]", both).get("image_processor") if isinstance(both, dict) else None
    given: object = found if isinstance(found, dict) else own
    return cast("dict[str, Any]", given) if isinstance(given, dict) else None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def processor_differences(own: Path, base: Path) -> Iterator[str]:
    """In what the image processor in one folder differs from that in another, by what they do and not by how their files
    say it. Nothing where a folder has none.
    """
    ours, theirs = _steps(own), _steps(base)
    if ours is not None and theirs is not None:
        for name, value in ours.items():
            if value != theirs[name]:
                yield f"`{name}` is {_said(value)}, not {_said(theirs[name])}"


def _steps(folder: Path) -> dict[str, Any] | None:
    """What the image processor in a folder does; None if there is none, or its file cannot be read."""
    table = _table(folder)
    if table is None:
        return None
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


def _settled(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of a processor's file, each written in one way, and what is wrong with them."""
    known = {**_USUAL, "do_convert_rgb": True, "do_pad": False}
    known |= {name: value for name, value in given.items() if name in known}
    wrong: list[str] = []
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"):
        known[name] = bool(known[name])
    for name in ("size", "crop_size"):
        known[name] = _sides(name, known[name], wrong if known[_USED_IF[name]] else [])
    if known["crop_size"] is None:
        known["do_center_crop"] = False
    filter_ = known["resample"]
    found = (
        _FILTERS.index(filter_.lower())
        if isinstance(filter_, str) and filter_.lower() in _FILTERS
        else filter_
    )
    known["resample"] = int(found) if found in range(len(_FILTERS)) else 0
    if known["do_resize"] and found not in range(len(_FILTERS)):
        near = did_you_mean(filter_, _FILTERS) if isinstance(filter_, str) else ""
        wrong.append(
            f"`resample`: expected a number from 0 to 5 or one of {', '.join(_FILTERS)}, got {_said(filter_)}{near}"
        )
    if known["do_rescale"] and not _positive(known["rescale_factor"]):
        wrong.append(f"`rescale_factor`: expected a number above 0, got {_said(known['rescale_factor'])}")
    for name, smallest in (("image_mean", -math.inf), ("image_std", 0.0)):
        value = known[name]
        if _number(value):
            value = (float(value),) * 3
        every = tuple(cast("Sequence[object]", value)) if isinstance(value, list | tuple) else ()
        known[name] = every
        if known["do_normalize"] and (
            len(every) != 3 or not all(_number(each) and each > smallest for each in every)
        ):
            above = " above 0" if not smallest else ""
            wrong.append(f"`{name}`: expected three numbers{above}, one for each channel, got {_said(value)}")
    return known, wrong


def _sides(name: str, value: Any, wrong: list[str]) -> dict[str, int] | None:
    """A size as a table of its sides; adds to `wrong` what is none."""
    sides = value
    if _number(value):
        sides = {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    elif isinstance(value, list | tuple):
        every = cast("Sequence[Any]", value)
        sides = dict(zip(("height", "width"), every, strict=False)) if len(every) == 2 else ""
    elif isinstance(value, dict):
        sides = {side: each for side, each in cast("dict[str, Any]", value).items() if each is not None}
    if sides is None:
        return None
    if not isinstance(sides, dict) or not all(map(_positive, cast("dict[str, Any]", sides).values())):
        wrong.append(
            f"`{name}`: expected a number, or a table with `height` and `width`"
            f"{' or `shortest_edge`' if name == 'size' else ''}, got {_said(value)}"
        )
        return None
    return {side: int(each) for side, each in cast("dict[str, Any]", sides).items()}


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _said(value: object) -> str:
    return "nothing" if value is None else toml_text(value)


def framing_of(known: ImageProcessor, path: Path) -> tuple[ResizeAndCrop, tuple[int, int]]:
    """What a processor does before it rescales, and the height and width that come out.

    Raises:
        InputError: it does something else than a CLIP's, or gives images of several sizes.
    """
    size = (known.size or {}) if known.do_resize else {}
    crop = (known.crop_size or {}) if known.do_center_crop else {}
    fixed, cut = _rectangle(size), _rectangle(crop)
    shorter = size.get("shortest_edge") if not fixed else None
    result = cut or fixed
    if result is None and shorter:
        raise InputError(
            f"{path}: its image processor crops nothing, so that images of several sizes come out",
            "`preprocessor_config.json` should have `do_center_crop`, and `crop_size` of the size that the tower takes",
        )
    more = size.keys() - {"height", "width", "shortest_edge"}
    if result is None or known.do_pad or (known.do_resize and (not (fixed or shorter) or more)):
        raise InputError(
            f"{path}: its image processor is not one of CLIP's",
            "`preprocessor_config.json` should have `size` with `shortest_edge`, and `crop_size`",
        )
    return ResizeAndCrop(shorter, fixed, known.resample, cut), result


def _rectangle(sides: Mapping[str, int]) -> tuple[int, int] | None:
    """Height and width; None if one is not there."""
    return (sides["height"], sides["width"]) if sides.keys() >= {"height", "width"} else None


def expect_fit(known: ImageProcessor, path: Path, vision: VisionConfig) -> None:
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


def _largest(known: ImageProcessor) -> float:
    """The largest number, whatever its sign, that a pixel becomes."""
    ends = [0.0, 255.0 * (known.rescale_factor if known.do_rescale else 1.0)]
    mean, std = (known.image_mean, known.image_std) if known.do_normalize else ((0.0,), (1.0,))
    return max(abs((end - m) / s) for end in ends for m, s in zip(mean, std, strict=True))
