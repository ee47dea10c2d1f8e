"""What a command may import before it does its work, checked in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mergecli.cli import COMMANDS

HEAVY = {
    "torch", "transformers", "datasets", "rich", "numpy", "pydantic", "PIL", "pyarrow", "matplotlib", "click",
    "huggingface_hub", "modelscope_hub", "requests", "filelock",
}  # fmt: skip
PROGRAM = f"""
import contextlib, io, json, sys
from mergecli.cli import run
seen = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = run(command)
    seen.append([status, sorted({{name.split(".")[0] for name in sys.modules}} & {HEAVY})])
print(json.dumps(seen))
"""
"""Runs commands one after another; after each its status, and what of the heavy libraries has been imported."""


def ended(commands: list[list[str]], folder: Path) -> list[tuple[int, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        capture_output=True, text=True, cwd=folder, check=True,
        env=dict(os.environ),  # readline, which pytest imports, sets COLUMNS where Python does not see it
    )  # fmt: skip
    return [(status, heavy) for status, heavy in json.loads(done.stdout)]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    commands = [["--help"], *([name, "--help"] for name in COMMANDS)]
    assert ended(commands, tmp_path) == [(0, [])] * len(commands)


WRONG = [
    (["mrege"], 2),
    (["merge", "--no-such-option"], 2),
    (["merge", "a.safetensors", "--method", "tise", "-o", "x.safetensors"], 2),
    (["merge", "wrong.toml", "-o", "x.safetensors"], 2),
    (["merge", "missing.toml", "-o", "x.safetensors"], 3),
    (["merge", "missing.safetensors", "--method", "average", "-o", "x.safetensors"], 3),
    (["merge", "a.safetensors", "--method", "average", "-o", "x.bin"], 2),
    (["taskvector", "a.safetensors", "-o", "x.safetensors"], 2),
    (["eval", "a.safetensors", "-o", "x.json"], 2),
    (["eval", "a.safetensors", "--clip", "b", "--task", "mnits"], 2),
    (["eval", "a.safetensors", "--min-average", "70"], 2),
    (["cos-sim", "missing.safetensors"], 3),
    (["report", "missing.json"], 3),
    (["report", "x.json", "--format", "xls"], 2),
    (["finetune", "--task", "digits", "-o", "x"], 2),
    (["info", "missing.safetensors"], 3),
    (["methods", "tise"], 2),
    (["tasks", "mnits"], 2),
    (["fetch", "toy:bas"], 3),
]


def test_a_wrong_command_is_answered_without_importing_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text('[method]\nname = "ties"\ndensity = 2\n')
    found = ended([command for command, _ in WRONG], tmp_path)
    assert [(command, *each) for (command, _), each in zip(WRONG, found, strict=True)] == [
        (command, status, []) for command, status in WRONG
    ]


def test_lists_import_nothing_heavy(tmp_path: Path) -> None:
    commands = [["methods"], ["methods", "ties"], ["tasks"], ["tasks", "mnist"], ["--version"]]
    assert ended(commands, tmp_path) == [(0, [])] * len(commands)


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import mergecli, sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {module.split(".")[0] for module in out.split()} & HEAVY == set()


UNUSED = {"transformers", "datasets", "pyarrow", "tokenizers", "peft", "huggingface_hub", "sympy"}


def test_an_evaluation_of_what_is_kept_imports_torch_and_little_else(tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text('base = "toy:base"\ntuned = { digits = "toy:digits" }\n')
    command = ["eval", "toy:digits", "--recipe", "toy.toml", "--limit", "8"]
    program = (
        "import sys; from mergecli.cli import run; status = run(sys.argv[1:]);"
        f"print(status, sorted({{name.split('.')[0] for name in sys.modules}} & {UNUSED}),"
        " 'torch._dynamo' in sys.modules, 'PIL.Image' in sys.modules)"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--fresh"],
            capture_output=True, text=True, cwd=tmp_path, check=True,
            env={**os.environ, "MERGECLI_HOME": str(tmp_path / "home")},
        )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 [] False False"
