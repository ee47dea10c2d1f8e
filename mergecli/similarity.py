"""`cos_sim`: cosine similarities between task vectors, in one streaming pass with float64 sums."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.catalogue import read_recipe, recipe_from
from mergecli.methods._kinds import Group
from mergecli.models import open_models
from mergecli.output import refuse_inputs, write_text
from mergecli.progress import Progress
from mergecli.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.tables import Table


@dataclass(frozen=True)
class Similarities:
    """Cosines between T task vectors, and how long each vector is."""

    names: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    """T rows of T; 0 where a vector is zero, 1 of a vector with itself."""
    norms: tuple[float, ...]
    """Euclidean norms."""

    def to_csv(self) -> str:
        """Names as header row, after an empty cell, and as first column; numbers in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", *self.names])
        for name, row in zip(self.names, self.cosines, strict=True):
            writer.writerow([name, *map(repr, row)])
        return text.getvalue()

    def table(self) -> Table:
        """The cosines as a table."""
        from mergecli.tables import Column, Table

        columns = (Column(""), *(Column(name, "number") for name in self.names))
        return Table(columns, tuple((name, *row) for name, row in zip(self.names, self.cosines, strict=True)))


def cos_sim(
    vectors: str | Path | Recipe | Mapping[str, str | Path],
    *,
    base: str | Path | None = None,
    output: str | Path | None = None,
    plot: str | Path | None = None,
    changes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Similarities:
    """Cosine similarities between task vectors, over all their entries.

    Args:
        vectors: name -> task-vector file, or fine-tuned model if `base` is given; or a recipe or its file.
        output: a CSV file. plot: a heat-map (PNG, SVG or PDF by its suffix).
    """
    if isinstance(vectors, Mapping):
        recipe = recipe_from(base, vectors, changes)
    else:
        recipe = vectors if isinstance(vectors, Recipe) else read_recipe(vectors, changes)
    if plot:
        from mergecli.plots import require_matplotlib

        require_matplotlib(Path(plot))
    with ExitStack() as stack:
        models = open_models(recipe, stack, needs="deltas")
        for target in filter(None, (output, plot)):
            refuse_inputs(Path(target), models.paths)
        import torch

        products = torch.zeros(len(models.tuned), len(models.tuned), dtype=torch.float64)
        done = 0

        def look(_: int, group: Group) -> tuple[int, Tensor]:
            deltas = group.deltas.double()  # (T, n)
            return group.shape.numel(), deltas @ deltas.T

        for count, product in models.map(look):
            products += product
            done += count
            if progress:
                progress("comparing", done, models.size)
    norms = products.diagonal().sqrt()  # (T,)
    cosines = (products / norms / norms[:, None]).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(-1, 1)
    cosines.fill_diagonal_(1.0)
    result = Similarities(tuple(models.tuned), tuple(map(tuple, cosines.tolist())), tuple(norms.tolist()))
    if output:
        write_text(Path(output), result.to_csv())
    if plot:
        from mergecli.plots import heat_map

        heat_map(result.names, result.cosines, Path(plot))
    return result
