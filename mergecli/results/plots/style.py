"""The style of our plots, and how they are saved."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mergecli.runtime.errors import UsageError, did_you_mean, either
from mergecli.storage.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")

FORMATS = (".png", ".svg", ".pdf")
KINDS = ("bars", "radar", "heatmap", "sweep")

INK = "#1a1a1a"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#4d4d4d", "#b8a900")
"""Okabe and Ito's palette for color-blind readers; yellow and black softened."""
HATCHES = ("", "////", "....", "xxxx")
"""Hatches of the second eight models, of the third, ..."""
STYLES = len(COLORS) * len(HATCHES)
"""Bars that do not look alike."""
LINES = ("-", "--", ":", "-.")
MARKERS = "os^Dv<>Pp*X"
CJK = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "Hiragino Sans", "PingFang SC",
       "Microsoft YaHei", "Yu Gothic", "Arial Unicode MS")  # fmt: skip


def require_matplotlib(path: Path) -> None:
    """Raises UsageError if a plot cannot be written to `path`: unknown suffix, or no matplotlib."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: expected a {either(FORMATS)} file")
    if not has_matplotlib():
        raise UsageError("plots need matplotlib", "pip install 'mergecli[plots]'")


def has_matplotlib() -> bool:
    """Whether the extra `plots` is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def check_kind(kind: str) -> str:
    """The kind of plot; raises UsageError if there is no such kind."""
    if kind not in KINDS:
        raise UsageError(
            f"--plot-kind: expected one of {', '.join(KINDS)}, got `{kind}`{did_you_mean(kind, KINDS)}"
        )
    return kind


def styled(function: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """Runs the function in our own style, whatever the user's matplotlibrc says."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn:
        import matplotlib as mpl
        from matplotlib import font_manager

        installed = {font.name for font in font_manager.fontManager.ttflist}
        style: dict[Any, Any] = {
            **mpl.rcParamsDefault, "font.family": ["DejaVu Sans", *(name for name in CJK if name in installed)],
            "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
            "hatch.linewidth": 0.6, "svg.hashsalt": "mergecli", "pdf.fonttype": 42,
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        }  # fmt: skip
        del style["backend"]
        with mpl.rc_context(style), warnings.catch_warnings():
            # characters without an installed font are drawn as boxes
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from font", category=UserWarning)
            return function(*args, **kwargs)

    return run


def labels(names: Sequence[str], limit: int = 24) -> list[str]:
    """The names for a plot: on one line, long ones without their middle; numbered if that makes two equal."""
    half = limit // 2
    shown = [
        name if len(name) <= limit else f"{name[:half]}…{name[len(name) - half + 1 :]}" for name in names
    ]
    if len(set(shown)) < len(set(names)):
        shown = [
            f"{short[: limit - 4]} ({number})" if shown.count(short) > 1 else short
            for number, short in enumerate(shown, 1)
        ]
    return ["".join(c if c.isprintable() else " " for c in name).replace("$", r"\$") for name in shown]


def canvas(width: float, height: float, **axes: Any) -> tuple[Figure, Axes]:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(**axes)


def legend(figure: Figure, names: Sequence[str], handles: Sequence[Any]) -> None:
    """The legend above the figure, in as many columns as fit; the figure grows by what is beyond three rows."""
    # matplotlib leaves out names that begin with an underscore
    shown = [f"\u200a{name}" if name.startswith("_") else name for name in labels(names)]
    width = 0.55 + 0.078 * max(map(len, shown))
    columns = max(1, min(len(shown), int(figure.get_figwidth() / width)))
    rows = -(-len(shown) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, rows - 3))
    figure.legend(
        handles, shown, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5, handlelength=1.4,
        columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


@styled
def save(figure: Figure, path: Path) -> None:
    """Writes the figure whole or not at all, without a date, so that the same picture is the same file."""
    buffer = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    figure.savefig(buffer, format=path.suffix[1:], dpi=200, metadata=metadata)
    with whole_file(path) as file:
        file.write(buffer.getvalue())


@styled
def svg(figure: Figure, prefix: str) -> str:
    """The figure as an SVG element for an HTML page: in the color of the text around it, with identifiers that begin with
    `prefix`, and without references to other files."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        .replace("xlink:href", "href")
        .replace(INK, "currentColor")
    )
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" ', r"<svg \1", text, count=1
    )
