"""The trace of a method that learns, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.results.plots.style import COLORS, INK, LINES, labels, legend, save, styled

if TYPE_CHECKING:
    from mergecli.results.tables import Table


@styled
def traces(table: Table, path: Path) -> None:
    """Writes a plot of a trace: above the loss of each task and their mean, below what is learned.

    Args:
        table: columns `step`, the name of the loss such as `entropy`, `entropy TASK` and then `coefficient TASK` or another `WORD NAME`, as
            `merge --trace` writes them.

    Raises:
        UsageError: `path` has not the suffix of a plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows: list[list[Any]] = [list(row) for row in table.rows]
    values = {column.name: [row[index] for row in rows] for index, column in enumerate(table.columns)}
    loss = table.columns[1].name
    parts = {
        kind: {name.removeprefix(kind): each for name, each in values.items() if name.startswith(kind)}
        for kind in (f"{loss} ", table.columns[-1].name.partition(" ")[0] + " ")
    }
    names = list(dict.fromkeys(name for each in parts.values() for name in each))
    styles: dict[str, Any] = {
        name: {"color": COLORS[index % 8], "linestyle": LINES[index // 8 % 4]}
        for index, name in enumerate(names)
    }
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes: Any = figure.subplots(2, 1, sharex=True)
    for panel, (kind, lines) in zip(axes, parts.items(), strict=True):
        for name, each in lines.items():
            panel.plot(
                values["step"], _smooth(each) if kind == f"{loss} " else each, linewidth=1.2, **styles[name]
            )
        panel.set_ylabel(kind.strip())
        panel.grid(axis="y", color="#b0b0b0", alpha=0.5, linewidth=0.6)
    axes[0].plot(values["step"], _smooth(values[loss]), color=INK, linewidth=2.2)
    if len(rows) > 1:
        axes[1].set_xlim(1, len(rows))
    axes[1].set_xlabel(labels(["step"])[0])
    handles = [Line2D([], [], linewidth=2.2, color=INK)]
    handles += [Line2D([], [], linewidth=1.2, **styles[name]) for name in names]
    legend(figure, ["mean", *names], handles)
    save(figure, path)


def _smooth(values: list[float]) -> list[float]:
    """Running means over a fiftieth of the steps, since batches differ more than steps do."""
    width = max(1, len(values) // 50)
    return [
        sum(part) / len(part)
        for end in range(1, len(values) + 1)
        if (part := values[max(0, end - width) : end])
    ]
