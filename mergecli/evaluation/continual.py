"""`continual`: models arrive one after another; each step of the chain is evaluated on the tasks seen so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.evaluation.evaluate import evaluate
from mergecli.evaluation.grid import Grid, check_share, fill
from mergecli.evaluation.scoring import Scoring, evaluation_of, tell
from mergecli.evaluation.settings import Tower, read_arguments
from mergecli.evaluation.work import CountingWork
from mergecli.hub.fetched import expect_all
from mergecli.merging.chain_state import read_state, state_path
from mergecli.merging.merge import merge
from mergecli.merging.models import open_models
from mergecli.merging.onto import Onto, begin, continual_method, go_on
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.results.continual import continual_table
from mergecli.results.plan import Plan, Work, check, plan
from mergecli.results.result import Evaluation
from mergecli.results.tables import Table
from mergecli.runtime import interrupts
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.engines.contract import Engine, Unit
from mergecli.runtime.engines.grid import FailedUnitsError, Failure, workers_stay
from mergecli.runtime.errors import InputError, UsageError
from mergecli.runtime.progress import AnyProgress, Progress, shown
from mergecli.storage.atomic import check_target, check_targets, warn_of_others, write_text
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import version
from mergecli.storage.sources import Source
from mergecli.storage.units import LOG, UnitFiles

if TYPE_CHECKING:
    from mergecli.data.images import TaskImages
    from mergecli.data.tasks import Task


@dataclass(frozen=True)
class Chained:
    """What chains of merges gave."""

    orders: tuple[tuple[str, ...], ...]
    results: tuple[Evaluation, ...]
    """One a step, order after order; none where only a part of the units was done."""
    models: tuple[Path, ...]
    """The last merge of each order."""

    @property
    def table(self) -> Table:
        """The table of `report --continual`."""
        return continual_table(self.results)


def continual(
    recipe: str | Path | Recipe,
    *,
    output: str | Path,
    method: str | None = None,
    changes: Sequence[str] = (),
    keep: bool = False,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    workers: int | None = None,
    cache: bool = True,
    cache_size: str | int | None = None,
    fresh: bool = False,
    engine: Engine | None = None,
    progress: AnyProgress | None = None,
) -> Chained:
    """Merges the recipe's models one after another, in each order of its `[continual]`, and evaluates every step.

    Step k is evaluated on the tasks of the first k models; its result is `order-01/step-0k.json` in the folder. The last merge of
    each order stays, with its state, so that `merge(onto=...)` goes on from it. To resume, make the same call again: steps that
    are there are not merged again, and what is counted is not counted again.

    Args:
        recipe: its models are named after their tasks. Without `[continual]` they arrive in the order of `[tuned]`.
        output: a folder.
        keep: whether the merges of all steps stay.
        split, limit, batch_size, device, dtype, workers, cache, cache_size, fresh: as for `evaluate`.
        engine: where the units run, a step on a task each. By default in this process.

    Raises:
        UsageError: the method cannot go on from an earlier merge, or the recipe is wrong.
        InputError: a model or a data set is missing, damaged or does not fit.
        FailedUnitsError: units failed, and the engine was to keep going; it has the other orders.
    """
    known = recipe_of(recipe, method=method, changes=changes)
    continual_method(known)
    engine, target = engine or Engine(), Path(output)
    if not known.tuned:
        raise UsageError("there are no fine-tuned models to merge", "name them in `[tuned]`")
    orders = known.continual.of(tuple(known.tuned))
    width = max(2, len(str(max(len(orders), len(known.tuned)))))
    chains = [
        _Order(f"order-{number:0{width}}", order, target, width) for number, order in enumerate(orders, 1)
    ]
    _check_outputs(target, chains)
    check_share(engine, target)
    evaluation: dict[str, Any] = {"split": split, "limit": limit, "batch_size": batch_size, "dtype": dtype, "workers": workers,
                  "cache": cache, "cache_size": cache_size, "fresh": fresh}  # fmt: skip
    base, tasks, settings = read_arguments(
        known, engine, tasks=list(known.tuned), device=device, **evaluation
    )
    if not engine.keep_going:
        expect_all([base, *known.tuned.values()], known, tasks)
    # no merge is there yet: the base stands for all
    stand_in = partial(
        evaluate, recipe=known, only=["base"], tasks=list(known.tuned), device=device, **evaluation
    )
    if engine.is_this_process and not engine.collect:
        check(stand_in)
    work_begins(partial(_plan, known, chains, target, device, stand_in))
    with ExitStack() as stack:
        inputs = open_models(known, stack, needs="base").digests()
    known_steps = _Known(known, inputs, settings.device)
    scoring = Scoring(base, settings)
    images = {task.name: scoring.images(task) for task in tasks}
    for each in images.values():
        tell(each.images)
    files = UnitFiles(target, settings.max_size, what="its images are counted")
    found: list[Evaluation] = []
    failures: list[Failure] = []
    total = 0
    with shown(progress) as report, interrupts.telling(lambda: _kept(chains)), workers_stay():
        for chain in chains:
            job = _Job(
                chain, known_steps, scoring, images, {task.name: task for task in tasks}, files, engine
            )
            failed = job.do(base, report)
            total += len(job.grid.units)
            failures += failed
            if engine.part or failed:
                continue
            found += job.results()
            if not keep:
                chain.clear()
    if failures:
        raise FailedUnitsError(failures, total, Chained(orders, tuple(found), ()) if found else ())
    return Chained(
        orders, tuple(found), () if engine.part else tuple(each.model(len(each.tasks)) for each in chains)
    )


@dataclass(frozen=True)
class _Order:
    """One order of the models, and the files of its steps."""

    name: str
    tasks: tuple[str, ...]
    target: Path
    width: int

    @property
    def folder(self) -> Path:
        return self.target / self.name

    def step(self, number: int) -> str:
        """What files and results of a step are called; numbers begin with 1."""
        return f"step-{number:0{self.width}}"

    def model(self, number: int) -> Path:
        return self.folder / f"{self.step(number)}.safetensors"

    def result(self, number: int) -> Path:
        return self.folder / f"{self.step(number)}.json"

    def clear(self) -> None:
        """Removes all merges but the last."""
        for number in range(1, len(self.tasks)):
            for file in (self.model(number), state_path(self.model(number))):
                with suppress(OSError):
                    file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Known:
    """What all steps are made of."""

    recipe: Recipe
    inputs: Mapping[str, str]
    """Model -> digest."""
    device: str

    def identity(self, tasks: Sequence[str]) -> str:
        """What tells the merge of these models, in their order, from others before it is made."""
        recipe, method = self.recipe, self.recipe.built
        about = [
            version(),
            self.device.partition(":")[0],
            methods.name_of(method),
            methods.table_of(method),
            recipe.dtype,
            recipe.seed,
        ]
        return json.dumps(
            ["chain", *about, self.inputs["base"], [[name, self.inputs[name]] for name in tasks]]
        )

    def is_there(self, model: Path, tasks: Sequence[str]) -> bool:
        """Whether the file is the merge of these models, whole, with its state."""
        recipe, method = self.recipe, self.recipe.built
        try:
            state, stored = read_state(state_path(model))
            with stored, open_checkpoint(model) as opened:
                digest = opened.digest()
        except InputError:
            return False
        wanted = {name: self.inputs[name] for name in tasks}
        settings = json.loads(json.dumps(methods.table_of(method)))
        return (state.method, state.settings, state.dtype, state.seed, state.base, list(state.experts.items()), state.model) == (
            methods.name_of(method), settings, recipe.dtype, recipe.seed, self.inputs["base"], list(wanted.items()), digest,
        )  # fmt: skip


@dataclass(frozen=True)
class _Steps:
    """The merges of a chain, as files that every machine sees."""

    base: Source
    paths: Mapping[str, Path]
    identities: Mapping[str, str]

    @property
    def needed(self) -> Iterable[Source]:
        return [self.base]

    def leave(self) -> None:
        pass

    def open(self, name: str, stack: ExitStack) -> Tower:
        opened = stack.enter_context(open_checkpoint(self.paths[name]))
        return Tower(name, name, opened.vision(), identity=self.identities[name])


class _Job:
    """One order: its merges, their units, and its results."""

    def __init__(
        self,
        chain: _Order,
        known: _Known,
        scoring: Scoring,
        images: Mapping[str, TaskImages],
        tasks: Mapping[str, Task],
        files: UnitFiles,
        engine: Engine,
    ) -> None:
        self.chain, self.known, self.scoring, self.tasks, self.engine = chain, known, scoring, tasks, engine
        self.numbers = range(1, len(chain.tasks) + 1)
        self.names = {number: f"{chain.name}-{chain.step(number)}" for number in self.numbers}
        self.identities = {
            self.names[number]: known.identity(chain.tasks[:number]) for number in self.numbers
        }
        units: dict[tuple[str, str], Unit] = {}
        for number, name in self.names.items():
            for task in chain.tasks[:number]:
                units[name, task] = scoring.unit(images[task], name, self.identities[name])
        self.grid = Grid(scoring, {task: images[task] for task in chain.tasks}, units, files, several=True)

    def do(self, base: Source, progress: Progress | None) -> list[Failure]:
        """Merges and counts what is left to do."""
        chain, engine, grid = self.chain, self.engine, self.grid
        fresh = self.scoring.settings.fresh
        if not engine.collect:
            open_units = {unit.of[0] for unit in grid.units.values() if fresh or not grid.has(unit)}
            wanted = [number for number, name in self.names.items() if name in open_units]
            self._merge({*wanted, len(chain.tasks)}, progress)
        paths = {name: chain.model(number) for number, name in self.names.items()}
        steps = _Steps(base, paths, self.identities)
        work = CountingWork(steps, base, self.tasks, self.scoring.settings, several=True)

        def here(missing: Sequence[Unit]) -> None:
            with ExitStack() as stack:
                towers = {
                    name: steps.open(name, stack) for name in dict.fromkeys(unit.of[0] for unit in missing)
                }
                for tower in towers.values():
                    self.scoring.check(tower, ())
                grid.count(missing, towers, progress)

        return fill(grid, engine, work, here, progress, window=len(chain.tasks))

    def results(self) -> list[Evaluation]:
        """Writes the result of each step."""
        scores, chain = self.grid.scores(), self.chain
        found: list[Evaluation] = []
        for number, name in self.names.items():
            own = scores[name]
            assert own.facts is not None
            result = evaluation_of(own.facts, own.tasks, self.scoring)
            about: Mapping[str, str | None] = {
                **result.checkpoint, "name": name, "path": f"{chain.name}/{chain.model(number).name}",
                "chain": chain.name, "order": ",".join(chain.tasks), "step": str(number),
            }  # fmt: skip
            result = replace(result, checkpoint=about)
            write_text(chain.result(number), result.to_json())
            found.append(result)
        return found

    def _merge(self, wanted: set[int], progress: Progress | None) -> None:
        """Makes the merges of these steps that are not there, each from the last one before it that is."""
        chain, known = self.chain, self.known
        there = {
            number for number in self.numbers if known.is_there(chain.model(number), chain.tasks[:number])
        }
        for number in sorted(wanted - there):
            first = max((each for each in there if each < number), default=0) + 1
            for each in range(first, number + 1):
                interrupts.check()
                self._step(each)
                there.add(each)
                if progress:
                    progress(f"merging: {chain.name}", each, len(chain.tasks))

    def _step(self, number: int) -> None:
        chain, known = self.chain, self.known
        task = chain.tasks[number - 1]
        recipe = replace(known.recipe, tuned={task: known.recipe.tuned[task]})
        step = Onto(recipe, chain.model(number), device=known.device)
        _ = begin(step, None) if number == 1 else go_on(step, chain.model(number - 1), None)


def _check_outputs(target: Path, chains: Sequence[_Order]) -> None:
    if target.suffix:
        raise UsageError(
            f"{target}: a chain has several results, so the output is a folder",
            f"write `-o {target.with_suffix('')}/`",
        )
    check_target(target, folder=True)
    files = [each.result(number) for each in chains for number in range(1, len(each.tasks) + 1)]
    check_targets([(file, ()) for file in files], {})
    warn_of_others(target, {LOG, *(each.name for each in chains)})


def _kept(chains: Sequence[_Order]) -> str:
    steps = [(each, number) for each in chains for number in range(1, len(each.tasks) + 1)]
    count = sum(each.model(number).exists() or each.result(number).exists() for each, number in steps)
    return f"{count} of {len(steps)} merges are kept" if count else ""


def _plan(
    known: Recipe, chains: Sequence[_Order], target: Path, device: str, base: Callable[[], object]
) -> Plan:
    """The plan of all chains, from those of a merge and of an evaluation of the base in place of a merge."""
    steps = sum(len(each.tasks) for each in chains)
    first = next(iter(known.tuned))
    one = replace(known, tuned={first: known.tuned[first]})
    merged = plan(merge, one, output=target / "step.safetensors", device=device)
    counted = plan(base)
    work = [
        replace(each, what=f"{steps} steps", file=None, passes=None)
        for each in merged.work
        if each.work == "merge"
    ]
    pairs = sum(len(each.tasks) * (len(each.tasks) + 1) // 2 for each in chains)
    share = pairs / max(1, len(known.tuned))
    for each in counted.work:
        if each.work == "evaluate":
            what = each.what.replace("base", "the steps that have seen it", 1)
            images, seconds = round((each.images or 0) * share), (each.seconds or 0.0) * share
            each = replace(each, what=what, images=images, seconds=seconds, cached=None)
        if each.work in ("head", "decode", "evaluate"):
            work.append(each)
    work.append(Work("write", f"{steps} results, {len(chains)} merges", str(target)))
    return Plan(
        "continual", tuple(work), max(merged.memory, counted.memory), merged.measured + counted.measured
    )
