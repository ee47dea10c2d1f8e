"""Units on a Ray cluster of three machines with two GPUs each, all of which are this one and none of which is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergecli
from mergecli.runtime.engines.contract import Engine, Report, Unit
from mergecli.runtime.engines.grid import run_grid
from mergecli.runtime.engines.worker import BugError
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from tests.runtime.engines.works import Echo

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FAST = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 500,
}  # fmt: skip
"""A machine that has gone is missed after two seconds, not after half a minute."""


@pytest.fixture(scope="module")
def cluster(own_world: None) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        head = {"num_cpus": 1, "num_gpus": 2, "include_dashboard": False, "_system_config": FAST}
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1, num_gpus=2)
        yield made
        made.shutdown()


@pytest.fixture
def engine(cluster) -> dict[str, Any]:
    return {"name": "ray", "address": cluster.address}


def ran(work: Echo, names: list[str], **settings: Any) -> dict[str, Report]:
    found: dict[str, Report] = {}

    def write(unit: Unit, report: Report) -> None:
        assert unit.name not in found
        found[unit.name] = report

    run_grid(work, [Unit((name,), name) for name in names], Engine(**settings), write, lambda _: False)
    return found


def test_units_come_back_once_with_what_was_said_and_ray_leaves_stdout_alone(tmp_path, engine, capfd):
    (tmp_path / "lives").write_bytes(b"x")
    with pytest.warns(MergecliWarning, match="something odd"):
        found = ran(Echo(tmp_path), ["a", "lost", "loud"], **engine)
    assert {name: report.result for name, report in found.items()} == {
        name: f"{name} ".encode() for name in ("a", "lost", "loud")
    }
    assert capfd.readouterr().out == ""
    assert (tmp_path / "left").exists()
    assert not ray.is_initialized()


def test_a_unit_sees_the_gpu_that_it_was_given_and_none_without(tmp_path, engine):
    found = ran(Echo(tmp_path, "cuda"), ["a", "b"], **engine, gpus_per_unit=1)
    assert {report.result.split()[1] for report in found.values()} <= {b"0", b"1"}
    assert {report.device for report in found.values()} <= {"cuda:0", "cuda:1"}
    with pytest.raises(UsageError, match="a unit that computes on a GPU needs some of it"):
        ran(Echo(tmp_path, "cuda"), ["a"], **engine, gpus_per_unit=0)


def test_a_gpu_that_is_held_and_not_used_gets_a_warning(tmp_path, engine):
    said = "--gpus-per-unit 0.5: units hold GPUs and compute on processors; `--device cuda` computes on GPUs"
    with pytest.warns(MergecliWarning) as caught:
        ran(Echo(tmp_path), ["a"], **engine, gpus_per_unit=0.5)
    assert said in [str(each.message) for each in caught]


def test_what_no_machine_has_is_refused_before_ray_waits_for_ever(tmp_path, engine):
    with pytest.raises(UsageError) as caught:
        ran(Echo(tmp_path), ["a"], **engine, gpus_per_unit=4)
    assert caught.value.message.startswith(
        "no machine of the Ray cluster has 4 GPUs and 1 processors for a unit:\n  "
    )
    assert "1 processors, 2 GPUs" in caught.value.message
    with pytest.raises(UsageError, match="has 9 processors for a unit"):
        ran(Echo(tmp_path), ["a"], **engine, cpus_per_unit=9)


def test_a_machine_with_other_versions_is_named(tmp_path, engine, monkeypatch):
    from mergecli.runtime.engines import ray as dialect

    real = dialect._look_at_versions
    here = iter([lambda packages: {**real()(packages), "torch": "1.0"}])
    monkeypatch.setattr(dialect, "_look_at_versions", lambda: next(here, real()))
    with pytest.raises(InputError, match=r"has other versions than this machine:\n  torch .*, here 1\.0"):
        ran(Echo(tmp_path), ["a"], **engine)


def test_a_machine_that_lacks_models_or_data_is_named(tmp_path, engine):
    (tmp_path / "lacking").touch()
    with pytest.raises(InputError) as caught:
        ran(Echo(tmp_path), ["a"], **engine)
    assert caught.value.message.endswith("): data.parquet: no such file or folder")
    assert caught.value.hint == "copy it"


def test_errors_and_bugs_come_back_as_they_were(tmp_path, engine):
    with pytest.raises(InputError) as caught:
        ran(Echo(tmp_path), ["bad", "a"], **engine)
    assert (caught.value.message, caught.value.hint) == ("bad.safetensors: is damaged", "fetch it again")
    with pytest.raises(BugError, match="ZeroDivisionError: none"):
        ran(Echo(tmp_path), ["bug"], **engine, keep_going=True)


def test_no_cluster_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"--address 127\.0\.0\.1:1: there is no Ray cluster"):
        ran(Echo(tmp_path), ["a"], name="ray", address="127.0.0.1:1")


TOY = ["toy:base", "toy:digits", "--clip", "toy:base", "--tasks", "digits,letters,shapes", "--limit", "60"]
COMMAND = [sys.executable, "-m", "mergecli", "eval", *TOY]


def results(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob("*.json")}


def log(folder: str) -> list[str]:
    return sorted(json.loads(line)["unit"] for line in Path(folder, "units.jsonl").read_text().splitlines())


def test_a_token_that_is_asked_for_and_not_there_is_an_error(cluster, tmp_path):
    ended = subprocess.run(
        [*COMMAND, "-o", "out", "--engine", "ray", "--address", cluster.address],
        env={**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert (ended.returncode, [line for line in ended.stderr.splitlines() if line.startswith("error")]) == (
        3,
        [
            f"error: --address {cluster.address}: Ray does not start: "
            "Token authentication is enabled but no authentication token was found"
        ],
    )


EVERY = sorted(
    f"{tower} on {task}" for tower in ("base", "digits") for task in ("digits", "letters", "shapes")
)


def test_an_evaluation_is_that_of_one_process_and_a_second_run_does_nothing(cluster):
    subprocess.run([*COMMAND, "-o", "whole"], check=True)
    on_ray = [
        *COMMAND,
        "-o",
        "out",
        "--engine",
        "ray",
        "--address",
        cluster.address,
        "--gpus-per-unit",
        "0.5",
    ]
    done = subprocess.run(on_ray, check=True, stdout=subprocess.PIPE, text=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["model", "base", "digits"]
    assert (results("out"), log("out")) == (results("whole"), EVERY)
    subprocess.run([*on_ray[:-4], "--address", "127.0.0.1:1"], check=True)
    assert log("out") == EVERY


def test_two_callers_in_one_folder_and_one_that_is_stopped_before_leave_what_one_process_would(cluster):
    subprocess.run([*COMMAND, "-o", "whole"], check=True)
    on_ray = [*COMMAND, "-o", "out", "--engine", "ray", "--address", cluster.address]
    with subprocess.Popen(on_ray, stderr=subprocess.PIPE, text=True) as process:
        while not list(Path("out/.units").glob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate()
    assert process.returncode in (0, 130)
    assert "Traceback" not in text
    before = log("out")
    both = [subprocess.Popen(on_ray) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    assert results("out") == results("whole")
    assert sorted(set(log("out"))) == EVERY
    for unit in before:
        assert log("out").count(unit) == 1


def test_units_of_a_machine_that_is_killed_in_the_middle_are_done_by_others(cluster, tmp_path):
    mergecli.evaluate({"base": "toy:base"}, clip="toy:base", tasks="toy8", limit=40, output="whole")
    node = cluster.add_node(num_cpus=4)

    def kill() -> None:
        while not Path("out/units.jsonl").exists():
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    engine = Engine("ray", address=cluster.address)
    mergecli.evaluate(
        {"base": "toy:base"}, clip="toy:base", tasks="toy8", limit=40, output="out", engine=engine
    )
    killer.join()
    assert results("out") == results("whole")
    assert len(log("out")) == len(set(log("out"))) == 8


def test_a_damaged_model_fails_once_and_the_others_go_on(cluster, tmp_path):
    Path("cut.safetensors").write_bytes(b"no weights")
    command = [*COMMAND[:4], "cut.safetensors", *TOY, "-o", "out", "--keep-going"]
    done = subprocess.run(
        [*command, "--engine", "ray", "--address", cluster.address], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "error: 3 of 9 units failed:\n  cut on digits (and 2 more): cut.safetensors: " in done.stderr
    assert sorted(results("out")) == ["base.json", "digits.json"]
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["model", "base", "digits"]


def test_a_sweep_merges_where_it_evaluates(cluster):
    recipe = Path(__file__).parents[3] / "recipes" / "toy.toml"
    given: dict[str, Any] = {
        "method": "ties",
        "select": "validation",
        "tasks": ["digits", "letters"],
        "limit": 40,
    }
    over = ["method.scaling_factor=0.1,0.3"]
    swept = mergecli.sweep(recipe, over, **given, output="whole")
    engine = Engine("ray", address=cluster.address)
    assert mergecli.sweep(recipe, over, **given, output="out", engine=engine) == swept
    assert results("out") == results("whole")


def test_without_an_address_ray_starts_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert os.environ.get("RAY_ADDRESS") is None
    assert sorted(ran(Echo(tmp_path), ["a", "b"], name="ray", address="local")) == ["a", "b"]
