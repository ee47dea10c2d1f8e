"""Checkpoints on disk as named tensors, read lazily: one file, shards with an index, or a Hugging Face folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergecli.runtime.errors import InputError, listed, quoted
from mergecli.storage.checksums import (
    KEY,
    ChunkHashes,
    DamagedFileError,
    chunk_bytes,
    digest_of,
    expected_chunks,
)
from mergecli.storage.file_state import expect_unchanged, state_of
from mergecli.storage.safetensors_format import (
    DTYPE_BYTES,
    FLOATS,
    TORCH_NAMES,
    bytes_of,
    entry_count,
    generation_of,
    open_regular,
    pickle_hint,
    read_header,
    shards_of,
)
from mergecli.storage.store import recorded_checksums

if TYPE_CHECKING:
    from torch import Tensor


TASK_VECTOR = "task vector"
"""The `kind` in the metadata of a file that holds differences to a base, not weights."""

MIXTURE = "mixture"
"""The `kind` in the metadata of a file that holds more than one tower; see `mergecli.formats.mixture`."""


VISION = "vision_model."
TEXT = "text_model."
PROJECTION = "visual_projection.weight"
"""(D, W) behind the vision tower: makes image features of its output. The two together are an image encoder."""
_FLAT_MARKS = (
    ("embeddings.class_embedding", "pre_layrnorm.weight"),
    ("embeddings.patch_embedding.weight", "head.probe"),  # of SigLIP
)
_BUFFERS = ("embeddings.position_ids",)
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Modules of torch's own around a module: of `torch.compile`, sharding and recomputation of activations."""
_PARALLEL = "module."
"""What DataParallel puts before every name."""


class TensorEntry(NamedTuple):
    """Where one tensor lies: `start` is its first byte in file number `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return entry_count(self.shape)

    @property
    def chunk(self) -> int:
        """Bytes of the tensor that are hashed together."""
        return chunk_bytes(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.size * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether the tensor is merged; others must be equal in all models."""
        return self.dtype in FLOATS


def canonical_names(names: Iterable[str], *, ours: bool = False) -> dict[str, str]:
    """Name in the file -> our name.

    The keys of a vision tower of a CLIP or a SigLIP always begin with `vision_model.`, whatever it was part of when it was saved
    (`model.vision_model.`, `backbone.`); what else the file has beside the tower loses the same beginning. What torch
    puts into names for wrappers of its own is taken out. The `position_ids` buffers that old versions of transformers
    saved are left out. Names stay as they are where two would become one.

    Args:
        ours: whether this program wrote the file. It gives towers no wrappers, and what it learned of a tower's tensors
            has names that would look like some (`logits.vision_model.`).
    """
    kept = [name for name in names if not name.endswith(_BUFFERS)]
    plain = {name: name if ours else _WRAPPERS.sub("", name) for name in kept}
    if not ours and all(name.startswith(_PARALLEL) for name in plain.values()):
        plain = {name: each.removeprefix(_PARALLEL) for name, each in plain.items()}
    there = set(plain.values())
    towers = [
        root
        for mark, other in _FLAT_MARKS
        for root in (name.removesuffix(mark) for name in there if name.endswith(mark))
        if root + other in there and root[-1:] in ("", ".")
    ]
    if len(towers) == 1 and not (ours and towers[0]):
        lead, new = towers[0], VISION
        if f".{lead}".endswith(f".{VISION}"):
            lead, new = lead.removesuffix(VISION), ""
        plain = {
            name: new + each.removeprefix(lead) if each.startswith(lead) else each
            for name, each in plain.items()
        }
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in kept}


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors on disk; nothing is held in memory but the header.

    `entries` are sorted by name. The files stay open until `close`, so that replacing or deleting them
    meanwhile does no harm.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]
    descriptors: tuple[int, ...]
    hashes: ChunkHashes
    states: tuple[int, ...]
    """Of the files when they were opened."""

    @property
    def is_task_vector(self) -> bool:
        """Whether the file says that it holds differences to a base."""
        return self.metadata.get("kind") == TASK_VECTOR

    @property
    def is_mixture(self) -> bool:
        """Whether the file says that it holds more than one tower."""
        return self.metadata.get("kind") == MIXTURE

    @property
    def is_whole_clip(self) -> bool:
        """Whether the text tower of a CLIP, or of another dual encoder, is in it too."""
        return all(any(name.startswith(each) for name in self.entries) for each in (VISION, TEXT))

    @property
    def parameters(self) -> int:
        """Number of entries of all tensors together."""
        return sum(entry.size for entry in self.entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as they are stored."""
        return sum(entry.nbytes for entry in self.entries.values())

    def vision(self) -> Checkpoint:
        """The vision tower of a whole CLIP; anything else unchanged."""
        if not self.is_whole_clip:
            return self
        return self.only(name for name in self.entries if name.startswith(VISION))

    def encoder(self) -> Checkpoint:
        """The image encoder of a whole CLIP, its vision tower and its visual projection; anything else unchanged."""
        if not self.is_whole_clip:
            return self
        return self.only(name for name in self.entries if name.startswith(VISION) or name == PROJECTION)

    def without_projection(self) -> Checkpoint:
        """The vision tower of a whole CLIP or of an image encoder; anything else unchanged."""
        if self.is_whole_clip:
            return self.vision()
        if not self.has_projection:
            return self
        return self.only(name for name in self.entries if name != PROJECTION)

    @property
    def has_projection(self) -> bool:
        """Whether it has one tower and, behind that, a visual projection."""
        return (
            PROJECTION in self.entries
            and not self.is_mixture
            and any(name.startswith(VISION) for name in self.entries)
        )

    def only(self, names: Iterable[str]) -> Checkpoint:
        """The same with these tensors alone."""
        kept = {name: self.entries[name] for name in names}
        return replace(self, entries=kept, hashes=self.hashes.anew())

    def read(self, name: str) -> Tensor:
        """(...) the tensor, in its own dtype and shape."""
        found = self.read_entries(name, 0, self.entries[name].size).view(self.entries[name].shape)
        self.expect_unchanged()
        return found

    def read_entries(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """(stop - start,) entries of the flattened tensor in its own dtype; read into `into` if that is given."""
        import torch

        entry = self.entries[name]
        if into is None:
            into = torch.empty(stop - start, dtype=getattr(torch, TORCH_NAMES[entry.dtype]))
        if stop > start:
            buffer = bytes_of(into)
            self._read_bytes(entry, start * DTYPE_BYTES[entry.dtype], buffer)
            self.hashes.feed(name, start * DTYPE_BYTES[entry.dtype], buffer, entry.chunk, entry.nbytes)
        return into

    def expect_checksums(self, cure: str) -> None:
        """Raises DamagedFileError if the file has no checksums, as all have that we write of its kind."""
        if self.entries.keys() - self.hashes.expected.keys():
            raise no_checksums(self.path, cure)

    def expect_unchanged(self) -> None:
        """Raises InputError if a file has been written to, or replaced by another, since it was opened."""
        for file, before, opened in zip(self.files, self.states, self.descriptors, strict=True):
            expect_unchanged(file, before, opened)

    def _read_bytes(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self.descriptors[entry.file], [buffer[done:]], entry.start + offset + done)
            except OSError as error:
                raise InputError(f"{self.files[entry.file]}: cannot read: {error.strerror}") from error
            if not got:
                raise InputError(f"{self.files[entry.file]}: was cut short while it was being read")
            done += got

    def digest(self) -> str:
        """`xxh3:` and 32 hex digits that depend on names, dtypes, shapes and bytes of the tensors only.

        The same for one file, shards or a folder, whatever the metadata. What has been read before was hashed on
        the way; only the rest is read now.
        """
        for name, entry in self.entries.items():
            size = entry.nbytes
            for chunk in range(-(-size // entry.chunk)):
                if not self.hashes.is_whole(name, chunk):
                    start = chunk * entry.chunk
                    buffer = memoryview(bytearray(min(entry.chunk, size - start)))
                    self._read_bytes(entry, start, buffer)
                    self.hashes.feed(name, start, buffer, entry.chunk, size)
        self.expect_unchanged()
        layout = {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}
        return digest_of(layout, lambda _: self.hashes)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self.descriptors:
            os.close(descriptor)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: Path, *, checked: bool = False, cure: str = "") -> Checkpoint:
    """The checkpoint at `path`: a `.safetensors` file, a `.safetensors.index.json`, or a folder with either.

    Where a file has checksums, its own or the store's, they are compared with what is read of it.

    Args:
        checked: it is a file of ours that has checksums; one without is damaged.
        cure: the hint where a file of ours is damaged.

    Raises:
        DamagedFileError: it is not what its checksums say.
        InputError: it is missing, not safetensors, damaged, or has two tensors of one name.
    """
    files = _files(path)
    raw: dict[str, TensorEntry] = {}
    headers: list[dict[str, str]] = []
    expected: dict[str, bytes] = {}
    cures: dict[str, tuple[Path, str]] = {}
    descriptors: list[int] = []
    try:
        for number, file in enumerate(files):
            descriptors.append(open_regular(file))
            recorded = recorded_checksums(file)
            how = recorded.cure if recorded else cure
            try:
                tensors, about = read_header(file, descriptors[-1])
            except InputError as error:
                if not checked and not how:
                    raise
                raise DamagedFileError(file, error.message.removeprefix(f"{file}: "), how) from error
            own = about.pop(KEY, None)
            if (text := recorded.text if recorded else own) is not None:
                expected |= expected_chunks(file, tensors, about, text, how)
                cures |= dict.fromkeys(tensors, (file, how))
            elif checked:
                raise no_checksums(file, cure)
            headers.append(about)
            twice = sorted(raw.keys() & tensors.keys())
            if twice:
                raise InputError(f"{path}: {quoted(twice)} stand in more than one shard")
            raw.update(
                {
                    name: TensorEntry(dtype, shape, number, start)
                    for name, (dtype, shape, start) in tensors.items()
                }
            )
        _expect_one_model(path, files, headers)
        states = tuple(map(state_of, descriptors))
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    names = canonical_names(raw, ours=any("mergecli" in about for about in headers))
    theirs = {ours: name for name, ours in names.items()}
    entries = {ours: raw[name] for ours, name in sorted(theirs.items())}

    def damaged(name: str) -> DamagedFileError:
        file, how = cures[theirs[name]]
        return DamagedFileError(file, f"is damaged: `{name}` is not what was written", how)

    hashes = ChunkHashes({ours: expected[name] for ours, name in theirs.items() if name in expected}, damaged)
    metadata = {key: value for about in headers for key, value in about.items()}
    return Checkpoint(path, entries, metadata, tuple(files), tuple(descriptors), hashes, states)


def no_checksums(file: Path, cure: str) -> DamagedFileError:
    """The error about a file of ours that lacks its checksums."""
    return DamagedFileError(file, "has no checksums: it is damaged, or was written by another program", cure)


def _expect_one_model(path: Path, files: Sequence[Path], headers: Sequence[Mapping[str, str]]) -> None:
    """Raises InputError if shards of ours say different things of the model that they are parts of."""
    if not any("mergecli" in about for about in headers):
        return
    for file, about in zip(files, headers, strict=True):
        if about != headers[0]:
            raise InputError(
                f"{path}: its shards are of two models: `{file.name}` was made of other inputs or settings than "
                f"`{files[0].name}`",
                "one was copied or written over the other: make the model again",
            )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _files(path: Path) -> list[Path]:
    """The safetensors files that a path stands for."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
        if whole.exists():
            return [whole]
        if index.exists():
            return _files(index)
        alone = sorted(path.glob("*.safetensors"))
        if (path / "adapter_config.json").exists():
            raise InputError(
                f"{path}: is an adapter, not a checkpoint",
                "an adapter is read together with its base: name that with `--base`, or with `base = ...` in the recipe",
            )
        if len(alone) == 1:
            return alone
        if alone:
            raise InputError(
                f"{path}: has {len(alone)} safetensors files and no `{index.name}`", "name one of them"
            )
        if list(path.glob("*.bin")) or list(path.glob("*.pt")):
            raise InputError(
                f"{path}: has only pickled weights, and a pickle is not opened as it is", pickle_hint(path)
            )
        models = sorted(each.name for each in path.glob("*/") if _has_weights(each))
        raise InputError(
            f"{path}: has no `model.safetensors`",
            f"name one of the models in it: {quoted(str(path / name) for name in models)}" if models else "",
        )
    if path.name.endswith(".index.json"):
        try:
            with os.fdopen(open_regular(path), "rb") as index:
                text = index.read()
            shards = shards_of(text)
        except ValueError as error:
            raise InputError(
                f"{path}: is not an index of shards: {error}", "copy, fetch or make the model again"
            ) from error
        if other := [shard for shard in shards if generation_of(text) not in shard]:
            raise InputError(
                f"{path}: names shards of another generation than its own, `{generation_of(text)}`:\n{listed(other)}",
                "it was changed, or one model was copied over another: make the model again",
            )
        missing = [shard for shard in shards if not (path.parent / shard).is_file()]
        if missing:
            raise InputError(
                f"{path}: shards are missing:\n{listed(missing)}", "copy, fetch or make the model again"
            )
        return [path.parent / shard for shard in shards]
    return [path]
