"""`mergecli measure` as real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.looking import make_zoo

FEW = ("--set", "method.examples=8", "--set", "method.batch_size=4")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_zoo(tmp_path)
    return tmp_path / "zoo.toml"


def test_tasks_measured_by_two_processes_at_once_give_the_files_of_one(recipe: Path, run: Run) -> None:
    command = [sys.executable, "-m", "mergecli", "measure", recipe, "--method", "reg_mean", *FEW, "-o", "two"]
    several = [
        subprocess.Popen([*command, "--only", tasks], cwd=recipe.parent, stdout=subprocess.PIPE, text=True)
        for tasks in ("a,c", "b")
    ]
    outs = [process.communicate()[0] for process in several]
    assert outs == ["two/a.safetensors\ntwo/c.safetensors\n", "two/b.safetensors\n"]
    ended = run("measure", "zoo.toml", "--method", "reg_mean", *FEW, "-o", "one")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == "one/a.safetensors\none/b.safetensors\none/c.safetensors\n"
    for name in "abc":
        one, two = (recipe.parent / folder / f"{name}.safetensors" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    ended = run(
        "merge", "zoo.toml", "--method", "reg_mean", *FEW, "--statistics", "two", "-o", "m.safetensors"
    )
    assert (ended.status, ended.out, ended.err) == (0, "m.safetensors\n", "")
    assert not (recipe.parent / "home" / "statistics").exists()


def test_a_method_that_measures_nothing_is_a_usage_error(recipe: Path, run: Run) -> None:
    ended = run("measure", "zoo.toml", "--method", "ties", "-o", "s")
    assert (ended.status, ended.out) == (2, "")
    assert "error: `ties` measures nothing" in ended.err
    ended = run("merge", "zoo.toml", "--method", "ties", "--statistics", "s", "-o", "m.safetensors")
    assert (ended.status, ended.out) == (2, "")
    assert "`ties` measures nothing" in ended.err


def torchrun(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mergecli",
         *command],
        cwd=folder, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


def test_processes_of_torchrun_share_the_tasks_and_one_of_them_talks(recipe: Path, run: Run) -> None:
    command = ("measure", "zoo.toml", "--method", "fisher", *FEW)
    done = torchrun(recipe.parent, *command, "-o", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "two/a.safetensors\ntwo/b.safetensors\ntwo/c.safetensors\n"
    assert run(*command, "-o", "one").status == 0
    for name in "abc":
        one, two = (recipe.parent / folder / f"{name}.safetensors" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


WHO_WRITES = """
import os, sys
from mergecli.merging.learning import probe
write = probe.StatisticsRun.write
def told(self, path, subjects, *more):
    print("wrote", os.environ["RANK"], *(each.name for each in subjects), file=sys.stderr, flush=True)
    write(self, path, subjects, *more)
probe.StatisticsRun.write = told
sys.argv[0] = "mergecli"
from mergecli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("method", "wrote"),
    [("fisher", ["wrote 0 a", "wrote 0 c", "wrote 1 b"]), ("reg_mean_plus_plus", ["wrote 0 a b c"])],
)
def test_a_merge_waits_for_what_the_processes_measure(
    recipe: Path, run: Run, method: str, wrote: list[str]
) -> None:
    (recipe.parent / "told.py").write_text(WHO_WRITES)
    command = ["merge", "zoo.toml", "--method", method, *FEW]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "told.py", *command,
         "-o", "two.safetensors"],
        cwd=recipe.parent, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "two.safetensors\n"
    assert sorted(line for line in done.stderr.splitlines() if line.startswith("wrote")) == wrote
    assert run(*command, "-o", "one.safetensors").status == 0
    one, two = (recipe.parent / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_only_takes_names_and_no_empty_ones(recipe: Path, run: Run) -> None:
    command = ("measure", "zoo.toml", "--method", "reg_mean", *FEW, "-o", "s", "--only")
    ended = run(*command, "b,,")
    assert (ended.status, ended.out) == (0, "s/b.safetensors\n"), ended.err
    ended = run(*command, " ,")
    assert (ended.status, ended.out) == (2, "")
    assert "--only: expected names with commas between them, got ` ,`" in ended.err
