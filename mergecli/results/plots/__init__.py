"""Plots of results; needs the extra `plots`."""

from __future__ import annotations

from mergecli.results.plots.chains import chain_curves
from mergecli.results.plots.charts import Chart, bars, heat_map, heatmap, radar
from mergecli.results.plots.curves import curves
from mergecli.results.plots.parallel import parallel
from mergecli.results.plots.routes import route_maps
from mergecli.results.plots.style import (
    FORMATS,
    KINDS,
    STYLES,
    check_kind,
    has_matplotlib,
    require_matplotlib,
    save,
    svg,
)

__all__ = [
    "FORMATS", "KINDS", "STYLES", "Chart", "bars", "chain_curves", "check_kind", "curves", "has_matplotlib", "heat_map", "heatmap", "parallel",
    "radar",
    "require_matplotlib", "route_maps", "save", "svg",
]  # fmt: skip
