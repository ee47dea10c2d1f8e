"""`mergecli finetune`: Ctrl-C in the middle of a step, and what is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergecli.training import loop
from tests.conftest import Run
from tests.support.tiny_clip import make_image_task, make_tiny_clip

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_tiny_clip(folder / "base", seed=1)
    make_image_task(folder / "tints")
    (folder / "recipe.toml").write_text(
        'base = "base"\n[tasks.tints]\ndata = "tints"\ntemplates = ["something {}"]\n'
    )
    return folder / "recipe.toml"


def test_ctrl_c_in_the_middle_of_a_step_keeps_that_step(
    recipe: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["finetune", recipe, "--task", "tints", "--batch-size", 4, "--steps", 8, "--learning-rate", "1e-3",
               "--seed", 3, "--validate-every", 2, "-o"]  # fmt: skip
    update = loop.Training._update

    def pressed(self: loop.Training, losses: list[float]) -> None:
        if self.state.step == 4:
            signal.raise_signal(signal.SIGINT)
        update(self, losses)

    state = tmp_path / ".a.resume.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_update", pressed)
        stopped = run(*command, "a.safetensors")
    assert (stopped.status, stopped.out) == (130, "")
    assert (
        stopped.err
        == "interrupted: 5 of 8 steps are kept in .a.resume.safetensors; the same command goes on\n"
    )
    assert len(load_file(state)["losses"]) == 5
    assert [run(*command, f"{name}.safetensors").status for name in "ab"] == [0, 0]
    assert not state.exists()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


ERRORS = [
    (["--rank", "4"], 2, "`rank`: only low-rank adapters have it"),
    (["--lora", "-o", "a.safetensors"], 2, "an adapter is a folder"),
    (["--learning-rate", "1e30"], 3, "loss of `tints` is nan at step"),
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
