from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from mergecli.results import plots
from mergecli.results.cells import Column
from mergecli.results.pictures import draw
from mergecli.results.plots.curves import spread
from mergecli.results.plots.style import labels
from mergecli.results.plots.traces import traces
from mergecli.results.report import report
from mergecli.results.result import Evaluation
from mergecli.results.tables import Table
from mergecli.runtime.errors import MergecliWarning, UsageError
from tests.results.test_report import THREE, TWO, result

NAMES = ["合并模型", "$x_1$ and $", "_hidden", "a\nb\tc", "x" * 300, "%s {} \\alpha"]


def odd(count: int, tasks: int = 4) -> list[Evaluation]:
    accuracies = {f"task-{number}": 0.1 + 0.8 * number / tasks for number in range(tasks)}
    return [
        result(f"{NAMES[n % len(NAMES)]}{n if n >= len(NAMES) else ''}", **accuracies) for n in range(count)
    ]


@pytest.mark.parametrize(
    ("kind", "suffix", "start"),
    [("bars", ".png", b"\x89PNG"), ("radar", ".svg", b"<?xml"), ("heatmap", ".svg", b"<?xml"), ("bars", ".pdf", b"%PDF")],
)  # fmt: skip
def test_a_picture_is_the_same_file_every_time(kind: str, suffix: str, start: bytes, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for file in files:
        report(odd(2), plot=file, plot_kind=kind, intervals=True)
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith(start)


@pytest.mark.parametrize(("kind", "count"), [("bars", 20), ("radar", 10), ("heatmap", 10)])
def test_names_of_every_kind_and_many_models_are_drawn_without_a_warning(
    kind: str, count: int, tmp_path: Path
) -> None:
    report(odd(count), plot=tmp_path / "p.png", plot_kind=kind)
    with Image.open(tmp_path / "p.png") as picture:
        assert max(picture.size) <= 15 * 200
        assert len(picture.convert("L").getcolors() or ()) > 10


@pytest.mark.parametrize("kind", ["bars", "heatmap"])
def test_missing_numbers_one_task_and_losses_are_drawn(kind: str, tmp_path: Path) -> None:
    for number, (results, metric) in enumerate(((TWO, "accuracy"), (TWO[1:], "loss"))):
        report(results, plot=tmp_path / f"{number}.svg", plot_kind=kind, metric=metric)  # pyright: ignore
        assert "<svg" in (tmp_path / f"{number}.svg").read_text()


def test_a_radar_of_two_tasks_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a radar needs three tasks or more"):
        report(THREE, plot=tmp_path / "r.png", plot_kind="radar")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_takes_its_values_from_the_results() -> None:
    from mergecli.results.pictures import swept

    assert swept([result("ties-0.3", mnist=1), result("ties-1", mnist=1)]) == ("ties", [0.3, 1.0])
    assert swept([result(f"method.x={value}", mnist=1) for value in ("1e-3", "-2")]) == (
        "method.x",
        [1e-3, -2.0],
    )
    with pytest.raises(UsageError, match="results that differ in the value of one setting"):
        swept(TWO)
    with pytest.raises(UsageError, match="results that differ in the value of one setting"):
        swept([result("a-1", mnist=1), result("b-2", mnist=1)])
    with pytest.raises(UsageError, match="results that differ in the value of one setting"):
        swept([result("a-1", mnist=1), result("a-1.0", mnist=1)])


def test_a_sweep_is_a_line_for_each_task_and_a_bold_one_for_the_average(tmp_path: Path) -> None:
    values = [0.5, 0.1, 0.3]
    figure = plots.curves(
        values,
        {"mnist": [1, 2, 3], "dtd": [3.0, None, 1.0]},
        [2, 2.5, 4],
        x_label="method.scaling_factor",
        best=2,
    )
    lines = {tuple(line.get_xdata()): line for line in figure.axes[0].lines}  # pyright: ignore
    assert tuple(lines[(0.1, 0.3, 0.5)].get_ydata()) in ((2, 3, 1), (2.5, 4, 2))  # pyright: ignore
    assert tuple(lines[(0.3, 0.5)].get_ydata()) == (1.0, 3.0)  # pyright: ignore
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["best 0.3: 4", "mnist", "dtd", "average"]
    widths = [line.get_linewidth() for line in figure.axes[0].lines[:3]]
    assert widths[2] > 2 * widths[0] == 2 * widths[1]
    plots.save(figure, tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_a_report_of_a_sweep_is_drawn_by_its_setting(tmp_path: Path) -> None:
    points = [result(f"scaling_factor={value}", mnist=value, dtd=0.5) for value in (0.3, 0.1, 0.2)]
    report(points, plot=tmp_path / "s.pdf", plot_kind="sweep", sort="average")
    assert (tmp_path / "s.pdf").read_bytes().startswith(b"%PDF")


def test_labels_at_the_end_of_lines_keep_their_distance() -> None:
    got = spread([5, 5, 5.1, 9, 0], 1, 0, 10)
    assert sorted(got) == pytest.approx([0, 5, 6, 7, 9])
    assert got[3:] == [9, 0]
    assert spread([10, 10, 10], 1, 0, 10) == pytest.approx([8, 9, 10])
    crowded = sorted(spread([1.0] * 30, 1, 0, 10))
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(crowded))


def test_long_names_lose_their_middle_and_stay_apart() -> None:
    assert labels(["short", "a" * 20 + "b" * 20]) == ["short", "a" * 12 + "…" + "b" * 11]
    same_ends = ["a" * 30 + "1" + "b" * 30, "a" * 30 + "2" + "b" * 30]
    assert [each[-4:] for each in labels(same_ends)] == [" (1)", " (2)"]
    assert labels(["a\nb", "$x$"]) == ["a b", r"\$x\$"]


def test_names_that_begin_with_an_underscore_are_in_the_legend() -> None:
    chart = plots.Chart(("_a", "b"), ("x",), ((1.0,), (2.0,)), (1.0, 2.0))
    (legend,) = plots.bars(chart).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_a", "b"]


def test_many_models_leave_a_plot_its_height_and_bars_that_look_alike_are_told(tmp_path: Path) -> None:
    chart = plots.Chart(tuple(f"m{n}" for n in range(33)), ("x", "y", "z"), ((1.0,) * 3,) * 33, (1.0,) * 33)
    few = replace(chart, models=chart.models[:2], values=chart.values[:2], averages=chart.averages[:2])
    rows = 33 / 8
    assert plots.radar(chart).get_figheight() > plots.radar(few).get_figheight() + 0.18 * (rows - 3)
    with pytest.warns(MergecliWarning) as told:
        draw(chart, "bars", tmp_path / "b.svg", ())
    assert [str(each.message) for each in told] == [
        f"{tmp_path}/b.svg: 33 models are drawn in 32 styles, so that some look alike; `--plot-kind heatmap` has a row for each"
    ]


def test_similarities_are_drawn_with_their_numbers(tmp_path: Path) -> None:
    plots.heat_map(["$a$", "合"], [[1.0, -0.5], [-0.5, 1.0]], tmp_path / "h.svg")
    assert "<svg" in (tmp_path / "h.svg").read_text()


def test_the_colors_of_similarities_span_what_is_off_the_diagonal(tmp_path: Path) -> None:
    values = [[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]]
    plots.heat_map(["a", "b", "c"], values, tmp_path / "h.svg")
    cells = re.findall(
        r'<path d="[^"]*" clip-path="[^"]*" style="fill: (#[0-9a-f]{6})"', (tmp_path / "h.svg").read_text()
    )
    assert len(cells) == 9
    gray, lightest, _, darkest = cells[0], *cells[1:3], cells[5]
    assert [cells[at] for at in (0, 4, 8)] == [gray] * 3
    assert gray == "#e0e0e0"
    assert (lightest, darkest) == ("#ffffd9", "#234da0")
    assert cells.count(darkest) == cells.count(lightest) == 2


def test_a_picture_in_a_page_takes_the_colour_of_its_text() -> None:
    chart = plots.Chart(("a",), ("x",), ((1.0,),), (1.0,))
    text = plots.svg(plots.bars(chart), "p")
    assert text.startswith("<svg ")
    assert "currentColor" in text
    assert not re.search(r"<metadata|xmlns|http|<svg [^>]*width=", text)


def test_there_are_only_the_plots_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"r.gif: expected a .png, .svg or .pdf file"):
        plots.require_matplotlib(tmp_path / "r.gif")
    with pytest.raises(UsageError, match="got `pie`"):
        plots.check_kind("pie")


def test_a_trace_of_any_loss_is_drawn(tmp_path: Path) -> None:
    names = ("step", "cross-entropy", "cross-entropy a", "cross-entropy b", "coefficient a", "coefficient b")
    table = Table(
        tuple(Column(name, "number") for name in names),
        ((1, 1.5, 1.0, 2.0, 0.3, 0.3), (2, 1.0, 0.5, 1.5, 0.4, 0.2)),
    )
    traces(table, tmp_path / "trace.svg")
    drawn = (tmp_path / "trace.svg").read_text()
    assert all(f"<!-- {word} -->" in drawn for word in ("cross-entropy", "coefficient", "mean", "a", "b"))


def test_trials_are_lines_through_their_settings_and_bend_where_a_method_has_none() -> None:
    axes = {"name": ["ties", "average", "ties"], "density": [0.01, None, 1.0]}
    figure = plots.parallel(axes, [50.0, 60.0, 55.0], label="average (%)", best=1)
    (plot,) = figure.axes
    lines = [
        [float(height) for height in line.get_ydata()] for line in plot.lines if len(line.get_ydata()) == 3
    ]
    assert lines == [[0.75, 0.0, 0.0], [0.75, 1.0, 0.5], [0.25, -0.1, 1.0]], (
        "the best one is the last, above the others"
    )
    assert [text.get_text() for text in plot.get_xticklabels()] == ["name", "density", "average (%)"]
    written = [text.get_text() for text in plot.texts]
    assert {"ties", "average", "0.01", "0.1", "1", "55"} <= set(written), (
        "densities over two decades are on a logarithm"
    )
