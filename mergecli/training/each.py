"""`finetune_each`: several tasks, each trained by itself, in this process or by an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergecli.formats.opening import model_path, open_source
from mergecli.hub.fetched import expect_all
from mergecli.recipe.reading import recipe_of
from mergecli.results.plan import Plan, plan
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.engines.contract import Engine, Report, Unit, part_of
from mergecli.runtime.engines.grid import Failure, Failures, run_grid
from mergecli.runtime.engines.worker import report_of
from mergecli.runtime.errors import InputError, UsageError, listed
from mergecli.runtime.progress import shown
from mergecli.storage.atomic import check_target
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import version
from mergecli.storage.sources import Source
from mergecli.storage.units import UnitFiles
from mergecli.training.finetune import Finetuned, base_and_tasks, finetune

if TYPE_CHECKING:
    from mergecli.recipe.schema import Recipe
    from mergecli.runtime.progress import AnyProgress, Progress


def finetune_each(
    recipe: str | Path | Recipe | None = None,
    *,
    task: Sequence[str],
    output: str | Path,
    base: str | Path | None = None,
    device: str = "cpu",
    fresh: bool = False,
    engine: Engine | None = None,
    progress: AnyProgress | None = None,
    **training: Any,
) -> tuple[Finetuned, ...]:
    """Trains a model of its own for each task, in the order of the tasks.

    Each has the file, or the folder, that `finetune` would write, called after its task. To resume, make the same call again:
    what is trained already is not trained again.

    Args:
        task: tasks, or names of sets of them.
        output: a folder; where an engine has several machines, one that all of them see.
        engine: where the units run, a task each. By default in this process.
        training: further arguments of `finetune`, such as `steps` or `lora`.

    Raises:
        UsageError, InputError: as `finetune`. FailedUnitsError: tasks failed, and the engine was to keep going.
    """
    import torch

    from mergecli.clip.heads import clip_digests
    from mergecli.data.tasks import expand
    from mergecli.training.data import tasks_metadata

    engine, target = engine or Engine(), Path(output)
    if target.suffix:
        raise UsageError(f"{target}: there is a model for each task, so the output is a folder")
    if (
        other := next((name for name in ("trace", "tensorboard", "data") if training.get(name)), None)
    ) is not None:
        raise UsageError(f"`{other}`: is for a single training, and does not go with `each`")
    check_target(target, folder=True)
    known = recipe_of(recipe) if recipe is not None else None
    asks = bool(training.get("validate_every"))
    work = TrainingWork(known, base, target, engine.device(device), fresh, training)
    own = {key: each for key, each in training.items() if key != "save_every"}
    kind = [version(), torch.__version__, work.device.partition(":")[0], own]
    failures = Failures(engine.keep_going)
    units: list[Unit] = []

    @cache
    def digests_of(source: Source) -> list[str]:
        """Of the base, which is that of all tasks: hashed once."""
        with open_source(source) as stored:
            return [stored.vision().digest(), *clip_digests(model_path(source))]

    for name in expand(task, known):
        with failures.of("task", name):
            source, trained = base_and_tasks(known, name, base, None, asks, training.get("validation_split"))
            facts = json.dumps([kind, digests_of(source), tasks_metadata(trained)], default=str)
            units.append(Unit((name,), sha256(facts.encode()).hexdigest()[:32]))
    if not units and not failures.found:
        raise UsageError("no task to train on", "name at least one")
    failures.units += [Failure(Unit((name,), ""), error) for (_, name), error in failures.found.items()]
    files = UnitFiles(target, 0, what="it is trained")

    def done(unit: Unit) -> Finetuned | None:
        return files.read(unit, lambda record: _record(record, work.path(unit)))

    def write(unit: Unit, finished: Report) -> None:
        files.save(unit, finished)
        if done(unit) is None:
            raise InputError(
                f"{work.path(unit)}: was trained on {finished.node}, and is not here",
                "name an output that all machines see",
            )

    wanted = part_of(units, [1] * len(units), engine.share)
    work_begins(lambda: _plan([partial(work.train, unit) for unit in wanted if fresh or done(unit) is None]))
    if fresh:
        files.forget(wanted)
    missing = [unit for unit in wanted if done(unit) is None]
    if engine.collect and missing:
        raise InputError(
            f"{len(missing)} of {len(units)} units are missing:\n{listed([unit.name for unit in missing], 20)}",
            "run the parts that they belong to again, or the same command without `--collect`",
        )
    if engine.is_this_process:
        with shown(progress) as report:
            for unit in missing:
                write(unit, work.here(unit, report))
    else:
        with shown(progress) as report:
            failures.units += run_grid(
                work, missing, engine, write, lambda unit: done(unit) is not None, report
            )
    results = tuple(found for unit in wanted if (found := done(unit)) is not None)
    failures.check(len(units) + len(failures.found), results)
    return results


@dataclass(frozen=True)
class TrainingWork:
    """Trains on one task, wherever it is called, and writes the model itself, beside which it resumes; what comes back is a
    record of it."""

    recipe: Recipe | None
    base: str | Path | None
    output: Path
    device: str
    fresh: bool
    training: Mapping[str, Any]

    def path(self, unit: Unit) -> Path:
        """The file or folder of a task's model."""
        is_adapter = self.training.get("lora") or self.training.get("l_lora")
        return self.output / (unit.of[0] if is_adapter else f"{unit.of[0]}.safetensors")

    def expect_sources(self) -> None:
        expect_all([self.recipe.base] if self.base is None and self.recipe else [], self.recipe)

    def leave(self) -> None:
        pass

    def __call__(self, unit: Unit) -> bytes:
        return self.here(unit, None).result

    def train(self, unit: Unit, progress: Progress | None = None) -> Finetuned:
        """Trains, or resumes."""
        return finetune(
            self.recipe, task=unit.of[0], output=self.path(unit), base=self.base, device=self.device, fresh=self.fresh,
            progress=progress, **self.training,
        )  # fmt: skip

    def here(self, unit: Unit, progress: Progress | None) -> Report:
        """The same with progress, as a report."""
        from time import perf_counter

        from mergecli.storage.safetensors_writer import save_tensors

        started = perf_counter()
        done = self.train(unit, progress)
        with _weights(done.path) as model:
            digest = model.digest()
        about = {"what": f"a training on {unit.name}", "key": unit.key, "digest": digest}
        about["finetuned"] = json.dumps({**asdict(done), "path": ""})
        with TemporaryDirectory(prefix="mergecli-record-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "record.safetensors"
            save_tensors({}, path, about, checked=True)
            return report_of(path.read_bytes(), self.device, perf_counter() - started)


def _plan(trainings: Sequence[Callable[[], object]]) -> Plan:
    """The plans of all trainings as one."""
    plans = [plan(each) for each in trainings]
    work = tuple(each for one in plans for each in one.work)
    memory = max((each.memory for each in plans), default=0)
    return Plan("finetune", work, memory, sum(each.measured for each in plans))


def _record(record: Checkpoint, path: Path) -> Finetuned | None:
    """What the record says of the model at `path`; None if that is not the one it was made of."""
    try:
        with _weights(path) as model:
            if model.digest() != record.metadata["digest"]:
                return None
    except InputError:
        return None
    values = json.loads(record.metadata["finetuned"])
    values["validation"] = {int(step): each for step, each in values["validation"].items()}
    return replace(Finetuned(**values), path=path)


def _weights(path: Path) -> Checkpoint:
    """The file of a trained tower, or of an adapter."""
    return open_checkpoint(
        path / "adapter_model.safetensors"
        if path.is_dir() and (path / "adapter_model.safetensors").exists()
        else path
    )
