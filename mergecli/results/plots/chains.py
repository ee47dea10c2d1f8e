"""Average accuracy and backward transfer over the steps of chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mergecli.results.continual import Chains, ChainScores
from mergecli.results.plots.style import COLORS, LINES, MARKERS, legend, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def chain_curves(chains: Sequence[Chains]) -> Figure:
    """Two panels over the steps: the average accuracy on the tasks seen so far, and backward transfer over these.

    A line a method is the mean over its orders, the band one standard deviation on both sides; each order is a thin line.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    figure = Canvas(figsize=(9.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    handles: list[Any] = []
    for number, each in enumerate(chains):
        handles.append(_draw(left, each, number, lambda order, step: order.average(step)))
        _draw(right, each, number, lambda order, step: order.transfer(step) / step)
    right.axhline(0, color="#8c8c8c", linewidth=0.8, zorder=1)
    for axes, text in ((left, "average accuracy on tasks seen (%)"), (right, "backward transfer (points)")):
        axes.set_xlabel("step")
        axes.set_ylabel(text)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#b0b0b0", alpha=0.5, linewidth=0.6)
    names = [f"{each.label} ({len(each.orders)} order{'s' * (len(each.orders) > 1)})" for each in chains]
    legend(figure, names, handles)
    return figure


def _draw(axes: Any, chains: Chains, number: int, measure: Callable[[ChainScores, int], float]) -> Any:
    """Draws one method; the handle of its line."""
    steps = range(1, len(chains.tasks) + 1)
    color = COLORS[number % len(COLORS)]
    means: list[float] = []
    spreads: list[float] = []
    for step in steps:
        mean, spread = chains.over(lambda order, step=step: measure(order, step))
        means.append(100 * (mean or 0.0))
        spreads.append(100 * (spread or 0.0))
    if len(chains.orders) > 1:
        for order in chains.orders:
            axes.plot(
                steps, [100 * measure(order, step) for step in steps], color=color, linewidth=0.6, alpha=0.35
            )
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    style = LINES[number // len(COLORS) % len(LINES)]
    (line,) = axes.plot(
        steps,
        means,
        color=color,
        linewidth=2,
        linestyle=style,
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
    )
    return line
