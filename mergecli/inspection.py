"""`info`: what a checkpoint is, from its header alone, and its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergecli.checkpoint import open_checkpoint
from mergecli.provenance import inputs_of
from mergecli.sources import locate, parse_source


@dataclass(frozen=True)
class Info:
    """What is known of a checkpoint."""

    path: str
    kind: str
    """`checkpoint`, `task vector`, or what else its metadata says."""
    parameters: int
    """Entries of all floating point tensors; of a whole CLIP, of its vision tower."""
    whole_clip: bool
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name -> dtype and shape."""
    dtypes: Mapping[str, int]
    """dtype -> number of entries."""
    files: int
    size: int
    """Bytes on disk."""
    digest: str
    metadata: Mapping[str, str]

    @property
    def inputs(self) -> dict[str, str]:
        """Input -> digest, for files that mergecli wrote."""
        return inputs_of(self.metadata)


def info(checkpoint: str | Path) -> Info:
    """What the checkpoint is, how large, with which tensors, and where it says it comes from."""
    with open_checkpoint(locate(parse_source(str(checkpoint), Path()))) as whole:
        each = whole.vision()
        dtypes: dict[str, int] = {}
        for entry in each.entries.values():
            dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.size
        return Info(
            path=str(checkpoint),
            kind=each.metadata.get("kind", "checkpoint"),
            parameters=sum(entry.size for entry in each.entries.values() if entry.is_float),
            whole_clip=whole.is_whole_clip,
            tensors={name: (entry.dtype, entry.shape) for name, entry in each.entries.items()},
            dtypes=dtypes,
            files=len(each.files),
            size=sum(file.stat().st_size for file in each.files),
            digest=each.digest(),
            metadata=each.metadata,
        )
