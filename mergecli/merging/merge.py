"""`merge`: open the models, check that they fit, let the method learn, merge block by block, write.

Fixed policies: sums are float32 in the recipe's order, cast once at the end to `dtype` (by default the base
tensor's own); tensors that are not floating point must be equal in all models and are copied; NaN or infinity is
an error that names task and tensor; randomness comes from the CPU and depends on seed, tensor name and block only,
so that the same inputs and recipe give the same bytes. Of a whole CLIP only the vision tower is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.formats.quantized import models_metadata
from mergecli.merging.learning.files import Learned, Learning, LearningFiles
from mergecli.merging.learning.learn import learning
from mergecli.merging.merge_plan import merge_plan
from mergecli.merging.merge_target import MergeTarget, cast
from mergecli.merging.models import ModelPasses, Models, open_models
from mergecli.methods._base import DataDriven, Group, Method, TwoPass, Unit
from mergecli.methods._bitmasks import packed_size
from mergecli.methods._calibrated import Calibrated
from mergecli.methods._mixture import extra_values, outcomes
from mergecli.recipe.reading import Override, recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.results.card import write_card
from mergecli.runtime.distributed import is_first
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.errors import UsageError, quoted
from mergecli.runtime.progress import AnyProgress, Progress, shown
from mergecli.storage.atomic import check_space
from mergecli.storage.cache import made_again
from mergecli.storage.metadata import inputs_of
from mergecli.storage.scratch import Scratch
from mergecli.storage.sizes import parse_size

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote."""

    path: Path
    method: str
    tasks: tuple[str, ...]
    tensors: int
    parameters: int
    inputs: Mapping[str, str]
    """Input -> digest of its content."""
    digest: str = ""
    """Of the content, as `info` shows it; empty in processes that write nothing."""
    warnings: tuple[str, ...] = ()
    card: Path | None = None
    """The model card, if one was written."""


def merge(
    recipe: str | Path | Recipe | Mapping[str, str | Path],
    *,
    output: str | Path,
    base: str | Path | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    shard_size: str | None = None,
    card: bool | None = None,
    statistics: str | Path | None = None,
    coefficients: str | Path | None = None,
    save_coefficients: str | Path | None = None,
    trace: str | Path | None = None,
    plot: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: AnyProgress | None = None,
) -> Merged:
    """Merges fine-tuned models into one checkpoint at `output`, never holding more than a block of each.

    Args:
        recipe: a recipe or its file; or the fine-tuned models themselves, name -> source, in the order of all sums.
        output: a `.safetensors` file, or a Hugging Face folder if the name has no suffix.
        base: the base model, where `recipe` is a mapping.
        method: a method's name; replaces the recipe's.
        settings: the method's settings, with `method`.
        changes: further changes to the recipe, each `key=value` as for `--set`.
        dtype: of the output, in place of the recipe's: same, float32, float16 or bfloat16.
        device: where the method computes; files are read and written by the CPU.
        shard_size: of the files of a folder, such as `2GB`; by default there is one file.
        card: whether a model card is written, `README.md` in the folder or beside the file; by default for a folder.
        statistics: a folder for what a method measures on images, a file a task; by default the store, where it is
            found again by content.
        coefficients: a file with what a method learned before, to apply without images.
        save_coefficients: a file for what the method learns.
        trace: a CSV file with a row for each step in which the method learns.
        plot: a picture (PNG, SVG or PDF) of that.
        tensorboard: a folder that gets the same for TensorBoard.

    Raises:
        UsageError: the recipe is wrong. InputError: a model is missing, damaged, or does not fit the others.
    """
    written_in = [Override("dtype", dtype, "--dtype")] if dtype is not None else []
    recipe = recipe_of(
        recipe, base=base, method=method, settings=settings, changes=changes, overrides=written_in
    )
    given = (statistics, coefficients, save_coefficients, trace, plot, tensorboard)
    files = LearningFiles(*(None if each is None else Path(each) for each in given))
    points = {Path(output): recipe}
    with shown(progress) as report:
        return merge_points(
            points, device=device, shard_size=shard_size, files=files, card=card, progress=report
        )[0]


def merge_points(
    points: Mapping[Path, Recipe],
    *,
    device: str = "cpu",
    shard_size: str | None = None,
    files: LearningFiles | None = None,
    card: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Merged, ...]:
    """Merges the same models once for each output; the recipes differ in the method and its settings only.

    Every pass over the models serves all of them, and surveys are shared where their settings are the same.
    """
    return made_again(
        partial(_merge_points, points, device, shard_size, files or LearningFiles(), card, progress)
    )


def _merge_points(
    points: Mapping[Path, Recipe],
    device: str,
    shard_size: str | None,
    files: LearningFiles,
    card: bool | None,
    progress: Progress | None,
) -> tuple[Merged, ...]:
    targets = [MergeTarget.of(recipe, path, card) for path, recipe in points.items()]
    size = parse_size(shard_size, "--shard-size", least=1) if shard_size is not None else None
    for each in targets:
        if size is not None and each.path.suffix:
            raise UsageError(
                f"{each.path}: one file has no shards", "name a folder, without suffix, with `--shard-size`"
            )
    for each in targets:
        files.check(each)
    needs_base = any(each.method.needs_base for each in targets)
    with ExitStack() as stack:
        models = open_models(
            targets[0].recipe,
            stack,
            needs="base" if needs_base else "weights",
            device=device,
            says_other_parts=True,
        )
        for each in targets:
            files.refuse_inputs(each, models.paths)
            each.check(models)
        check_space({each.path: each.size(models) for each in targets})
        found: dict[str, Learning] = {}
        for each in targets:
            if _key(each.method) not in found:
                found[_key(each.method)] = learning(models, each, files, stack)
        learnings = [found[_key(each.method)] for each in targets]
        expected = [
            _learned_for(*each) for each in zip(targets, (one.expected for one in learnings), strict=True)
        ]
        merges = list(zip(expected, learnings, strict=True))
        work_begins(lambda: merge_plan(models, merges, size, partial(_rehearse, expected)))
        done = {key: each.learn(progress) for key, each in found.items()}
        learned = [_learned_for(each, done[_key(each.method)]) for each in targets]
        return _stream(models, learned, size, progress)


def _learned_for(target: MergeTarget, learned: Learned) -> Learned:
    """The learned state, with this target's own merge-time settings."""
    method = target.method if target.method.merge_time else learned.target.method
    return replace(learned, target=replace(target, method=method))


def _stream(
    models: Models, learned: Sequence[Learned], size: int | None, progress: Progress | None
) -> tuple[Merged, ...]:
    """Merges every block, or every tensor, once for each target, and writes it where it belongs; one pass for all."""
    targets = [each.target for each in learned]
    if not is_first():  # the first of several processes writes
        return tuple(_merged(models, each, {}) for each in targets)
    with ExitStack() as stack:
        folder = next(each for each in targets[0].path.absolute().parents if each.is_dir())
        passes = _passes(models, learned, Scratch(folder, stack), progress)
        known = _surveys(learned, passes)
        abouts = [{**each.about, **models_metadata(models.tuned)} for each in learned]
        writers = [
            each.target.open(models, size, stack, [*models.read, *each.files], about)
            for each, about in zip(learned, abouts, strict=True)
        ]
        _merge_blocks(passes, models, learned, known, [each.write for each in writers])
        for number, target in enumerate(targets):
            dtypes = {name: dtype for name, (dtype, _) in target.layout(models).items()}
            for key, result in _extra_values(learned[number], known[number], models):
                writers[number].write(key, cast(result, dtypes[key], key))
        digests = models.digests()
        merged: list[Merged] = []
        for each, writer, about in zip(learned, writers, abouts, strict=True):
            inputs = digests | {name: file.digest() for name, file in each.files.items()}
            writer.describe(each.target.metadata(inputs, about))
            done = _merged(models, each.target, inputs)
            merged.append(replace(done, warnings=(*done.warnings, *_foreign_files(each, inputs))))
    return tuple(
        replace(done, digest=writer.digest, card=_card(each, writer.digest))
        for done, writer, each in zip(merged, writers, targets, strict=True)
    )


def _extra_values(learned: Learned, known: Any, models: Models) -> Iterable[tuple[str, Tensor]]:
    return extra_values(learned.target.method, known, learned.value, len(models.tuned)).items()


def _card(target: MergeTarget, digest: str) -> Path | None:
    return write_card(target.path, target.sources, digest) if target.has_card else None


def _passes(
    models: Models, learned: Sequence[Learned], scratch: Scratch, progress: Progress | None
) -> ModelPasses:
    """Passes for all the merges: what one of them must be given together, all are."""
    methods = [each.target.method for each in learned]
    unit, fused = max(each.unit for each in methods), any(each.fuses for each in methods)
    return ModelPasses(models, unit, progress, fused, scratch)


def _merge_blocks(
    passes: ModelPasses,
    models: Models,
    learned: Sequence[Learned],
    known: Sequence[Any],
    writes: Sequence[Write],
) -> None:
    """The last pass: every block is merged once for each target, and written."""
    targets = [each.target for each in learned]
    dtypes = [{name: dtype for name, (dtype, _) in each.layout(models).items()} for each in targets]
    packed = [each.packed(models) for each in targets]

    def work(start: int, group: Group) -> None:
        for number, target in enumerate(targets):
            own = group.copy() if number + 1 < len(targets) else group
            for each in [own] if target.method.fuses else own.apart():
                for key, result in outcomes(target.method, each, known[number]).items():
                    data, row_size = cast(result, dtypes[number][key], key), packed[number].get(key)
                    if row_size is None:
                        writes[number](key, data, start)
                        continue
                    for row, part in enumerate(data):
                        writes[number](key, part, row * row_size + packed_size(start))

    for _ in passes.run("merging", work):
        pass


def _rehearse(learned: Sequence[Learned], sample: Models, merges: bool) -> None:
    """What a merge computes, or only its surveys, of some of the tensors; what is not learned yet is left out."""
    able = [
        each for each in learned if each.value is not None or not isinstance(each.target.method, DataDriven)
    ]
    if not able:
        for _ in ModelPasses(sample, Unit.ENTRY, None).map(lambda group: group.tasks):
            pass
        return
    with ExitStack() as stack:
        passes = _passes(sample, able, Scratch(Path(), stack, in_memory=True), None)
        known = _surveys(able, passes)
        if merges:
            _merge_blocks(passes, sample, able, known, [_write_nothing] * len(able))


def _write_nothing(name: str, data: Tensor, start: int) -> None:
    del name, data, start


Write = Callable[[str, "Tensor", int], None]
"""Takes the name of a tensor, entries of it, and the number of the first."""


def _merged(models: Models, target: MergeTarget, inputs: Mapping[str, str]) -> Merged:
    return Merged(
        target.path, str(target.recipe.method), tuple(models.tuned), len(models.reference.entries),
        models.reference.parameters, inputs, warnings=tuple(_foreign_vectors(models, inputs)) if inputs else (),
    )  # fmt: skip


def learning_key(method: Method) -> str:
    """A name that is the same for methods that learn the same on the same models."""
    return sha256(_key(method).encode()).hexdigest()[:32]


def _key(method: Method) -> str:
    """The same for methods that differ only in their merge-time settings."""
    return f"{methods.name_of(method)} {methods.table_of(method, without=method.merge_time)}"


def _survey_key(method: Method) -> str:
    """The same for methods whose surveys are the same; one that reads statistics too depends on settings that they do not."""
    if not isinstance(method, Calibrated):
        return _key(method)
    return f"{methods.name_of(method)} {methods.table_of(method, without=Method.merge_time)}"


def _surveys(several: Sequence[Learned], passes: ModelPasses) -> list[Any]:
    """What each method needs to know before it merges: what it learned and surveyed, None where it needs nothing.

    Methods that differ only in merge-time settings share one survey.
    """
    found: dict[str, Any] = {}
    results: list[Any] = []
    for each in several:
        method = each.target.method
        key = _survey_key(method)
        if key not in found:
            own = replace(passes, fused=method.fuses)
            if isinstance(method, TwoPass):
                found[key] = method.survey(own)
            elif isinstance(method, Calibrated):
                found[key] = method.survey_with(own, each.value)
            else:
                found[key] = each.value
        results.append(found[key])
    return results


def _foreign_files(learned: Learned, digests: Mapping[str, str]) -> Iterator[str]:
    """A warning for each file that was made from other models than those that are merged."""
    for file in learned.files.values():
        origin = inputs_of(file.metadata)
        if other := [name for name, digest in origin.items() if digests.get(name, digest) != digest]:
            how = "merged from" if file.metadata.get("kind") == "checkpoint" else "learned on"
            yield f"{file.path}: was {how} other weights of {quoted(other)}"


def _foreign_vectors(models: Models, digests: Mapping[str, str]) -> Iterator[str]:
    """A warning for each task vector that was made from another base than the one it is added to."""
    for name, each in models.tuned.items():
        origin, base = inputs_of(each.metadata).get("base"), digests.get("base")
        if each.is_task_vector and origin and base and origin != base:
            yield f"{each.path}: `{name}` is a task vector of another base ({origin}) than {base}"
