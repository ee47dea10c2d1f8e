"""Old checkpoint formats, pickles and open_clip's names, rewritten as safetensors with Hugging Face's names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli import interrupts
from mergecli.checkpoint import open_checkpoint
from mergecli.conversion.naming import renaming
from mergecli.conversion.pickles import DTYPES, pickled_files, read_state
from mergecli.errors import UsageError, quoted
from mergecli.layout import TORCH_NAMES
from mergecli.output import SafetensorsWriter, check_targets
from mergecli.progress import Progress
from mergecli.provenance import about

if TYPE_CHECKING:
    from torch import Tensor


def is_pickled(path: Path) -> bool:
    """Whether the weights at `path` (a file, an index of shards or a folder) are pickled; told by their first bytes.

    Raises:
        InputError: it is missing, empty, or neither safetensors nor a pickle.
    """
    return bool(pickled_files(path))


def needs_conversion(path: Path) -> bool:
    """Whether mergecli can read `path` only after `convert`: it is pickled, or has open_clip's or a wrapper's names.

    Raises:
        InputError: it is missing, damaged, or has names of open_clip but not the tensors of a CLIP.
    """
    if is_pickled(path):
        return True
    with open_checkpoint(path) as stored:
        return renaming(path, {name: entry.shape for name, entry in stored.entries.items()}).changes


def convert(
    source: Path,
    target: Path,
    *,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The file `target`: the tensors of `source` as safetensors, each in its own dtype, with Hugging Face's names.

    `source` is a file of `torch.save`, in its zip or its older format, that holds a state dict or a table with one in
    it; an index of such shards; a folder with either; or safetensors with open_clip's names. What has no place in
    `target` is told to `note` and stands in the file's metadata as `left_out`.

    The models that OpenAI trained, and so those fine-tuned from them in work on task arithmetic, need `quick_gelu` as
    activation, other models of open_clip mostly `gelu`: the weights do not tell, and no `config.json` is written.

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
        plan = renaming(source, shapes)
        if stored and not plan.changes:
            raise UsageError(f"{source}: is safetensors with names that mergecli knows: nothing to convert")
        if note and plan.left_out:
            note(f"{source}: left out {quoted(plan.left_out)}: Hugging Face's model has no place for them")
        if note and others:
            note(f"{source}: left out {quoted(others)}: they are no tensors of the model")
        layout = {name: _form(origin.taken_from(forms[origin.name])) for name, origin in plan.origins.items()}
        kind = stored.metadata.get("kind", "checkpoint") if stored else "checkpoint"
        with SafetensorsWriter(
            target, layout, _metadata(kind, source, files, [*plan.left_out, *others])
        ) as writer:
            for number, (name, origin) in enumerate(plan.origins.items(), 1):
                interrupts.check()
                writer.write(name, origin.taken_from(read(origin.name)))
                if progress:
                    progress("converting", number, len(layout))
    return target


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)


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
