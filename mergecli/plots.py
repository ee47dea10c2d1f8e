"""Pictures of results; needs matplotlib, the extra `plots`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.errors import UsageError
from mergecli.output import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mergecli.tables import Table

FORMATS = (".png", ".svg", ".pdf")


def require_matplotlib(path: Path) -> None:
    """Raises UsageError if a plot cannot be written to `path`: unknown suffix, or no matplotlib."""
    import importlib.util

    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: a plot is a {', '.join(FORMATS)} file")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib", "pip install 'mergecli[plots]'")


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], path: Path) -> None:
    """A square of similarities with the numbers in the cells; the colours span what lies off the diagonal."""
    from matplotlib.figure import Figure

    size = max(3.2, 0.55 * len(names) + 1.6)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.add_subplot()
    others = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j]
    low, high = min(0.0, *others, 0.0), max(0.1, *others, 0.1)
    image = axes.imshow(values, cmap="GnBu", vmin=low, vmax=high)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = (value - low) > 0.6 * (high - low)
            axes.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity", extend="max")
    save(figure, path)


def bars(table: Table, path: Path) -> None:
    """Accuracy by task, one bar a model, the average last."""
    from matplotlib.figure import Figure

    columns = [place for place, column in enumerate(table.columns) if column.unit == "percent"]
    columns = [place for place in columns if table.columns[place].name != "reference"]
    width = 0.8 / max(len(table.rows), 1)
    figure = Figure(
        figsize=(max(6.4, 0.9 * len(columns) + 0.12 * len(columns) * len(table.rows)), 4),
        layout="constrained",
    )
    axes = figure.add_subplot()
    for number, row in enumerate(table.rows):
        heights = [100 * float(row[place] or 0) for place in columns]
        axes.bar(
            [x - 0.4 + (number + 0.5) * width for x in range(len(columns))], heights, width, label=str(row[0])
        )
    axes.set_xticks(
        range(len(columns)), [table.columns[place].name for place in columns], rotation=30, ha="right"
    )
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(table.rows), 6), frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes the figure whole or not at all, without a date, so that the same picture is the same file."""
    buffer = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    figure.savefig(buffer, format=path.suffix[1:], dpi=160, metadata=metadata)
    with whole_file(path) as file:
        file.write(buffer.getvalue())
