"""What of a model differs from the base besides the image encoder, which is all that is merged and evaluated of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from mergecli.clip.processor import processor_differences
from mergecli.formats.lora_files import is_adapter
from mergecli.runtime.errors import MergecliWarning, listed, toml_text
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.sources import Source

_PARTS = {
    "text_model.": "text tower",
    "text_projection.": "text projection",
    "logit_scale": "logit scale",
}
_RUN = 1 << 12
"""Entries at the beginning, in the middle and at the end of a tensor that are compared. Training moves nearly all of
them; the last rows of a token embedding are those that stand in every prompt."""
_UNSEEN = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}
"""What a tower computes with and its tensors do not show, with the values of configurations that do not say."""


class Candidate(NamedTuple):
    """A model as it was opened, before only its image encoder is looked at."""

    name: str
    source: Source
    opened: Checkpoint


def warn_of_other_parts(
    models: Sequence[Candidate], base: Checkpoint | None, label: str, *, merged: bool
) -> None:
    """One warning that names, for each model, what else differs from the base, and how to evaluate with it.

    A tuned text tower is no mistake, but without it the model's accuracy is another. Without a base that is a whole CLIP,
    the first model that is one stands for it.

    Args:
        merged: whether the models are merged; else they are evaluated.
    """
    if base is None or not base.is_whole_clip:
        first = next((each for each in models if each.opened.is_whole_clip), None)
        if first is None:
            return
        base, label = first.opened, f"`{first.name}`"
    lines = [
        f"`{each.name}`: {', '.join(parts)} ({_use(each.source, each.opened, merged=merged)})"
        for each in models
        if (parts := list(other_parts(each.opened, base, label)))
    ]
    if lines:
        what = (
            "only vision towers are merged" if merged else "are evaluated with its text tower and other parts"
        )
        warnings.warn(
            f"these models differ from {label} outside of the vision tower, and {what}:\n{listed(lines)}",
            MergecliWarning,
            stacklevel=2,
        )


def other_parts(opened: Checkpoint, base: Checkpoint, label: str) -> Iterator[str]:
    """What differs from the base, but for the weights of the vision tower and its projection.

    The tensors are sampled, so that a merge need not read text towers. A model in another dtype differs by more than
    rounding.
    """
    if opened.path == base.path:
        return
    for start, part in _PARTS.items():
        names = [name for name in opened.entries if name.startswith(start) and name in base.entries]
        if any(not _is_same(opened, base, name) for name in names):
            yield part
    ours, theirs = _unseen(opened), _unseen(base)
    if ours is not None and theirs is not None:
        for key, value in ours.items():
            if value != theirs[key]:
                yield f"`{key}` is {toml_text(value)}, not {toml_text(theirs[key])}"
    if processing := ", ".join(processor_differences(opened.path, base.path)):
        yield f"image processor ({processing}; that of {label} is used)"


def _is_same(opened: Checkpoint, base: Checkpoint, name: str) -> bool:
    import torch

    shape, size = opened.entries[name].shape, opened.entries[name].size
    if shape != base.entries[name].shape:
        return False
    for start in sorted({0, max(0, (size - _RUN) // 2), max(0, size - _RUN)}):
        stop = min(start + _RUN, size)
        ours, theirs = opened.read_entries(name, start, stop), base.read_entries(name, start, stop)
        if ours.dtype == theirs.dtype or not (ours.is_floating_point() and theirs.is_floating_point()):
            same = ours.equal(theirs.to(ours.dtype))
        else:
            step = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
            same = torch.allclose(ours.float(), theirs.float(), rtol=step, atol=1e-7)
        if not same:
            return False
    return True


def _unseen(opened: Checkpoint) -> dict[str, Any] | None:
    """What the configuration beside the weights says of the vision tower's computation; None if there is none."""
    if not opened.path.is_dir() or is_adapter(opened.path):
        return None
    try:
        table: Any = json.loads((opened.path / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(table, dict) and "vision_config" in table:
        table = cast("dict[str, Any]", table)["vision_config"]
    if not isinstance(table, dict) or cast("dict[str, Any]", table).get("hidden_size", 768) != _width(opened):
        return None  # of another tower, or a stub: what it leaves out is not what is usual
    return {key: cast("dict[str, Any]", table).get(key, usual) for key, usual in _UNSEEN.items()}


def _width(opened: Checkpoint) -> int | None:
    """The width of the vision tower; None if there is none."""
    entry = opened.entries.get("vision_model.embeddings.class_embedding")
    return entry.shape[0] if entry else None


def _use(source: Source, opened: Checkpoint, *, merged: bool) -> str:
    """How to evaluate with a model's other parts."""
    where = str(opened.path) if source.kind == "path" else str(source)
    if source.adapter is not None or is_adapter(opened.path):
        where = "FOLDER"
        how = "merge the adapter with peft (`merge_and_unload`) and save it with the base's tokenizer and processor; then "
    elif not opened.is_whole_clip:
        where = "FOLDER"
        how = "write what differs into a copy of the base's folder; then "
    elif source.kind == "path" and not _is_runnable(opened.path):
        where = "FOLDER"
        how = "put the file into a copy of the base's folder; then "
    else:
        how = ""
    return f"to use them: {how}`{'mergecli eval ... ' if merged else ''}--clip {where}`"


def _is_runnable(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "preprocessor_config.json"))
