"""Names that would speak to a terminal, a spreadsheet or a browser are text, whatever prints them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mergecli.cli import console
from mergecli.results.result import Evaluation, TaskScore
from tests.conftest import Run, World, random_weights
from tests.faults.test_pipes import on_a_terminal

EVIL = "a\x1b]0;owned\x07\x9b31m\r\u202e"
SHOWN = r"a\x1b]0;owned\x07\x9b31m\r\u202e"


def scored(name: str) -> Evaluation:
    score = TaskScore(0.5, 1.0, 1.0, 5, 10, "test", {"source": "x", "fingerprint": "y"}, "c", "t")
    about = {"name": name, "path": name, "digest": "d", "kind": "checkpoint", "method": name}
    return Evaluation(about, {"path": "p", "digest": "d"}, 7, {"mnist": score}, 128, "float32")


def results(folder: Path, *names: str) -> list[str]:
    """Files of results of models with these names."""
    for number, name in enumerate(names):
        (folder / f"{number}.json").write_text(scored(name).to_json())
    return [f"{number}.json" for number in range(len(names))]


def controls(text: str) -> list[str]:
    return [each for each in text if not each.isprintable() and each not in "\n\t"]


@pytest.mark.parametrize("form", ["tsv", "csv", "json", "md", "latex", "html"])
def test_a_report_of_a_hostile_name_has_no_control_character(tmp_path: Path, run: Run, form: str) -> None:
    ended = run("report", *results(tmp_path, EVIL), "--format", form)
    assert (ended.status, controls(ended.out + ended.err)) == (0, [])


def test_a_name_with_markup_is_whole_on_a_terminal(tmp_path: Path) -> None:
    names = ["ties[b]", "a[/b]", "[red]x[/red]", ":smile:", "[link=file:///etc]y[/link]", EVIL]
    out = on_a_terminal(["report", *results(tmp_path, *names)], tmp_path, TERM="dumb", COLUMNS="200")
    rows = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert [name for name in [*names[:-1], SHOWN] if name not in rows] == []
    assert controls(out.replace("\r\n", "\n")) == []


def test_progress_on_a_terminal_shows_names_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as progress:
        assert progress is not None
        progress("a[/b] \x07: merging", 1, 2)
    assert "\x07" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["info", f"{EVIL}.safetensors"], ["report", EVIL], ["methods", EVIL], ["tasks", EVIL], ["fetch", f"hf:{EVIL}"],
        [f"--{EVIL}"], ["cos-sim", EVIL, EVIL], ["merge", EVIL, "--method", EVIL, "-o", EVIL], ["cache", EVIL],
        ["merge", f"{EVIL}.toml", "-o", "x.safetensors"], ["eval", EVIL, "--task", EVIL, "--clip", EVIL],
    ],
)  # fmt: skip
def test_a_message_quotes_a_hostile_name_as_escapes(run: Run, command: list[str]) -> None:
    ended = run(*command)
    assert ended.status in (2, 3, 4)
    assert controls(ended.out + ended.err) == []
    assert "x1b]0;owned" in ended.err
    assert "bug in mergecli" not in ended.err


def test_a_name_with_an_end_of_line_forges_no_message(run: Run) -> None:
    ended = run("info", "a\nerror: forged")
    assert [line.partition(":")[0] for line in ended.err.splitlines()] in (["error"], ["error", "hint"])


def test_info_shows_hostile_names_of_tensors_and_metadata_as_escapes(tmp_path: Path, run: Run) -> None:
    weights = random_weights(0)
    weights[EVIL] = next(iter(weights.values())).clone()
    about = {"mergecli": EVIL, "method": EVIL, "recipe": f"x = 1\n{EVIL}", "kind": "checkpoint"}
    save_file(weights, tmp_path / "m.safetensors", metadata=about)
    for options in ([], ["--keys"], ["--recipe"], ["--json"]):
        ended = run("info", "m.safetensors", *options)
        assert (ended.status, controls(ended.out + ended.err)) == (0, [])
        assert "x1b]0;owned" in ended.out or "u001b]0;owned" in ended.out
    assert json.loads(ended.out)["metadata"]["method"] == EVIL


def test_a_toml_file_cannot_speak_to_the_terminal(tmp_path: Path, run: Run) -> None:
    (tmp_path / "r.toml").write_text('"a\\u001b[2J" = 1\nbase = "\\u001b[2J"\n')
    ended = run("merge", "r.toml", "-o", "x.safetensors")
    assert ended.status == 2
    assert controls(ended.err) == []


def test_a_bug_prints_its_traceback_without_control_characters(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(EVIL)

    monkeypatch.setattr("mergecli.methods.names", broken)
    ended = run("methods")
    assert ended.status == 1
    assert "Traceback" in ended.err
    assert SHOWN in ended.err
    assert controls(ended.err) == []


def test_a_path_goes_to_programs_as_it_is_and_to_a_terminal_as_escapes(world: World) -> None:
    name = b"m\x1b\xff.safetensors"
    command = [
        sys.executable,
        "-m",
        "mergecli",
        "merge",
        "t1.safetensors",
        "t2.safetensors",
        "--method",
        "average",
        "-o",
    ]
    done = subprocess.run([*map(os.fsencode, command), name], cwd=world.folder, capture_output=True)
    assert (done.returncode, done.stdout) == (0, name + b"\n")
    assert done.stderr.startswith(rb"wrote m\x1b\udcff.safetensors (xxh3:")
    assert (world.folder / os.fsdecode(name)).is_file()
    out = on_a_terminal([*command[3:], "m\x1b.safetensors"], world.folder, NO_COLOR="1")
    assert r"m\x1b.safetensors" in out


def test_what_a_library_logs_has_no_control_characters(run: Run) -> None:
    assert run("methods").status == 0
    handler = logging.lastResort
    assert handler is not None
    assert handler.format(logging.makeLogRecord({"msg": EVIL, "levelname": "WARNING"})) == SHOWN
