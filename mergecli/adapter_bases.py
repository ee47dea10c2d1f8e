"""Which base an adapter is for: how that is written, and whether it is the one that the adapter is put on."""

from __future__ import annotations

import re
import warnings

from mergecli.adapter_files import Adapter
from mergecli.checkpoint import Checkpoint
from mergecli.errors import InputError, MergecliWarning
from mergecli.provenance import inputs_of
from mergecli.sources import HUBS, Source

_HINT = (
    "name the base that it was made on, with `--base` or with `base = ...` in the recipe; what it changes goes to "
    "another base as a task vector (`mergecli taskvector`)"
)


def base_name(source: Source) -> str:
    """What an adapter's configuration calls its base: a repository that peft finds on the hub, else the label."""
    return source.name if source.kind == "hf" else source.label


def expect_base(adapter: Adapter, base: Checkpoint, source: Source) -> None:
    """Compares what the adapter says of its base with the one that it is put on, and that `source` names.

    Adapters that this program wrote have the digest of the base's vision tower; of others the name is all there is, and
    where both are names of a hub that end differently, that is a warning.

    Raises:
        InputError: the digest is another.
    """
    origin, name = inputs_of(adapter.stored.metadata).get("base"), adapter.config.base
    if origin is not None:
        own = base.vision().digest()
        if own != origin:
            made_on = f"{name} ({origin})" if name else origin
            raise InputError(_foreign(adapter, made_on, f"{source.label} ({own})"), _HINT)
        return
    theirs, ours = _repository(name or ""), _repository(str(source)) if source.kind in HUBS else None
    if theirs and ours and theirs.rpartition("/")[2].lower() != ours.rpartition("/")[2].lower():
        warnings.warn(_foreign(adapter, theirs, source.label), MergecliWarning, stacklevel=2)


def _foreign(adapter: Adapter, expected: str, got: str) -> str:
    return f"{adapter.stored.path}: is an adapter for another base: expected {expected}, got {got}"


def _repository(text: str) -> str | None:
    """`org/name` of a hub in `hf:org/name@revision` or the like; None if it is not one."""
    found = re.fullmatch(r"(?:(?:hf|ms):)?(\w[\w.-]*/[\w.-]+)(?:@[^#]+)?(?:#.*)?", text)
    return found[1] if found else None
