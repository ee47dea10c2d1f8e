"""Reports as plots: bars, radar and heat-maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.results.plots.style import (
    COLORS,
    HATCHES,
    INK,
    LINES,
    MARKERS,
    canvas,
    labels,
    legend,
    save,
    styled,
)
from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """The numbers of a plot: one for each model and task, and each model's average."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """A row for each model; None for a missing number."""
    averages: tuple[float, ...]
    sides: tuple[tuple[tuple[float, float] | None, ...], ...] | None = None
    """How far the interval of each value, and last of the average, reaches below and above it."""
    label: str = "accuracy (%)"
    top: float | None = 100
    """The end of the axis; None fits it to the numbers."""


@styled
def bars(chart: Chart) -> Figure:
    """A group per task and a bar per model, the average last; with error bars if there are intervals, else with numbers
    if they fit."""
    groups, count = [*labels(chart.tasks), "average"], len(chart.models)
    numbered = chart.sides is None and count * len(groups) <= 36
    width = min(15.0, max(6.4, len(groups) * (0.3 + (0.24 if numbered else 0.13) * count)))
    figure, axes = canvas(width, 4.0)
    thick = 0.84 / count
    positions = [*range(len(chart.tasks)), len(chart.tasks) + 0.35]
    axes.axvspan(positions[-1] - 0.58, positions[-1] + 0.58, color=INK, alpha=0.06, linewidth=0, zorder=0)
    for number, (values, average) in enumerate(zip(chart.values, chart.averages, strict=True)):
        sides = chart.sides[number] if chart.sides else [None] * len(positions)
        shown = [
            (position - 0.42 + (number + 0.5) * thick, value, side)
            for position, value, side in zip(positions, [*values, average], sides, strict=True)
            if value is not None
        ]
        axes.bar(
            [x for x, _, _ in shown], [value for _, value, _ in shown], thick * 0.94, color=COLORS[number % 8],
            linewidth=0, edgecolor="white", hatch=HATCHES[number // 8 % 4],
        )  # fmt: skip
        for x, value, side in shown:
            if side:
                cap = min(2.5, 14 * thick)
                axes.errorbar(x, value, [[side[0]], [side[1]]], color=INK, linewidth=0.8, capsize=cap)
            elif numbered:
                text = f"{value:.1f}" if chart.top else f"{value:.3g}"
                axes.annotate(text, (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    level = max(map(len, groups)) * 0.085 < width / len(groups)
    axes.set_xticks(
        positions, groups, rotation=0 if level else 25, ha="center" if level else "right",
        rotation_mode="default" if level else "anchor",
    )  # fmt: skip
    axes.set_xlim(-0.6, positions[-1] + 0.58)
    axes.tick_params(axis="x", length=0, pad=5)
    axes.set_ylabel(chart.label)
    axes.set_ylim(0, chart.top)
    axes.grid(axis="y", color="#b0b0b0", alpha=0.5, linewidth=0.6)
    legend(figure, chart.models, [_patch(number) for number in range(count)])
    return figure


@styled
def radar(chart: Chart) -> Figure:
    """An axis per task and a line per model.

    Raises:
        UsageError: there are fewer than three tasks.
    """
    from matplotlib.lines import Line2D

    if len(chart.tasks) < 3:
        raise UsageError("a radar needs three tasks or more", "`--plot-kind bars` draws any number")
    figure, axes = canvas(6.2, 5.4, projection="polar")
    polar: Any = axes
    angles = [2 * pi * position / len(chart.tasks) for position in range(len(chart.tasks))]
    polar.set_theta_offset(pi / 2)
    polar.set_theta_direction(-1)
    for number, values in enumerate(chart.values):
        known = [(angle, value) for angle, value in zip(angles, values, strict=True) if value is not None]
        closed = [*known, known[0]] if len(known) == len(angles) else known
        axes.plot(
            [angle for angle, _ in closed], [value for _, value in closed], color=COLORS[number % 8], linewidth=1.6,
            linestyle=LINES[number // 8 % 4], marker=MARKERS[number % 11], markersize=4, clip_on=False, zorder=3,
        )  # fmt: skip
        if len(chart.models) <= 3:
            axes.fill(
                [angle for angle, _ in closed],
                [value for _, value in closed],
                color=COLORS[number],
                alpha=0.08,
            )
    axes.set_xticks(angles, labels(chart.tasks, 18), fontsize=9.5)
    for text, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = round(angle / pi, 6) % 1
        text.set_horizontalalignment("center" if side == 0 else "left" if angle < pi else "right")
    axes.tick_params(axis="x", pad=2)
    polar.set_rlabel_position(180 / len(chart.tasks))
    axes.tick_params(axis="y", labelsize=7, labelcolor="#767676")
    axes.set_ylim(0, chart.top)
    axes.grid(color="#b0b0b0", alpha=0.5, linewidth=0.6)
    axes.spines[:].set_visible(False)
    lines = [
        Line2D([], [], color=COLORS[n % 8], linestyle=LINES[n // 8 % 4], marker=MARKERS[n % 11], markersize=4)
        for n in range(len(chart.models))
    ]  # fmt: skip
    legend(figure, chart.models, lines)
    return figure


@styled
def heatmap(chart: Chart) -> Figure:
    """Models by tasks with the numbers in the cells; the average is set apart."""
    tasks, models = labels(chart.tasks, 18), labels(chart.models, 32)
    longest = max(map(len, models))
    figure, axes = canvas(0.075 * longest + 0.62 * (len(tasks) + 1) + 0.9, 0.34 * len(models) + 1.5)
    flat = [value for row in chart.values for value in row if value is not None] + list(chart.averages)
    low = 10 * (min(flat) // 10) if chart.top else min(flat)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colors: Any = ScalarMappable(Normalize(low, chart.top or max(*flat, low + 1e-9)), _palette())
    for i, (row, average) in enumerate(zip(chart.values, chart.averages, strict=True)):
        for j, value in enumerate([*row, average]):
            x = j + 0.18 * (j == len(tasks))
            red, green, blue, _ = colors.to_rgba(value) if value is not None else (0.5, 0.5, 0.5, 1)
            axes.add_patch(Rectangle((x - 0.48, i - 0.47), 0.96, 0.94, color=(red, green, blue, 1 if value is not None else 0.15), linewidth=0))  # fmt: skip
            dark = value is not None and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            shown = "-" if value is None else f"{value:.1f}" if chart.top else f"{value:.3g}"
            axes.text(
                x, i, shown, ha="center", va="center", fontsize=8, fontweight="bold" if j == len(tasks) else "normal",
                color="#ffffff" if dark else "#000000" if value is not None else INK,
            )  # fmt: skip
    axes.set_xlim(-0.5, len(tasks) + 0.68)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xticks(
        [*range(len(tasks)), len(tasks) + 0.18],
        [*tasks, "average"],
        rotation=35,
        ha="left",
        rotation_mode="anchor",
    )
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(models)), models)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(
        colors, ax=axes, label=chart.label, aspect=max(6, 2.4 * len(models)), pad=0.02
    ).outline.set_visible(False)
    return figure


@styled
def heat_map(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    label: str = "cosine similarity",
    x_label: str = "",
) -> None:
    """Writes a table with its numbers in colored cells. Without names of its own for the columns it is a square of
    similarities: the colors span the values off the diagonal, which is gray."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    across = names if columns is None else columns
    figure, axes = canvas(max(3.2, 0.55 * len(across) + 1.6) + 0.6, max(2.4, 0.55 * len(names) + 1.6))
    apart = {(i, i) for i in range(len(names))} if columns is None else set[tuple[int, int]]()
    cells = {(i, j): value for i, row in enumerate(values) for j, value in enumerate(row)}
    scaled = [value for at, value in cells.items() if at not in apart] or [0.0]
    digits = 2 if max(scaled) - min(scaled) > 0.05 else 3
    spare = max(0.0, 0.1 - (max(scaled) - min(scaled))) / 2  # values that hardly differ look alike
    colors: Any = ScalarMappable(Normalize(min(scaled) - spare, max(scaled) + spare), _palette())
    for (i, j), value in cells.items():
        red, green, blue, _ = (0.88, 0.88, 0.88, 1) if (i, j) in apart else colors.to_rgba(value)
        axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, color=(red, green, blue), linewidth=0))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            j,
            i,
            f"{round(value, digits) + 0.0:.{digits}f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )
    axes.set_xlim(-0.5, len(across) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(across)), labels(across), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels(names))
    axes.set_xlabel(x_label)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(colors, ax=axes, shrink=0.8, label=label).outline.set_visible(False)
    save(figure, path)


def _palette() -> Any:
    """Colors from light to dark, without the darkest fifth."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap([colormaps["YlGnBu"](step / 320) for step in range(256)])


def _patch(number: int) -> Any:
    """A bar's color and hatch, for the legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=COLORS[number % 8], hatch=HATCHES[number // 8 % 4], edgecolor="white", linewidth=0)
