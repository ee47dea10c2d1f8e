"""The script that makes a table of every method."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergecli import methods

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("method_table")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_every_method_has_a_row_of_a_label_of_its_own_and_the_published_ones_are_counterparts_once(
    script: Any,
) -> None:
    rows = list(script.rows(0.1))
    assert {row.method for row in rows} | set(script.LEFT_OUT) == set(methods.names())
    assert len({row.label for row in rows}) == len(rows)
    assert {row.on for row in rows} - {""} <= {row.label for row in rows}
    published = [name for row in rows for routing in row.routings if (name := row.published(routing))]
    assert sorted(published) == sorted(set(published))
    assert "Layer-wise AdaMerging" in published
    assert "Weight-Ensembling MoE" in published


def test_fewer_steps_leave_what_is_short_and_what_does_not_learn(script: Any) -> None:
    assert script.fewer_steps("ada_merging", 0.05) == {"steps": 50}
    assert script.fewer_steps("concrete_ada_merging", 0.001) == {"mask_steps": 10, "steps": 10}
    assert script.fewer_steps("fw_merging", 0.001) == {"steps": 10}
    assert script.fewer_steps("doge_ta", 0.001) == {}
    assert script.fewer_steps("ada_merging", 1) == {}


def test_kendalls_tau_counts_pairs_in_the_same_order(script: Any) -> None:
    assert script.kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert script.kendall([1, 2, 3], [3, 2, 1]) == -1
    assert script.kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6, abs=1e-3)
    assert script.kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5, abs=1e-3)  # one tie
    assert script.kendall([1, 1], [1, 2]) is None


def test_the_table_replaces_what_is_between_the_marks_of_a_page(script: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    first, last = script.MARKS
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    script.put(page, "| new |")
    assert page.read_text() == f"before\n{first}\n\n| new |\n\n{last}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="expected the lines"):
        script.put(page, "| new |")


def test_a_row_with_fewer_steps_than_published_says_so(script: Any) -> None:
    shares = {row.label: row.share for row in script.rows(0.1)}
    assert shares["ada_merging, by layer"] == 0.1
    assert shares["ties"] == 1
    assert {row.share for row in script.rows(1)} == {1}
    line = {
        "label": "ada_rank, from the mean", "kind": "test-time", "mean": 81.84, "spread": None, "size": 1.0, "images": "all test",
        "processor_seconds": 61.2, "gigabytes": 0.734,
    }  # fmt: skip
    shown = [
        script.markdown({"unmerged": {}, "rows": [{**line, "share of steps": share}], "order": {}}).split(
            "\n"
        )[-1]
        for share in (1, 0.1)
    ]
    assert shown == [
        "| `ada_rank`, from the mean | 81.8 | 1 | all test | 61 | 0.73 |",
        "| `ada_rank`, from the mean, 10 % of the steps | 81.8 | 1 | all test | 61 | 0.73 |",
    ]


def test_what_is_known_of_a_row_and_what_was_made_are_one_row_of_all_seeds(script: Any) -> None:
    known = {
        "seeds": [0, 1],
        "averages": [80.0, 82.0],
        "mean": 81.0,
        "spread": 1.41,
        "tasks": {"a": 81.0},
        "seconds": 9,
    }
    own = {"seeds": [2], "averages": [84.0], "mean": 84.0, "spread": None, "tasks": {"a": 84.0}, "seconds": 7}
    assert script.joined(None, known) is known
    assert script.joined(own, None) is own
    assert script.joined(own, known) == {
        "seeds": [0, 1, 2], "averages": [80.0, 82.0, 84.0], "mean": 82.0, "spread": 2.0, "tasks": {"a": 82.0}, "seconds": 7,
    }  # fmt: skip
    again = {**own, "seeds": [0, 1]}
    assert script.joined(again, known) is again


@pytest.mark.slow
def test_rows_that_compact_results_have_are_not_made_again(script: Any, tmp_path: Path) -> None:
    import json
    import subprocess

    recipe, found = tmp_path / "two.toml", tmp_path / "found.json"
    recipe.write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nfaces = "toy:faces"\n')

    def run(*more: str, limit: int = 20) -> str:
        """What was done: the lines of stderr."""
        words = [recipe, tmp_path / more[0], "--limit", limit, "--reference", "", "--json", found, *more[1:]]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "method_table.py", *map(str, words)], capture_output=True, text=True
        )  # fmt: skip
        return done.stderr if done.returncode == 0 else f"{done.returncode}: {done.stderr}"

    first = run("one", "--seeds", "0", "--row", "dare", "--row", "average")
    assert [line.split(":")[0] for line in first.splitlines()] == [
        "merge average, seed 0", "eval average, seed 0", "merge dare, seed 0", "eval dare, seed 0", "eval base", "eval fine-tuned",
    ]  # fmt: skip
    rows = {line["label"]: line for line in json.loads(found.read_text())["rows"]}
    second = run("other", "--seeds", "0,1", "--row", "dare", "--row", "average", "--known", str(found))
    assert [line.split(":")[0] for line in second.splitlines()] == ["merge dare, seed 1", "eval dare, seed 1"]
    third = run("third", "--seeds", "0,1", "--row", "ties", "--known", str(found))
    assert [line.split(":")[0] for line in third.splitlines()] == ["merge ties, seed 0", "eval ties, seed 0"]
    results = json.loads(found.read_text())
    assert set(results["unmerged"]) >= {"base", "fine-tuned"}
    joined = {line["label"]: line for line in results["rows"]}
    assert set(joined) == {"average", "dare", "ties"}
    assert joined["average"] == rows["average"]
    assert joined["dare"]["seeds"] == [0, 1]
    assert joined["dare"]["averages"][:1] == rows["dare"]["averages"]
    assert (
        run("other", "--row", "average", "--known", str(found), limit=30)
        == f"1: {found}: is of 20 images of each task\n"
    )
    recipe.write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nshapes = "toy:shapes"\n')
    assert run("other", "--row", "average", "--known", str(found)) == f"1: {found}: is of other models\n"


@pytest.mark.slow
def test_known_rows_of_fewer_steps_stay_until_there_are_more(script: Any, tmp_path: Path) -> None:
    import json
    import subprocess

    recipe, found = tmp_path / "two.toml", tmp_path / "found.json"
    recipe.write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nfaces = "toy:faces"\n')

    def run(folder: str, *more: str) -> tuple[list[str], list[float]]:
        """What was done, and the shares of the steps in the results."""
        words = [
            recipe,
            tmp_path / folder,
            "--limit",
            20,
            "--reference",
            "",
            "--json",
            found,
            "--seeds",
            0,
            *more,
        ]
        words += ["--row", "representation_surgery on task_arithmetic"]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "method_table.py", *map(str, words)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        rows = json.loads(found.read_text())["rows"]
        return [line.split(",")[0] for line in done.stderr.splitlines()], [
            line["share of steps"] for line in rows
        ]

    name = "representation_surgery on task_arithmetic"
    made = ["merge task_arithmetic", f"merge {name}", f"eval {name}"]
    steps, shares = run("one", "--share", "0.02")
    assert (steps[:3], shares) == (made, [0.02])
    known = ("--known", str(found))
    assert run("two", "--share", "0.01", *known) == ([], [0.02])
    assert run("two", "--share", "0.03", "--table", *known) == ([], [0.02])
    assert run("two", "--share", "0.03", *known) == (made, [0.03])


@pytest.mark.parametrize("text", [None, "no JSON", '{"rows": []}', "[]"])
def test_known_results_that_are_none_are_told(script: Any, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "known.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit, match=r"known\.json: expected results that `--json` has written"):
        script.Table._compact(None, file)
