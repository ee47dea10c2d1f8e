"""Which split of a data set a Parquet file belongs to, told by its name; the same on a hub and on disk."""

from __future__ import annotations

import re
from pathlib import PurePath

VALIDATION_NAMES = ("validation", "valid", "val", "dev")

_NAMES = ("train", "test", *VALIDATION_NAMES)
_SHARD = re.compile(r"[-_]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")


def split_of(path: PurePath) -> tuple[str, PurePath]:
    """The split of `test-00000-of-00002.parquet`, `test.parquet` or `test/0.parquet`, and the folder around it, which
    says of which configuration it is."""
    split, folder = _SHARD.sub("", path.stem), path.parent
    if not split or (split not in _NAMES and folder.name in _NAMES):
        return folder.name or "test", folder.parent
    return split, folder
