"""The trials of a search as lines through parallel axes, one axis a setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergecli.results.plots.style import COLORS, INK, canvas, labels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def parallel(
    axes: Mapping[str, Sequence[float | str | None]], objective: Sequence[float], *, label: str, best: int
) -> Figure:
    """Parallel coordinates (Inselberg 1985): a line a trial, darker where the objective is higher; the best one is bold.

    Args:
        axes: setting -> its value in each trial; None where a trial's method has no such setting, whose line then bends
            through the gap below the axis.
        objective: of each trial, on the last axis, which is called `label`.
        best: the number of the best trial.
    """
    from matplotlib import colormaps

    columns = {**axes, label: list(objective)}
    scales = [_Scale(values) for values in columns.values()]
    figure, plot = canvas(min(14.0, max(5.0, 1.7 * len(columns) + 1.5)), 4.2)
    low, high = min(objective), max(objective)
    shade: Any = colormaps["YlGnBu"]
    order = sorted(range(len(objective)), key=lambda number: objective[number])
    for number in [*(each for each in order if each != best), best]:
        heights = [
            scale.height(values[number]) for scale, values in zip(scales, columns.values(), strict=True)
        ]
        share = (objective[number] - low) / (high - low) if high > low else 1.0
        is_best = number == best
        plot.plot(
            range(len(heights)), heights, color=COLORS[5] if is_best else shade(0.25 + 0.7 * share),
            linewidth=2.2 if is_best else 1.0, alpha=1.0 if is_best else 0.75, zorder=3 if is_best else 2,
        )  # fmt: skip
    for place, scale in enumerate(scales):
        plot.axvline(place, 0.09, 0.96, color=INK, linewidth=0.8, zorder=1)
        for height, text in scale.ticks():
            plot.annotate(
                text, (place, height), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK, zorder=4,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )  # fmt: skip
    plot.set_xticks(range(len(columns)), labels(list(columns), 26))
    plot.set_xlim(-0.15, len(columns) - 0.6)
    plot.set_ylim(-0.14, 1.06)
    plot.set_yticks([])
    plot.tick_params(axis="x", length=0)
    plot.spines[:].set_visible(False)
    return figure


class _Scale:
    """Where values lie on an axis from 0 to 1: numbers by their size, on a logarithm if they span two decades, words in order."""

    def __init__(self, values: Sequence[float | str | None]) -> None:
        known = [each for each in values if each is not None]
        self._numbers = [float(each) for each in known if not isinstance(each, str)]
        self._is_numeric = len(self._numbers) == len(known)
        self._words = sorted({str(each) for each in known})
        self._log = (
            self._is_numeric
            and bool(known)
            and min(self._numbers) > 0
            and max(self._numbers) >= 100 * min(self._numbers)
        )

    def height(self, value: float | str | None) -> float:
        """Of a value; below the axis for None."""
        if value is None:
            return -0.1
        if not self._is_numeric:
            return (self._words.index(str(value)) + 0.5) / len(self._words)
        low, high, at = min(self._numbers), max(self._numbers), float(value)
        if self._log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Height and text of what is written on the axis."""
        if not self._is_numeric:
            return [
                (self.height(word), text)
                for word, text in zip(self._words, labels(self._words, 18), strict=True)
            ]
        if not self._numbers:
            return []
        low, high = min(self._numbers), max(self._numbers)
        if low == high:
            return [(0.5, f"{low:.4g}")]
        parts = [0, 0.25, 0.5, 0.75, 1]
        values = [low * (high / low) ** part if self._log else low + part * (high - low) for part in parts]
        return [(self.height(each), f"{each:.3g}") for each in values]
