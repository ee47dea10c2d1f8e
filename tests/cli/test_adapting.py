"""Merges that learn, as processes: messages and statuses, Ctrl-C, and several processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Run
from tests.support.adapted_world import AdaptedWorld, make_adapted_world

SHORT = ["--set", "method.batch_size=3", "--set", "method.learning_rate=0.01"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("adapting"))


def arguments(world: AdaptedWorld, folder: Path, method: str, *more: str) -> list[str]:
    return [
        "merge", str(world.recipe), "--method", method, *SHORT, "-o", str(folder / "merged.safetensors"),
        "--save-coefficients", str(folder / "learnt.safetensors"), *more,
    ]  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "MERGECLI_HOME": str(home), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_keeps_what_was_learnt_and_the_same_command_goes_on(
    world: AdaptedWorld, run: Run, tmp_path: Path
) -> None:
    more = ["--set", "method.steps=20", "--set", "method.mask_steps=30"]
    command = arguments(world, tmp_path, "concrete_ada_merging", *more)
    home = tmp_path / "home"
    stopped = subprocess.run(
        [sys.executable, "-c", LATE_SIGNAL, *command],
        env=environment(home), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (stopped.returncode, stopped.stderr) == (130, "")
    (partial,) = home.rglob("*.partial.safetensors")
    assert 5 <= len(load_file(partial)["trace.entropies"]) < 50
    assert not (tmp_path / "merged.safetensors").exists()
    resumed = run(*command, MERGECLI_HOME=str(home), OMP_NUM_THREADS="1")
    assert resumed.status == 0, resumed.err
    assert not list(home.rglob("*.partial.safetensors"))
    first = (tmp_path / "learnt.safetensors").read_bytes()
    again = run(*command, MERGECLI_HOME=str(tmp_path / "other home"), OMP_NUM_THREADS="1")
    assert again.status == 0, again.err
    assert (tmp_path / "learnt.safetensors").read_bytes() == first


LATE_SIGNAL = f"""
import os, signal, sys, threading, time
from mergecli.clip import adaptation_run
add = adaptation_run.Run.add
def counted(self, *given):
    add(self, *given)
    if self.step == 5:
        threading.Timer(0.01, os.kill, (os.getpid(), {int(signal.SIGINT)})).start()
adaptation_run.Run.add = counted
sys.argv[0] = "mergecli"
from mergecli.__main__ import main
main()
"""
"""The program, which gets a SIGINT somewhere in the middle of a step after the fifth."""


def torchrun(count: int, command: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "mergecli",
         *command],
        env=environment(home), capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


def test_two_processes_learn_what_one_does(world: AdaptedWorld, run: Run, tmp_path: Path) -> None:
    method, more = "concrete_ada_merging", ["--set", "method.steps=2", "--set", "method.mask_steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    ended = run(*arguments(world, one, method, *more), MERGECLI_HOME=str(one / "home"), OMP_NUM_THREADS="1")
    assert ended.status == 0, ended.err
    done = torchrun(2, arguments(world, two, method, *more), two / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{two / 'merged.safetensors'}\n"
    got, want = load_file(two / "learnt.safetensors"), load_file(one / "learnt.safetensors")
    assert (got["trace.entropies"] - want["trace.entropies"]).abs().max() < 1e-5
    matter = [place for place, name in enumerate(world.base) if not name.endswith("k_proj.bias")]
    # sums of the tasks' gradients round otherwise; keys' biases have none but rounding
    assert (got["coefficients"] - want["coefficients"])[:, matter].abs().max() < 1e-3 * 0.01


def test_more_processes_than_tasks_and_an_interrupted_state_are_no_trouble(
    world: AdaptedWorld, run: Run, tmp_path: Path
) -> None:
    command = arguments(world, tmp_path, "ada_merging", "--set", "method.steps=8")
    home = tmp_path / "home"
    stopped = subprocess.run(
        [sys.executable, "-c", LATE_SIGNAL.replace("0.01", "0"), *command],
        env=environment(home), check=False, capture_output=True,
    )  # fmt: skip
    assert stopped.returncode == 130, stopped.stderr
    done = torchrun(4, command, home)
    assert done.returncode == 0, done.stderr
    assert len(load_file(tmp_path / "learnt.safetensors")["trace.entropies"]) == 8


ERRORS = [
    (["--method", "ada_merging", "--set", 'method.adapt_on=["four"]'], 2, "`method.adapt_on`: there are no models `four`"),
    (["--method", "ada_merging", "--set", "method.split=dev"], 2, "`method.split`"),
    (["--method", "ada_merging", "--coefficients", "nowhere.safetensors"], 3, "nowhere.safetensors: no such file"),
    (["--method", "ada_merging", "--set", "tasks.two.data=gone"], 3, "gone"),
    (["--method", "ties", "--save-coefficients", "c.safetensors"], 2, "method `ties` learns no coefficients"),
    (["--method", "ties", "--trace", "t.csv"], 2, "--trace: method `ties` learns no coefficients"),
    (["--method", "ada_merging", "--set", "method.start=1e30", "--set", "method.steps=3"], 3, "the entropy is nan in step 1"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "status", "message"), ERRORS)
def test_what_cannot_be_learnt_is_told_in_one_message(
    world: AdaptedWorld, run: Run, tmp_path: Path, more: list[str], status: int, message: str
) -> None:
    ended = run("merge", world.recipe, *more, "-o", "m.safetensors", MERGECLI_HOME=str(tmp_path / "home"))
    assert (ended.status, ended.out) == (status, ""), ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "m.safetensors").exists()
