"""Plans as values: totals, tables and JSON; and `mergecli.plan` of functions."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergecli
from mergecli.results.plan import Plan, Work, check
from mergecli.runtime.dry_run import is_dry, work_begins
from tests.conftest import World

PLAN = Plan(
    "merge",
    (
        Work("check", "", seconds=1.5),
        Work("read", "base", "toy:base", tensors=3, passes=2, bytes=100),
        Work("learn", "ada_merging", images=60, steps=20, cached=False, seconds=2.0),
        Work("write", "ada_merging", "m.safetensors", tensors=3, bytes=120),
    ),
    memory=1000,
    measured=0.25,
)


def test_totals_are_sums_over_the_work() -> None:
    assert (PLAN.reads, PLAN.writes, PLAN.passes, PLAN.seconds) == (200, 120, 2, 3.5)


def test_json_has_the_totals_and_leaves_out_what_does_not_apply() -> None:
    assert PLAN.to_json() == {
        "command": "merge", "passes": 2, "bytes_read": 200, "bytes_written": 120, "memory": 1000, "seconds": 3.5,
        "estimated": ["memory", "seconds"],
        "work": [
            {"work": "check", "what": "", "seconds": 1.5},
            {"work": "read", "what": "base", "file": "toy:base", "tensors": 3, "passes": 2, "bytes": 100},
            {"work": "learn", "what": "ada_merging", "images": 60, "steps": 20, "cached": False, "seconds": 2.0},
            {"work": "write", "what": "ada_merging", "file": "m.safetensors", "tensors": 3, "bytes": 120},
        ],
    }  # fmt: skip


def test_a_table_has_only_columns_with_something_in_them() -> None:
    lines = Plan("finetune", (PLAN.work[0], PLAN.work[2]), 0, 0.0).table.text("tsv").splitlines()
    assert lines == [
        "work\twhat\timages\tsteps\tcached\tseconds",
        "check\t\t\t\t\t1.5",
        "learn\tada_merging\t60\t20\tno\t2",
    ]


def test_a_function_is_planned_with_its_own_parameters(world: World) -> None:
    models = {name: str(file) for name, file in world.files.items()}
    target = world.folder / "new" / "m.safetensors"
    found = mergecli.plan(mergecli.merge, models, base=str(world.base_file), method="ties", output=target)
    assert not target.parent.exists()
    assert [each.work for each in found.work] == ["check", *["read"] * 4, "merge", "write"]
    merged = mergecli.merge(models, base=str(world.base_file), method="ties", output=target)
    assert found.writes == merged.path.stat().st_size
    with pytest.raises(mergecli.UsageError, match="the output would replace an input"):
        mergecli.plan(mergecli.merge, models, method="average", output=world.files["t1"])


def test_a_function_without_a_dry_run_is_refused() -> None:
    with pytest.raises(TypeError, match="tree has no dry run"):

        def tree() -> None:
            return None

        mergecli.plan(tree)


def test_checks_alone_measure_nothing_and_leave_no_trace(tmp_path: Path) -> None:
    done: list[str] = []

    def verb(wrong: bool) -> None:
        done.append("checked" if is_dry() else "checked for work")
        if wrong:
            raise mergecli.UsageError("wrong")
        work_begins(lambda: done.append("measured"))
        done.append("worked")

    check(verb, wrong=False)
    assert done == ["checked"]
    with pytest.raises(mergecli.UsageError, match="wrong"):
        check(verb, wrong=True)
    verb(wrong=False)
    assert done[2:] == ["checked for work", "worked"]
    assert list(tmp_path.iterdir()) == []
