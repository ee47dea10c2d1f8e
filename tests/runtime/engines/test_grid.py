"""The loop above the engines, with processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergecli.runtime.engines.contract import Engine, Report, Unit
from mergecli.runtime.engines.grid import FailedUnitsError, Failure, Failures, run_grid, workers_stay
from mergecli.runtime.engines.worker import BugError
from mergecli.runtime.errors import InputError, MergecliError, MergecliWarning, UsageError
from tests.runtime.engines.works import Echo


def units(*names: str) -> list[Unit]:
    return [Unit((name,), name) for name in names]


def ran(tmp_path: Path, names: list[str], **settings: object) -> tuple[dict[str, Report], list[Failure]]:
    """The report of each unit, and the failures."""
    found: dict[str, Report] = {}

    def write(unit: Unit, report: Report) -> None:
        assert unit.name not in found
        found[unit.name] = report

    failures = run_grid(Echo(tmp_path), units(*names), Engine(**settings), write, lambda _: False)
    return found, failures


def test_every_unit_comes_back_once_and_says_where_it_ran_and_hides_the_gpus(tmp_path):
    with pytest.warns(MergecliWarning, match="something odd"):
        found, failures = ran(tmp_path, ["a", "b", "loud"], jobs=2)
    assert {name: report.result for name, report in found.items()} == {
        name: f"{name} ".encode() for name in ("a", "b", "loud")
    }
    assert failures == []
    assert {(report.node, report.device) for report in found.values()} == {(os.uname().nodename, "cpu")}


def test_what_is_done_meanwhile_is_not_done_again(tmp_path):
    seen: list[str] = []
    run_grid(
        Echo(tmp_path), units("a", "b"), Engine(keep_going=True), lambda unit, _: seen.append(unit.name),
        lambda unit: unit.name == "a",
    )  # fmt: skip
    assert seen == ["b"]


def test_a_unit_that_fails_for_its_input_ends_the_others_with_its_own_error(tmp_path):
    with pytest.raises(InputError) as caught:
        ran(tmp_path, ["bad", "a"], jobs=2)
    assert (caught.value.message, caught.value.hint) == ("bad.safetensors: is damaged", "fetch it again")


def test_a_unit_that_fails_does_so_once_and_others_go_on_if_they_are_to(tmp_path):
    found, failures = ran(tmp_path, ["bad", "a", "b"], keep_going=True)
    assert sorted(found) == ["a", "b"]
    assert [(each.unit.name, each.error.message) for each in failures] == [
        ("bad", "bad.safetensors: is damaged")
    ]


def test_failures_are_told_together_with_the_status_of_the_first():
    failures = Failures(keep_going=True)
    wrong = UsageError("a setting is wrong", "change it")
    failures.units += [Failure(unit, wrong) for unit in units("x", "y")] + [
        Failure(units("z")[0], InputError("gone"))
    ]
    with pytest.raises(FailedUnitsError) as caught:
        failures.check(9)
    assert caught.value.message == "3 of 9 units failed:\n  x (and 1 more): a setting is wrong\n  z: gone"
    assert (caught.value.hint, int(caught.value.status)) == ("change it", 2)


def test_a_bug_comes_back_with_its_traceback(tmp_path):
    with pytest.raises(BugError, match="ZeroDivisionError: none"):
        ran(tmp_path, ["bug"], keep_going=True)


def test_the_unit_of_a_lost_worker_is_done_again(tmp_path):
    (tmp_path / "lives").write_bytes(b"xx")
    found, _ = ran(tmp_path, ["lost", "a"], jobs=2, retries=2)
    assert sorted(found) == ["a", "lost"]


def test_a_worker_that_is_lost_too_often_is_an_error(tmp_path):
    (tmp_path / "lives").write_bytes(b"xx")
    with pytest.raises(MergecliError, match=r"lost: its worker was lost 2 times: a process .* status -9"):
        ran(tmp_path, ["lost"], keep_going=True, retries=1)


def test_workers_stay_for_the_next_call_until_one_fails(tmp_path):
    def process(**settings: object) -> int:
        found, _ = ran(tmp_path, ["who"], **settings)
        return int(found["who"].result)

    with workers_stay():
        first = process()
        with workers_stay():
            assert process(keep_going=True) == first
        other = process(retries=1)
        assert other != first
        with pytest.raises(InputError, match="is damaged"):
            ran(tmp_path, ["bad"])
        assert not Path(f"/proc/{first}").exists()
        last = process()
        assert last != first
    for each in (other, last):
        assert not Path(f"/proc/{each}").exists()


def test_processes_of_torchrun_share_the_work_already(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="share the work already"):
        ran(tmp_path, ["a"], jobs=2)


def test_gpus_that_are_not_there_are_told(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="--gpus all: this machine has no GPU that torch can use"):
        ran(tmp_path, ["a"], gpus="all")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--gpus 1,2: there is no GPU 2, the last one is 1"):
        ran(tmp_path, ["a"], gpus="1,2")


def test_on_a_machine_with_gpus_each_process_sees_one(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found: list[bytes] = []
    run_grid(
        Echo(tmp_path, "cuda"), units("a", "b", "c", "d"), Engine(gpus="all"),
        lambda _, report: found.append(report.result), lambda _: False,
    )  # fmt: skip
    assert {each.split()[1] for each in found} == {b"4", b"6"}


def test_a_caller_that_is_killed_takes_its_workers_along(tmp_path):
    text = (
        "from pathlib import Path; from mergecli.runtime.engines.contract import Engine, Unit; "
        "from mergecli.runtime.engines.grid import run_grid; from tests.runtime.engines.works import Echo; "
        f"run_grid(Echo(Path({str(tmp_path)!r})), [Unit(('slow',), '1'), Unit(('slow',), '2')], Engine(jobs=2), print, lambda _: False)"
    )
    with subprocess.Popen([sys.executable, "-c", text]) as caller:
        while len(files := list(tmp_path.glob("*.pid"))) < 2:
            assert caller.poll() is None
            time.sleep(0.05)
        caller.kill()
    for number in [int(file.stem) for file in files]:
        while Path(f"/proc/{number}").exists():
            time.sleep(0.05)
