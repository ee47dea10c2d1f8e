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
