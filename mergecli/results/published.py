"""Comparison with published tables, and every known difference in protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import Formatter

from mergecli import methods
from mergecli.results.cells import Cell, Column, Estimate
from mergecli.results.references import IMAGES, Reference
from mergecli.results.references import Row as PublishedRow
from mergecli.results.result import Evaluation, TaskScore
from mergecli.results.rows import Block, Row
from mergecli.results.statistics import Count, difference_interval
from mergecli.runtime.errors import quoted, toml_text
from mergecli.storage.sources import HUBS

_UNMERGED = {"pretrained": "Pre-trained", "fine-tuned": "Fine-tuned (STL)"}
"""What a result says of a model that no method merged -> the row of the published tables."""
_MODELS = {"base": "Pre-trained", "stanford-cars": "Cars"}
"""Our model -> the row of the tables of single models, where that is not the task in capitals."""
_PARAMETERS = {
    "clip-vit-base-patch32": 87_456_000,
    "clip-vit-base-patch16": 85_799_424,
    "clip-vit-large-patch14": 303_179_776,
}


_OTHER = "not as in `{}`: "
FEW = 3
"""So many differences in protocol are told one by one."""


def columns(rows: Sequence[Row], reference: Reference, intervals: bool = False) -> Block:
    """The published average of the same method and tasks, and our difference to it; with `intervals` also its
    significance."""
    parts = ("seen", "unseen") if reference.seen else ("all",)
    found: list[tuple[Column, list[Cell]]] = []
    for part in parts:
        suffix = "" if part == "all" else f" ({part})"
        pairs = [_pair(row, reference, part) for row in rows]
        theirs: list[Cell] = [pair[1] for pair in pairs]
        differences: list[Cell] = [
            None if b is None or a is None else _estimate(row, reference, part, a - b) if intervals else a - b
            for row, (a, b) in zip(rows, pairs, strict=True)
        ]
        found += [
            (Column(f"reference{suffix}", "percent"), theirs),
            (Column(f"difference{suffix}", "points"), differences),
        ]
    notes = [f"reference: the published table `{reference.name}`, the row of the same method."]
    notes += [f"its source: {'; '.join(reference.sources)}."] if reference.sources else []
    if intervals:
        notes.append(
            "difference: ±: longer side of the 95 % interval for two independent proportions (Newcombe), as if the published "
            "numbers were of other images, and so too wide for the same ones."
        )
    warnings = departures([row.result for row in rows if row.result], reference)
    other = [line for line in warnings if line.startswith(_OTHER.format(reference.name))]
    short = (
        f"evaluated otherwise than `{reference.name}` in {len(other)} ways, from which differences may come"
    )
    return Block(found, notes, warnings, {short: other} if len(other) > FEW else {})


def _estimate(row: Row, reference: Reference, part: str, difference: float) -> Cell:
    """The difference with its interval, if the number of images of the published number is known."""
    theirs = _counterpart(row, reference)
    shared = [task for task in _part(reference, part) if task in row.values]
    if theirs is None or not theirs.accuracies or any(task not in IMAGES for task in shared):
        return difference
    counts = [Count(round(theirs.accuracies[task] * IMAGES[task]), IMAGES[task]) for task in shared]
    low, high = difference_interval(row.counts(shared), counts)
    middle = sum(each.correct / each.images for each in row.counts(shared)) / len(shared) - sum(
        each.correct / each.images for each in counts
    ) / len(shared)
    low, high = low - middle + difference, high - middle + difference  # published averages are rounded
    return Estimate(difference, low, high, not low <= 0 <= high)


def _pair(row: Row, reference: Reference, part: str) -> tuple[float | None, float | None]:
    """Our average and the published one, over the tasks that both have."""
    theirs = _counterpart(row, reference)
    if theirs is None or row.result is None:
        return None, None
    wanted = _part(reference, part)
    shared = [task for task in wanted if task in row.values]
    if not shared or (not theirs.accuracies and shared != wanted):
        return None, None
    return sum(row.values[task] for task in shared) / len(shared), _average(theirs, reference, part, shared)


def _counterpart(row: Row, reference: Reference) -> PublishedRow | None:
    names = {name.lower(): name for name in reference.rows}
    method = _published(row.method or "", row.result)
    for name in (method, _MODELS.get(row.name, row.name)):
        if name and name.lower() in names:
            return reference.rows[names[name.lower()]]
    return None


def _published(method: str, result: Evaluation | None) -> str:
    """The row of the published tables that a method, with the settings that a result says, is in; empty if in none."""
    if method not in methods.names():
        return _UNMERGED.get(method, "")
    kind = methods.find(method)
    recorded = result.checkpoint if result else {}
    values = {key: recorded.get(f"method.{key}", getattr(kind, key)) for key in _named(kind)}
    return kind.published.format(**{key: str(value).capitalize() for key, value in values.items()})


def _named(method: type[methods.Method]) -> list[str]:
    """The settings that the method's published rows are called by."""
    return [key for _, key, _, _ in Formatter().parse(method.published) if key]


def _part(reference: Reference, part: str) -> list[str]:
    if part == "all":
        return list(reference.tasks)
    return [task for task in reference.tasks if (task in reference.seen) == (part == "seen")]


def _average(row: PublishedRow, reference: Reference, part: str, shared: Sequence[str]) -> float:
    """The printed average if the tasks are the same, else the mean of the printed accuracies."""
    if part in row.averages and list(shared) == _part(reference, part):
        return row.averages[part]
    return sum(row.accuracies[task] for task in shared) / len(shared)


def rows(reference: Reference, tasks: Sequence[str]) -> list[Row]:
    """The published rows, for those of our tasks that the table has."""
    shared = {part: [t for t in _part(reference, part) if t in tasks] for part in ("all", "seen", "unseen")}
    if not shared["all"] or (reference.averaged and shared["all"] != list(reference.averaged)):
        return []
    parts = ("seen", "unseen") if reference.seen else ()
    return [
        Row(
            name=row.name,
            method="published",
            values={task: row.accuracies[task] for task in shared["all"] if task in row.accuracies},
            average=_average(row, reference, "all", shared["all"]),
            seen=reference.seen,
            averages={part: _average(row, reference, part, shared[part]) for part in parts if shared[part]},
        )
        for row in reference.rows.values()
    ]


def departures(evaluations: Sequence[Evaluation], reference: Reference) -> list[str]:
    """A line for each known difference between the protocol of the results and that of the reference."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for each in evaluations:
        for problem, task in _problems(each, reference):
            tasks, models = found.setdefault(problem, ({}, {}))
            models[each.name] = None
            if task:
                tasks[task] = None
    lines = [f"`{reference.name}`: {reference.caveat}"] if reference.caveat else []
    for problem, (tasks, models) in found.items():
        where = f"{quoted(tasks)}: " if tasks else ""
        who = "" if len(models) == len(evaluations) else f" ({quoted(models)})"
        lines.append(f"{_OTHER.format(reference.name)}{where}{problem}{who}")
    if silent := [each.name for each in evaluations if _are_unknown(each, reference)]:
        lines.append(
            f"whether the models are those of `{reference.name}` cannot be seen from {quoted(silent)}: "
            "`mergecli info CHECKPOINT` lists what it was made of"
        )
    return lines


def _models_of(result: Evaluation, reference: Reference) -> dict[str, str] | None:
    """Task -> repository, without owner, of the merged models or of the single model; empty for the base; None if the
    result does not record it."""
    if result.checkpoint.get("method") == "pretrained":
        return {}
    if result.models:
        return {task: _repository(source) for task, source in result.models.items()}
    path = _repository(result.checkpoint.get("path") or "")
    task = path.removeprefix(f"{reference.backbone}_").removesuffix(reference.suffix)
    return {task: path} if path == f"{reference.backbone}_{task}{reference.suffix}" else None


def _are_unknown(result: Evaluation, reference: Reference) -> bool:
    """Whether nothing says which models a result is of."""
    if reference.averaged:
        return not result.pool and result.checkpoint.get("method") != "pretrained"
    return _models_of(result, reference) is None


def _settings(result: Evaluation, reference: Reference) -> Iterator[str]:
    """Settings that are not the defaults, which are those of the published tables."""
    method = result.checkpoint.get("method")
    if method not in methods.names() or _published(method or "", result) not in reference.rows:
        return
    usual = methods.table_of(methods.create(method, {}), without=_named(methods.find(method)))
    for key, value in usual.items():
        own, known = (
            result.checkpoint.get(f"method.{key}"),
            value if isinstance(value, str) else toml_text(value),
        )
        if own is not None and own != known:
            yield f"`{key}` is {own}, not {known}"


def _repository(source: str) -> str:
    """The name in `hf:owner/name@revision`; empty for a source that is on no hub."""
    kind, colon, rest = source.partition(":")
    return (
        rest.partition(" ")[0].partition("#")[0].partition("@")[0].rpartition("/")[2]
        if colon and kind in HUBS
        else ""
    )


def _model_problems(result: Evaluation, reference: Reference) -> Iterator[tuple[str, str]]:
    """(problem, task) for each model that is not the published one."""
    if reference.averaged:
        return
    models = _models_of(result, reference) or {}
    single = not result.models
    for task, name in models.items():
        if name != f"{reference.backbone}_{task}{reference.suffix}":
            yield f"the model is not known to be `{reference.backbone}_{task}{reference.suffix}`", task
    wanted = reference.seen or reference.tasks
    if models and not single and set(models) != set(wanted):
        lacking, more = [t for t in wanted if t not in models], [t for t in models if t not in wanted]
        if lacking:
            yield f"merged without the models of {quoted(lacking)}", ""
        if more:
            yield f"merged with models of {quoted(more)} too", ""


def _problems(result: Evaluation, reference: Reference) -> Iterator[tuple[str, str]]:
    """(problem, task); the task is empty if the problem belongs to no task."""
    clip = result.clip.get("path") or "unknown"
    if clip.partition("@")[0].rpartition("/")[2].rpartition(":")[2] != reference.backbone:
        yield f"the CLIP is `{clip}`, not `{reference.backbone}`", ""
    if 1 < result.parameters < _PARAMETERS[reference.backbone]:
        yield (
            f"the vision tower has {result.parameters:,} parameters, not {_PARAMETERS[reference.backbone]:,}",
            "",
        )
    yield from _model_problems(result, reference)
    yield from (
        (f"{problem}, which the published table is taken to have", "")
        for problem in _settings(result, reference)
    )
    if result.dtype != "float32":
        yield f"computed in {result.dtype}, not float32", ""
    if lacking := [task for task in reference.tasks if task not in result.tasks]:
        yield f"lacks {quoted(lacking)}: compared over the tasks that are there", ""
    if more := [task for task in result.tasks if task not in reference.tasks]:
        yield f"has {quoted(more)} too: not compared", ""
    for task, score in result.tasks.items():
        if task in reference.tasks:
            for problem in _task_problems(task, score, reference):
                yield problem, task


def _task_problems(task: str, score: TaskScore, reference: Reference) -> Iterator[str]:
    from mergecli.data.tasks import digest, find, names

    if task not in names():
        return
    published = find(task)
    if score.classes != digest(published.classes or ()):
        yield "other class names"
    if score.templates != digest(published.templates):
        yield "other templates"
    source = score.data.get("source", "unknown")
    if source.partition("@")[0].rpartition("/")[2] != published.data.label.rpartition("/")[2]:
        yield "data that are not known to be the published ones"
    split = reference.split or published.split
    if score.split != split:
        yield f"split `{score.split}`, not `{split}`"
    elif reference.split is None and score.images != IMAGES.get(task, score.images):
        yield f"{score.images:,} images, not {IMAGES[task]:,}"
