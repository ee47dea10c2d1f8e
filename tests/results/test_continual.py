"""The measures of continual learning, by hand; tables and pictures of chains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.results.cells import number_in
from mergecli.results.continual import continual_table, read_chains
from mergecli.results.report import report
from mergecli.results.result import Evaluation
from mergecli.results.tables import Table
from mergecli.runtime.errors import InputError, UsageError
from tests.results.test_report import result


def step(
    chain: str, order: str, number: int, method: str = "opcm", alpha: str = "0.5", **scores: float
) -> Evaluation:
    made = result(f"{chain}-{number}", method, images=100, **scores)
    about = {"chain": chain, "order": order, "step": str(number), "method.alpha": alpha}
    return replace(made, checkpoint={**made.checkpoint, **about})


def two_orders(**more: str) -> list[Evaluation]:
    return [
        step("order-01", "a,b,c", 1, a=0.9, **more),
        step("order-01", "a,b,c", 2, a=0.6, b=0.8, **more),
        step("order-01", "a,b,c", 3, a=0.7, b=0.5, c=0.4, **more),
        step("order-02", "c,a,b", 1, c=0.5, **more),
        step("order-02", "c,a,b", 2, c=0.6, a=0.8, **more),
        step("order-02", "c,a,b", 3, c=0.4, a=0.9, b=0.7, **more),
    ]


def values(table: Table) -> dict[str, list[float | None]]:
    """Measure -> mean, standard deviation, and the value of each order."""
    return {str(row[1]): [number_in(cell) for cell in row[2:]] for row in table.rows}


def test_accuracy_transfer_and_forgetting_are_those_by_hand() -> None:
    found = values(continual_table(two_orders()))
    assert found["average accuracy after step 1"] == pytest.approx([0.7, 0.08**0.5, 0.9, 0.5])
    assert found["average accuracy after step 2"] == pytest.approx([0.7, 0.0, 0.7, 0.7])
    assert found["average accuracy after step 3"] == pytest.approx([0.6, 0.2 / 3 * 2**0.5, 1.6 / 3, 2.0 / 3])
    # order-01: (0.7 - 0.9) + (0.5 - 0.8) + 0; order-02: (0.4 - 0.5) + (0.9 - 0.8) + 0
    assert found["backward transfer, over T"][2:] == pytest.approx([-0.5 / 3, 0.0], abs=1e-12)
    assert found["backward transfer, over T - 1"][2:] == pytest.approx([-0.25, 0.0], abs=1e-12)
    assert found["forgetting of a"][2:] == pytest.approx([0.2, -0.1])
    assert found["forgetting of b"] == [pytest.approx(0.3), None, pytest.approx(0.3), None]
    assert found["forgetting of c"] == [pytest.approx(0.2), None, None, pytest.approx(0.2)]
    assert found["forgetting"][2:] == pytest.approx([0.25, 0.05])


def test_methods_and_settings_stand_apart_under_names_of_their_own() -> None:
    every = [*two_orders(), *two_orders(alpha="0.9"), *two_orders(method="dop")]
    chains, warnings = read_chains(every)
    assert [each.label for each in chains] == ["opcm alpha 0.5", "opcm alpha 0.9", "dop"]
    assert warnings == []


def test_one_order_has_no_spread_and_no_columns_of_orders() -> None:
    table = continual_table(two_orders()[:3])
    assert [column.name for column in table.columns] == ["method", "measure", "mean", "std"]
    assert all(number_in(row[3]) is None for row in table.rows)
    one = values(continual_table([step("order-01", "a", 1, a=0.9)]))
    assert one == {"average accuracy after step 1": [0.9, None], "backward transfer, over T": [0.0, None]}


def test_an_order_that_is_not_whole_is_left_out_with_a_warning() -> None:
    table = continual_table(two_orders()[:5])
    assert table.warnings == ("opcm: `order-02` lacks `3` of its 3 steps: left out",)
    with pytest.raises(InputError) as caught:
        continual_table(two_orders()[:2])
    assert str(caught.value) == (
        "no chain is whole: opcm: `order-01` lacks `3` of its 3 steps: left out\n"
        "hint: run the same `mergecli continual` again: it goes on"
    )


def test_what_is_no_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one: is no result of a chain"):
        continual_table([result("one", "ties", a=0.5)])
    with pytest.raises(InputError, match="two results are step 1 of `order-01` by `opcm`"):
        continual_table([*two_orders(), *two_orders()])
    with pytest.raises(InputError, match="has no results of a chain"):
        report([tmp_path], continual=True)
    with pytest.raises(UsageError, match="--normalized: does not go with --continual"):
        report(two_orders(), continual=True, normalized=True)
    with pytest.raises(UsageError, match="--steps: is for `--continual`"):
        report(two_orders(), steps="steps.csv")


def test_a_folder_gives_its_steps_a_picture_and_a_table_of_all_steps(tmp_path: Path) -> None:
    for each in two_orders():
        file = tmp_path / f"chain/{each.checkpoint['chain']}/step-0{each.checkpoint['step']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(each.to_json())
    table = report([tmp_path / "chain"], continual=True, steps="steps.csv", plot="p.png", output="t.html")
    assert values(table) == values(continual_table(two_orders()))
    lines = Path("steps.csv").read_text().splitlines()
    assert lines[:4] == [
        "model_name,a,b,c", "opcm_order-01_step_1,0.9,,", "opcm_order-01_step_2,0.6,0.8,", "opcm_order-01_step_3,0.7,0.5,0.4",
    ]  # fmt: skip
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("t.html").read_text()
    assert "-16.7" in table.text("md")
