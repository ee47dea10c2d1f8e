"""The thresholds of `--min` and `--min-average`: parsed and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergecli.runtime.errors import ThresholdError, UsageError, did_you_mean, listed

if TYPE_CHECKING:
    from mergecli.recipe.schema import Recipe
    from mergecli.results.result import Evaluation


def check_thresholds(
    results: Sequence[Evaluation], thresholds: dict[str, float], min_average: float | None
) -> None:
    """Raises ThresholdError if a result is below a threshold."""
    below = [
        f"{each.checkpoint['path']}: {task}: " + _below(each, task, least)
        for task, least in thresholds.items()
        for each in results
        if task not in each.tasks or each.tasks[task].accuracy < least
    ]
    if min_average is not None:
        lines = [
            f"{each.checkpoint['path']}: {each.average.accuracy:.4f}"
            for each in results
            if each.average.accuracy < min_average
        ]
        below += [f"average accuracy below {min_average:g}: {'; '.join(lines)}"] if lines else []
    if below:
        raise ThresholdError(below[0] if len(below) == 1 else f"accuracies too low:\n{listed(below, 20)}")


def _below(result: Evaluation, task: str, least: float) -> str:
    score = result.tasks.get(task)
    return (
        f"{score.accuracy:.4f}, below {least:g}" if score else f"not evaluated, so not known to be {least:g}"
    )


def parse_thresholds(texts: list[str], tasks: list[str] | None, recipe: Recipe | None) -> dict[str, float]:
    """Task -> least accuracy, from texts `TASK=X` of `--min`."""
    from mergecli.data.tasks import find
    from mergecli.evaluation.evaluate import tasks_of

    known = [task.name for task in tasks_of(tasks, recipe)]
    thresholds: dict[str, float] = {}
    for text in texts:
        written, equals, number = text.partition("=")
        try:
            least = float(number)
        except ValueError:
            least = -1.0
        if not equals or not 0 <= least <= 1:
            raise UsageError(f"--min {text}: expected `TASK=X` with a fraction X from 0 to 1")
        name = find(written, recipe).name
        if name not in known:
            raise UsageError(f"--min {text}: `{name}` is not among the tasks{did_you_mean(name, known)}")
        if name in thresholds:
            raise UsageError(f"--min {text}: `{name}` has one already, {thresholds[name]:g}")
        thresholds[name] = least
    return thresholds
