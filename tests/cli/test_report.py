from __future__ import annotations

from pathlib import Path

from tests.conftest import Run
from tests.results.test_report import predictions, result


def test_the_table_is_on_stdout_and_how_to_read_it_on_stderr(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.json").write_text(result("a", "ties", 4, mnist=0.5).to_json())
    (tmp_path / "b.json").write_text(result("b", "average", 4, mnist=0.75).to_json())
    predictions(tmp_path / "1.parquet", a={"mnist": [1, 1, 0, 0]})
    predictions(tmp_path / "2.parquet", b={"mnist": [1, 1, 1, 0]})
    ended = run(
        "report", "a.json", "b.json", "--against", "a", "--predictions", "1.parquet", "--predictions", "2.parquet",
        "--reference", "clip-vit-base-patch32-ta8", "--sort", "average", "--format", "md", "-o", "r.txt",
    )  # fmt: skip
    assert ended.status == 0
    table = ended.out.splitlines()
    assert table[2] == "| b | average | **75.0** | **75.0** | 86.3 | -11.3 | +25.0 n.s. | +25.0 n.s. |"
    assert all(line.startswith(("warning: ", "note: ")) for line in ended.err.splitlines())
    assert "McNemar" in ended.err
    assert (tmp_path / "r.txt").read_text() == ended.out
    pair = (
        "report",
        "a.json",
        "b.json",
        "--against",
        "a",
        "--predictions",
        "1.parquet",
        "--predictions",
        "2.parquet",
    )
    tested = run(*pair, "--p-values").out.splitlines()
    assert tested[0].split("\t")[-5:] == [
        "average (diff.)", "average (diff.) low", "average (diff.) high", "average (diff.) significant", "average (p)",
    ]  # fmt: skip
    assert tested[2].split("\t")[-2:] == ["false", "1"]
    assert (
        run(*pair, "--p-values", "--format", "md")
        .out.splitlines()[3]
        .endswith(" +25.0 | 1.000 | +25.0 | 1.000 |")
    )
    ended = run("report", "a.json", "-o", "r.html")
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")


def test_wrong_options_and_files_have_their_status(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.json").write_text(result("a", "ties", 4, mnist=0.5).to_json())
    ended = run("report", "a.json", "--sort", "avrage")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("error: --sort: expected one of average, name, mnist, got `avrage`")
    ended = run("report", "a.json", "--against", "a.json", "--predictions", "no.parquet")
    assert (ended.status, ended.out, ended.err) == (3, "", "error: no.parquet: no such predictions\n")


def test_many_departures_from_a_published_table_are_a_line_unless_all_is_wanted(
    tmp_path: Path, run: Run
) -> None:
    (tmp_path / "a.json").write_text(result("a", "ties", 4, mnist=0.5).to_json())
    line = ["report", "a.json", "--reference", "clip-vit-base-patch32-ta8"]
    whole = [each for each in run(*line, "-v").err.splitlines() if each.startswith("warning: not as in ")]
    assert len(whole) > 3
    short = run(*line, "-o", "r.html").err.splitlines()
    assert [each for each in short if each.startswith("warning: evaluated otherwise")] == [
        f"warning: evaluated otherwise than `clip-vit-base-patch32-ta8` in {len(whole)} ways, from which differences may "
        "come: `--verbose` lists them, and so does `-o report.html`"
    ]
    page = (tmp_path / "r.html").read_text()
    assert page.count("<strong>Warning:</strong> not as in `clip-vit-base-patch32-ta8`") == len(whole)
