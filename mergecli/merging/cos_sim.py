"""`cos_sim`: cosine similarities between task vectors, in one streaming pass with float64 sums."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.formats.mixture import mixture_of
from mergecli.formats.opening import open_source
from mergecli.hub.fetched import expect_all
from mergecli.merging.models import open_models
from mergecli.methods._base import Group, total
from mergecli.methods._depth import parts_of
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import MergecliWarning
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.atomic import check_targets, write_text
from mergecli.storage.sources import Source

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.results.tables import Table

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Similarities:
    """Cosines between T task vectors, and how long each vector is."""

    names: tuple[str, ...]
    cosines: Matrix
    """T rows of T; 0 where a vector is zero, 1 of a vector with itself."""
    norms: tuple[float, ...]
    """Euclidean norms."""
    layers: Mapping[str, Matrix]
    """The same of each part of the network: its layers by number, and what comes `before` and `after` them."""

    def to_csv(self) -> str:
        """Names as header row, after an empty cell, and as first column; numbers in full."""
        rows = [[name, *row] for name, row in zip(self.names, self.cosines, strict=True)]
        from mergecli.results.tables import csv_text

        return csv_text([["", *self.names], *rows], repr)

    def layers_to_csv(self) -> str:
        """One row for each layer and pair of names: layer, first, second, cosine."""
        rows = [
            [layer, self.names[i], self.names[j], cosines[i][j]]
            for layer, cosines in self.layers.items()
            for i in range(len(self.names))
            for j in range(i + 1, len(self.names))
        ]
        from mergecli.results.tables import csv_text

        return csv_text([["layer", "first", "second", "cosine"], *rows], repr)

    def table(self) -> Table:
        """The cosines as a table."""
        from mergecli.results.cells import Column
        from mergecli.results.tables import Table

        columns = (Column(""), *(Column(name, "number") for name in self.names))
        return Table(columns, tuple((name, *row) for name, row in zip(self.names, self.cosines, strict=True)))


def cos_sim(
    vectors: str | Path | Recipe | Mapping[str, str | Path] | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    layers: str | Path | None = None,
    plot: str | Path | None = None,
    changes: Sequence[str] = (),
    progress: AnyProgress | None = None,
) -> Similarities:
    """Cosine similarities between task vectors, over all their entries.

    A mixture stands for the towers of all its tasks, called `NAME#TASK`.

    Args:
        vectors: task-vector files, or fine-tuned models if `base` is given, in a list or by name; or a recipe or its file.
        output: a CSV file.
        layers: a CSV file with the cosines of each layer.
        plot: a heat-map (PNG, SVG or PDF by its suffix).

    Raises:
        UsageError: there is no base, and models are no task vectors; or an output cannot be written.
        InputError: a model is missing, damaged, or does not fit the others.
    """
    recipe = recipe_of(vectors, base=base, changes=changes)
    if plot:
        from mergecli.results.plots import require_matplotlib

        require_matplotlib(Path(plot))
    expect_all([recipe.base, *recipe.tuned.values()], recipe)
    recipe = replace(recipe, tuned=_towers(recipe))
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        models = open_models(recipe, stack, needs="deltas")
        check_targets([(Path(target), ()) for target in (output, layers, plot) if target], models.paths)
        import torch

        parts = parts_of(models.floats)
        products = {
            part: torch.zeros(len(models.tuned), len(models.tuned), dtype=torch.float64)
            for part in dict.fromkeys(parts.values())
        }
        done = 0

        def look(_: int, group: Group) -> tuple[str, int, Tensor]:
            deltas = group.deltas.double()  # (T, n)
            return parts[group.name], group.shape.numel(), deltas @ deltas.T

        for part, count, product in models.map(look):
            products[part] += product
            done += count
            if report:
                report("comparing", done, models.size)
    whole = total(torch.stack(list(products.values())))
    result = Similarities(
        names=tuple(models.tuned),
        cosines=_cosines(whole),
        norms=tuple(whole.diagonal().sqrt().tolist()),
        layers={part: _cosines(each) for part, each in products.items()},
    )
    for name, norm in zip(result.names, result.norms, strict=True):
        if not norm:
            text = f"`{name}` has the weights of the base: its task vector is zero, and so are its cosines with others"
            warnings.warn(text, MergecliWarning, stacklevel=2)
    if output:
        write_text(Path(output), result.to_csv())
    if layers:
        write_text(Path(layers), result.layers_to_csv())
    if plot:
        from mergecli.results.plots import heat_map

        heat_map(result.names, result.cosines, Path(plot))
    return result


def _towers(recipe: Recipe) -> dict[str, Source]:
    """Name -> source of one tower each; a mixture's are called `NAME#TASK`, which no other can be."""
    towers: dict[str, Source] = {}
    for name, source in recipe.tuned.items():
        with open_source(source, recipe.base) as opened:
            tasks = mixture_of(opened).tasks if opened.is_mixture else ()
        towers |= {f"{name}#{task}": replace(source, task=task) for task in tasks} or {name: source}
    return towers


def _cosines(products: Tensor) -> Matrix:
    norms = products.diagonal().sqrt()  # (T,)
    cosines = (products / norms / norms[:, None]).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-1, 1)
    return tuple(map(tuple, cosines.fill_diagonal_(1.0).tolist()))
