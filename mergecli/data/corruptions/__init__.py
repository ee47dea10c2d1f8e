"""Seven image corruptions at five severities, after ImageNet-C, with the same pixels on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mergecli.runtime.errors import UsageError, did_you_mean, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

SEVERITIES = (1, 2, 3, 4, 5)

CONSTANTS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "jpeg_compression": (25, 18, 15, 10, 7),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "spatter": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    }
)
"""For each severity: the factor of the contrast; the standard deviation of the noise, 1 being white; the share of
values hit; the JPEG quality; radius and sigma of the blur in pixels; the remaining share of the side; and for
`spatter` mean, standard deviation, blur and threshold of the liquid, then for water (0) its opacity and for mud (1)
the blur of its outline.

They are the constants of ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, arXiv 1903.12261; the authors' `make_imagenet_c.py`), for images of
224 x 224 pixels. Those of CIFAR-10-C, for 32 x 32 pixels, are other and milder ones.
"""

NAMES = tuple(CONSTANTS)


def check(name: str, severity: int) -> None:
    """Checks that there is such a corruption, and such a severity.

    Raises:
        UsageError: `name` is not one of `NAMES`, or `severity` not one of `SEVERITIES`.
    """
    if name not in NAMES:
        raise UsageError(
            f"unknown corruption `{name}`{did_you_mean(name, NAMES)}", f"there are {quoted(NAMES)}"
        )
    if type(severity) is not int or severity not in SEVERITIES:
        raise UsageError(f"corruption `{name}`: expected a severity from 1 to 5, got {severity!r}")


def corrupt(image: Image, name: str, severity: int, seed_text: str) -> Image:
    """The image corrupted: RGB, of the same size.

    It belongs after the processor's resize and center crop to 224 x 224, and before rescaling and normalization: the
    constants count pixels of an image of that size. An image of any other size is corrupted with the same constants, so
    that a smaller one suffers more. An image of another mode is converted to RGB first.

    Random numbers (noise, angle of the blur, drops) come from PCG64, seeded with the SHA-256 of the name, the severity
    and `seed_text`. That should name the image and nothing else: then neither the order nor the number of processes
    matters. Wherever NumPy draws the same normal numbers and Pillow has the same JPEG library, the pixels are the same.

    Differs from ImageNet-C: its files were made from a crop of an image resized to 256 pixels, and stored again as JPEG
    of quality 85. Here neither is done. Each effect says what else differs.

    Raises:
        UsageError: as `check`.
    """
    check(name, severity)
    import numpy as np
    from PIL import Image

    from mergecli.data.corruptions.effects import EFFECTS

    seed = sha256(f"{name}\n{severity}\n{seed_text}".encode("utf-8", "surrogatepass")).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big")))
    constant = CONSTANTS[name][severity - 1]
    return Image.fromarray(EFFECTS[name](np.asarray(image.convert("RGB")), constant, rng))
