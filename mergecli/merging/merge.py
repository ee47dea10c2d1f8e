"""`merge`: open the models, check that they fit, let the method learn, merge block by block, write.

Fixed policies: sums are float32 in the recipe's order, cast once at the end to `dtype` (by default the base
tensor's own); tensors that are not floating point must be equal in all models and are copied; NaN or infinity is
an error that names task and tensor; randomness comes from the CPU and depends on seed, tensor name and block only,
so that the same inputs and recipe give the same bytes. Of a whole CLIP only the vision tower is merged, and the visual
projection where models have fine-tuned it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli import methods
from mergecli.formats.lora import AdaptedCheckpoint
from mergecli.formats.projection import projection_metadata
from mergecli.formats.quantized import models_metadata
from mergecli.merging.learning.files import Learned, Learning, LearningFiles
from mergecli.merging.learning.learn import learning
from mergecli.merging.low_rank_target import AdapterWriter, target_in, target_of
from mergecli.merging.merge_plan import merge_plan
from mergecli.merging.merge_target import (
    Merged,
    MergeTarget,
    ModelWriter,
    cast,
    foreign_vectors,
    same_weights,
)
from mergecli.merging.models import ModelPasses, Models, open_models
from mergecli.merging.onto import Onto, begin, go_on
from mergecli.merging.spaces import in_space, space_of
from mergecli.methods._base import DataDriven, Group, Method, TwoPass, Unit
from mergecli.methods._bitmasks import packed_size
from mergecli.methods._calibrated import Calibrated, measured_by
from mergecli.methods._continual import Continual
from mergecli.methods._learned import Learner
from mergecli.methods._mixture import extra_values, outcomes
from mergecli.recipe.reading import Override, recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.results.card import write_card
from mergecli.runtime.distributed import is_first
from mergecli.runtime.dry_run import is_dry, work_begins
from mergecli.runtime.errors import MergecliWarning, UsageError, quoted
from mergecli.runtime.progress import AnyProgress, Progress, shown
from mergecli.storage.atomic import check_space
from mergecli.storage.cache import made_again
from mergecli.storage.checkpoint import PROJECTION
from mergecli.storage.metadata import inputs_of
from mergecli.storage.scratch import Scratch
from mergecli.storage.sizes import parse_size

if TYPE_CHECKING:
    from torch import Tensor


def merge(
    recipe: str | Path | Recipe | Mapping[str, str | Path] | Sequence[str | Path],
    *,
    output: str | Path,
    base: str | Path | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    dtype: str | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    onto: str | Path | None = None,
    replace: str | None = None,
    without: Sequence[str] = (),
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
        recipe: a recipe or its file; or the fine-tuned models themselves, name -> source or a list, in the order of all sums.
        output: a `.safetensors` file, or a Hugging Face folder if the name has no suffix; of an adapter, its folder.
        base: the base model, where `recipe` is models.
        method: a method's name; replaces the recipe's.
        settings: the method's settings, with `method`.
        changes: further changes to the recipe, each `key=value` as for `--set`.
        dtype: of the output, in place of the recipe's: same, float32, float16 or bfloat16.
        as_adapter: write an adapter that plain peft loads, in place of weights.
        rank: the most that its rank may be; by default as much as the merge has.
        onto: an earlier merge, to which the recipe's models are added without its own; or the base, on which a chain begins. What
            the next step needs is written beside the output, `NEXT.state.safetensors`.
        replace: with `onto`, `TASK` or `TASK=SOURCE`: the earlier model of that task, in whose place the new one comes.
        without: with `onto`, the same of earlier models that are taken out.
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
    written_in = [
        Override(key, value, option)
        for key, value, option in (
            ("dtype", dtype, "--dtype"),
            ("as_adapter", as_adapter or None, "--as-adapter"),
            ("rank", rank, "--rank"),
        )
        if value is not None
    ]
    recipe = recipe_of(
        recipe, base=base, method=method, settings=settings, changes=changes, overrides=written_in
    )
    given = (statistics, coefficients, save_coefficients, trace, plot, tensorboard)
    files = LearningFiles(*(None if each is None else Path(each) for each in given))
    if onto is None and (replace is not None or without):
        option = "--replace" if replace is not None else "--without"
        raise UsageError(f"{option}: of which merge?", "name it with `--onto`")
    if onto is not None or (recipe.method is not None and _only_in_chains(recipe)):
        if any(each is not None for each in given):
            raise UsageError("a step of a chain looks at no images, and has nothing to learn or to trace")
        step = Onto(recipe, Path(output), replace, tuple(without), device, shard_size, card)
        with shown(progress) as report:
            return begin(step, report) if onto is None else go_on(step, onto, report)
    points = {Path(output): recipe}
    with shown(progress) as report:
        return merge_points(
            points, device=device, shard_size=shard_size, files=files, card=card, progress=report
        )[0]


def _only_in_chains(recipe: Recipe) -> bool:
    """Whether the order of the models counts for the method, so that every merge by it is a chain."""
    method = recipe.built
    return isinstance(method, Continual) and method.kind == "continual"


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
    targets = [target_of(recipe, path, card) for path, recipe in points.items()]
    size = parse_size(shard_size, "--shard-size", least=1) if shard_size is not None else None
    for each in targets:
        if size is not None and each.recipe.as_adapter:
            raise UsageError("--shard-size: an adapter is one file")
        if size is not None and each.path.suffix:
            raise UsageError(
                f"{each.path}: one file has no shards", "name a folder, without suffix, with `--shard-size`"
            )
    for each in targets:
        files.check(each)
    needs_base = any(each.method.reads_base for each in targets)
    with ExitStack() as stack:
        models = open_models(
            targets[0].recipe,
            stack,
            needs="base" if needs_base else "weights",
            device=device,
            says_other_parts=True,
        )
        _warn_of_projections(models, targets)
        for each in targets:
            files.refuse_inputs(each, models.paths)
        models, targets = _in_one_space(models, targets, stack, progress)
        targets = [each.fitted(models) for each in targets]
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


def _in_one_space(
    models: Models, targets: Sequence[MergeTarget], stack: ExitStack, progress: Progress | None
) -> tuple[Models, list[MergeTarget]]:
    """The models in the space in which all the merges are, and the targets of these.

    Raises:
        UsageError: they are in several.
    """
    spaces = [space_of(each.recipe, each.method, models) for each in targets]
    if len(set(spaces)) > 1:
        raise UsageError(
            f"space: these merges are in {quoted(sorted(set(spaces)))}, and share passes over one"
        )
    found = [target_in(target, space) for target, space in zip(targets, spaces, strict=True)]
    if spaces[0] == "dense":
        _warn_of_adapters(models, targets)
        return models, found
    scratch = Scratch(_folder_of(targets[0]), stack, in_memory=is_dry())
    return in_space(models, spaces[0], scratch, progress), found


def _warn_of_adapters(models: Models, targets: Sequence[MergeTarget]) -> None:
    """Warns of what is known against merging whole weights of adapters by a method."""
    if all(isinstance(each, AdaptedCheckpoint) for each in models.tuned.values()):
        for text in dict.fromkeys(each.method.against_adapters for each in targets):
            if text:
                warnings.warn(text, MergecliWarning, stacklevel=2)


def _warn_of_projections(models: Models, targets: Sequence[MergeTarget]) -> None:
    """Warns of methods that leave the visual projection alone, where it is part of the models."""
    if PROJECTION in models.shapes:
        for name in dict.fromkeys(
            str(each.recipe.method) for each in targets if each.method.keeps_projection
        ):
            warnings.warn(
                f"`{name}` keeps the base's visual projection: those that the models have fine-tuned are not merged",
                MergecliWarning,
                stacklevel=2,
            )


def _folder_of(target: MergeTarget) -> Path:
    """The folder in which the output is made, or the nearest around it that is there."""
    return next(each for each in target.path.absolute().parents if each.is_dir())


def _learned_for(target: MergeTarget, learned: Learned) -> Learned:
    """The learned state, with this target's own merge-time settings and those by layer."""
    method = target.method if target.method.merge_time else learned.target.method
    if isinstance(method, Learner):  # all other settings may be those of a file
        own = {key: getattr(method, key) for key in method.merge_time}
        method = replace(learned.target.method, **own)
    method = replace(method, layers=target.method.layers)
    return replace(learned, target=replace(target, method=method))


def _stream(
    models: Models, learned: Sequence[Learned], size: int | None, progress: Progress | None
) -> tuple[Merged, ...]:
    """Merges every block, or every tensor, once for each target, and writes it where it belongs; one pass for all."""
    targets = [each.target for each in learned]
    if not is_first():  # the first of several processes writes
        return tuple(_merged(models, each, {}) for each in targets)
    with ExitStack() as stack:
        passes = _passes(models, learned, Scratch(_folder_of(targets[0]), stack), progress)
        known = _surveys(learned, passes)
        more = models_metadata(models.tuned) | projection_metadata(models.base)
        abouts = [{**each.about, **more} for each in learned]
        writers = [
            each.target.open(models, size, stack, [*models.read, *each.files], about)
            for each, about in zip(learned, abouts, strict=True)
        ]
        _merge_blocks(passes, models, learned, known, [each.write for each in writers])
        for number, target in enumerate(targets):
            dtypes = target.computed(models)
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
        replace(done, digest=writer.digest, card=_card(each, writer.digest), **_of_adapter(writer))
        for done, writer, each in zip(merged, writers, targets, strict=True)
    )


def _extra_values(learned: Learned, known: _Surveyed, models: Models) -> Iterable[tuple[str, Tensor]]:
    return extra_values(learned.target.method, known.own.surveyed, learned.value, len(models.tuned)).items()


def _of_adapter(writer: ModelWriter) -> dict[str, Any]:
    """What is known of an adapter when it is written."""
    if not isinstance(writer, AdapterWriter):
        return {}
    return {name: getattr(writer, name) for name in ("tensors", "parameters", "rank", "error")}


def _card(target: MergeTarget, digest: str) -> Path | None:
    return write_card(target.path, target.sources, digest) if target.has_card else None


def _passes(
    models: Models, learned: Sequence[Learned], scratch: Scratch, progress: Progress | None
) -> ModelPasses:
    """Passes for all the merges: what one of them must be given together, all are."""
    methods = [method for each in learned for method in each.target.every_method]
    unit, fused = max(each.unit for each in methods), any(each.fuses for each in methods)
    return ModelPasses(models, unit, progress, fused, scratch)


def _merge_blocks(
    passes: ModelPasses,
    models: Models,
    learned: Sequence[Learned],
    known: Sequence[_Surveyed],
    writes: Sequence[Write],
) -> None:
    """The last pass: every block is merged once for each target, and written."""
    targets = [each.target for each in learned]
    dtypes = [each.computed(models) for each in targets]
    packed = [each.packed(models) for each in targets]

    def work(start: int, group: Group) -> None:
        for number in range(len(targets)):
            own = group.copy() if number + 1 < len(targets) else group
            for each in [own] if known[number].of(own).method.fuses else own.apart():
                method, surveyed = known[number].of(each)
                for key, result in outcomes(method, each, surveyed).items():
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
        each
        for each in learned
        if each.value is not None
        or not (isinstance(each.target.method, DataDriven) or measured_by(each.target.method))
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
    reference = models.dense.reference
    return Merged(
        target.path, str(target.recipe.method), tuple(models.tuned), len(reference.entries), reference.parameters, inputs,
        warnings=(*foreign_vectors(models, inputs), *same_weights(models.tuned, inputs)) if inputs else (),
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


class _Ready(NamedTuple):
    """A method and what it needs to know before it merges: what it learned and surveyed, None where it needs nothing."""

    method: Method
    surveyed: Any


class _Surveyed(NamedTuple):
    """What merges the tensors of one target."""

    own: _Ready
    """The method with its own settings."""
    by_tensor: Mapping[str, _Ready]
    """Tensor -> the same with its settings by layer."""

    def of(self, group: Group) -> _Ready:
        """What merges a group; the members of one that a method wants stacked have the same settings."""
        return self.by_tensor.get(group.members[0] if group.members else group.name, self.own)


def _surveys(several: Sequence[Learned], passes: ModelPasses) -> list[_Surveyed]:
    """What merges the tensors of each target. Methods that differ only in merge-time settings share one survey."""
    found: dict[str, Any] = {}

    def ready(method: Method, learned: Learned) -> _Ready:
        key = _survey_key(method)
        if key not in found:
            own = replace(passes, fused=method.fuses)
            if isinstance(method, TwoPass | Calibrated):
                found[key] = method.survey_with(own, learned.value)
            else:
                found[key] = learned.value
        return _Ready(method, found[key])

    results: list[_Surveyed] = []
    for each in several:
        target = each.target
        made = {id(method): ready(method, each) for method in target.every_method}
        own = made.get(id(target.method)) or _Ready(target.method, None)
        by_tensor = {name: made[id(method)] for name, method in target.merged_by.items()}
        results.append(_Surveyed(own, by_tensor))
    return results


def _foreign_files(learned: Learned, digests: Mapping[str, str]) -> Iterator[str]:
    """A warning for each file that was made from other models than those that are merged."""
    for file in learned.files.values():
        origin = inputs_of(file.metadata)
        if other := [name for name, digest in origin.items() if digests.get(name, digest) != digest]:
            how = "merged from" if file.metadata.get("kind") == "checkpoint" else "learned on"
            yield f"{file.path}: was {how} other weights of {quoted(other)}"
