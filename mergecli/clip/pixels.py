"""Pixels: images decoded, resized and cropped once, kept as bytes in a memory-mapped file of the cache."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any

from mergecli.clip.preprocessing import Normalization, resize_and_crop_of
from mergecli.data.decoding import Block, Corruption, Decoders, Unreadable, decode_block, workers_for
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError
from mergecli.storage.alone import alone
from mergecli.storage.cache import allowed_size, cache_path, kept, make_room, remove_damaged, touch
from mergecli.storage.checksums import DamagedFileError
from mergecli.storage.mapped import MappedTensor
from mergecli.storage.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images
    from mergecli.storage.checkpoint import Checkpoint

BLOCK = 32
"""Images that one process decodes at a time, at most."""


@dataclass(frozen=True)
class Pixels:
    """Images as the model gets them, but for the normalization."""

    labels: Tensor
    """(N,) int64."""
    stored: Tensor | None
    """(N, 3, H, W) uint8, in a memory-mapped file or in memory; None if only `read` gives them."""
    read: Callable[[Sequence[int]], Tensor]
    """The images of these numbers, (B, 3, H, W) uint8."""
    verify: Callable[[Sequence[int]], None] = lambda _: None
    """Called with the numbers of the images of `stored` that are about to be used."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, start: int, stop: int) -> Tensor:
        """(stop - start, 3, H, W) uint8: neighboring images."""
        if self.stored is None:
            return self.read(range(start, stop))
        self.verify(range(start, stop))
        return self.stored[start:stop]

    def rows(self, numbers: Tensor) -> Tensor:
        """(B, 3, H, W) uint8: the images of these numbers, in this order."""
        return self.read(numbers.tolist())

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, 3, H, W) uint8 images and their (B,) labels, `size` at a time and in order; ends with KeyboardInterrupt when
        Ctrl-C was pressed."""
        for start in range(0, len(self), size):
            interrupts.check()
            stop = min(start + size, len(self))
            yield self.batch(start, stop), self.labels[start:stop]


@dataclass(frozen=True)
class Processing:
    """How images are processed and kept; none of it but the corruption changes them."""

    corruption: Corruption | None = None
    workers: int | None = None
    """Processes that decode; None takes as many as seem good."""
    max_size: int = 0
    """Bytes that the cache may grow to; 0 does without it."""
    ahead: int = 0
    """Batches that are decoded while the model computes on the one before."""


def cached_pixels(clip: Clip, images: Images, processing: Processing | None = None) -> Pixels:
    """All images, from the cache; if they are not there, they are decoded and put there first.

    Where they cannot be kept (they are larger than the cache may be, the disk is full or read-only) they are decoded
    at every use.

    Raises:
        InputError: an image cannot be read.
    """
    how = processing or Processing(max_size=allowed_size())
    found = stored_pixels(clip, images, how)
    if found is None and make_room(_size(clip, images), how.max_size):
        with _first_to_decode(clip, images, how):
            found = stored_pixels(clip, images, how)
            for _ in () if found else decoded_batches(clip, images, how, 8 * BLOCK):
                interrupts.check()
        found = found or stored_pixels(clip, images, how)
    return found or decoded_alone(clip, images, how)


def chunks(clip: Clip, images: Images, how: Processing, size: int, room: int) -> Generator[Pixels]:
    """All images in order: in one chunk if they are in the cache; else in chunks of whole batches of `size` images and
    at most `room` bytes, or of one batch, and on the way they are put into the cache.

    Why chunks: several models take turns on the same images, each for as long as possible, since to change the weights
    costs time; but the decoded images of a large task do not fit into memory.
    """
    import torch

    found = stored_pixels(clip, images, how)
    if found is not None:
        yield found
        return
    labels = torch.tensor(images.labels)
    with contextlib.ExitStack() as decoding:
        decoding.enter_context(_first_to_decode(clip, images, how))
        found = stored_pixels(clip, images, how)  # another process may have put them there meanwhile
        if found is not None:
            decoding.close()
            yield found
            return
        batches = decoding.enter_context(contextlib.closing(decoded_batches(clip, images, how, size)))
        done = 0
        for first in batches:
            count = min(size * max(room // first.nbytes, 1), len(images) - done)
            # filled in place: to join a list of batches would hold every image twice for a moment
            chunk = first if count <= len(first) else first.new_empty((count, *first.shape[1:]))
            filled = len(first)
            chunk[:filled] = first
            for batch in islice(batches, -(-(count - filled) // size)):
                chunk[filled : filled + len(batch)] = batch
                filled += len(batch)
            done += count
            if done == len(images):
                next(batches, None)  # which gives the file its name
                decoding.close()  # nobody has to wait for the model
            yield in_memory(chunk, labels[done - count : done])


def stored_pixels(clip: Clip, images: Images, how: Processing) -> Pixels | None:
    """The images as the cache has them; None if it has not. Chosen images are also found in the file of all of their split."""
    import torch

    if not how.max_size:
        return None
    _, shape = resize_and_crop_of(clip)
    labels = torch.tensor(images.labels)
    found = _opened(clip, images, how, shape)
    if found is not None:
        return Pixels(labels, found.stored, found.rows, found.verify)
    if images.rows is None:
        return None
    rows = torch.tensor(images.rows)
    every = replace(images, rows=None)
    whole = _opened(clip, every, how, shape)
    # not `whole[rows]` at once: that would read all the chosen images into memory
    return (
        None
        if whole is None
        else Pixels(labels, None, lambda numbers: whole.rows(rows[torch.tensor(numbers)]))
    )


def decoded_batches(clip: Clip, images: Images, how: Processing, size: int) -> Generator[Tensor]:
    """(B, 3, H, W) uint8 batches of `size` images, in order; when the last has been taken, all are in the cache.

    Each batch is cut into blocks, which the processes share. At most `how.ahead + 1` batches are under way: the queue
    bounds the memory, whatever the number of images.

    Raises:
        InputError: an image cannot be read.
    """
    import numpy as np
    import torch

    count, shape = len(images), resize_and_crop_of(clip)[1]
    workers = workers_for(count, how.workers)
    block = min(BLOCK, -(-size // workers))
    what = f"{count} images of {images.where}" + (f", {how.corruption.name}" if how.corruption else "")
    layout = {"pixels": ("U8", (count, 3, *shape)), "labels": ("I64", (count,))}
    every = [range(start, min(start + size, count)) for start in range(0, count, size)]
    coming: deque[list[tuple[range, Any]]] = deque()
    with (
        _Store(_file(clip, images, how), layout, what, _size(clip, images), how.max_size) as store,
        Decoders(workers) as decoders,
    ):
        store.write("labels", torch.tensor(images.labels))
        ahead = iter(every)
        for numbers in every:
            for later in islice(ahead, how.ahead + 1 - len(coming)):
                parts = [later[start : start + block] for start in range(0, len(later), block)]
                coming.append([(part, decoders.submit(_block(clip, images, how, part))) for part in parts])
            arrays = [_readable(images, part, future.result()) for part, future in coming.popleft()]
            batch = torch.from_numpy(np.concatenate(arrays))
            store.write("pixels", batch, numbers.start * batch[0].numel())
            yield batch


def _block(clip: Clip, images: Images, how: Processing, numbers: range) -> Callable[[], Block]:
    """What makes the block of these images: to read them from their files is left to the thread that sends them on."""
    rows = [images.row(number) for number in numbers]
    seeds = [f"{images.fingerprint} {images.split} {row}" for row in rows]
    crop, _ = resize_and_crop_of(clip)
    return lambda: Block([images.encoded(row) for row in rows], crop, how.corruption, seeds)


def _readable(images: Images, numbers: range, found: Any) -> Any:
    if isinstance(found, Unreadable):
        raise images.cannot_read(images.row(numbers[found.number]), found.reason, found.hint)
    return found


def decoded_alone(clip: Clip, images: Images, how: Processing) -> Pixels:
    """The images without the cache: each is decoded by this process whenever it is used."""
    import torch

    def read(numbers: Sequence[int]) -> Tensor:
        parts = [range(number, number + 1) for number in numbers]
        arrays = [_readable(images, part, decode_block(_block(clip, images, how, part)())) for part in parts]
        return torch.cat([torch.from_numpy(array) for array in arrays])

    return Pixels(torch.tensor(images.labels), None, read)


def in_memory(stored: Tensor, labels: Tensor) -> Pixels:
    """(N, 3, H, W) uint8 images and their (N,) labels."""
    import torch

    return Pixels(labels, stored, lambda numbers: stored[torch.tensor(numbers)])


def _size(clip: Clip, images: Images) -> int:
    """Bytes of all images."""
    _, (height, width) = resize_and_crop_of(clip)
    return len(images) * 3 * height * width


def _file(clip: Clip, images: Images, how: Processing) -> Path:
    """The file in the cache for these images, so processed.

    Its name holds all that the bytes depend on. Pillow's version does: its filters and its JPEG library may change.
    """
    import PIL

    about = {
        "data": images.fingerprint,
        "columns": images.columns,
        "rows": None if images.rows is None else list(images.rows),
        "framing": asdict(resize_and_crop_of(clip)[0]),
        "corruption": [*how.corruption, images.split] if how.corruption else None,
        "pillow": PIL.__version__,
    }
    return cache_path("pixels", sha256(json.dumps(about).encode()).hexdigest()[:32])


def _first_to_decode(clip: Clip, images: Images, how: Processing) -> AbstractContextManager[None]:
    """Other processes of the machine that want the same images wait, and find them in the cache."""
    can_be_kept = _size(clip, images) <= how.max_size
    return alone(_file(clip, images, how)) if can_be_kept else contextlib.nullcontext()


class _StoredImages:
    """Images in a file of the cache, mapped into memory. Those that are damaged there are decoded again."""

    def __init__(self, mapped: MappedTensor, again: Callable[[Sequence[int]], Tensor]) -> None:
        self.stored = mapped.tensor
        """(N, 3, H, W) uint8."""
        self._mapped, self._again = mapped, again
        self._size = self.stored[0].numel() if len(self.stored) else 1
        self._lock = threading.Lock()

    def rows(self, numbers: Sequence[int] | Tensor) -> Tensor:
        """(B, 3, H, W) uint8: the images of these numbers, in this order."""
        import torch

        self.verify(numbers)
        return self.stored[torch.as_tensor(numbers)]

    def verify(self, numbers: Sequence[int] | Tensor) -> None:
        """Makes sure that the images of these numbers are those that were put into the file."""
        each = (
            [(numbers[0], numbers[-1])]
            if isinstance(numbers, range) and numbers
            else [(n, n) for n in numbers]
        )
        with self._lock:  # a thread must not use images that another is about to mend
            for first, last in each:
                found = self._mapped.damage(int(first) * self._size, (int(last) + 1) * self._size)
                if found is not None:
                    self._mend(*found)

    def _mend(self, error: DamagedFileError, ranges: Sequence[range]) -> None:
        remove_damaged(error, "its images are decoded")
        for part in ranges:
            images = range(part.start // self._size, -(-part.stop // self._size))
            self.stored[images.start : images.stop] = self._again(images)


def _opened(clip: Clip, images: Images, how: Processing, shape: tuple[int, ...]) -> _StoredImages | None:
    """The images as a file of the cache has them; None if there is no such file, or not a whole one."""
    path = _file(clip, images, how)

    def read(stored: Checkpoint) -> MappedTensor | None:
        entry = stored.entries["pixels"]
        fits = entry.shape == (len(images), 3, *shape) and entry.dtype == "U8"
        return MappedTensor(stored, "pixels") if fits else None

    mapped = kept(path, "its images are decoded", read)
    if mapped is None:
        return None
    touch(path)
    return _StoredImages(mapped, decoded_alone(clip, images, how).read)


class _Store:
    """The file of the cache that images are put into as they are decoded; if it cannot be written, it is left out."""

    def __init__(self, path: Path, layout: Any, what: str, size: int, max_size: int) -> None:
        self._writer: SafetensorsWriter | None = None
        if make_room(size, max_size):
            with contextlib.suppress(InputError, OSError):
                self._writer = SafetensorsWriter(path, layout, {"what": what}, checked=True).__enter__()

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        if self._writer is not None:
            try:
                self._writer.write(name, data, start)
            except (InputError, OSError) as error:
                self.__exit__(type(error), error, None)

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(InputError, OSError):
                writer.__exit__(kind, error, trace)


DECODED = 256
"""Images that are decoded at a time, or about so many, where they are not in the cache."""


def batches(clip: Clip, images: Images, size: int) -> Iterator[Tensor]:
    """(B, 3, H, W) float32 batches of `size` images, in order, where the CLIP is.

    Raises:
        InputError: an image cannot be read.
    """
    normalize = Normalization(clip)
    how = Processing(max_size=allowed_size())
    with closing(chunks(clip, images, how, size * max(DECODED // size, 1), 0)) as parts:
        for pixels in parts:
            for batch, _ in pixels.batches(size):
                yield normalize(batch)


MICRO_BATCH = 4 << 20
"""Bytes of activations that a processor works on at a time: on ViT-B/32 a sixth more images a second than 128 at once."""
FEWEST = 8
"""Images that a processor works on at a time, whatever they take: fewer are slower again, for they read all weights."""


def micro_batch_size(clip: Clip) -> int:
    """How many images' widest activations take about `MICRO_BATCH` bytes, at least `FEWEST`."""
    config = clip.model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    return max(FEWEST, MICRO_BATCH // (4 * tokens * max(config.intermediate_size, 1)))
