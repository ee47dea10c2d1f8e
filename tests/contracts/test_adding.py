"""What is added to the package is found there: a method, a task and a command, each with the files that the guide names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergecli
from tests.conftest import Ended
from tests.support.tiny_clip import make_image_folder, make_tiny_clip

METHOD = '''"""The point half-way from the base to the mean of the fine-tuned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergecli.methods._base import Group, PerTensor, total

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HalfWay(PerTensor):
    """theta = (theta_0 + (1 / T) sum_i theta_i) / 2"""

    title: ClassVar[str] = "the mean of the base and the average"
    paper: ClassVar[str] = "none, arXiv 0000.00000"

    def merge(self, group: Group, /) -> Tensor:
        return (group.base + total(group.tuned).div_(group.tasks)).div_(2)
'''
TASK = """description = "Tinted noise"
data = "{data}"
split = "test"
train_split = "train"
templates = ["something {{}}"]
classes = ["red", "green", "blue"]
"""
FUNCTION = '''"""`count`: how many tensors a checkpoint has."""

from __future__ import annotations

from pathlib import Path

from mergecli.storage.checkpoint import open_checkpoint


def count(checkpoint: str | Path) -> int:
    """The number of tensors in the file."""
    with open_checkpoint(Path(checkpoint)) as stored:
        return len(stored.entries)
'''
COMMAND = '''"""`mergecli count`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergecli.cli import console


def count(checkpoint: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint.")]) -> None:
    """Count the tensors of a checkpoint."""
    from mergecli.storage.count import count

    console.line(str(count(checkpoint)))
'''
COMMANDS = {
    "method": ["methods", "half_way"],
    "merge": ["merge", "--base", "base.safetensors", "a.safetensors", "b.safetensors", "--method", "half_way", "-o", "m.safetensors"],
    "task": ["tasks", "tints"],
    "eval": ["eval", "clip", "--clip", "clip", "--task", "tints", "-o", "r.json"],
    "help": ["--help"],
    "count": ["count", "base.safetensors"],
}  # fmt: skip
PROGRAM = """
import contextlib, io, json, sys
import mergecli
from mergecli.cli import run
ended = {"package": [0, mergecli.__file__, ""]}
for name, command in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run(command)
    ended[name] = [int(status), out.getvalue(), err.getvalue()]
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    """A folder with a copy of the package to which all three were added, and how commands of the copy ended."""
    folder = tmp_path_factory.mktemp("added")
    package = folder / "mergecli"
    shutil.copytree(
        Path(mergecli.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    (package / "methods" / "half_way.py").write_text(METHOD)
    (package / "data" / "prompts" / "tints.toml").write_text(TASK.format(data=folder / "images"))
    (package / "storage" / "count.py").write_text(FUNCTION)
    (package / "cli" / "count.py").write_text(COMMAND)
    table = package / "cli" / "commands.py"
    table.write_text(
        table.read_text().replace("COMMANDS = {\n", 'COMMANDS = {\n    "count": "mergecli.cli.count",\n')
    )
    for split in ("train", "test"):
        make_image_folder(folder / "images" / split)
    make_tiny_clip(folder / "clip")
    for number, name in enumerate(("base", "a", "b")):
        weights = {"w": torch.tensor([number, 2.0 * number]), "v": torch.ones(1)}
        save_file(weights, folder / f"{name}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    ended = {name: Ended.of(*each) for name, each in json.loads(done.stdout).items()}
    assert ended["package"].out == str(package / "__init__.py")
    return folder, ended


def test_a_method_is_one_file(added: tuple[Path, dict[str, Ended]]) -> None:
    folder, ended = added
    assert (ended["method"].status, ended["method"].err) == (0, "")
    assert "theta = (theta_0 + (1 / T) sum_i theta_i) / 2" in ended["method"].out
    assert (ended["merge"].status, ended["merge"].out, ended["merge"].err) == (0, "m.safetensors\n", "")
    assert load_file(folder / "m.safetensors")["w"].tolist() == [0.75, 1.5]


def test_a_task_is_one_file(added: tuple[Path, dict[str, Ended]]) -> None:
    folder, ended = added
    assert ended["task"].out.startswith("tints: Tinted noise\n")
    assert (ended["eval"].status, ended["eval"].rest) == (0, "")
    assert json.loads((folder / "r.json").read_text())["tasks"]["tints"]["images"] == 6


def test_a_command_is_a_function_a_file_that_parses_and_a_line_in_the_table(
    added: tuple[Path, dict[str, Ended]],
) -> None:
    _, ended = added
    assert "  count       Count the tensors of a checkpoint\n" in ended["help"].out
    assert ended["count"] == Ended(0, "2\n", "")
