"""Routing of a tower: for each task, the mean weight of each expert in each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from mergecli.results.plots.style import INK, labels, save, styled

LETTERED = 28
"""The most layers whose names are written; of more, every n-th."""


@styled
def route_maps(
    experts: Sequence[str], tasks: Mapping[str, Mapping[str, Sequence[float]]], path: Path
) -> None:
    """Writes a heat-map for each task, layers by experts, with one color scale from 0 (or the smallest
    weight, if negative) to the largest. A triangle marks the expert that is named after the task.

    Args:
        tasks: task -> layer -> mean weight of each of the experts.

    Raises:
        UsageError: `path` has not the suffix of a plot.
    """
    from matplotlib.figure import Figure

    layers = list(next(iter(tasks.values())))
    columns = min(len(tasks), 4)
    rows = ceil(len(tasks) / columns)
    names, titles, named = labels(experts, 14), labels(list(tasks)), _named_layers(layers)
    longest = max(len(layers[index]) for index in named)
    panel = (max(0.9, 0.2 * len(names)), max(0.7, min(0.13 * len(layers), 3.6)))
    figure = Figure(
        figsize=(columns * (panel[0] + 0.15) + 0.068 * longest + 1.1, rows * (panel[1] + 0.35) + 0.085 * max(map(len, names)) + 0.4),
        layout="constrained",
    )  # fmt: skip
    panels: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    every = [weight for each in tasks.values() for weights in each.values() for weight in weights]
    low, top = min(0.0, *every), max(0.0, *every)
    image: Any = None
    for axes, title, (task, weights) in zip(panels.flat, titles, tasks.items(), strict=False):
        image = axes.imshow(
            [list(weights[layer]) for layer in layers], cmap="GnBu", vmin=low, vmax=top or low + 1, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_yticks(named, [layers[index] for index in named], fontsize=6.5)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if task in experts:
            axes.plot(list(experts).index(task), -0.5, marker="v", markersize=4, color=INK, clip_on=False)
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    bar = figure.colorbar(
        image, ax=panels, label="mean routing weight", aspect=7 * figure.get_figheight(), pad=0.01, shrink=0.9
    )
    bar.outline.set_visible(False)
    save(figure, path)


def _named_layers(layers: Sequence[str]) -> list[int]:
    """Indices of the layers whose names are written: all, or the first of each block."""
    if len(layers) <= LETTERED:
        return list(range(len(layers)))
    blocks = [found[0] if (found := re.search(r"\d+", layer)) else layer for layer in layers]
    firsts = [index for index, block in enumerate(blocks) if index == 0 or block != blocks[index - 1]]
    return firsts[:: ceil(len(firsts) / LETTERED)]
