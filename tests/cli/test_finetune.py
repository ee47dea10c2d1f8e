"""Fine-tuning as a process: several at once, Ctrl-C in the middle of a step, and what is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergecli.finetuning import finetune
from tests.conftest import Run
from tests.tiny import make_image_task, make_tiny_clip

SHORT = ["--steps", "8", "--learning-rate", "1e-3", "--seed", "3"]


pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_tiny_clip(folder / "base", seed=1)
    make_image_task(folder / "tints")
    make_image_task(folder / "shades", classes=("dark", "bright"), train=20, seed=4)
    text = 'schema = 1\nbase = "base"\n'
    for name in ("tints", "shades"):
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


def difference(one: Path, other: Path) -> float:
    got, want = load_file(one), load_file(other)
    assert sorted(got) == sorted(want)
    # keys' biases have no gradient but rounding, which Adam blows up
    return max(
        float((got[name] - want[name]).abs().max()) for name in want if not name.endswith("k_proj.bias")
    )


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ([], "t.safetensors"),
        pytest.param(
            ["--lora", "--rank", "4", "--lora-dropout", "0"],
            "t/adapter_model.safetensors",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tower", "adapter"],
)
def test_two_processes_train_what_one_does_with_twice_the_batch(
    recipe: Path, tmp_path: Path, kind: list[str], file: str
) -> None:
    command = [
        "finetune",
        recipe,
        "--task",
        "tints",
        "--task",
        "shades",
        *SHORT,
        *kind,
        "--validate-every",
        "3",
    ]
    target = file.partition("/")[0]
    one, two = tmp_path / "one", tmp_path / "two"
    adapter = {"lora": True, "rank": 4, "lora_dropout": 0.0} if kind else {}
    finetune(
        recipe, task=["tints", "shades"], steps=8, learning_rate=1e-3, seed=3, validate_every=3, batch_size=8,
        output=one / target, trace=one / "t.csv", **adapter,
    )  # fmt: skip
    more = ["--batch-size", 4, "-o", two / target, "--trace", two / "t.csv", "--tensorboard", two / "tb"]
    done = torchrun(2, [*command, *more], tmp_path / "other home")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{two / target}\n"
    # two means of four, and one of eight, round otherwise; Adam's steps are 1e-3
    assert difference(two / file, one / file) <= 2e-6
    rows, others = ((each / "t.csv").read_text().splitlines() for each in (two, one))
    for row, other in zip(rows[1:], others[1:], strict=True):
        pairs = zip(row.split(","), other.split(","), strict=True)
        assert all(
            got == want == "" or float(got) == pytest.approx(float(want), rel=1e-3) for got, want in pairs
        )
    assert len(list((two / "tb").iterdir())) == 1
    assert sorted(each.name for each in two.iterdir()) == sorted([target, "t.csv", "tb"])


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


@pytest.mark.slow
def test_several_processes_go_on_where_they_were_stopped_with_dropout(recipe: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LATE_SIGNAL)
    command = [
        "finetune",
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
    stopped = torchrun(2, [*command, "-o", tmp_path / "a"], tmp_path / "home", [str(program)])
    assert stopped.returncode != 0
    assert len(load_file(tmp_path / ".a.resume.safetensors")["losses"]) == 5
    for name in "ab":
        done = torchrun(2, [*command, "-o", tmp_path / name], tmp_path / "home")
        assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


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
