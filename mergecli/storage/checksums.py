"""Checksums of what is kept on disk: of a file's header and of every chunk of its tensors, compared as the bytes are read.

A file of ours has them in its metadata, under `KEY`; of a fetched file the store has them. They are XXH3 digests of the chunks
that the digest of a checkpoint is made of, so that to compare them costs no hashing of its own.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.runtime.errors import InputError
from mergecli.storage.safetensors_format import DTYPE_BYTES, entry_count, read_header

if TYPE_CHECKING:
    import xxhash

KEY = "checksums"
"""The key in the metadata: hexadecimal digits of the header's digest, then of each tensor's chunks, in order of the names."""

CHUNK_ENTRIES = 1 << 18
"""Entries of a tensor that are hashed together."""

_LENGTH = 16
"""Bytes of a digest."""

Layout = Mapping[str, tuple[str, tuple[int, ...], int]]
"""Name -> dtype, shape and first byte in the file."""


class DamagedFileError(InputError):
    """A file that is not what was written, and can be made or fetched again."""

    def __init__(self, file: Path, what: str, cure: str) -> None:
        super().__init__(f"{file}: {what}", cure)
        self.file = file


class ChunkHashes:
    """Hashes of every chunk of every tensor, made of the bytes as they are read.

    So the digest of a checkpoint that was read whole costs no second reading. Chunks may come in any order and from any
    thread.
    """

    def __init__(
        self,
        expected: Mapping[str, bytes] | None = None,
        refuse: Callable[[str], Exception] = RuntimeError,
    ) -> None:
        """`expected` has the digests of the chunks of some tensors, one after another; for a tensor that has others the
        exception `refuse(name)` is raised."""
        self.expected = expected or {}
        self.refusal = refuse
        self._whole: dict[tuple[str, int], bytes] = {}
        self._begun: dict[tuple[str, int], tuple[int, xxhash.xxh3_128]] = {}
        self._lock = threading.Lock()

    def anew(self) -> ChunkHashes:
        """The same expectations of bytes that are yet to be read."""
        return ChunkHashes(self.expected, self.refusal)

    def is_whole(self, name: str, chunk: int) -> bool:
        """Whether all bytes of the chunk have been hashed."""
        return (name, chunk) in self._whole

    def feed(self, name: str, offset: int, buffer: memoryview, size: int, total: int) -> None:
        """Hashes the bytes of a tensor of `total` bytes from byte `offset` on, where they continue what is known of chunks
        of `size`.

        Raises:
            Exception: what `refuse` makes, when a chunk is complete and is not what is expected.
        """
        import xxhash

        end = offset + len(buffer)
        for chunk in range(offset // size, -(-end // size)):
            if (name, chunk) in self._whole:
                continue
            first, length = chunk * size, min(size, total - chunk * size)
            start = max(first, offset)
            piece = buffer[start - offset : first + length - offset]
            at = start - first
            if len(piece) == length:
                # outside of the lock: threads mostly read whole chunks, and hashing is what takes time
                self._finish(name, chunk, xxhash.xxh3_128_digest(piece))
                continue
            with self._lock:
                done, state = self._begun.get((name, chunk), (0, xxhash.xxh3_128()))
                if at <= done < at + len(piece):  # else it is hashed already, or `digest` will read the gap
                    state = state.copy()
                    state.update(piece[done - at :])
                    done = at + len(piece)
                    self._begun[name, chunk] = done, state
            if done == length:
                self._finish(name, chunk, state.digest())

    def _finish(self, name: str, chunk: int, found: bytes) -> None:
        want = self.expected.get(name)
        if want is not None and want[_LENGTH * chunk : _LENGTH * (chunk + 1)] != found:
            raise self.refusal(name)
        self._whole[name, chunk] = found
        self._begun.pop((name, chunk), None)

    def digests(self, name: str, chunks: int) -> bytes:
        """The digests of all chunks, one after another; they have been hashed."""
        return b"".join(self._whole[name, chunk] for chunk in range(chunks))

    def hex(self, name: str, chunks: int) -> str:
        """The hash of the chunks' hashes."""
        import xxhash

        return xxhash.xxh3_128_hexdigest(self.digests(name, chunks))


def chunk_count(shape: tuple[int, ...]) -> int:
    """How many chunks a tensor of this shape has."""
    return -(-entry_count(shape) // CHUNK_ENTRIES)


def chunk_bytes(dtype: str) -> int:
    """Bytes of every chunk but a tensor's last."""
    return DTYPE_BYTES[dtype] * CHUNK_ENTRIES


def digest_of(layout: Mapping[str, tuple[str, tuple[int, ...]]], hashes: Callable[[str], ChunkHashes]) -> str:
    """`xxh3:` and 32 hex digits that depend on names, dtypes, shapes and bytes of the tensors only.

    `hashes` gives those of the file that a tensor is in, of which all bytes have been hashed.
    """
    lines = [
        f"{name} {dtype} {list(shape)} {hashes(name).hex(name, chunk_count(shape))}\n"
        for name, (dtype, shape) in sorted(layout.items())
    ]
    return "xxh3:" + sha256("".join(lines).encode()).hexdigest()[:32]


def blank(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """As long as the checksums of a file with these tensors (dtype, shape); stands for them until all is written."""
    return "0" * (2 * _LENGTH * (1 + sum(chunk_count(shape) for _, shape in layout.values())))


def checksums(layout: Layout, metadata: Mapping[str, str], hashes: ChunkHashes) -> str:
    """The checksums of a file whose chunks have all been hashed."""
    parts = [_header(layout, metadata)]
    parts += [hashes.digests(name, chunk_count(layout[name][1])) for name in sorted(layout)]
    return b"".join(parts).hex()


def checksums_of(file: Path) -> str | None:
    """The checksums of a safetensors file on disk, made of what it holds now; None if it is none."""
    try:
        with file.open("rb") as opened:
            layout, metadata = read_header(file, opened.fileno())
            hashes = ChunkHashes()
            for name, (dtype, shape, first) in layout.items():
                size, total = chunk_bytes(dtype), entry_count(shape) * DTYPE_BYTES[dtype]
                for start in range(0, total, size):
                    piece = os.pread(opened.fileno(), min(size, total - start), first + start)
                    hashes.feed(name, start, memoryview(piece), size, total)
    except (InputError, OSError):
        return None
    return checksums(layout, metadata, hashes)


def expected_chunks(
    file: Path, layout: Layout, metadata: Mapping[str, str], text: str, cure: str
) -> dict[str, bytes]:
    """Name -> digests of its chunks, as the checksums `text` of a file say.

    Raises:
        DamagedFileError: they are not those of its header.
    """
    try:
        digests = bytes.fromhex(text)
    except ValueError:
        digests = b""
    sizes = {name: _LENGTH * chunk_count(layout[name][1]) for name in sorted(layout)}
    if digests[:_LENGTH] != _header(layout, metadata) or len(digests) != _LENGTH + sum(sizes.values()):
        raise DamagedFileError(file, "is damaged: its header is not what was written", cure)
    found: dict[str, bytes] = {}
    start = _LENGTH
    for name, size in sizes.items():
        found[name] = digests[start : start + size]
        start += size
    return found


def _header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    """The digest of what a header says, but for the checksums."""
    import xxhash

    about = sorted((key, value) for key, value in metadata.items() if key != KEY)
    tensors = sorted((name, dtype, list(shape), start) for name, (dtype, shape, start) in layout.items())
    return xxhash.xxh3_128_digest(json.dumps([about, tensors]).encode())
