"""The pictures of a report, and the parts of its page that follow the table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli import plots, webpage
from mergecli.errors import UsageError
from mergecli.reporting.rows import Metric, Row
from mergecli.scores import Evaluation
from mergecli.statistics import Interval, mean_interval, wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def chart(rows: Sequence[Row], tasks: Sequence[str], metric: Metric, intervals: bool) -> plots.Chart:
    """What is drawn: accuracies in percent, or losses."""
    scale = 100 if metric == "accuracy" else 1

    def sides(
        value: float | None, counts: list[tuple[int, int]], interval: Interval | None
    ) -> tuple[float, float] | None:
        if value is None or interval is None or not counts:
            return None
        return scale * (value - interval.low), scale * (interval.high - value)

    def row_sides(row: Row) -> tuple[tuple[float, float] | None, ...]:
        counted = {task: row.counts([task])[0] for task in row.values} if row.result else {}
        parts = [
            sides(row.values[task], [counted[task]], wilson(*counted[task])) if task in counted else None
            for task in tasks
        ]
        every = list(counted.values())
        return (*parts, sides(row.average, list(every), mean_interval(every)) if every else None)

    return plots.Chart(
        models=tuple(f"{row.name} (published)" if row.result is None else row.name for row in rows),
        tasks=tuple(tasks),
        values=tuple(
            tuple(scale * row.values[task] if task in row.values else None for task in tasks) for row in rows
        ),
        averages=tuple(scale * row.average for row in rows),
        sides=tuple(map(row_sides, rows)) if intervals else None,
        label="accuracy (%)" if metric == "accuracy" else "loss",
        top=100 if metric == "accuracy" else None,
    )


def draw(chart: plots.Chart, kind: str, path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Writes the picture.

    Raises:
        UsageError: these results cannot be drawn in that way.
    """
    plots.save(_figure(chart, kind, evaluations), path)


def _figure(chart: plots.Chart, kind: str, evaluations: Sequence[Evaluation]) -> Figure:
    if kind == "sweep":
        points = [each for each in evaluations if not each.checkpoint.get("selected_on")]
        setting, values = swept(points)
        ours = {name: place for place, name in enumerate(chart.models)}
        places = [ours[each.name] for each in points]
        return plots.curves(
            values,
            {
                task: [chart.values[place][column] for place in places]
                for column, task in enumerate(chart.tasks)
            },
            [chart.averages[place] for place in places],
            x_label=setting,
            y_label=chart.label,
        )
    return {"bars": plots.bars, "radar": plots.radar, "heatmap": plots.heatmap}[kind](chart)


_NUMBERED = re.compile(r"(.*?)(?:=|[-_ ](?=[-+.\d]))([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)")


def swept(evaluations: Sequence[Evaluation]) -> tuple[str, list[float]]:
    """The setting in which results differ, and its value in each: what the checkpoint says (a key with a dot, such as
    `method.scaling_factor`), else the number at the end of its name (`ties-0.3`, `scaling_factor=0.3`).

    Raises:
        UsageError: there is no such setting, or two results have the same value.
    """
    keys = [key for each in evaluations[:1] for key in each.checkpoint if "." in key]
    varying = [
        key for key in keys if len({each.checkpoint.get(key) for each in evaluations}) == len(evaluations)
    ]
    try:
        if varying:
            return varying[0], [float(each.checkpoint[varying[0]] or "") for each in evaluations]
        found = [_NUMBERED.fullmatch(each.name) for each in evaluations]
        settings = {match[1] if match else None for match in found}
        values = [float(match[2]) for match in found if match]
    except (KeyError, ValueError):
        settings, values = {None}, []
    if None in settings or len(settings) != 1 or len(set(values)) != len(evaluations):
        raise UsageError(
            "a sweep needs results that differ in the value of one setting",
            "name them by it, such as `ties-0.1`, `ties-0.2`",
        )
    return str(settings.pop()), values


def page(chart: plots.Chart, evaluations: Sequence[Evaluation], kind: str | None) -> tuple[str, ...]:
    """The pictures as SVG, where matplotlib is installed, and how each number was made."""
    parts: list[str] = []
    if plots.has_matplotlib():
        kinds = dict.fromkeys((kind or "bars", "bars", "heatmap"))
        parts += [
            webpage.figure(plots.svg(_figure(chart, each, evaluations), f"plot-{each}"), _CAPTIONS[each])
            for each in kinds
        ]
    return (*parts, *map(webpage.origin, evaluations))


_CAPTIONS = {
    "bars": "By task and on average.",
    "heatmap": "Every number; bluer is more.",
    "radar": "By task.",
    "sweep": "Over the values of the setting.",
}
