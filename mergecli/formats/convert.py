"""Old checkpoint formats, pickles and open_clip's names, rewritten as safetensors with Hugging Face's names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.formats.lora_files import is_adapter
from mergecli.formats.open_clip_config import lacks_config, transformers_config
from mergecli.formats.open_clip_names import renaming
from mergecli.formats.pickles import pickled_files, read_state
from mergecli.runtime import interrupts
from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.storage.atomic import check_targets, whole_folder, write_text, writing
from mergecli.storage.checkpoint import VISION, Checkpoint, open_checkpoint
from mergecli.storage.file_state import state_of
from mergecli.storage.metadata import about
from mergecli.storage.safetensors_format import SAFETENSORS_NAMES, TORCH_NAMES
from mergecli.storage.safetensors_writer import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor


def is_pickled(path: Path) -> bool:
    """Whether the weights at `path` (a file, an index of shards or a folder) are pickled, which their first bytes show.

    Raises:
        InputError: it is missing, empty, or neither safetensors nor a pickle.
    """
    return bool(pickled_files(path))


def needs_conversion(path: Path) -> bool:
    """Whether `path` can be used only after `convert`: it is pickled, or a folder with open_clip's names or configuration,
    as which transformers cannot load it. A safetensors file with such names is read as it is.

    Raises:
        InputError: it is missing, damaged, or has names of open_clip but not the tensors of a CLIP.
    """
    if is_pickled(path):
        return True
    return path.is_dir() and (lacks_config(path) or _has_old_names(path))


def _has_old_names(path: Path) -> bool:
    with open_checkpoint(path) as stored:
        return renaming(
            path, {name: entry.shape for name, entry in stored.entries.items()}, opened=True
        ).changes


def convert(
    source: Path,
    target: Path,
    *,
    allow_pickle: bool = False,
) -> Path:
    """The file `target`: the tensors of `source` as safetensors, each in its own dtype, with Hugging Face's names.

    `source` is a file of `torch.save`, in its zip or its older format, that holds a state dict or a table with one in
    it, of the zip format also a module; an index of such shards; a folder with either; or safetensors with open_clip's names. The names of
    what `target` has no tensor for are in its metadata as `left_out`.

    The models that OpenAI trained, and so those fine-tuned from them in work on task arithmetic, need `quick_gelu` as
    activation, other models of open_clip mostly `gelu`: the weights do not tell.

    Memory: a zip's tensors are views of the mapped file, and safetensors are read one by one, so that of either only
    one tensor at a time is copied (none, where it is contiguous). Files of the older format are in memory once.

    Raises:
        UsageError: it is a pickle and `allow_pickle` is not set, there is nothing to convert, or `target` is an input.
        InputError: a file is missing, damaged, needs code to be opened, or has no CLIP under the names of one.
    """
    import torch

    pickled = pickled_files(source)
    if pickled and not allow_pickle:
        raise UsageError(
            f"{source}: is a pickle: instructions that Python follows when it opens the file, and that may start any "
            "program; so it is not opened by default",
            "`--allow-pickle` reads it with torch's restricted unpickler, which makes tensors and refuses all else",
        )
    with ExitStack() as stack:
        stored = None if pickled else stack.enter_context(open_checkpoint(source))
        files = list(stored.files) if stored else pickled
        check_targets([(target, [".safetensors"])], {file.name: file for file in files})
        read: Callable[[str], Tensor]
        if stored:
            shapes = {name: entry.shape for name, entry in stored.entries.items()}
            forms = {
                name: torch.empty(entry.shape, dtype=getattr(torch, TORCH_NAMES[entry.dtype]), device="meta")
                for name, entry in stored.entries.items()
            }
            read, others = stored.read, list[str]()
        else:
            forms, others = read_state(files)
            shapes = {name: tuple(tensor.shape) for name, tensor in forms.items()}
            read = forms.__getitem__
        plan = renaming(source, shapes, opened=stored is not None)
        if stored and not plan.changes:
            raise UsageError(f"{source}: is safetensors with names that mergecli knows: nothing to convert")
        layout = {name: _form(origin.taken_from(forms[origin.name])) for name, origin in plan.origins.items()}
        kind = stored.metadata.get("kind", "checkpoint") if stored else "checkpoint"
        with SafetensorsWriter(
            target, layout, _metadata(kind, source, files, [*plan.left_out, *others]), checked=True
        ) as writer:
            for name, origin in plan.origins.items():
                interrupts.check()
                writer.write(name, origin.taken_from(read(origin.name)))
    return target


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)


def _metadata(kind: str, source: Path, files: list[Path], left_out: list[str]) -> Mapping[str, str]:
    digests: dict[str, str] = {}
    for file in files:
        with file.open("rb") as opened:
            digests[_text(file)] = "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
    metadata = about(kind, inputs=digests, converted_from=_text(source))
    return {**metadata, "left_out": json.dumps(left_out)} if left_out else metadata


def _text(path: Path) -> str:
    """The name of a file, without bytes that are no text."""
    return path.name.encode("utf-8", "backslashreplace").decode()


def why_foreign(stored: Checkpoint) -> str:
    """What to do with a checkpoint whose names are not those of one CLIP of Hugging Face; empty if they are, or are none
    of a CLIP at all."""
    own = re.compile(rf"(.*?)(?:{re.escape(VISION)})?embeddings\.class_embedding")
    if len(towers := [found[1] or "(none)" for name in stored.entries if (found := own.fullmatch(name))]) > 1:
        return f"{stored.path} holds {len(towers)} vision towers, under {quoted(towers)}: save the one that is meant alone"
    try:
        plan = renaming(
            stored.path, {name: entry.shape for name, entry in stored.entries.items()}, opened=True
        )
    except InputError as error:
        return error.message
    if not plan.changes:
        return ""
    return (
        f"{stored.path} has open_clip's names: `mergecli fetch {shlex.quote(str(stored.path))}` rewrites it once, and from "
        "then on that is read in its place"
    )


_COPIED = (".json", ".txt")
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")


def converted_path(path: Path, home: Path, *, allow_pickle: bool) -> Path:
    """Where the checkpoint can be read: at its own path, or else at that of its conversion, which `convert_once` writes.

    The conversion lies in the store under a digest of the content, so that what was converted once is found again.

    Raises:
        UsageError: it is a pickle that is not converted yet, and `allow_pickle` is not set. InputError: it is damaged.
    """
    if is_adapter(path) or not needs_conversion(path):
        return path
    state = hashlib.sha256(b"configuration" if path.is_dir() and lacks_config(path) else b"")
    for file in _content(path):
        state.update(_sha256(file, state_of(file)))
    folder = home / "converted" / state.hexdigest()[:32]
    if not (allow_pickle or os.path.isdir(folder)) and is_pickled(path):  # noqa: PTH112  a name that is too long is none
        raise UsageError(
            f"{path}: is a pickle, which may start any program when it is opened; so it is not opened by default",
            "`--allow-pickle` converts it with torch's restricted reader, which makes tensors and refuses all else",
        )
    return folder if path.is_dir() else folder / "model.safetensors"


@lru_cache(maxsize=1024)
def _sha256(file: Path, _state: int) -> bytes:
    """The digest of a file. A command asks for it whenever it opens the model, and only a file that has changed is read again."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def convert_once(path: Path, target: Path) -> None:
    """Converts the checkpoint to its `converted_path`, unless that is there; with a folder's configuration, which may be
    open_clip's, and tokenizer.

    Raises:
        InputError: it is damaged, would run code, cannot be written, or its configuration is not that of a CLIP like OpenAI's.
    """
    if target == path or os.path.exists(target):  # noqa: PTH110
        return
    made = transformers_config(path) if path.is_dir() and lacks_config(path) else {}
    is_renamed = is_pickled(path) or not path.is_dir() or _has_old_names(path)
    with writing(target), whole_folder(target if path.is_dir() else target.parent) as folder:
        if is_renamed:
            convert(path, folder / "model.safetensors", allow_pickle=True)
        for name, content in made.items():
            write_text(folder / name, content)
        for file in _files(path) if path.is_dir() else ():
            is_weights = file.name.endswith((".index.json", ".safetensors"))
            if (file.suffix in _COPIED and not is_weights) or (is_weights and not is_renamed):
                shutil.copyfile(file, folder / file.name)


def _content(path: Path) -> list[Path]:
    """The files that the conversion depends on."""
    if path.is_dir():
        return [file for file in _files(path) if file.suffix in (*_WEIGHTS, *_COPIED)]
    if not path.name.endswith(".index.json"):
        return [path]
    if shards := pickled_files(path):
        return [path, *shards]
    with open_checkpoint(path) as stored:
        return [path, *stored.files]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
