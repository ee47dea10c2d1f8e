"""`measure`: statistics of every model, measured on images and kept as files before any merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.hub.fetched import expect_all
from mergecli.merging.learning.statistics import Measurement, StatisticsFile, files_for, fitted
from mergecli.merging.models import Models, open_models, with_own_projection
from mergecli.methods._calibrated import Calibrated, measured_by
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.engines.contract import Engine, Report, Unit, part_of
from mergecli.runtime.engines.grid import Failure, Failures, run_grid
from mergecli.runtime.errors import InputError, UsageError, did_you_mean, listed, quoted
from mergecli.runtime.progress import shown
from mergecli.storage.atomic import check_name, check_target, warn_of_others, whole_file
from mergecli.storage.units import LOG, UnitFiles

if TYPE_CHECKING:
    from mergecli.runtime.progress import AnyProgress


@dataclass(frozen=True)
class Measured:
    """The files of statistics."""

    paths: Mapping[str, Path]
    """Task -> its file; for a method that measures all tasks together, its name and their one file."""
    new: tuple[str, ...]
    """Names of those measured now, by any of several processes; the others existed already, and fit."""


def measure(
    recipe: str | Path | Recipe,
    *,
    output: str | Path,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    only: Sequence[str] = (),
    device: str = "cpu",
    engine: Engine | None = None,
    progress: AnyProgress | None = None,
) -> Measured:
    """Measures the statistics that a method needs of every model, for merges with `statistics=output`.

    There is a file for each task, so several processes or machines may measure different tasks at the same time; each
    needs only the base, and the models and images of its own tasks. Files that exist already are kept if they fit.
    Processes that `torchrun` starts share the tasks, and end when all are measured; the files have the bytes that one
    process would write. A method that measures all tasks together has one file, called after the method.

    Args:
        output: a folder.
        method: a method's name; replaces the recipe's.
        settings: the method's settings, with `method`.
        only: the tasks to measure; none stands for all.
        engine: where the units run, a task each. By default in this process.

    Raises:
        UsageError: the recipe is wrong, or its method measures nothing.
        InputError: models or images are missing; or a file in the folder was measured on something else.
        FailedUnitsError: tasks failed, and the engine was to keep going.
    """
    engine = engine or Engine()
    recipe = recipe_of(recipe, method=method, settings=settings, changes=changes)
    chosen = measured_by(fitted(recipe.built, recipe)) if recipe.method else None
    if chosen is None:
        known = [name for name in methods.names() if issubclass(methods.find(name), Calibrated)]
        what = f"`{recipe.method}` measures nothing" if recipe.method else "no method is named"
        raise UsageError(what, f"name one with `--method`: {quoted(known)}")
    target = Path(output)
    check_name(target, folder=True)
    for name in only:
        if name not in recipe.tuned:
            raise UsageError(f"the recipe has no model `{name}`{did_you_mean(name, recipe.tuned)}")
    if only and chosen.joint:
        raise UsageError(
            f"`{recipe.method}` cannot measure some tasks only: what goes into a layer comes out of the layers before "
            "it, merged of all tasks",
            "measure all tasks at once, or use a method that measures each task by itself",
        )
    wanted_names = tuple(name for name in recipe.tuned if name in only) if only else tuple(recipe.tuned)
    apart = not chosen.joint and (only or engine.keep_going)
    # a model is measured as it is merged, with a projection if any model of the recipe has fine-tuned its own
    projection = True if apart and with_own_projection(recipe) else None
    recipe, whole = replace(recipe, tuned={name: recipe.tuned[name] for name in wanted_names}), recipe
    device = engine.device(device)
    failures = Failures(engine.keep_going)
    recipes = [recipe] if chosen.joint or not engine.keep_going else _one_by_one(recipe)
    paths: dict[str, Path] = {}
    new: list[str] = []
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        found: list[tuple[StatisticsFile, Models]] = []
        for each in recipes:
            with failures.of("task", next(iter(each.tuned))):
                models = open_models(
                    each, stack, needs="base", device=_device_here(device, engine), projection=projection
                )
                files = files_for(models, chosen, each, target)
                if not engine.is_this_process:
                    Measurement.of(
                        files, models, chosen, each
                    )  # checks what is there, and whether the rest can be measured
                found += [(file, models) for file in files]
        if not all(file.path.exists() for file, _ in found):  # a folder that has them all may be read-only
            check_target(target, folder=True)
        inputs = [path for _, models in found for path in models.paths.values()]
        known = {f"{name}.safetensors" for name in whole.tuned} | {file.path.name for file, _ in found}
        warn_of_others(target, {LOG, *known}, inputs)
        failures.units += [Failure(Unit((name,), ""), error) for (_, name), error in failures.found.items()]
        units = {Unit((file.name,), file.key): file for file, _ in found}
        wanted = part_of(list(units), [1] * len(units), engine.share)
        missing = [unit for unit in wanted if not units[unit].path.exists()]
        if engine.collect and missing:
            raise InputError(
                f"{len(missing)} of {len(units)} units are missing:\n{listed([unit.name for unit in missing], 20)}",
                "run the parts that they belong to again, or the same command without `--collect`",
            )
        if engine.is_this_process:
            own = [file for unit, file in units.items() if unit in wanted]
            new += Measurement.of(own, found[0][1], chosen, recipe).measure(report)
        else:
            log = UnitFiles(target, 0)

            def write(unit: Unit, done: Report) -> None:
                with whole_file(units[unit].path) as file:
                    file.write(done.result)
                new.append(unit.name)
                log.tell(unit, done)

            work = MeasuringWork(whole, wanted_names, device, chosen.joint)
            failures.units += run_grid(
                work, missing, engine, write, lambda unit: units[unit].path.exists(), report
            )
        paths = {unit.name: units[unit].path for unit in wanted if units[unit].path.exists()}
        failures.check(len(units) + len(failures.found))
    return Measured(paths, tuple(new))


@dataclass(frozen=True)
class MeasuringWork:
    """Measures the statistics of one task, or of all together, wherever it is called."""

    recipe: Recipe
    names: tuple[str, ...]
    """Of the models that are measured; the others tell whether visual projections are."""
    device: str
    joint: bool

    def expect_sources(self) -> None:
        expect_all([self.recipe.base, *(self.recipe.tuned[name] for name in self.names)])

    def leave(self) -> None:
        pass

    def __call__(self, unit: Unit) -> bytes:
        with TemporaryDirectory(prefix="mergecli-measure-", ignore_cleanup_errors=True) as folder:
            only = () if self.joint else unit.of
            (path,) = measure(self.recipe, output=folder, only=only, device=self.device).paths.values()
            return path.read_bytes()


def _one_by_one(recipe: Recipe) -> list[Recipe]:
    """A recipe for each model."""
    return [replace(recipe, tuned={name: source}) for name, source in recipe.tuned.items()]


def _device_here(device: str, engine: Engine) -> str:
    """Where this process computes, if it does."""
    return device if engine.is_this_process and not engine.collect else "cpu"
