from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.errors import InputError, UsageError
from mergecli.references import names, published_averages
from mergecli.scores import Evaluation, TaskScore
from mergecli.tables import Column, Table, accuracy_table, report


def result(name: str, method: str | None = None, **accuracies: float) -> Evaluation:
    scores = {
        task: TaskScore(accuracy, 1.0, 1.0, round(accuracy * 1000), 1000, "test", {"source": "x", "fingerprint": "y"}, "c", "t")
        for task, accuracy in accuracies.items()
    }  # fmt: skip
    about = {"name": name, "path": name, "digest": "d", "kind": "checkpoint", "method": method}
    return Evaluation(about, {"path": "p", "digest": "d"}, 7, scores, 128, "float32")


TWO = [result("one", "ties", mnist=0.75, dtd=0.5), result("two", None, mnist=0.9)]


def test_results_stand_side_by_side_with_a_dash_where_a_task_is_missing() -> None:
    table = accuracy_table(TWO)
    assert [column.name for column in table.columns] == ["model", "method", "mnist", "dtd", "average"]
    assert table.rows == (("one", "ties", 0.75, 0.5, 0.625), ("two", None, 0.9, None, 0.9))


def test_people_get_percent_and_programs_fractions() -> None:
    table = accuracy_table(TWO)
    assert table.text("tsv").splitlines() == [
        "model\tmethod\tmnist\tdtd\taverage", "one\tties\t0.75\t0.5\t0.625", "two\t\t0.9\t\t0.9",
    ]  # fmt: skip
    assert table.text("csv").splitlines()[1] == "one,ties,0.75,0.5,0.625"
    assert json.loads(table.text("json"))[1] == {
        "model": "two",
        "method": None,
        "mnist": 0.9,
        "dtd": None,
        "average": 0.9,
    }
    assert table.text("md").splitlines() == [
        "| model | method | mnist | dtd | average |", "| :-- | :-- | --: | --: | --: |",
        "| one | ties | 75.0 | 50.0 | 62.5 |", "| two | - | 90.0 | - | 90.0 |",
    ]  # fmt: skip


def test_latex_escapes_what_it_must_and_uses_booktabs() -> None:
    text = Table((Column("a_b"), Column("x", "percent")), (("50 % & more", 0.123),)).text("latex")
    assert text.splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"a\_b & x \\", r"\midrule", r"50 \% \& more & 12.3 \\", r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip


def test_a_reference_adds_the_published_average_and_the_difference() -> None:
    table = accuracy_table(TWO, "clip-vit-base-patch32-ta8")
    assert [column.name for column in table.columns][-2:] == ["reference", "difference"]
    assert table.rows[0][-2:] == (0.722, pytest.approx(0.625 - 0.722))
    assert table.rows[1][-2:] == (None, None)
    assert table.text("md").splitlines()[2].endswith("| 62.5 | 72.2 | -9.7 |")


def test_the_published_tables_are_those_of_the_page() -> None:
    assert names() == ["clip-vit-base-patch16-ta8", "clip-vit-base-patch32-ta8", "clip-vit-large-patch14-ta8"]
    b32 = published_averages("clip-vit-base-patch32-ta8")
    assert b32["Pre-trained"] == pytest.approx(0.482)
    assert b32["Fine-tuned (STL)"] == pytest.approx(0.903)
    assert b32["Weight-Ensembling MoE"] == pytest.approx(0.892)
    assert published_averages("clip-vit-large-patch14-ta8")["RegMean++"] == 0.91
    with pytest.raises(
        UsageError, match=r"unknown reference `clip-vit-base-patch32-ta9` \(did you mean `clip-vit-base-p"
    ):
        published_averages("clip-vit-base-patch32-ta9")


@pytest.mark.parametrize(
    ("suffix", "start"), [(".md", "| model"), (".csv", "model,"), (".tex", "\\begin"), (".tsv", "model\t")]
)
def test_the_suffix_of_the_output_chooses_the_format(tmp_path: Path, suffix: str, start: str) -> None:
    report(TWO, output=tmp_path / f"r{suffix}")
    assert (tmp_path / f"r{suffix}").read_text().startswith(start)


def test_a_report_of_files_is_the_report_of_their_results(tmp_path: Path) -> None:
    files = [tmp_path / f"{each.name}.json" for each in TWO]
    for file, each in zip(files, TWO, strict=True):
        file.write_text(each.to_json())
    assert report(files) == accuracy_table(TWO)
    report(files, plot=tmp_path / "r.svg")
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_nothing_to_report_and_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no results to report"):
        report([])
    (tmp_path / "x.json").write_text('{"schema": "mergecli.eval/9"}')
    with pytest.raises(
        InputError, match=r"x.json: `schema`: expected `mergecli.eval/1`, got 'mergecli.eval/9'"
    ):
        report([tmp_path / "x.json"])
    with pytest.raises(UsageError, match=r"r.gif: a plot is a .png, .svg, .pdf file"):
        report(TWO, plot=tmp_path / "r.gif")


def test_a_tsv_cell_with_a_tab_is_quoted_and_read_back() -> None:
    table = accuracy_table([replace(TWO[0], checkpoint={**TWO[0].checkpoint, "name": "a\tb"})])
    rows = list(csv.reader(table.text("tsv").splitlines(), delimiter="\t"))
    assert rows[1][0] == "a\tb"
