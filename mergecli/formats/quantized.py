"""Files that hold tensors as codes of a few bits, read as the checkpoints that they stand for, block by block.

A tensor `NAME` of the scheme lies in the file as `NAME.codes` (packed), `NAME.scale` and `NAME.zero`; all others lie there as
they are. What a residual file holds is added to what its shared file holds of the same name (RTVQ: Kim et al., ICCV 2025,
arXiv 2503.06921).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from mergecli.formats.quantizer import (
    BITS,
    PER,
    Per,
    Quantized,
    Steps,
    dequantize,
    packed_bytes,
    row_count,
)
from mergecli.runtime.errors import InputError, listed
from mergecli.storage.checkpoint import MIXTURE, Checkpoint, TensorEntry, open_checkpoint
from mergecli.storage.checksums import ChunkHashes
from mergecli.storage.differences import Form, differences
from mergecli.storage.lazy_checkpoint import BlockReader, LazyCheckpoint, lazy_checkpoint
from mergecli.storage.safetensors_format import DTYPE_BYTES, entry_count
from mergecli.storage.sources import is_safe

if TYPE_CHECKING:
    from torch import Tensor

KEY = "quantization"
"""The key in the metadata: the scheme, as JSON."""

SHARED = "shared part of task vectors"
"""The `kind` of a file that residual task vectors add themselves to."""

SMALLEST = 4096
"""Entries of the smallest tensor that is quantized: biases and norms are a thousandth of a tower, and stay as they are."""

KEPT = 4
"""Tensors whose steps are kept in memory: those that several threads read at one time."""

AnyPath = TypeVar("AnyPath", bound=PurePath)

_HINT = (
    "it is damaged, or was written by a later version: make it again with `mergecli taskvector --quantize`"
)


@dataclass(frozen=True)
class Scheme:
    """How a file holds its quantized tensors."""

    bits: int
    per: Per
    shapes: Mapping[str, tuple[int, ...]]
    """Name -> shape, of those that are quantized."""
    shared: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of a residual file: the shared `file`, from this one's folder, and its `digest`."""

    @classmethod
    def of(cls, bits: int, per: Per, shapes: Mapping[str, tuple[int, ...]]) -> Scheme:
        """For the tensors of these shapes: those that are not small, and that take less room as codes."""
        scheme = cls(bits, per, {})
        chosen = {
            name: shape
            for name, shape in shapes.items()
            if entry_count(shape) >= SMALLEST
            and _size(scheme.parts(name, shape)) < entry_count(shape) * DTYPE_BYTES["BF16"]
        }
        return replace(scheme, shapes=chosen)

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Key -> dtype and shape of what a quantized tensor is written as."""
        rows = row_count(shape, self.per)
        return {
            f"{name}.codes": ("U8", (packed_bytes(entry_count(shape), self.bits),)),
            f"{name}.scale": ("F32", (rows,)),
            f"{name}.zero": ("U8", (rows,)),
        }

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The same of all quantized tensors."""
        return {key: part for each in self.shapes.items() for key, part in self.parts(*each).items()}

    def to_json(self) -> str:
        """The text for the metadata."""
        return json.dumps({key: value for key, value in asdict(self).items() if value or key != "shared"})


def _size(parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(entry_count(shape) * DTYPE_BYTES[dtype] for dtype, shape in parts.values())


def tensors_of(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """Key -> tensor that is written."""
    return {
        f"{name}.codes": quantized.codes,
        f"{name}.scale": quantized.scale,
        f"{name}.zero": quantized.zero,
    }


def is_quantized(stored: Checkpoint) -> bool:
    """Whether a file of ours says that it holds quantized tensors."""
    return "mergecli" in stored.metadata and KEY in stored.metadata


def scheme_of(stored: Checkpoint) -> Scheme:
    """How an open file holds its quantized tensors.

    Raises:
        InputError: its metadata do not say.
    """
    try:
        table: Any = json.loads(stored.metadata[KEY])
        bits, per, shapes, shared = table["bits"], table["per"], table["shapes"], table.get("shared", {})
        if not isinstance(bits, int) or bits not in BITS:
            raise ValueError(f"bits: expected 8, 4, 3 or 2, got {json.dumps(bits)}")
        if per not in PER:
            raise ValueError(f"per: expected row or tensor, got {json.dumps(per)}")
        found = {str(name): tuple(shape) for name, shape in shapes.items()}
        if not all(type(side) is int and side >= 0 for shape in found.values() for side in shape):
            raise ValueError("shapes: expected whole numbers")
        if shared and not (
            shared.keys() == {"file", "digest"}
            and all(isinstance(each, str) for each in shared.values())
            and is_safe(shared["file"])
        ):
            raise ValueError("shared: expected a file beside this one, and its digest")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else "it cannot be read"
        raise InputError(f"{stored.path}: its quantization: {why}", _HINT) from error
    return Scheme(bits, per, found, dict(shared))


def dequantized(stored: Checkpoint) -> Checkpoint:
    """The checkpoint that an open file stands for, whose tensors are computed as they are read; the file itself if it holds
    none that are quantized. It closes the file with it, also on an error.

    Raises:
        InputError: the file is not what its metadata say, or its shared file is missing, or another.
    """
    if not is_quantized(stored):
        return stored
    try:
        return _dequantized(stored)
    except BaseException:
        stored.close()
        raise


def _dequantized(stored: Checkpoint) -> LazyCheckpoint:
    scheme = scheme_of(stored)
    parts = scheme.layout()
    own = {name: entry for name, entry in stored.entries.items() if name not in parts}
    wanted = {key: Form(shape, dtype) for key, (dtype, shape) in parts.items()}
    wrong = differences({key: stored.entries[key] for key in parts if key in stored.entries}, wanted)
    wrong += [f"has `{name}` both as it is and quantized" for name in scheme.shapes if name in own]
    if wrong:
        raise InputError(f"{stored.path}: is not what its quantization says:\n{listed(wrong)}", _HINT)
    shared = _shared(stored, scheme) if scheme.shared else None
    raw = stored if stored.hashes.expected else replace(stored, hashes=_NoHashes())
    load = lru_cache(KEPT)(partial(_steps, raw, scheme))
    readers: dict[str, BlockReader] = {}
    for name in scheme.shapes:
        reader = _Codes(raw, name, scheme.bits, partial(load, name)).read_block
        readers[name] = _Sum(reader, shared, name).read_block if shared else reader
    entries = own | {name: TensorEntry("F32", shape, 0, 0) for name, shape in scheme.shapes.items()}
    under = replace(stored, entries=dict(sorted(entries.items())))
    return lazy_checkpoint(under, readers, others=(shared,) if shared else (), stored=stored)


class _NoHashes(ChunkHashes):
    """Of bytes that are neither compared with checksums nor part of a digest: that is of the values."""

    def feed(self, name: str, offset: int, buffer: memoryview, size: int, total: int) -> None:
        pass


def _shared(stored: Checkpoint, scheme: Scheme) -> Checkpoint:
    """What a residual file adds itself to, known to be the one that it was made with."""
    path = stored.files[0].resolve().parent / scheme.shared["file"]
    cure = f"copy it from where {stored.path.name} was made, or make both again with `mergecli taskvector --residual`"
    if not path.is_file():
        raise InputError(f"{stored.path}: is a residual, and there is no {path} to add it to", cure)
    raw = open_checkpoint(path)
    try:
        if raw.metadata.get("kind") != SHARED or not is_quantized(raw) or scheme_of(raw).shared:
            raise InputError(
                f"{stored.path}: is a residual, and {path} is not what it is to be added to", cure
            )
        if (digest := raw.digest()) != (wanted := scheme.shared["digest"]):
            raise InputError(
                f"{stored.path}: is a residual to {path} of another digest: expected {wanted}, got {digest}",
                cure,
            )
    except BaseException:
        raw.close()
        raise
    found = dequantized(raw)
    have = {name: found.entries[name] for name in scheme.shapes if name in found.entries}
    if wrong := differences(
        have, {name: Form(shape) for name, shape in scheme.shapes.items()}, "the residual has"
    ):
        found.close()
        raise InputError(f"{stored.path}: does not fit {path}:\n{listed(wrong)}", cure)
    return found


@dataclass(frozen=True)
class _Codes:
    """One quantized tensor of a file."""

    stored: Checkpoint
    name: str
    bits: int
    steps: Callable[[], Steps]

    def read_block(self, start: int, stop: int, into: Tensor) -> None:
        assert len(into) == stop - start
        packed = partial(self.stored.read_entries, f"{self.name}.codes")
        dequantize(packed, self.bits, into, start, self.steps())


def _steps(stored: Checkpoint, scheme: Scheme, name: str) -> Steps:
    """Raises InputError if a step is none, or a zero no code."""
    scale, zero = stored.read(f"{name}.scale"), stored.read(f"{name}.zero")
    # where one is NaN, least and largest are NaN too, and no comparison holds
    if len(scale) and not 0 <= float(scale.min()) <= float(scale.max()) < math.inf:
        raise InputError(f"{stored.path}: `{name}.scale`: expected numbers that are not below 0", _HINT)
    if len(zero) and int(zero.max()) >= 2**scheme.bits:
        raise InputError(f"{stored.path}: `{name}.zero`: expected codes of {scheme.bits} bits", _HINT)
    return Steps.of(scale, zero, entry_count(scheme.shapes[name]))


@dataclass(frozen=True)
class _Sum:
    """A residual and what it is added to."""

    residual: BlockReader
    shared: Checkpoint
    name: str

    def read_block(self, start: int, stop: int, into: Tensor) -> None:
        self.residual(start, stop, into)
        into.add_(self.shared.read_entries(self.name, start, stop))


def about_quantization(stored: Checkpoint) -> dict[str, str]:
    """Fact -> value of a file of quantized tensors: `bits`; `error`, the share of the norm that is lost, and the largest of
    an entry; `shared part`, the file that it is added to. Of one that was made of such files: `quantized`, see
    `quantized_models`."""
    facts = dict[str, str]()
    if not is_quantized(stored):
        made_of = quantized_models(stored.metadata)
        return {"quantized": f"made of {made_of}"} if made_of else facts
    scheme = scheme_of(stored)
    facts["bits"] = f"{scheme.bits} an entry, a step for each {scheme.per}"
    if loss := loss_of(stored):
        facts["error"] = (
            f"{loss['error']:.2%} of the task vector, at most {loss['largest_error']:.3g} an entry"
        )
    if scheme.shared:
        facts["shared part"] = f"{scheme.shared['file']} ({scheme.shared['digest']})"
    return facts


def loss_of(stored: Checkpoint) -> dict[str, float]:
    """`error` and `largest_error` of a file of quantized tensors, as it says; empty where it does not."""
    try:
        return {key: float(stored.metadata[key]) for key in ("error", "largest_error")}
    except (KeyError, ValueError):
        return {}


def models_metadata(tuned: Mapping[str, Checkpoint]) -> dict[str, str]:
    """What a file says that is made of these models: which of them are quantized, as JSON; nothing if none is."""
    found = {
        name: {"bits": scheme_of(each).bits, **loss_of(each)}
        for name, each in tuned.items()
        if is_quantized(each)
    }
    return {"quantized": json.dumps(found)} if found else {}


def quantized_models(metadata: Mapping[str, str]) -> str:
    """`3 task vectors of 4 bits (errors 9.69% to 10.36%)`: what a file says of the quantized models that it was made of, or of
    itself; empty if there are none."""
    try:
        if KEY in metadata and metadata.get("kind") == MIXTURE:
            lost = f" (error {float(metadata['error']):.2%})" if "error" in metadata else ""
            return f"parts of {json.loads(metadata[KEY])['bits']} bits{lost}"
        if KEY in metadata:
            every: list[Any] = [{"bits": json.loads(metadata[KEY])["bits"], "error": metadata.get("error")}]
        else:
            every = list(json.loads(metadata.get("quantized", "{}")).values())
        parts: list[str] = []
        for bits in dict.fromkeys(int(each["bits"]) for each in every):
            own = [each for each in every if int(each["bits"]) == bits]
            errors = sorted(float(each["error"]) for each in own if each.get("error") is not None)
            ends = " to ".join(dict.fromkeys(f"{error:.2%}" for error in errors[:1] + errors[-1:]))
            lost = f" (error{'s' * (len(own) > 1)} {ends})" if errors else ""
            parts.append(f"{len(own)} task vector{'s' * (len(own) > 1)} of {bits} bits{lost}")
        return ", ".join(parts)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return ""


def shared_path(folder: AnyPath) -> AnyPath:
    """Where the shared file of the residual task vectors of a folder lies: not among them, since it is no model."""
    return folder / "shared" / "mean.safetensors"
