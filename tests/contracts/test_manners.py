"""How every command behaves: exit status, data on stdout, messages on stderr; quiet, in a pipe, without colors, narrow.

Each command runs once as a process in a pipe and once on a terminal that is 40 columns wide; the rest in this process.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from mergecli.cli import COMMANDS
from tests.conftest import END, Run, make_world
from tests.faults.test_pipes import on_a_terminal

RESULT = ("eval", "toy:base", "--clip", "toy:base", "--task", "digits", "--limit", "2", "-o", "r.json")
GOOD: dict[str, tuple[str, ...]] = {
    "fetch": ("fetch", "toy:base"),
    "taskvector": ("taskvector", "r.toml", "-o", "vectors"),
    "merge": ("merge", "r.toml", "--method", "average", "-o", "m.safetensors"),
    "eval": RESULT,
    "measure": ("measure", "toys.toml", "--method", "fisher", "--set", "method.examples=2", "--task", "digits", "-o", "s"),
    "continual": ("continual", "toys.toml", "--method", "average", "--limit", "2", "-o", "chain"),
    "cos-sim": ("cos-sim", "r.toml"),
    "report": ("report", "result.json"),
    "finetune": (
        "finetune", "--base", "toy:base", "--task", "digits", "--steps", "1", "--batch-size", "2", "-o", "f.safetensors",
    ),
    "extract": ("extract", "toy:digits", "--base", "toy:base", "--rank", "1", "-o", "adapter"),
    "export": ("export", "toy:digits", "--clip", "toy:base", "-o", "digits.pt"),
    "info": ("info", "t1.safetensors"),
    "cache": ("cache",),
    "methods": ("methods", "ties"),
    "tasks": ("tasks", "toy8"),
}  # fmt: skip
"""A command of each kind that does its work."""
if find_spec("optuna"):
    GOOD["search"] = (
        "search", "toys.toml", "--method", "task_arithmetic", "--space", "method.scaling_factor=0.1:0.3", "--trials", "1",
        "--limit", "2", "-o", "found",
    )  # fmt: skip
LONG = ("eval", "search", "continual", "measure", "finetune", "cos-sim", "extract", "export", "taskvector")
"""Those that load libraries for seconds, which `merge` stands for in the daily tests of whole processes."""
PROCESSES = [pytest.param(each, marks=[pytest.mark.slow] * (each in LONG)) for each in GOOD]
BAD: dict[str, tuple[int, tuple[str, ...]]] = {
    "fetch": (3, ("fetch", "toy:bas")),
    "taskvector": (3, ("taskvector", "none.toml", "-o", "vectors")),
    "merge": (2, ("merge", "r.toml", "--method", "tise", "-o", "m.safetensors")),
    "eval": (2, ("eval", "toy:base", "--clip", "toy:base", "--task", "digts")),
    "measure": (2, ("measure", "r.toml", "--method", "ties", "-o", "s")),
    "search": (
        2,
        ("search", "r.toml", "--method", "ties", "--space", "method.densty=0.1:0.2", "-o", "found"),
    ),
    "continual": (2, ("continual", "r.toml", "--method", "tsv_m", "-o", "chain")),
    "cos-sim": (3, ("cos-sim", "none.safetensors")),
    "report": (3, ("report", "none.json")),
    "finetune": (2, ("finetune", "--task", "digits", "-o", "f.safetensors")),
    "extract": (2, ("extract", "toy:digits", "-o", "adapter")),
    "export": (3, ("export", "toy:digits", "-o", "digits.pt")),
    "info": (3, ("info", "none.safetensors")),
    "cache": (2, ("cache", "pixel")),
    "methods": (2, ("methods", "tise")),
    "tasks": (2, ("tasks", "mnits")),
    "push": (3, ("push", "none", "hf:org/name", "--dry-run")),
    "doctor": (2, ("doctor", "--nosuch")),
}
"""A command of each kind that is refused, and its exit status."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, recipes and a result."""
    folder = tmp_path_factory.mktemp("manners")
    make_world(folder)
    (folder / "r.toml").write_text(
        'base = "base.safetensors"\n[tuned]\nt1 = "t1.safetensors"\nt2 = "t2.safetensors"\n'
    )
    (folder / "toys.toml").write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\n')
    return folder


@pytest.fixture
def place(files: Path, tmp_path: Path, run: Run) -> Path:
    """The files in the test's own folder, and a result that was evaluated once."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    result = files / "result.json"
    if not result.exists():
        assert run(*RESULT).status == 0
        shutil.copy(tmp_path / "r.json", result)
        (tmp_path / "r.json").unlink()
    shutil.copy(result, tmp_path / "result.json")
    return tmp_path


def is_quiet(text: str) -> bool:
    """Whether there are warnings and errors only, with what belongs to them."""
    return all(line.startswith(("warning: ", "error: ", "hint: ", "  ")) for line in text.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_tried(command: str) -> None:
    assert command in BAD
    assert command in GOOD or command in ("push", "doctor", *([] if find_spec("optuna") else ["search"]))


@pytest.mark.parametrize("command", GOOD)
def test_quiet_says_nothing_and_changes_no_data(place: Path, run: Run, command: str) -> None:
    loud, quiet = run(*GOOD[command]), run("--quiet", *GOOD[command])
    assert (loud.status, quiet.status) == (0, 0)
    assert quiet.end == ""
    assert is_quiet(quiet.err)
    assert quiet.out == loud.out != ""
    assert "\x1b" not in loud.out + loud.err + loud.end
    assert loud.end != ""


@pytest.mark.parametrize("command", BAD)
@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_refused_has_its_status_one_message_and_no_data(
    place: Path, run: Run, command: str, quiet: bool
) -> None:
    if command not in COMMANDS:
        pytest.skip("there is no such command")
    status, arguments = BAD[command]
    ended = run(*arguments, *(["-q"] if quiet else []))
    assert (ended.status, ended.out, ended.end) == (status, "", "")
    assert ended.err.startswith("error: ")
    assert is_quiet(ended.err)


@pytest.mark.parametrize("command", PROCESSES)
def test_in_a_pipe_there_is_data_on_stdout_and_a_line_at_the_end_of_stderr(
    place: Path, process: Run, command: str
) -> None:
    ended = process(*GOOD[command], COLUMNS=40)
    assert ended.status == 0
    assert "\x1b" not in ended.out + ended.err + ended.end
    assert "\r" not in ended.err
    assert not any(line.startswith(("note:", "warning:", "error:")) for line in ended.out.splitlines())
    assert all(line.startswith(("note: ", "warning: ")) for line in ended.err.splitlines()), ended.err
    assert END.fullmatch(ended.end + "\n")


@pytest.mark.parametrize("command", PROCESSES)
def test_a_narrow_terminal_without_colors_gets_none_and_ends_with_the_same_line(
    place: Path, command: str
) -> None:
    shown = on_a_terminal(list(GOOD[command]), place, COLUMNS="40", NO_COLOR="1", TERM="dumb")
    assert "\x1b" not in shown
    assert END.search(shown.replace("\r\n", "\n"))
