"""The scripts in `recipes/slurm`, and Slurm itself on this machine where its programs are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

import mergecli

SCRIPTS = Path(__file__).parents[2] / "recipes" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
KillWait=5
SchedulerParameters=sched_interval=1
FirstJobId={job}
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def program(folder: Path, name: str, *lines: str) -> None:
    """A program in a folder that PATH begins with."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(("#!/bin/bash", *lines)) + "\n")
    (folder / name).chmod(0o755)


def own(folder: Path) -> dict[str, str]:
    """The variables with which `mergecli` and `python` are those of this test."""
    program(folder / "bin", "mergecli", f'exec {sys.executable} -m mergecli "$@"')
    program(folder / "bin", "python", f'exec {sys.executable} "$@"')
    path = (str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])
    return {**os.environ, "PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def test_a_task_of_an_array_does_the_part_of_its_number(tmp_path: Path) -> None:
    given = own(tmp_path) | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    program(tmp_path / "bin", "srun", 'exec "$@"')
    program(tmp_path / "bin", "mergecli", 'printf "%s\\n" "$@"; exit 3')
    done = subprocess.run(
        ["bash", SCRIPTS / "parts.sbatch", "eval", "--recipe", "a b.toml"], env=given, capture_output=True, text=True
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["eval", "--recipe", "a b.toml", "--part", "3/16"]


@pytest.mark.parametrize("name", ["parts.sbatch", "ray.sbatch"])
def test_a_script_is_one_that_bash_reads(name: str) -> None:
    done = subprocess.run(["bash", "-n", SCRIPTS / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of a Slurm cluster of this machine alone, on ports of its own."""
    where = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in DAEMONS}
    if missing := [name for name, path in where.items() if path is None]:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    job = 1000 + os.getpid() % 10000  # of which the port of Ray is made
    text = CONF.format(host=host, ports=ports, user=user, folder=folder, job=job)
    (folder / "slurm.conf").write_text(text)
    given = own(folder) | {"SLURM_CONF": str(folder / "slurm.conf")}
    commands = {
        "munged": ["--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/key",
                   f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/seed"],
        "slurmctld": ["-D", "-i"],
        "slurmd": ["-D", "-N", host],
    }  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, arguments in commands.items():
            with (folder / f"{name}.out").open("wb") as out:
                running.append(
                    subprocess.Popen(
                        [str(where[name]), *arguments], env=given, stdout=out, stderr=subprocess.STDOUT
                    )
                )
            time.sleep(1)
        asked = None
        for _ in range(60):
            asked = subprocess.run(["sinfo", "-h", "-o", "%T"], env=given, capture_output=True, text=True)
            if asked.stdout.strip() == "idle":
                break
            if any(each.poll() is not None for each in running):
                break
            time.sleep(1)
        else:
            pytest.skip(f"Slurm does not start here: {asked}")
        if any(each.poll() is not None for each in running):
            said = "\n".join((folder / f"{name}.out").read_text()[-300:] for name in commands)
            pytest.skip(f"Slurm does not start here: {said}")
        yield given
    finally:
        with suppress(subprocess.TimeoutExpired):  # jobs outlive the daemons
            while running and all(each.poll() is None for each in running):
                subprocess.run(["scancel", f"--user={user}"], env=given, capture_output=True, timeout=20)
                left = subprocess.run(["squeue", "-h"], env=given, capture_output=True, text=True, timeout=20)
                if not left.stdout:
                    break
                time.sleep(1)
        for each in reversed(running):
            each.terminate()
            each.wait(30)


def submitted(given: dict[str, str], folder: Path, *arguments: object) -> str:
    """What a job has printed when all its tasks have ended."""
    log = folder / "log-%a.txt"
    command = [
        "sbatch",
        "--wait",
        "--gpus=0",
        "--mem=0",
        "--cpus-per-task=1",
        f"--output={log}",
        *map(str, arguments),
    ]
    done = subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, timeout=300)
    printed = "".join(file.read_text() for file in sorted(folder.glob("log-*.txt")))
    assert done.returncode == 0, printed + done.stderr
    return printed


@pytest.mark.slow
def test_an_array_shares_an_evaluation_and_what_it_collects_is_that_of_one_process(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    recipe = tmp_path / "toy.toml"
    recipe.write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nletters = "toy:letters"\n')
    mergecli.evaluate(recipe=recipe, limit=16, output=tmp_path / "whole")
    evaluate = ("eval", "--recipe", recipe, "--limit", 16, "-o", tmp_path / "out")
    submitted(slurm, tmp_path, "--array=1-3", SCRIPTS / "parts.sbatch", *evaluate)
    units = (tmp_path / "out" / "units.jsonl").read_text().splitlines()
    assert len(units) == 6
    assert not list((tmp_path / "out").glob("*.json"))
    subprocess.run(["mergecli", *map(str, evaluate), "--collect"], env=slurm, check=True, capture_output=True)
    whole, out = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.json")}
        for name in ("whole", "out")
    )
    assert len(whole) == 3
    assert out == whole
    submitted(slurm, tmp_path, "--array=1-3", SCRIPTS / "parts.sbatch", *evaluate)
    assert (tmp_path / "out" / "units.jsonl").read_text().splitlines() == units


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="needs Ray")
def test_a_job_starts_ray_on_its_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    evaluate = ("eval", "toy:base", "--clip", "toy:base", "--task", "digits", "--limit", 16)
    mergecli.evaluate("toy:base", clip="toy:base", tasks="digits", limit=16, output=tmp_path / "whole.json")
    submitted(
        slurm, tmp_path, "--nodes=1", "--gpus-per-node=0", "--exclusive", SCRIPTS / "ray.sbatch",
        *evaluate, "-o", tmp_path / "out.json",
    )  # fmt: skip
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
