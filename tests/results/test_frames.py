"""Results as pandas has them."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

import mergecli
from mergecli.results.cells import Column, Estimate
from mergecli.results.result import Evaluation, Evaluations, TaskScore
from mergecli.results.tables import Table

SCORE = TaskScore(0.5, 1.5, 1.5, 50, 100, "test", {"source": "toy:digits"}, "c", "t")
RESULT = Evaluation(
    {"name": "ties", "method": "ties"},
    {},
    1,
    {"digits": SCORE, "letters": replace(SCORE, limit=100)},
    128,
    "float32",
)


def test_results_are_a_frame_with_a_row_for_each_model_and_task() -> None:
    results = Evaluations([RESULT, replace(RESULT, checkpoint={"name": "base", "method": "pretrained"})])
    frame = results.to_frame()
    assert list(frame.columns) == [
        "model", "method", "task", "accuracy", "loss", "correct", "images", "split", "limit", "corruption", "severity"
    ]  # fmt: skip
    assert list(frame["model"]) == ["ties", "ties", "base", "base"]
    wide = frame.pivot(index="model", columns="task", values="accuracy")
    assert wide.loc["ties", "digits"] == 0.5
    assert RESULT.to_frame().equals(frame[:2])


def test_what_evaluate_gives_is_a_tuple_still() -> None:
    (result,) = mergecli.evaluate("toy:base", clip="toy:base", tasks="digits", limit=4, cache=False)
    results = mergecli.evaluate("toy:base", clip="toy:base", tasks="digits", limit=4, cache=False)
    assert results == (result,)
    assert list(results.to_frame()["images"]) == [4]


def test_a_table_is_a_frame_with_the_columns_of_its_csv() -> None:
    table = Table(
        (Column("model"), Column("digits", "percent")), (("a", Estimate(0.5, 0.4, 0.6)), ("b", None))
    )
    frame = table.to_frame()
    assert list(frame.columns) == ["model", "digits", "digits low", "digits high"]
    assert frame.loc[0, "digits"] == 0.5


def test_pandas_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        mergecli.UsageError, match="to_frame: pandas is not installed\nhint: install it: `pip install pandas`"
    ):
        RESULT.to_frame()
