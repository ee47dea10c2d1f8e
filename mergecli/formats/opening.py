"""A source opened as a checkpoint, whatever it is: weights, an adapter on its base, or either rounded to a dtype."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mergecli.formats.lora import adapted
from mergecli.formats.lora_files import expect_base, is_adapter, open_adapter
from mergecli.formats.mixture import mixture_of
from mergecli.formats.open_clip_names import read_through
from mergecli.formats.quantized import dequantized
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.checkpoint import MIXTURE, TASK_VECTOR, Checkpoint, open_checkpoint
from mergecli.storage.lazy_checkpoint import rounded
from mergecli.storage.sources import CHAIN_STATE, Source
from mergecli.storage.store import home, locate

MODELS = ("checkpoint", TASK_VECTOR, MIXTURE)
"""The `kind` of files of ours that are opened as models."""


def is_model(opened: Checkpoint) -> bool:
    """Whether it is one as far as is known: of files of ours, whether they say that they are."""
    return "mergecli" not in opened.metadata or opened.metadata.get("kind") in MODELS


def open_source(source: Source, base: Source | None = None) -> Checkpoint:
    """The checkpoint that a source means, with its adapter added and rounded to its dtype as it is read.

    Args:
        base: what the source is added to if it is an adapter itself, and not used otherwise.

    Raises:
        InputError: it is missing or damaged, or the adapter does not fit the base, or is for another, or
            there is none.
    """
    origin, path = locate(source), model_path(source)
    made = path if path.is_dir() else path.parent
    cure = "" if path == origin else f"delete {made}, then run `mergecli fetch --allow-pickle {origin}` again"
    added = locate(source.adapter) if source.adapter else None
    with ExitStack() as stack:
        if is_adapter(path):
            if source.adapter:
                raise InputError(f"{source}: is an adapter itself, and has `adapter` too")
            if source.task is not None:
                raise InputError(f"{source}: is an adapter, and holds no tower of its own for a task")
            under = _base_of(source, path, base)
            opened = stack.enter_context(open_source(under))
            added = path
        else:
            under = replace(source, adapter=None, dtype=None, leave_out=())
            opened = _of_task(
                _model(stack.enter_context(dequantized(read_through(open_checkpoint(path, cure=cure))))),
                source,
            )
            _expect_projection(
                opened, cure or f"delete it, then run `mergecli fetch --allow-pickle {source}` again"
            )
            if opened.is_mixture and (added or source.dtype):
                raise InputError(
                    f"{source}: holds several towers, to which no `{'adapter' if added else 'dtype'}` applies",
                    "name one of them, `FILE#TASK`, or leave it out",
                )
        if added:
            adapter = open_adapter(added)
            stack.callback(adapter.stored.close)
            weights = opened
            opened = adapted(weights, adapter, path=path, dtype=source.dtype)
            expect_base(adapter, weights, under)
        elif source.dtype:
            opened = rounded(opened, source.dtype)
        if source.leave_out:
            kept = {
                name: each for name, each in opened.entries.items() if not name.startswith(source.leave_out)
            }
            opened = replace(opened, entries=kept, hashes=opened.hashes.anew())
        stack.pop_all()  # the files stay open, and close with what is returned
        return opened


def _expect_projection(opened: Checkpoint, cure: str) -> None:
    """Raises InputError for what an earlier version converted of an image encoder, and left the visual projection out."""
    left_out = opened.metadata.get("left_out", "") if "converted_from" in opened.metadata else ""
    if re.search(r'["\.]proj"', left_out):
        raise InputError(
            f"{opened.path}: was converted by an earlier version, which left the visual projection out", cure
        )


def _model(opened: Checkpoint) -> Checkpoint:
    """The checkpoint; raises InputError if it is a file of ours that says that it is something else."""
    if not is_model(opened):
        hint = "it holds no model, or was written by a later version: `mergecli info` says by which"
        if opened.path.name.endswith(CHAIN_STATE):
            hint = "it is what a chain remembers: name the model that it stands beside"
        raise InputError(
            f"{opened.path}: its kind: expected {', '.join(MODELS[:-1])} or {MODELS[-1]}, got {_kind(opened)}",
            hint,
        )
    return opened


def _kind(opened: Checkpoint) -> str:
    return f"`{opened.metadata['kind']}`" if "kind" in opened.metadata else "none"


def _of_task(opened: Checkpoint, source: Source) -> Checkpoint:
    """The tower of the task that the source names, of a mixture; else the checkpoint itself."""
    if source.task is None:
        return opened
    if not opened.is_mixture:
        raise InputError(f"{source}: the file holds one tower, and none of its own for a task")
    return mixture_of(opened).of_task(source.task)


def model_path(source: Source) -> Path:
    """Where the weights that a source means can be read: at their own path, or at that of their conversion on this
    machine, if `fetch` has made it of a pickle, or of a whole CLIP's folder with open_clip's names.

    Raises:
        InputError: there is nothing at the source.
    """
    from mergecli.formats.convert import converted_path

    path = locate(source)
    try:
        found = converted_path(path, home(), allow_pickle=False)
    except (InputError, UsageError):
        return path  # `open_checkpoint` says what is wrong with it
    return found if found.exists() else path


def _base_of(source: Source, path: Path, base: Source | None) -> Source:
    """What the adapter at `path` is added to, if it is there and is no adapter itself."""
    if base is None:
        raise InputError(
            f"{source}: is an adapter, and there is no base to add it to",
            "name its base with `--base`, or with `base = ...` in the recipe",
        )
    if is_adapter(locate(base)):
        raise InputError(f"{base}: is an adapter, weights were expected as base of {path}")
    return base
