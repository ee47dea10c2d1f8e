"""Pixels that a table has as nested lists of numbers, as image files."""

from __future__ import annotations

import io
from typing import Any

CHANNELS = (1, 3, 4)


def png_of(values: Any) -> bytes:
    """A PNG file of H x W or H x W x channels pixels.

    Raises:
        ValueError: the lists are laid out otherwise, or the numbers have no known range; the text says how they are.
    """
    import numpy as np
    from PIL import Image

    try:
        pixels = np.array(values)
    except ValueError as error:
        raise ValueError("are lists of different lengths") from error
    shape = " x ".join(map(str, pixels.shape))
    flat = pixels.ndim == 2
    if not flat and not (pixels.ndim == 3 and pixels.shape[2] in CHANNELS):
        first = pixels.ndim == 3 and pixels.shape[0] in CHANNELS
        raise ValueError(f"are lists of {shape}" + (", which has the channels first" if first else ""))
    if pixels.size == 0 or pixels.dtype.kind not in "biuf":
        raise ValueError(
            f"are lists of {shape} " + ("numbers" if pixels.size == 0 else "that are not numbers")
        )
    least, most = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        if not (least >= 0 and most <= 1):
            raise ValueError(f"are floating-point numbers from {least:g} to {most:g}, not from 0 to 1")
        pixels = pixels.astype(np.float64) * 255 + 0.5
    elif pixels.dtype.kind != "b" and (least < 0 or most > 255):
        raise ValueError(f"are whole numbers from {least} to {most}, not from 0 to 255")
    if pixels.dtype.kind == "b":
        pixels = pixels * 255
    pixels = pixels.astype(np.uint8)
    if not flat and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()
