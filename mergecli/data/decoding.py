"""Images decoded, resized and cropped as the model's processor does it, in this process or in several; no torch."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mergecli.storage.file_state import CHANGED_HINT, is_unchanged

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

FEW = 512
"""Up to so many images are decoded by this process alone: to start others would take longer."""


MOST_PIXELS = 1 << 26
"""An image that would be resized to more pixels is refused: a few bytes of a thin one can ask for gigabytes."""


class EncodedImage(NamedTuple):
    """An image that is not decoded yet, and can be sent to another process."""

    content: bytes | str | tuple[str, str, int] | None
    """An image file, as bytes or as its path; or task, split and number of a toy's drawing; None if there is none."""
    mode: str | None = None
    """What it is converted to before it becomes RGB, as PIL calls it."""
    state: int | None = None
    """Of its file, when the digest of the data was taken."""


@dataclass(frozen=True)
class ResizeAndCrop:
    """What an image processor does before it rescales; lengths in pixels."""

    shortest_edge: int | None
    """The shorter side after resizing; else `size`."""
    size: tuple[int, int] | None
    """Height and width after resizing; None with no `shortest_edge`: nothing is resized."""
    resample: int
    """PIL's number of the filter."""
    crop: tuple[int, int] | None
    """Height and width of the middle that is kept; an image that is smaller gets a black margin."""


class Corruption(NamedTuple):
    """A corruption of every image after it was cropped."""

    name: str
    severity: int


class Block(NamedTuple):
    """Images that one process decodes at a time."""

    images: Sequence[EncodedImage]
    resize_and_crop: ResizeAndCrop
    corruption: Corruption | None
    seeds: Sequence[str]
    """What the random numbers of a corruption are seeded with, for each image."""


class Unreadable(NamedTuple):
    """The first image of a block that cannot be read, and why."""

    number: int
    reason: str
    hint: str = ""


class UnreadableImageError(Exception):
    """An image that cannot be decoded, or whose pixels have no known range; the text is the reason."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def decoded(encoded: EncodedImage) -> Image:
    """The image as 8-bit RGB, turned as its EXIF orientation says.

    Raises:
        UnreadableImageError: it is damaged, is not there, has pixels of an unknown range, or its file has changed.
    """
    import PIL

    content = encoded.content
    if isinstance(content, tuple):
        from mergecli.data.toy.drawing import draw

        return draw(*content)[0]
    if content is None or (isinstance(content, str) and not Path(content).is_file()):
        raise UnreadableImageError("there is none" + (f" at {content}" if content else ""))
    try:
        try:
            return _opened(content, encoded.mode)
        finally:  # whatever was read of a file that changed, and whatever was wrong with it
            if isinstance(content, str) and encoded.state is not None:
                _expect_unchanged(content, encoded.state)
    except UnreadableImageError:
        raise
    except MemoryError as error:
        raise UnreadableImageError("it needs more memory than there is") from error
    except PIL.UnidentifiedImageError as error:
        where = f": {content}" if isinstance(content, str) else ""
        raise UnreadableImageError(f"it is no image of a kind that Pillow knows{where}") from error
    except Exception as error:  # a damaged file makes the decoders of Pillow raise errors of any kind
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _expect_unchanged(path: str, before: int) -> None:
    if not is_unchanged(path, before):
        raise UnreadableImageError(f"{path} changed while it was being read", CHANGED_HINT)


def _opened(content: bytes | str, mode: str | None) -> Image:
    import PIL.Image

    with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
        image: Image = opened
        image.load()  # a cut file fails here and not later: `open` reads the header only
        turn = _turn(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        if turn is not None:
            image = image.transpose(turn)
        if mode and mode != image.mode:
            image = image.convert(mode)
        return image if image.mode == "RGB" else image.convert("RGB")


def _turn(image: Image) -> Any:
    """How the image is turned or mirrored to be upright; None where it is, or its EXIF cannot be read.

    Why not `ImageOps.exif_transpose`: it writes the rest of the EXIF anew, which fails for tags that any viewer skips.
    """
    from PIL import ExifTags
    from PIL.Image import Transpose as How

    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        ways = {
            2: How.FLIP_LEFT_RIGHT, 3: How.ROTATE_180, 4: How.FLIP_TOP_BOTTOM, 5: How.TRANSPOSE,
            6: How.ROTATE_270, 7: How.TRANSVERSE, 8: How.ROTATE_90,
        }  # fmt: skip
        return ways.get(orientation)
    except Exception:  # noqa: BLE001  the pixels are whole, and a viewer shows them
        return None


def _eight_bits(image: Image) -> Image:
    """An image of more than 8 bits a pixel, scaled by the range of its type: Pillow would cut it off at 255.

    Raises:
        UnreadableImageError: the range is unknown.
    """
    import numpy as np
    import PIL.Image

    pixels = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise UnreadableImageError(
                f"its pixels are floating-point numbers from {pixels.min():g} to {pixels.max():g}, "
                "of which only those from 0 to 1 have a known range: save it with 8 or 16 bits a pixel"
            )
        scaled = pixels.astype(np.float64)
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        bits = tags.get(258)  # of a TIFF: 12 bits are stored as 16, too
        most = (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1 if bits else 65535
        scaled = np.clip(pixels.astype(np.float64) / most, 0, 1)
        if tags.get(262) == 0:  # white is zero
            scaled = 1 - scaled
    else:
        raise UnreadableImageError(
            "its pixels are whole numbers of 32 bits or with a sign, whose range is unknown: "
            "save it with 8 or 16 bits a pixel"
        )
    return PIL.Image.fromarray((scaled * 255 + 0.5).astype(np.uint8))


def resized_and_cropped(image: Image, how: ResizeAndCrop) -> ndarray[Any, Any]:
    """(3, H, W) uint8: an RGB image resized and cropped, bit by bit as transformers' processor of PIL does it.

    Differs for a palette image with a transparent color: Pillow still names that color in the `info` of the image that was
    converted to RGB, and the processor of transformers 5 makes its pixels white. Here they keep the color, as they did with
    transformers 4.

    Raises:
        UnreadableImageError: the image is so thin that the resized one would fill the memory.
    """
    import numpy as np

    width, height = image.size
    if how.shortest_edge is not None:
        edge = how.shortest_edge
        size = (edge, edge * height // width) if width <= height else (edge * width // height, edge)
        if size[0] * size[1] > MOST_PIXELS:
            raise UnreadableImageError(
                f"it is too thin: {width:,} x {height:,} pixels would be resized to {size[0]:,} x {size[1]:,}"
            )
        image = image.resize(size, how.resample)
    elif how.size is not None:
        image = image.resize((how.size[1], how.size[0]), how.resample)
    array = np.asarray(image)
    if how.crop is not None:
        array = _middle(array, *how.crop)
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _middle(array: ndarray[Any, Any], height: int, width: int) -> ndarray[Any, Any]:
    """(height, width, 3): the middle of an (H, W, 3) image, which lies in the middle of black if it is smaller."""
    import numpy as np

    above, left = -((array.shape[0] - height) // 2), -((array.shape[1] - width) // 2)
    if above > 0 or left > 0:
        margins = [
            (max(place, 0), max(length - size - max(place, 0), 0))
            for place, length, size in ((above, height, array.shape[0]), (left, width, array.shape[1]))
        ]
        array = np.pad(array, (*margins, (0, 0)))
    top, first = max(-above, 0), max(-left, 0)
    return array[top : top + height, first : first + width]


def decode_block(block: Block) -> ndarray[Any, Any] | Unreadable:
    """(B, 3, H, W) uint8, or what cannot be read."""
    import numpy as np

    found: list[Any] = []
    for number, encoded in enumerate(block.images):
        try:
            array = resized_and_cropped(decoded(encoded), block.resize_and_crop)
        except UnreadableImageError as error:
            return Unreadable(number, str(error), error.hint)
        except MemoryError:
            return Unreadable(number, "it needs more memory than there is")
        if block.corruption is not None:
            array = _corrupted(array, block.corruption, block.seeds[number])
        found.append(array)
    return np.stack(found)


def _corrupted(array: ndarray[Any, Any], corruption: Corruption, seed: str) -> ndarray[Any, Any]:
    import numpy as np
    import PIL.Image

    from mergecli.data.corruptions import corrupt

    image = corrupt(PIL.Image.fromarray(array.transpose(1, 2, 0)), corruption.name, corruption.severity, seed)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class Decoders:
    """Processes that decode images, one block at a time each; with one worker, this process itself.

    Each child is fed by a thread through a pipe. Why not `ProcessPoolExecutor`: its children import the caller's main file,
    which fails in a script without `if __name__ == "__main__"`; they stay when this process is killed, where a child of ours
    finds its pipe closed and ends; and pixels pass through one thread of it, at half as many images a second.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._children: list[subprocess.Popen[bytes]] = []

    def submit(self, make: Callable[[], Block]) -> Future[ndarray[Any, Any] | Unreadable]:
        """What `decode_block` makes of the block, which another thread makes."""
        return self._threads.submit(self._decode, make)

    def _decode(self, make: Callable[[], Block]) -> ndarray[Any, Any] | Unreadable:
        block = make()
        if self.workers == 1:
            return decode_block(block)
        try:
            child = getattr(self._own, "child", None) or self._start()
            assert child.stdin is not None
            assert child.stdout is not None
            pickle.dump(block, child.stdin)
            child.stdin.flush()
            return pickle.load(child.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):  # the child was killed, or cannot be started here
            return decode_block(block)

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from mergecli.data.decoding import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )  # fmt: skip  Ctrl-C is for this process alone, which ends the others
        self._own.child = child
        self._children.append(child)
        return child

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            with contextlib.suppress(BrokenPipeError), child:  # one that died still has a block in its pipe
                child.kill()


def serve() -> None:
    """Decodes the blocks that come on stdin and sends the pixels to stdout, until there are no more."""
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up among the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pickle.dump(decode_block(pickle.load(sys.stdin.buffer)), answers, protocol=5)
            answers.flush()


def workers_for(images: int, given: int | None = None) -> int:
    """How many processes decode so many images: as given, else one for each processor, at most eight."""
    if given is not None:
        return given
    if images <= FEW:
        return 1
    available = getattr(os, "sched_getaffinity", None)
    return min(8, len(available(0)) if available else os.cpu_count() or 1)
