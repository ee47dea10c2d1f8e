"""Files that `torch.save` wrote: found by their content, checked, and read without running what they carry."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from mergecli.runtime.errors import InputError, listed, quoted
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES, shards_of

if TYPE_CHECKING:
    from torch import Tensor

_ZIP = b"PK\x03\x04"
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INSIDE = ("state_dict", "model_state_dict", "model")
_ONCE = "open it once where it was made and trusted, and save only its tensors: "
_MEND = f"{_ONCE}`torch.save(torch.load(OLD, weights_only=False).state_dict(), NEW)`"
_MEND_SCRIPT = "save only its tensors: `torch.save(torch.jit.load(OLD).state_dict(), NEW)`"
_DAMAGES = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, EOFError,
    OSError, MemoryError, struct.error,
)  # fmt: skip
"""What torch raises for files that are cut or changed."""
_AGAIN = "the copy or download may not have finished: fetch it again"


def pickled_files(path: Path) -> list[Path]:
    """The pickled files that a file, an index of shards or a folder stands for; none if its weights are safetensors.

    Raises:
        InputError: it is missing, empty, of another format, an index that cannot be read, or a folder with several.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        return [] if any(path.glob("*.safetensors")) else _in_folder(path)
    if not path.is_file():
        raise InputError(f"{path}: is a pipe or a device, a file was expected")
    if path.name.endswith(".index.json"):
        shards = _shards(path)
        return shards if all(_starts_as_pickle(shard) for shard in shards) else []
    return [path] if _starts_as_pickle(path) else []


def _in_folder(path: Path) -> list[Path]:
    whole, index = path / "pytorch_model.bin", path / "pytorch_model.bin.index.json"
    if whole.is_file() or index.is_file():
        return pickled_files(whole if whole.is_file() else index)
    found = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES]
    pickled = [file for file in found if file.is_file() and _starts_as_pickle(file)]
    if len(pickled) > 1:
        raise InputError(
            f"{path}: has {len(pickled)} pickled files: {quoted(f.name for f in pickled)}", "name one"
        )
    return pickled


def _shards(index: Path) -> list[Path]:
    try:
        names = shards_of(index.read_bytes())
    except ValueError as error:
        raise InputError(f"{index}: is not an index of shards: {error}") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{index}: shards are missing:\n{listed(missing)}", _AGAIN)
    return [index.parent / name for name in names]


def _starts_as_pickle(file: Path) -> bool:
    start = _first_bytes(file)
    if (
        start.startswith((_ZIP, *_PICKLES)) and start[8:9] != b"{"
    ):  # a header of 640 bytes begins as a pickle does
        return True
    if not start:
        raise InputError(f"{file}: is empty", _AGAIN)
    if start[8:9] != b"{" and not start.startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: is neither a safetensors file nor one that `torch.save` wrote", _AGAIN)
    return False


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(32)
    except OSError as error:
        raise InputError(f"{file}: cannot open: {(error.strerror or '').lower()}") from error


def read_state(files: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """The named tensors of all files together, and the names of everything else in them.

    Raises:
        InputError: a file is damaged, needs code to be opened, or holds no named tensors; two tensors have one name.
    """
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for file in files:
        state, rest = _state(file, _load(file))
        twice = sorted(state.keys() & tensors.keys())
        if twice:
            raise InputError(
                f"{file}: {quoted(twice)} stand{'s' if len(twice) == 1 else ''} in another shard too"
            )
        tensors |= state
        others += [name for name in rest if name not in others]
    return tensors, others


class _Placeholder:
    """What an object of a class that torch's restricted unpickler does not know becomes: its arguments and attributes, as data.

    The class itself is never looked up, so no code of it runs.
    """

    path = ""
    """Module and name of the class or function that the pickle wants."""

    def __init__(self, *_: object) -> None: ...

    def __new__(cls, *_: object) -> _Placeholder:
        return super().__new__(cls)


def _is_module(value: object) -> TypeGuard[_Placeholder]:
    """Whether it has what every `torch.nn.Module` has."""
    return isinstance(value, _Placeholder) and all(
        isinstance(vars(value).get(key), Mapping) for key in ("_parameters", "_buffers", "_modules")
    )


def _without_module(value: object) -> object:
    """What a module's `state_dict()` gives: its parameters, and the buffers that belong to it; anything else as it is."""
    if not _is_module(value):
        return value
    found: dict[str, object] = {}
    seen: set[int] = set()  # no module twice: a hostile file may have one inside of itself

    def collect(module: object, lead: str) -> None:
        if id(module) in seen or not _is_module(module):
            return
        seen.add(id(module))
        own = vars(module)
        passing = own.get("_non_persistent_buffers_set", ())
        kept = {name: each for name, each in own["_buffers"].items() if name not in passing}
        tensors = {**own["_parameters"], **kept}
        found.update({f"{lead}{name}": each for name, each in tensors.items() if each is not None})
        for name, each in own["_modules"].items():
            collect(each, f"{lead}{name}.")

    collect(value, "")
    return found


def _load(file: Path) -> object:
    """What was saved; tensors of the zip format are views of the mapped file, those of the older one are in memory."""
    zipped = _first_bytes(file).startswith(_ZIP)
    mappable = zipped and _checked_zip(file)
    try:
        return _restricted(file, mappable)
    except pickle.UnpicklingError as error:
        if zipped:
            with suppress(pickle.UnpicklingError, *_DAMAGES):
                return _with_placeholders(file, mappable)
        raise _refusal(file, str(error)) from error
    except _DAMAGES as error:
        detail = re.split(r"\n|\. ", str(error).strip())[0][:160]
        because = f": {detail}" if detail else ""
        raise InputError(f"{file}: is damaged, or `torch.save` did not write it{because}", _AGAIN) from error


def _with_placeholders(file: Path, mappable: bool) -> object:
    """What was saved, with placeholders for the objects in it, and state dicts for modules."""
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    names = get_unsafe_globals_in_checkpoint(str(file))
    unknown = [(type("_Unknown", (_Placeholder,), {"path": name}), name) for name in names]
    with safe_globals(cast("list[Any]", unknown)):
        loaded = _restricted(file, mappable)
    if isinstance(loaded, Mapping):
        return {key: _without_module(each) for key, each in _table(loaded).items()}
    return _without_module(loaded)


def _restricted(file: Path, mappable: bool) -> object:
    """`weights_only=True` chooses torch's restricted unpickler, so that no environment variable turns it off."""
    import torch

    with warnings.catch_warnings():
        # about formats of other versions: what cannot be read fails in the caller
        warnings.simplefilter("ignore")
        return torch.load(  # noqa: TID251  the one place; nothing but tensors, plain containers and placeholders is built
            str(file), map_location="cpu", weights_only=True, mmap=mappable
        )


def _refusal(file: Path, reason: str) -> InputError:
    """What to say when the restricted unpickler gives up."""
    wanted = re.search(r"GLOBAL ([\w.<>]+)", reason)
    if wanted:
        return _wants_code(file, wanted[1])
    if "Unsupported operand" in reason:
        return InputError(f"{file}: is damaged, or `torch.save` did not write it", _AGAIN)
    detail = reason.partition("WeightsUnpickler error:")[2].strip().split("\n")[0][:160]
    return InputError(
        f"{file}: holds more than tensors, so it is not opened" + (f": {detail}" if detail else ""),
        _mend(file),
    )


def _wants_code(file: Path, wanted: str) -> InputError:
    return InputError(
        f"{file}: holds more than tensors: it wants `{wanted}`, which would run code, so it is not opened",
        _mend(file, wanted),
    )


def _mend(file: Path, wanted: str = "") -> str:
    """How to save only the tensors of a file that needs code: by what it begins with, and the words in it."""
    try:
        starts, words = _begins_with(file)
    except (OSError, ValueError, zipfile.BadZipFile, LookupError, EOFError, struct.error):
        return _MEND
    if not starts:
        return _MEND
    load = "torch.load(OLD, weights_only=False)"
    if inside := next((key for key in _INSIDE if key in words), None):
        return f'{_ONCE}`torch.save({load}["{inside}"], NEW)`, with `.state_dict()` after `["{inside}"]` if that is a module'
    if wanted.startswith("numpy"):
        return f"{_ONCE}`torch.save({{key: torch.as_tensor(each) for key, each in {load}.items()}}, NEW)`"
    return f"{_ONCE}`torch.save({{key: each for key, each in {load}.items() if isinstance(each, torch.Tensor)}}, NEW)`"


def _begins_with(file: Path) -> tuple[bool, set[str]]:
    """Whether a dictionary is what was saved, and every text in it; nothing of the pickle is carried out."""
    if _first_bytes(file).startswith(_ZIP):
        with zipfile.ZipFile(file) as archive:
            name = next(each for each in archive.namelist() if Path(each).name == "data.pkl")
            stream, before = io.BytesIO(archive.read(name)), 0
    else:
        stream, before = file.open("rb"), 3  # a mark, a version and facts of the machine, each a pickle
    with stream:
        for _ in range(before):
            for _ in pickletools.genops(stream):
                pass
        words: set[str] = set()
        first: str | None = None
        for operation, argument, _ in pickletools.genops(stream):
            if first is None and operation.name not in ("PROTO", "FRAME"):
                first = f"{operation.name} {argument}"
            if isinstance(argument, str):
                words.add(argument)
    return first in ("EMPTY_DICT None", "GLOBAL collections OrderedDict"), words


def _path_to_tensors(value: object, depth: int = 3) -> str:
    """`["a"]["b"]` of the first dictionary inside of a dictionary that has tensors; empty if there is none."""
    for key, each in _table(value).items() if depth else ():
        step = f"[{json.dumps(key)}]" if isinstance(key, str) else f"[{key!r}]"
        if _has_tensors(_table(each)):
            return step
        if further := _path_to_tensors(each, depth - 1):
            return step + further
    return ""


def _checked_zip(file: Path) -> bool:
    """Whether a zip's records can be mapped: none is compressed. torch does not look at the checksums; this does."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            names = {Path(record.filename).name for record in records}
            if "data.pkl" not in names:
                raise InputError(f"{file}: is a zip file that `torch.save` did not write")
            if "constants.pkl" in names:
                raise InputError(f"{file}: is a TorchScript program, so it is not opened", _MEND_SCRIPT)
            for record in records:
                if record.CRC:  # 0 where `torch.serialization.set_crc32_options(False)` was in force
                    with archive.open(record) as opened:
                        while opened.read(1 << 20):
                            pass
            return all(record.compress_type == zipfile.ZIP_STORED for record in records)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise InputError(f"{file}: is damaged: {error}", _AGAIN) from error


def _state(file: Path, loaded: object) -> tuple[dict[str, Tensor], list[str]]:
    """The named tensors in what was saved, detached, and the names of everything beside them."""
    import torch

    if isinstance(loaded, _Placeholder):
        raise _wants_code(file, loaded.path)
    others: list[str] = []
    table = _table(loaded)
    inside = [key for key in _INSIDE if _has_tensors(_table(table.get(key)))]
    if len(inside) > 1:
        raise InputError(
            f"{file}: holds several state dicts: {quoted(inside)}", "save the one that is meant alone"
        )
    if inside:
        others = [str(key) for key in table if key != inside[0]]
        table = _table(table[inside[0]])
    tensors: dict[str, Tensor] = {}
    for key, value in table.items():
        if isinstance(value, _Placeholder):  # it may be a tensor of a kind of its own
            raise _wants_code(file, value.path)
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = _plain(file, key, value.detach())
        else:
            others.append(str(key))
    if not tensors:
        found = f" ({quoted(others)})" if others else ""
        path = _path_to_tensors(loaded)
        hint = (
            f"`torch.save(torch.load(OLD){path}, NEW)` saves those that it has further inside"
            if path
            else "save what `state_dict()` of the module gives: `torch.save(MODULE.state_dict(), NEW)`"
        )
        raise InputError(f"{file}: holds a {type(loaded).__name__} without named tensors{found}", hint)
    return tensors, others


def _table(value: object) -> Mapping[Any, object]:
    return cast("Mapping[Any, object]", value) if isinstance(value, Mapping) else {}


def _has_tensors(table: Mapping[Any, object]) -> bool:
    import torch

    return any(isinstance(value, torch.Tensor) for value in table.values())


def _plain(file: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if safetensors can hold it and its name."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if (
        tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.device.type != "cpu"
        or dtype not in SAFETENSORS_NAMES
    ):
        how = dtype if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"{file}: `{name}` is a tensor of a kind that safetensors cannot hold ({how})")
    if name == "__metadata__" or not name.isprintable():
        raise InputError(f"{file}: {name!r} cannot be the name of a tensor")
    return tensor.resolve_conj().resolve_neg()
