"""Fine-tuning as a process: several at once, Ctrl-C in the middle of a step, and what is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergecli.training.finetune import finetune
from tests.conftest import Run, assert_same
from tests.support.tiny_clip import make_image_task, make_tiny_clip

SHORT = ["--steps", "8", "--learning-rate", "1e-3", "--seed", "3"]


pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_tiny_clip(folder / "base", seed=1)
    make_image_task(folder / "tints")
    make_image_task(folder / "shades", classes=("dark", "bright"), train=20, seed=4)
    make_image_task(folder / "even", train=24, seed=7)
    text = 'schema = 1\nbase = "base"\n'
    for name in ("tints", "shades", "even"):
        text += f'[tasks.{name}]\ndata = "{name}"\ntemplates = ["something {{}}"]\n'
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "MERGECLI_HOME": str(home), "OMP_NUM_THREADS": "1"}


def torchrun(
    count: int, command: Sequence[object], home: Path, program: Sequence[str] = ("-m", "mergecli")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *program,
         *map(str, command)],
        env=environment(home), capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


PROGRAM = f"""
import json, os, signal, sys
from mergecli import interrupts
from mergecli.cli import run
from mergecli.parallel import is_first
from mergecli.training import steps
update = steps.Training._update
def counted(self, losses):
    if "stopped" in self.state.output.name and self.state.step == 4:
        os.kill(os.getpid(), {int(signal.SIGINT)})
    update(self, losses)
steps.Training._update = counted
interrupts.watch()
ended = []
for command in json.loads(sys.argv[1]):
    ended.append(int(run(command)))
    interrupts.pressed = False
    steps.Training._update = update
if is_first():
    print(ended)
"""
"""Several commands one after another, as it takes long to start; what trains `stopped` first gets a SIGINT in the middle
of its fifth step."""


def together(commands: Sequence[Sequence[object]], folder: Path) -> tuple[list[str], str]:
    """What two processes print that run the commands, line by line, and what they say."""
    (folder / "program.py").write_text(PROGRAM)
    text = json.dumps([["finetune", *map(str, each)] for each in commands])
    done = torchrun(2, [text], folder / "home", [str(folder / "program.py")])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def losses(trace: Path) -> list[list[float]]:
    """The table without its head; -1 where a cell is empty."""
    rows = trace.read_text().splitlines()[1:]
    return [[float(cell or -1) for cell in row.split(",")] for row in rows]


def share_apart(one: Path, other: Path, tolerance: float) -> float:
    """Of all weights, those that are further apart."""
    got, want = load_file(one), load_file(other)
    assert sorted(got) == sorted(want)
    apart = sum(int(((got[name] - want[name]).abs() > tolerance).sum()) for name in want)
    return apart / sum(each.numel() for each in want.values())


def test_two_processes_train_what_one_does_in_as_many_batches_and_nearly_what_it_does_in_larger_ones(
    recipe: Path, tmp_path: Path
) -> None:
    lora = ["--lora", "--rank", 4, "--lora-dropout", 0]
    one_task, two_tasks = [recipe, "--task", "even", *SHORT], [recipe, "--task", "tints", "--task", "shades"]
    short = ["--batch-size", 4]
    told, said = together(
        [
            [*one_task, *short, "--trace", tmp_path / "two.csv", "-o", tmp_path / "two.safetensors"],
            [*one_task, *short, *lora, "-o", tmp_path / "two"],
            [*two_tasks, *SHORT, *short, "--validate-every", 3, "--tensorboard", tmp_path / "events",
             "--trace", tmp_path / "both.csv", "-o", tmp_path / "both.safetensors"],
            [*two_tasks, "--steps", 5, "--learning-rate", "1e30", "-o", tmp_path / "lost"],
        ],
        tmp_path,
    )  # fmt: skip
    assert told == [
        *(str(tmp_path / name) for name in ("two.safetensors", "two", "both.safetensors")),
        "[0, 0, 0, 3]",
    ]
    lines = [line for line in said.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2, "both say the same, and it is told once"
    assert f"{tmp_path / 'lost'}: the loss of `" in lines[0]
    assert lines[1] == "hint: lower `learning_rate` (it is 1e+30); nothing was learnt yet"
    same = {"task": "even", "steps": 8, "learning_rate": 1e-3, "seed": 3}
    adapter = {"lora": True, "rank": 4, "lora_dropout": 0.0}
    finetune(
        recipe,
        output=tmp_path / "one.safetensors",
        trace=tmp_path / "one.csv",
        batch_size=4,
        accumulate=2,
        **same,
    )
    finetune(recipe, output=tmp_path / "one", batch_size=4, accumulate=2, **same, **adapter)
    for name in ("{}.safetensors", "{}/adapter_model.safetensors"):
        assert_same(*(load_file(tmp_path / name.format(count)) for count in ("two", "one")))
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    finetune(
        recipe, output=tmp_path / "large.safetensors", trace=tmp_path / "large.csv", batch_size=8, **same
    )
    # means of four and of eight round otherwise; where a gradient vanishes Adam makes a step of 1e-3 of it
    assert share_apart(tmp_path / "two.safetensors", tmp_path / "large.safetensors", 2e-6) < 0.02
    for row, other in zip(losses(tmp_path / "two.csv"), losses(tmp_path / "large.csv"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    finetune(
        recipe, output=tmp_path / "large.safetensors", trace=tmp_path / "large.csv", batch_size=8, validate_every=3,
        **{**same, "task": ["tints", "shades"]},
    )  # fmt: skip
    for row, other in zip(losses(tmp_path / "both.csv"), losses(tmp_path / "large.csv"), strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    assert len(list((tmp_path / "events").iterdir())) == 1


LATE_SIGNAL = f"""
import os, signal, sys
from mergecli.training import steps
update = steps.Training._update
def counted(self, losses):
    if self.state.step == 4:
        os.kill(os.getpid(), {int(signal.SIGINT)})
    update(self, losses)
steps.Training._update = counted
sys.argv[0] = "mergecli"
from mergecli.__main__ import main
main()
"""
"""The program, which gets a SIGINT in the middle of its fifth step."""


def test_ctrl_c_in_the_middle_of_a_step_keeps_that_step(recipe: Path, tmp_path: Path) -> None:
    more = ["--batch-size", "4", *SHORT, "--validate-every", "2", "-o", str(tmp_path / "a.safetensors")]
    stopped = subprocess.run(
        [sys.executable, "-c", LATE_SIGNAL, "finetune", str(recipe), "--task", "tints", *more],
        env=environment(tmp_path / "home"), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    kept = tmp_path / ".a.resume.safetensors"
    assert (stopped.returncode, stopped.stderr) == (
        130, f"note: interrupted: the same command goes on from {kept}\n",
    )  # fmt: skip
    state = tmp_path / ".a.resume.safetensors"
    assert len(load_file(state)["losses"]) == 5
    settings = {"batch_size": 4, "steps": 8, "learning_rate": 1e-3, "seed": 3, "validate_every": 2}
    done = [
        finetune(recipe, task="tints", output=tmp_path / f"{name}.safetensors", **settings) for name in "ab"
    ]
    assert [each.resumed_from for each in done] == [5, 0]
    assert not state.exists()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_several_processes_go_on_where_they_were_stopped_with_dropout(recipe: Path, tmp_path: Path) -> None:
    command = [
        recipe,
        "--task",
        "tints",
        "--batch-size",
        4,
        *SHORT,
        "--lora",
        "--rank",
        4,
        "--validate-every",
        3,
    ]
    told, said = together(
        [
            [*command, "-o", tmp_path / "stopped"],
            [*command, "--seed", 4, "-o", tmp_path / "stopped"],
            [*command, "-o", tmp_path / "stopped"],
            [*command, "-o", tmp_path / "never"],
        ],
        tmp_path,
    )
    state = tmp_path / ".stopped.resume.safetensors"
    assert told == [str(tmp_path / "stopped"), str(tmp_path / "never"), "[130, 2, 0, 0]"]
    assert said.count(f"note: interrupted: the same command goes on from {state}\n") == 1
    assert (
        said.count(
            f"error: {state}: holds the state of a training that was begun otherwise:\n  `seed`: 3 -> 4\n"
        )
        == 1
    )
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("stopped", "never")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_all_processes_refuse_is_told_once(recipe: Path, tmp_path: Path) -> None:
    command = ["finetune", recipe, "--task", "tints", "--rank", 4, "-o", tmp_path / "a"]
    ended = torchrun(2, command, tmp_path / "home")
    assert ended.returncode != 0
    assert ended.stderr.count("`rank`: only low-rank adapters have it") == 1


ERRORS = [
    (["--rank", "4"], 2, "`rank`: only low-rank adapters have it"),
    (["--lora", "-o", "a.safetensors"], 2, "an adapter is a folder"),
    pytest.param(["--learning-rate", "1e30"], 3, "loss of `tints` is nan at step", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("more", "status", "message"), ERRORS)
def test_what_cannot_be_trained_is_told_in_one_message(
    recipe: Path, run: Run, tmp_path: Path, more: list[str], status: int, message: str
) -> None:
    ended = run("finetune", recipe, "--task", "tints", "--steps", 5, "-o", "a", *more)
    assert (ended.status, ended.out) == (status, ""), ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("a*"))
