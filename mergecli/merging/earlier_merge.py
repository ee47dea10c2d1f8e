"""The merge that a step of a chain goes on from: its state, beside it or made of what it says of itself, and what a recipe takes from
it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from mergecli import methods
from mergecli.merging.chain_state import ChainState, read_state, state_path
from mergecli.methods._continual import Continual
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError, toml_text
from mergecli.runtime.notes import note
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.sources import Source


class Earlier(NamedTuple):
    """What a step goes on from."""

    state: ChainState
    model: Checkpoint | None = None
    """None where nothing was merged before."""
    stored: Checkpoint | None = None
    """The state's tensors; None where they are computed from the merged weights."""
    folder: Path = Path()
    """That of the merged model, where models without a folder are looked for."""


def is_merge(model: Checkpoint) -> bool:
    """Whether the metadata say that a method of ours made it of other models."""
    about = model.metadata
    return about.get("kind") == "checkpoint" and about.get("method") in methods.names() and "recipe" in about


def earlier_merge(previous: Checkpoint, stack: ExitStack) -> Earlier:
    """The merge with its state; or with one made of what the merge says of itself, if it was no step of a chain.

    Raises:
        InputError: its state is lost, damaged or another model's, or it says too little for another merge to go on.
    """
    folder = previous.path.absolute().parent
    file = state_path(previous.path)
    if file.exists():
        return Earlier(*_own_state(previous, stack), folder)
    if "chain" in previous.metadata:
        raise InputError(
            f"{previous.path}: is a step of a chain, and its state is not beside it: expected {file}",
            "copy the state with the model, or make the step again",
        )
    state = _recalled(previous)
    method = methods.create(state.method, state.settings)
    if not isinstance(method, Continual) or not method.can_recall:
        raise InputError(
            f"{previous.path}: was merged by `{state.method}`, and says too little for another merge to go on",
            "`mergecli merge --onto BASE NEW --method NAME` begins a chain",
        )
    if method.remembers != "sum" or len(state.experts) > 1:
        note(
            f"{previous.path}: was no step of a chain, so what a step needs is computed from its weights, up to rounding; "
            "a chain that begins with `--onto BASE` is exact"
        )
    return Earlier(state, previous, None, folder)


def _own_state(previous: Checkpoint, stack: ExitStack) -> tuple[ChainState, Checkpoint, Checkpoint]:
    """The state beside a model, known to belong to it; the model, and the state's tensors."""
    file = state_path(previous.path)
    state, stored = read_state(file)
    stack.enter_context(stored)
    if (digest := previous.digest()) != state.model:
        raise InputError(
            f"{file}: is the state of another model ({state.model}) than {previous.path} ({digest})",
            "one of them was replaced or copied alone: make the step again",
        )
    return state, previous, stored


def _recalled(previous: Checkpoint) -> ChainState:
    """What a merge that was no step of a chain says of itself."""
    digests = inputs_of(previous.metadata)
    try:
        about: dict[str, Any] = tomli.loads(previous.metadata["recipe"])
        table = dict(about["method"])
        name, tuned = str(table.pop("name")), dict(about["tuned"])
        experts = {str(each): digests[each] for each in tuned}
        base, source = digests.get("base", ""), about.get("base", "")
        return ChainState(
            name, table, str(about["dtype"]), int(about["seed"]), base, source, experts, tuned, {}
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{previous.path}: does not say what it was merged of, and has no state") from error


def continued(earlier: Earlier, recipe: Recipe) -> Recipe:
    """The recipe of the step, with the chain's method, dtype, seed and base where it names none; raises UsageError where it
    names others."""
    state = earlier.state
    assert earlier.model
    place = f"{earlier.model.path}: its chain"
    if recipe.method is not None and recipe.method != state.method:
        raise UsageError(
            f"{place} is merged by `{state.method}`, got `{recipe.method}`",
            f"a chain keeps its method: `--method {state.method}`, or begin another with `--onto BASE`",
        )
    chosen = methods.table_of(methods.create(state.method, {**state.settings, **recipe.settings}))
    own = methods.table_of(methods.create(state.method, state.settings))
    if other := [key for key in {**own, **chosen} if own.get(key) != chosen.get(key)]:
        raise UsageError(
            f"{place} has `method.{other[0]}` = {toml_text(own.get(other[0]))}, got {toml_text(chosen.get(other[0]))}",
            "a chain keeps its settings: leave them out, or begin another",
        )
    if recipe.dtype not in ("same", state.dtype):
        raise UsageError(
            f"{place} is in dtype `{state.dtype}`, got `{recipe.dtype}`",
            "a chain keeps its dtype: leave it out",
        )
    if recipe.seed != state.seed and (recipe.names_seed or recipe.seed):
        raise UsageError(
            f"{place} has seed {state.seed}, got {recipe.seed}", f"write `--set seed={state.seed}`"
        )
    return replace(
        recipe,
        base=recipe.base or located("base", state.base_source, earlier.folder, "--base"),
        method=state.method,
        settings=dict(state.settings),
        dtype=state.dtype,
        seed=state.seed,
    )


def located(name: str, written: str | dict[str, str], folder: Path, option: str) -> Source:
    """A source that a state recorded without its folders: it is looked for beside the merged model, in `folder`.

    Args:
        name: what messages call it.
        option: that names it.

    Raises:
        UsageError: it is not there, or the state does not say where it was.
    """
    label = written if isinstance(written, str) else written["source"]
    sources = recipe_of({"source": written}).tuned if written else {}
    source = sources.get("source")
    if source is not None and source.kind == "path":
        path = folder / label
        source = replace(source, path=path) if path.exists() else None
    if source is None:
        where = f"`{label}` is not beside the merge" if label else "the merge does not say where it is"
        raise UsageError(f"{name}: {where}", f"name it with `{option}`")
    return source
