"""Tiny worlds: tensors of every awkward kind, checkpoints made of them, and the program."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergecli.runtime import interrupts

os.environ.pop("COLUMNS", None)  # readline, which pytest imports, sets it for the workers of xdist
os.environ.pop("LINES", None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a job in the background has it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as `nohup` has it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

Weights = dict[str, Tensor]

SHAPES = {
    "layer.0.weight": (7, 5),
    "layer.0.bias": (7,),
    "scale": (),
    "empty": (0, 3),
    "conv": (3, 2, 4, 4),
    "zz.long": (5000,),
}


def random_weights(seed: int, around: Weights | None = None, step: float = 0.1) -> Weights:
    """Random tensors of awkward shapes and one of whole numbers; near `around` if that is given."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if around is not None:
        weights = {name: around[name] + step * noise for name, noise in weights.items()}
    return {**weights, "steps": torch.arange(4)}


@dataclass(frozen=True)
class World:
    """A base and three fine-tuned models, in memory and on disk."""

    folder: Path
    base: Weights
    tuned: Mapping[str, Weights]

    @property
    def base_file(self) -> Path:
        return self.folder / "base.safetensors"

    @property
    def files(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.safetensors" for name in self.tuned}


def make_world(folder: Path, tasks: int = 3) -> World:
    """A world on disk in `folder`."""
    base = random_weights(0)
    world = World(folder, base, {f"t{i}": random_weights(i, base) for i in range(1, tasks + 1)})
    save_file(base, world.base_file)
    for name, file in world.files.items():
        save_file(world.tuned[name], file)
    return world


ROOT = Path(__file__).parents[1]
BEFORE = pytest.StashKey[list[str]]()


def changes_of_the_repository() -> list[str]:
    """What git sees that is not committed; nothing where there is no git."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return []
    done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines()


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.stash[BEFORE] = changes_of_the_repository()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a run that left something in the repository."""
    if hasattr(session.config, "workerinput"):
        return
    left = [line for line in changes_of_the_repository() if line not in session.config.stash[BEFORE]]
    if left:
        print("\nleft in the repository, by a test or by somebody else meanwhile:", *left, sep="\n  ")
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def own_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes they start, keep nothing in the user's own store and find nothing there; and they run the
    package that lies beside the tests, wherever another one is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        patch.setenv("MERGECLI_HOME", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a folder in its name lands in the test's own one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpu() -> str:
    """The device of tests marked `gpu`; those are skipped where there is none. `MERGECLI_TEST_DEVICE=cpu` tries the tests themselves."""
    device = os.environ.get("MERGECLI_TEST_DEVICE", "cuda")
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty store for the test alone, and one thread, so that sums are the same on every machine."""
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


END = re.compile(r"^.*, peak [\d.]+ [MG]B(?:, GPU .*)?\n", re.MULTILINE)
"""The line on stderr with which a command ends."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str
    """stderr without the line at the end of a command, whose seconds and memory nobody knows before."""
    end: str = ""
    """That line, without its end."""

    @classmethod
    def of(cls, status: int, out: str, err: str) -> Ended:
        ends = END.findall(err)
        assert len(ends) <= 1, err
        return cls(status, out, without_end(err), ends[0].rstrip("\n") if ends else "")

    @property
    def rest(self) -> str:
        """stderr without the lines in which an evaluation says what it counts."""
        return without_counts(self.err)


def without_end(text: str) -> str:
    """What was printed, without the lines with which commands end."""
    return END.sub("", text)


def without_counts(text: str) -> str:
    """What was printed, without the lines in which an evaluation says what it counts."""
    return re.sub(r"note: .*: used [\d,]+ images? in .*\n", "", text)


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mergecli ARGUMENTS` in this process, in the test's own folder, not on a terminal.

    Libraries are imported once, so that a command takes milliseconds. `process` is for what only a process shows.
    """

    def run(*arguments: object, **environment: object) -> Ended:
        from mergecli import cli

        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in interrupts.ENDING}
        with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(tmp_path)
            patch.setattr(interrupts, "received", interrupts.received)  # to be put back
            for name, value in environment.items():
                patch.setenv(name, str(value))
            try:
                status = cli.run([str(each) for each in arguments])
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Ended.of(int(status), out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def process(tmp_path: Path) -> Run:
    """Runs `mergecli ARGUMENTS` as a real process in the test's own folder, not on a terminal."""

    def process(*arguments: object, timeout: float = 120, **environment: object) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "mergecli", *map(str, arguments)],
            cwd=tmp_path, env=os.environ | {name: str(value) for name, value in environment.items()},
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        return Ended.of(done.returncode, done.stdout, done.stderr)

    return process


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], atol: float = 0.0) -> None:
    """The same names, shapes and dtypes, and values at most `atol` apart; says where the largest difference is."""
    assert sorted(got) == sorted(want)
    for name, expected in want.items():
        value = got[name]
        assert value.shape == expected.shape, f"`{name}`: {tuple(value.shape)} is not {tuple(expected.shape)}"
        assert value.dtype == expected.dtype, f"`{name}`: {value.dtype} is not {expected.dtype}"
        if expected.numel():
            difference = (value.double() - expected.double()).abs()
            worst = float(difference.max())
            assert worst <= atol, f"`{name}`: {worst:.3g} apart at entry {int(difference.argmax())}"
