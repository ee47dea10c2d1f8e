"""Curves over the values of a swept setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mergecli.results.plots.style import COLORS, INK, canvas, labels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def curves(
    x: Sequence[float],
    tasks: Mapping[str, Sequence[float | None]],
    average: Sequence[float | None],
    *,
    x_label: str,
    y_label: str = "accuracy (%)",
    best: int | None = None,
    best_label: str = "best",
    bold: str = "average",
) -> Figure:
    """The average over a swept setting as a bold line, each task as a thin gray line with its name at its end.

    Args:
        x: the values of the setting, in any order.
        tasks: task -> its number at each value; None for a missing number.
        average: the bold line, which `bold` names.
        best: the index in `x` of the point to mark with `best_label`.
    """
    order = sorted(range(len(x)), key=lambda index: x[index])
    figure, axes = canvas(6.4, 4.2)
    axes.set_xlabel(labels([x_label], 48)[0])
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#b0b0b0", alpha=0.5, linewidth=0.6)
    ends: list[tuple[float, str, bool]] = []
    for name, values in (*tasks.items(), (bold, average)):
        points = [(x[index], value) for index in order if (value := values[index]) is not None]
        if not points:
            continue
        thick = values is average
        axes.plot(
            [at for at, _ in points], [value for _, value in points], color=COLORS[0] if thick else "#8c8c8c",
            linewidth=2.4 if thick else 0.9, alpha=1 if thick else 0.75, marker="o" if thick else None, markersize=4,
            zorder=3 if thick else 2, clip_on=False,
        )  # fmt: skip
        ends.append((points[-1][1], labels([name], 18)[0], thick))
    low, high = axes.get_ylim()
    left, right = x[order[0]], x[order[-1]]
    if left < right:
        axes.set_xlim(left - 0.02 * (right - left), right)
    if best is not None and (top := average[best]) is not None:
        axes.plot([x[best]], [top], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=COLORS[5], markeredgewidth=1.8, zorder=4)  # fmt: skip
        axes.axvline(x[best], color=COLORS[5], linewidth=0.8, linestyle=":", zorder=1)
        axes.annotate(
            f"{best_label} {x[best]:g}: {top:.4g}", (x[best], high), (4, 2), textcoords="offset points", va="bottom",
            ha="left" if x[best] < (left + right) / 2 else "right", color=COLORS[5], fontsize=8.5,
        )  # fmt: skip
    axes.set_ylim(low, high)
    room = 0.045 * (high - low)
    for (value, name, thick), at in zip(ends, spread([end[0] for end in ends], room, low, high), strict=True):
        axes.annotate(
            name, (1, value), (1.06, at), xycoords=("axes fraction", "data"), textcoords=("axes fraction", "data"),
            va="center", fontsize=8.5, color=COLORS[0] if thick else INK, fontweight="bold" if thick else "normal",
            arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)},
        )  # fmt: skip
    return figure


def spread(positions: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Positions near the given ones and at least `room` apart, between `low` and `high` if they fit."""
    order = sorted(range(len(positions)), key=lambda each: positions[each])
    found = list(positions)
    for before, after in pairwise(order):
        found[after] = max(found[after], found[before] + room)
    limit = max(high, low + room * (len(positions) - 1))
    for index in reversed(order):
        found[index] = min(found[index], limit)
        limit = found[index] - room
    return found
