"""The linear layers of a model, chosen by their names or the ends of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergecli.methods._depth import layer_of
from mergecli.runtime.errors import UsageError, did_you_mean, quoted
from mergecli.storage.checkpoint import PROJECTION, VISION, Checkpoint


def chosen_layers(reference: Checkpoint, modules: Sequence[str]) -> dict[str, str]:
    """Weight -> module, as the tower itself calls it, of the linear layers that are meant.

    Args:
        modules: names of layers or their ends, such as `q_proj`; none stands for all those of the encoder's layers.

    Raises:
        UsageError: there is no such layer.
    """
    linear = {
        name: module
        for name, module in modules_of(reference, [2]).items()
        if not module.endswith("embedding")
    }
    if not modules:
        chosen = {name: module for name, module in linear.items() if layer_of(name) is not None}
        if not chosen:
            raise UsageError(
                f"{reference.path}: has no linear layers in an encoder", "name them with `--modules`"
            )
        return chosen
    for wanted in modules:
        if not any(is_end(wanted, module) for module in linear.values()):
            known = {module.rpartition(".")[2] for module in linear.values()}
            raise UsageError(
                f"{reference.path}: has no linear layer `{wanted}`{did_you_mean(wanted, known)}",
                f"its linear layers are {quoted(sorted(known))}",
            )
    return {name: module for name, module in linear.items() if any(is_end(each, module) for each in modules)}


def expect_room(rank: int, reference: Checkpoint, chosen: Mapping[str, str]) -> None:
    """Raises UsageError if a chosen weight has a side that is less than the rank."""
    most, module = min((min(reference.entries[name].shape), module) for name, module in chosen.items())
    if rank > most:
        raise UsageError(f"rank: expected at most {most}, the smaller side of `{module}`, got {rank}")


def modules_of(reference: Checkpoint, dimensions: Sequence[int]) -> dict[str, str]:
    """Weight -> module, of weights with so many dimensions; a CLIP's tower does not begin with its own name, and its projection is
    no part of it."""
    return {
        name: name.removeprefix(VISION).removesuffix(".weight")
        for name, entry in reference.entries.items()
        if entry.is_float
        and name.endswith(".weight")
        and len(entry.shape) in dimensions
        and name != PROJECTION
    }


def is_end(wanted: str, module: str) -> bool:
    """Whether the module is called so, or its name ends so."""
    return module == wanted or module.endswith(f".{wanted}")
