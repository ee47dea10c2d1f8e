"""The side file of a chain: what the next step needs besides the merged model, and which model it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.methods._base import Method
from mergecli.methods._continual import Remembered
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import TASK_VECTOR, Checkpoint, TensorEntry, open_checkpoint
from mergecli.storage.checksums import ChunkHashes
from mergecli.storage.metadata import UNKNOWN_DIGEST, about
from mergecli.storage.sources import CHAIN_STATE

if TYPE_CHECKING:
    from mergecli.recipe.schema import Recipe

KIND = "state of a chain"
"""The `kind` in the metadata of such a file."""
COUNT = "chain.experts"
"""The one tensor that every such file has: how many models are merged."""


@dataclass(frozen=True)
class ChainState:
    """What a chain is, and how far it is."""

    method: str
    settings: Mapping[str, Any]
    """All of them, defaults included."""
    dtype: str
    """As the recipe says it."""
    seed: int
    base: str
    """Digest of the base; empty where it is not known."""
    base_source: str | dict[str, str]
    """As recipes record it: without folders."""
    experts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name -> digest of each model that is in the merge, in their order."""
    sources: Mapping[str, str | dict[str, str]] = field(default_factory=dict[str, "str | dict[str, str]"])
    """Name -> source of each, as recipes record it."""
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict[str, "Sequence[float]"])
    """What the method remembers besides tensors."""
    model: str = UNKNOWN_DIGEST
    """Digest of the merged model that the file stands beside."""

    def metadata(self, recipe: str) -> dict[str, str]:
        """That of the file; as long whatever model it is of."""
        facts = {name: getattr(self, name) for name in _FACTS}
        return about(KIND, method=self.method, recipe=recipe, chain=json.dumps(facts))


_FACTS = ("settings", "dtype", "seed", "base", "base_source", "experts", "sources", "numbers", "model")


def state_path(model: Path) -> Path:
    """The side file of a merged model: `NEXT.state.safetensors` beside the file `NEXT.safetensors` or the folder `NEXT`."""
    return model.with_name(model.name.removesuffix(".safetensors") + CHAIN_STATE)


def read_state(file: Path) -> tuple[ChainState, Checkpoint]:
    """What the file says, and its tensors, which the caller closes.

    Raises:
        InputError: it is damaged, or no such file.
    """
    stored = open_checkpoint(file, checked=True, cure="make the model that it belongs to again")
    try:
        return _state(stored), stored
    except BaseException:
        stored.close()
        raise


def _state(stored: Checkpoint) -> ChainState:
    if stored.metadata.get("kind") != KIND:
        raise InputError(f"{stored.path}: is no state of a chain")
    try:
        facts: Any = json.loads(stored.metadata["chain"])
        return ChainState(method=stored.metadata["method"], **{name: facts[name] for name in _FACTS})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{stored.path}: is damaged, or was written by another version") from error


def memory_of(previous: Checkpoint, stored: Checkpoint, remembers: Remembered) -> Checkpoint:
    """What is remembered, as a model whose weights are read: the state's tensors, or the merged weights, of which the state has
    those in float32 that the model has rounded."""
    entries = {name: entry for name, entry in stored.entries.items() if name != COUNT}
    if remembers != "weights":
        metadata = {"kind": TASK_VECTOR if remembers == "task vector" else "checkpoint"}
        return replace(stored, entries=entries, metadata=metadata, hashes=stored.hashes.anew())
    if not entries:
        return previous
    count = len(previous.files)
    moved: dict[str, TensorEntry] = {
        name: each._replace(file=each.file + count) for name, each in entries.items()
    }
    expected = {**previous.hashes.expected, **{name: stored.hashes.expected[name] for name in entries}}
    return replace(
        previous,
        entries={**previous.entries, **moved},
        files=(*previous.files, *stored.files),
        descriptors=(*previous.descriptors, *stored.descriptors),
        states=(*previous.states, *stored.states),
        hashes=ChunkHashes(expected, stored.hashes.refusal),
    )


def state_layout(
    remembers: Remembered, layout: Mapping[str, tuple[str, tuple[int, ...]]], floats: Sequence[str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of what the state holds beside a model of that `layout`."""
    kept = [name for name in floats if remembers != "weights" or layout[name][0] != "F32"]
    return {COUNT: ("I64", ()), **{name: ("F32", layout[name][1]) for name in kept}}


def chain_state(recipe: Recipe, method: Method) -> ChainState:
    """The state of a chain that begins on the recipe's base, of which nothing is read yet."""
    assert recipe.base
    name, settings = methods.name_of(method), methods.table_of(method)
    return ChainState(name, settings, recipe.dtype, recipe.seed, "", recipe.base.written)
