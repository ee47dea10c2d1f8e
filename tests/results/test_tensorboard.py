"""TensorBoard reads what is written for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mergecli.results.cells import Column, Estimate, Quantity
from mergecli.results.tables import Table
from mergecli.results.tensorboard import require_tensorboard, write_tensorboard
from mergecli.runtime.errors import MergecliWarning, UsageError
from mergecli.training.finetune import finetune


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def table(*rows: tuple[object, ...]) -> Table:
    columns = (
        Column("step", "count"),
        Column("loss my task", "number"),
        Column("accuracy", "percent"),
        Column("note"),
    )
    return Table(columns, rows)  # pyright: ignore


def test_every_number_is_a_scalar_at_its_step(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    write_tensorboard(
        folder,
        table(
            (1, 0.5, None, "good"),
            (4, 0.25, Estimate(0.75, 0.5, 1.0), "x"),
            (5, 0, Quantity(1.0, "percent"), None),
        ),
    )
    assert scalars(folder) == {
        "loss/my task": [(1, 0.5), (4, 0.25), (5, 0.0)],
        "accuracy": [(4, 0.75), (5, 1.0)],
    }
    assert [file.parent for file in folder.parent.rglob("*") if file.is_file()] == [folder]


def test_a_run_is_replaced_and_what_others_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for loss in (1.0, 2.0):
        with pytest.warns(MergecliWarning, match=r"has other files, which stay: `notes\.txt`$"):
            write_tensorboard(tmp_path, table((1, loss, None, "")))
    assert scalars(tmp_path) == {"loss/my task": [(1, 2.0)]}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_first_column_is_the_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected `step`"):
        write_tensorboard(tmp_path, Table((Column("epoch", "count"),), ((1,),)))


def test_a_missing_library_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match="there is no tensorboard") as caught:
        require_tensorboard()
    assert "mergecli[tensorboard]" in caught.value.hint
    with pytest.raises(UsageError, match="there is no tensorboard"):
        finetune(
            base="toy:base", task="digits", output=tmp_path / "t.safetensors", tensorboard=tmp_path / "tb"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("own_store")
def test_a_training_is_shown(tmp_path: Path) -> None:
    done = finetune(
        base="toy:base", task="digits", output=tmp_path / "t.safetensors", steps=3, batch_size=2, lora=False,
        tensorboard=tmp_path / "tb",
    )  # fmt: skip
    found = scalars(tmp_path / "tb")
    assert sorted(found) == ["learning_rate", "loss", "loss/digits"]
    assert [step for step, _ in found["loss"]] == [1, 2, 3]
    assert sum(value for _, value in found["loss"]) / 3 == pytest.approx(done.loss, rel=1e-5)
