"""The plots of a report, and the parts of its page after the table."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.results import plots
from mergecli.results.html import escape, figure
from mergecli.results.result import Evaluation
from mergecli.results.rows import Metric, Row
from mergecli.results.statistics import Interval, mean_interval, wilson
from mergecli.runtime.errors import MergecliWarning, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def chart(rows: Sequence[Row], tasks: Sequence[str], metric: Metric, intervals: bool) -> plots.Chart:
    """The numbers of a plot: accuracies in percent, or losses."""
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
    """Writes the plot; warns of bars that look alike.

    Raises:
        UsageError: these results do not fit this kind of plot.
    """
    if kind == "bars" and len(chart.models) > plots.STYLES:
        warnings.warn(
            f"{path}: {len(chart.models)} models are drawn in {plots.STYLES} styles, so that some look alike; "
            "`--plot-kind heatmap` has a row for each",
            MergecliWarning,
            stacklevel=2,
        )
    plots.save(_figure(chart, kind, evaluations), path)


def _figure(chart: plots.Chart, kind: str, evaluations: Sequence[Evaluation]) -> Figure:
    if kind == "sweep":
        points = [each for each in evaluations if not each.checkpoint.get("selected_on")]
        setting, values = swept(points)
        ours = {name: index for index, name in enumerate(chart.models)}
        indices = [ours[each.name] for each in points]
        return plots.curves(
            values,
            {
                task: [chart.values[index][column] for index in indices]
                for column, task in enumerate(chart.tasks)
            },
            [chart.averages[index] for index in indices],
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


def figures(chart: plots.Chart, evaluations: Sequence[Evaluation], kind: str | None) -> tuple[str, ...]:
    """The plots of a web page, as SVG in HTML; none if matplotlib is not installed."""
    if not plots.has_matplotlib():
        return ()
    kinds = dict.fromkeys((kind or "bars", "bars", "heatmap"))
    return tuple(
        figure(plots.svg(_figure(chart, each, evaluations), f"plot-{each}"), _CAPTIONS[each])
        for each in kinds
    )


_CAPTIONS = {
    "bars": "By task and on average.",
    "heatmap": "All numbers; bluer is higher.",
    "radar": "By task.",
    "sweep": "Over the values of the setting.",
}


def origin(result: Evaluation) -> str:
    """All that a result records about its origin, as a folded section."""
    values = asdict(result)
    tasks: Mapping[str, Mapping[str, Any]] = values.pop("tasks")
    values["checkpoint"] = dict(result.checkpoint)
    facts = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(_fact(value))}</dd>"
        for key, value in _flat(values)
        if value is not None and value != ""
    )
    scores = {task: dict(_flat(score)) for task, score in tasks.items()}
    keys = list(dict.fromkeys(key for score in scores.values() for key in score))
    heads = "".join(f"<th>{escape(key)}</th>" for key in ("task", *keys))
    rows = "".join(
        f"<tr><th>{escape(task)}</th>{''.join(f'<td>{escape(_fact(score.get(key)))}</td>' for key in keys)}</tr>"
        for task, score in scores.items()
    )
    method = result.checkpoint.get("method")
    about = f" <span>{escape(method)}</span>" if method else ""
    return (
        f"<details><summary>{escape(result.name)}{about}</summary><dl>{facts}</dl>"
        f"<div class='scroll'><table class='origin'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys with a space between, in order."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += (
            _flat(value, f"{prefix}{key} ") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        )
    return found


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
