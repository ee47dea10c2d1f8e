"""Hashes of tensors that are read in pieces, in any order and from any thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xxhash


class ChunkHashes:
    """A hash of every chunk of every tensor, fed by whoever reads; chunks may come in any order and from any thread."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, int], tuple[int, xxhash.xxh3_128]] = {}
        self._lock = threading.Lock()

    def fed(self, name: str, chunk: int) -> int:
        """How many bytes of the chunk have been hashed."""
        return self._chunks[name, chunk][0] if (name, chunk) in self._chunks else 0

    def feed(self, name: str, offset: int, buffer: memoryview, size: int) -> None:
        """Hashes the bytes of a tensor from byte `offset` on, where they continue what is known of chunks of `size`."""
        import xxhash

        end = offset + len(buffer)
        for chunk in range(offset // size, -(-end // size)):
            start = max(chunk * size, offset)
            piece = buffer[start - offset : min((chunk + 1) * size, end) - offset]
            at = start - chunk * size
            if at == 0 and len(piece) > self.fed(name, chunk):
                self._chunks[name, chunk] = (len(piece), xxhash.xxh3_128(piece))
            else:
                with self._lock:
                    done, state = self._chunks.get((name, chunk), (0, xxhash.xxh3_128()))
                    if at <= done < at + len(piece):
                        state = state.copy()
                        state.update(piece[done - at :])
                        self._chunks[name, chunk] = (at + len(piece), state)

    def hex(self, name: str, chunks: int) -> str:
        """The hash of the chunks' hashes."""
        import xxhash

        return xxhash.xxh3_128(
            b"".join(self._chunks[name, chunk][1].digest() for chunk in range(chunks))
        ).hexdigest()
