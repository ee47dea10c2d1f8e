"""`merge --onto`: a step of a chain, a merge that goes on from an earlier one without its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from mergecli import methods
from mergecli.formats.mixture import one_tower
from mergecli.formats.opening import open_source
from mergecli.formats.projection import foreign_projection, projection_metadata
from mergecli.formats.quantized import models_metadata
from mergecli.merging.chain_state import (
    COUNT,
    ChainState,
    chain_state,
    memory_of,
    state_layout,
    state_path,
)
from mergecli.merging.earlier_merge import Earlier, continued, earlier_merge, is_merge, located
from mergecli.merging.merge_target import (
    Merged,
    MergeTarget,
    ModelWriter,
    cast,
    foreign_vectors,
    same_weights,
)
from mergecli.merging.models import ModelPasses, Models, check_fit, open_models
from mergecli.methods._base import Group
from mergecli.methods._continual import START, Chain, Continual, Step
from mergecli.methods._modifier import ChangedGroups
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe, recipe_text
from mergecli.results.card import write_card
from mergecli.results.plan import Plan, Work
from mergecli.runtime.distributed import is_first, usable_device
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.errors import InputError, MergecliError, UsageError, did_you_mean, quoted
from mergecli.runtime.memory import peak_memory
from mergecli.runtime.notes import note
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import check_space, check_target, refuse_inputs
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.metadata import UNKNOWN_DIGEST
from mergecli.storage.safetensors_format import layout_size
from mergecli.storage.safetensors_writer import SafetensorsWriter
from mergecli.storage.scratch import Scratch
from mergecli.storage.sizes import parse_size
from mergecli.storage.sources import CHAIN_STATE, Source, named_sources, parse_source

PREVIOUS = "previous merge"
"""What messages and records call it; no model can have the name."""
_TAKEN_OUT = "taken out: "
_SAME_BASE = "name the base that the chain began on"


@dataclass(frozen=True)
class Onto:
    """What a step was asked for."""

    recipe: Recipe
    """The new models; its base and method where they are named."""
    output: Path
    replace: str | None = None
    without: tuple[str, ...] = ()
    device: str = "cpu"
    shard_size: str | None = None
    card: bool | None = None


def begin(step: Onto, progress: Progress | None) -> Merged:
    """A merge of all models of the step, as the first step of a chain.

    Raises:
        UsageError: there is no base, or no step is made by the recipe's method. InputError: as `merge`.
    """
    recipe = step.recipe
    if recipe.base is None:
        raise UsageError(
            "there is no base, and differences to it are needed", "name it with `base = ...` or `--base`"
        )
    with ExitStack() as stack:
        return _step(step, Earlier(chain_state(recipe, continual_method(recipe))), stack, progress)


def go_on(step: Onto, onto: str | Path, progress: Progress | None) -> Merged:
    """The next step of the chain that the merge `onto` belongs to; the first one if it is no merge, but a plain model.

    Raises:
        UsageError: the step does not go on with the same method, settings or dtype, or cannot take a model out.
        InputError: the merge has no state, or that of another model.
    """
    source = parse_source(str(onto), Path())
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_source(source, step.recipe.base))
            one_tower(opened)
            previous = opened.vision()
        except MergecliError as error:
            is_state = str(onto).endswith(CHAIN_STATE)
            hint = "name the model that it stands beside" if is_state else error.hint
            raise type(error)(f"--onto: {error.message}", hint) from error
        recipe = step.recipe
        if state_path(previous.path).exists() or is_merge(previous):
            earlier = earlier_merge(previous, stack)
            return _step(replace(step, recipe=continued(earlier, recipe)), earlier, stack, progress)
        if step.replace is not None or step.without:
            raise InputError(f"{source}: is no merge, and no model can be taken out of it")
        if recipe.method is None:
            raise UsageError(
                "no method is named", "name one with `--method NAME`; `mergecli methods` lists them"
            )
        continual_method(recipe)  # known before anything is read
        if recipe.base is None:
            note(f"{source}: a chain begins on it")
            recipe = replace(recipe, base=source)
        elif _base_digest(recipe.base, stack) != previous.digest():
            first = recipe_of(named_sources([str(onto)])).tuned
            if twice := first.keys() & recipe.tuned.keys():
                raise UsageError(
                    f"two models are called {quoted(twice)}", "write `NAME=SOURCE` for the new one"
                )
            note(f"{source}: is no merge, so it is the first model of a chain")
            recipe = replace(recipe, tuned={**first, **recipe.tuned})
        return begin(replace(step, recipe=recipe), progress)


def _base_digest(base: Source, stack: ExitStack) -> str:
    opened = stack.enter_context(open_source(base))
    one_tower(opened)
    return opened.vision().digest()


def continual_method(recipe: Recipe) -> Continual:
    """The recipe's method; raises UsageError if it cannot go on from an earlier merge, or the recipe asks for what no step does."""
    method = recipe.built
    if method.layers:
        raise UsageError(
            "`method.layers`: a merge that others go on from has the same settings in every layer",
            "leave `[[method.layers]]` out, or merge all models at once",
        )
    if not isinstance(method, Continual):
        known = [name for name in methods.names() if issubclass(methods.find(name), Continual)]
        raise UsageError(
            f"`{recipe.method}` needs all models at once, and cannot go on from an earlier merge",
            f"{', '.join(known)} can",
        )
    if recipe.as_adapter or recipe.space not in ("", "dense"):
        raise UsageError(
            "a step of a chain is of whole weights",
            "leave out `as_adapter` and `space`; `extract` makes an adapter of a merge",
        )
    return method


def _step(step: Onto, earlier: Earlier, stack: ExitStack, progress: Progress | None) -> Merged:
    method, state, recipe = continual_method(step.recipe), earlier.state, step.recipe
    out, taken = _taken_out(step, method, earlier)
    stays = [name for name in state.experts if name not in out]
    for name in recipe.tuned:
        if name in stays:
            raise UsageError(
                f"`{name}` is in the merge already",
                f"write `--replace {name}`, or give the new model another name",
            )
    if not recipe.tuned and not out:
        raise UsageError("there are no new models to merge", "name them as arguments")
    if not recipe.tuned and not stays:
        raise UsageError(f"--without: nothing is left without {quoted(out)}")
    every = {**{name: _named(state.sources[name]) for name in stays}, **recipe.tuned}
    target = MergeTarget.of(replace(recipe, tuned=every), step.output, step.card)
    side = state_path(step.output)
    size = parse_size(step.shard_size, "--shard-size", least=1) if step.shard_size is not None else None
    if size is not None and step.output.suffix:
        raise UsageError(
            f"{step.output}: one file has no shards", "name a folder, without suffix, with `--shard-size`"
        )
    check_target(side)
    models = _models(step, earlier, taken, stack)
    refuse_inputs(step.output, models.paths)
    refuse_inputs(side, models.paths)
    if earlier.model:
        files = {f"{PREVIOUS} ({file.name})": file for file in earlier.model.files}
        if earlier.stored:
            files[f"state of the {PREVIOUS}"] = earlier.stored.path
        refuse_inputs(step.output, files)
        refuse_inputs(side, files)
    assert models.base
    if state.base and (digest := models.base.digest()) != state.base:
        raise InputError(
            f"{models.base.path}: is another base ({digest}) than that of the chain ({state.base})",
            _SAME_BASE,
        )
    if earlier.model and (foreign := foreign_projection(earlier.model.metadata, models.base)):
        raise InputError(f"{models.base.path}: has {foreign}, that of the chain's base", _SAME_BASE)
    layout = target.layout(models)
    kept = state_layout(method.remembers, layout, models.floats)
    check_space({step.output: target.size(models), side: layout_size(kept)})
    work_begins(lambda: _plan(step, models, method, layout_size(kept), target))
    if not is_first():  # the first of several processes writes
        return Merged(
            target.path, str(recipe.method), tuple(every), len(layout), models.reference.parameters, {}
        )
    chain = Chain(len(stays), state.numbers) if stays else START
    return _merged(_Job(step, method, models, target, chain, stays, taken, earlier, kept, size), progress)


def _taken_out(step: Onto, method: Continual, earlier: Earlier) -> tuple[list[str], dict[str, Source]]:
    """Names of the models that leave the merge, and their sources."""
    found: dict[str, Source] = {}
    given = [("--without", text) for text in step.without]
    given += [("--replace", step.replace)] if step.replace is not None else []
    for option, text in given:
        name, _, source = text.partition("=")
        experts = earlier.state.experts
        if name not in experts:
            raise UsageError(
                f"{option}: `{name}` is not in the merge{did_you_mean(name, experts)}; there are {quoted(experts, 20)}"
            )
        if method.why_not_without:
            raise UsageError(
                f"{option}: `{earlier.state.method}` cannot take `{name}` out again: {method.why_not_without}",
                "merge the other models again",
            )
        if name in found:
            raise UsageError(f"{option}: `{name}` is named twice")
        if option == "--replace" and list(step.recipe.tuned) != [name]:
            new = quoted(step.recipe.tuned) or "none"
            raise UsageError(
                f"--replace: expected one new model called `{name}`, got {new}", f"write `{name}=SOURCE`"
            )
        written = earlier.state.sources[name]
        found[name] = (
            parse_source(source, Path())
            if source
            else located(f"`{name}`", written, earlier.folder, f"{option} {name}=SOURCE")
        )
    return list(found), found


def _named(written: str | dict[str, str]) -> Source:
    return recipe_of({"source": written}).tuned["source"]


def _models(step: Onto, earlier: Earlier, taken: Mapping[str, Source], stack: ExitStack) -> Models:
    """The base, what is remembered, the models that are taken out, and the new ones: known to fit together."""
    recipe = replace(
        step.recipe,
        tuned={**{f"{_TAKEN_OUT}{name}": each for name, each in taken.items()}, **step.recipe.tuned},
    )
    previous = earlier.model
    # what is remembered is of the tensors of the first step: a projection that comes later has no place in it
    projection = None if previous is None else previous.has_projection
    opened = open_models(
        recipe, stack, needs="base", device=step.device, says_other_parts=True, projection=projection
    )
    for name in taken:
        expert, digest = opened.tuned[f"{_TAKEN_OUT}{name}"], earlier.state.experts[name]
        if (found := expert.digest()) != digest:
            raise InputError(
                f"{expert.path}: is another model ({found}) than the `{name}` that was merged ({digest})",
                "name the one that was merged",
            )
    if previous is None:
        return opened
    check_fit(Models(opened.base, {PREVIOUS: previous}))
    method = step.recipe.built
    assert isinstance(method, Continual)
    memory = memory_of(previous, earlier.stored, method.remembers) if earlier.stored else previous
    if lacking := [name for name in opened.floats if name not in memory.entries]:
        raise InputError(f"{memory.path}: is a state without {quoted(lacking)}", "make the step again")
    return replace(opened, tuned={PREVIOUS: memory, **opened.tuned}, device=usable_device(step.device))


def _plan(step: Onto, models: Models, method: Continual, state_size: int, target: MergeTarget) -> Plan:
    passes = method.reads
    work = [
        Work("read", name, str(each.path), tensors=len(each.entries), passes=passes, bytes=each.nbytes)
        for name, each in models.read.items()
    ]
    work.append(Work("merge", str(step.recipe.method), passes=passes))
    work.append(
        Work(
            "write", "model", str(step.output), tensors=len(target.layout(models)), bytes=target.size(models)
        )
    )
    work.append(Work("write", "state", str(state_path(step.output)), bytes=state_size))
    return Plan("merge", tuple(work), peak_memory(), 0.0)


@dataclass(frozen=True)
class _Job:
    """A step that has been checked."""

    step: Onto
    method: Continual
    models: Models
    target: MergeTarget
    chain: Chain
    stays: Sequence[str]
    taken: Mapping[str, Source]
    earlier: Earlier
    kept: Mapping[str, tuple[str, tuple[int, ...]]]
    """What the state holds."""
    shard_size: int | None

    def rows(self, group: Group) -> Group:
        """The group as the method gets it: what is remembered, if anything is, and the new models."""
        recalls = self.earlier.model is not None and self.earlier.stored is None
        if not recalls and not self.taken:
            return group
        recalled = None
        if recalls:
            before = Chain(len(self.earlier.state.experts))
            recalled = self.method.recall(group.tuned[0], Step(group, before))
        are_deltas = self.method.remembers == "task vector"
        rows = group.deltas if are_deltas else group.tuned
        if recalled is not None:
            rows[0] = recalled
        first = 1 + len(self.taken)
        for row in rows[1:first]:
            rows[0] -= row
        own = [*([0] if self.stays else []), *range(first, len(rows))]
        return group.of_rows(rows[own], tuple(group.names[at] for at in own), are_deltas=are_deltas)


def _merged(job: _Job, progress: Progress | None) -> Merged:
    """Writes the model, and then its state."""
    import torch

    method, models, target, chain, kept = job.method, job.models, job.target, job.chain, job.kept
    folder = next(each for each in target.path.absolute().parents if each.is_dir())
    with ExitStack() as files:
        passes = ModelPasses(models, method.unit, progress, False, Scratch(folder, files))
        surveyed = method.survey_step(ChangedGroups(passes, job.rows), chain)
        numbers = method.numbers(surveyed)
        unknown = dict.fromkeys([*models.read, *job.earlier.state.experts], UNKNOWN_DIGEST)
        state = SafetensorsWriter(
            state_path(target.path), kept, _state_of(job, unknown, numbers, UNKNOWN_DIGEST), checked=True
        )
        files.enter_context(state)
        written = files.enter_context(
            _Described(state, lambda digest: _state_of(job, models.digests(), numbers, digest))
        )
        inputs = _inputs(job, unknown)
        model = target.open(models, job.shard_size, files, inputs, _about(job))
        written.of = model
        dtypes = {name: dtype for name, (dtype, _) in target.layout(models).items()}

        def work(start: int, group: Group) -> None:
            own, name = job.rows(group), group.name
            at = Step(own, chain, surveyed)
            memory = method.remember(at)
            if name in kept and method.remembers != "weights":
                state.write(name, memory.cpu().contiguous(), start)
            weights = method.weights(memory, at)
            if name in kept and method.remembers == "weights":
                state.write(name, weights.cpu().contiguous(), start)
            model.write(name, cast(weights, dtypes[name], name), start)

        for _ in passes.run("merging", work):
            pass
        state.write(COUNT, torch.tensor(len(target.recipe.tuned)))
        inputs = _inputs(job, models.digests())
        model.describe(target.metadata(inputs, _about(job)))
        merged = [*job.stays, *job.step.recipe.tuned]
        warnings = (*foreign_vectors(Models(models.base, _new(job)), inputs), *same_weights(merged, inputs))
    if job.taken:
        note(
            f"{quoted(job.taken)} {'is' if len(job.taken) == 1 else 'are'} taken out of a sum in float32: equal to a merge "
            "without, up to the rounding of the sum's last bits"
        )
    sources = [each for each in (job.step.recipe.base, *job.step.recipe.tuned.values()) if each]
    card = write_card(target.path, sources, model.digest) if target.has_card else None
    return Merged(
        target.path, str(target.recipe.method), tuple(target.recipe.tuned), len(models.reference.entries),
        models.reference.parameters, inputs, model.digest, warnings, card, state.path,
    )  # fmt: skip


def _new(job: _Job) -> dict[str, Checkpoint]:
    return {name: job.models.tuned[name] for name in job.step.recipe.tuned}


def _about(job: _Job) -> dict[str, str]:
    """What the model's metadata say of the chain: the model that it goes on from."""
    origin = job.earlier.state.model if job.earlier.model else "begins"
    return {"chain": origin, **models_metadata(_new(job)), **projection_metadata(job.models.base)}


def _inputs(job: _Job, digests: Mapping[str, str]) -> dict[str, str]:
    """Input -> digest: of all models that are in the merge, also of those that were not read."""
    before = {name: job.earlier.state.experts[name] for name in job.stays}
    return {"base": digests["base"], **before, **{name: digests[name] for name in job.step.recipe.tuned}}


def _state_of(
    job: _Job, digests: Mapping[str, str], numbers: Mapping[str, Sequence[float]], model: str
) -> dict[str, str]:
    recipe, before = job.target.recipe, job.earlier.state
    assert recipe.base
    experts = {name: before.experts[name] for name in job.stays}
    experts |= {name: digests[name] for name in job.step.recipe.tuned}
    state = ChainState(
        method=str(recipe.method), settings=methods.table_of(job.method), dtype=recipe.dtype, seed=recipe.seed,
        base=digests["base"], base_source=recipe.base.written, experts=experts,
        sources={name: source.written for name, source in recipe.tuned.items()}, numbers=numbers, model=model,
    )  # fmt: skip
    return state.metadata(recipe_text(recipe, state.method, state.settings))


class _Described:
    """Tells the state the digest of its model, when that is written whole and the state is not yet."""

    def __init__(self, state: SafetensorsWriter, metadata: Callable[[str], dict[str, str]]) -> None:
        self._state, self._metadata = state, metadata
        self.of: ModelWriter | None = None

    def __enter__(self) -> _Described:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.of:
            self._state.describe(self._metadata(self.of.digest))
