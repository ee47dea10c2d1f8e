"""Merges that learn: Ctrl-C in the middle of a step, and what is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mergecli.merging.learning import adaptation_loop
from tests.conftest import Run
from tests.support.adapted_world import AdaptedWorld, make_adapted_world

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("adapting"))


def test_ctrl_c_keeps_what_was_learned_and_the_same_command_goes_on(
    world: AdaptedWorld, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("batch_size=3", "learning_rate=0.01", "steps=4", "mask_steps=6")
    command = [
        "merge", world.recipe, "--method", "concrete_ada_merging", "-o", "merged.safetensors",
        "--save-coefficients", "learned.safetensors", *(part for each in settings for part in ("--set", f"method.{each}")),
    ]  # fmt: skip
    add = adaptation_loop.LoopState.add

    def pressed(self: adaptation_loop.LoopState, *given: object) -> None:
        add(self, *given)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)

    home = tmp_path / "home"
    with monkeypatch.context() as patch:
        patch.setattr(adaptation_loop.LoopState, "add", pressed)
        stopped = run(*command)
    assert (stopped.status, stopped.err) == (
        130, "interrupted: 5 of 10 steps of learning are kept; the same command goes on\n",
    )  # fmt: skip
    (partial,) = home.rglob("*.partial.safetensors")
    assert len(load_file(partial)["trace.entropies"]) == 5
    assert not (tmp_path / "merged.safetensors").exists()
    resumed = run(*command)
    assert resumed.status == 0, resumed.err
    assert not list(home.rglob("*.partial.safetensors"))
    first = (tmp_path / "learned.safetensors").read_bytes()
    again = run(*command, MERGECLI_HOME=tmp_path / "other home")
    assert again.status == 0, again.err
    assert (tmp_path / "learned.safetensors").read_bytes() == first


ERRORS = [
    (["--method", "ada_merging", "--set", 'method.adapt_on=["four"]'], 2, "`method.adapt_on`: there are no models `four`"),
    (["--method", "ada_merging", "--set", "method.split=dev"], 2, "`method.split`"),
    (["--method", "ada_merging", "--coefficients", "nowhere.safetensors"], 3, "nowhere.safetensors: no such file"),
    (["--method", "ada_merging", "--set", "tasks.two.data=gone"], 3, "gone"),
    (["--method", "ties", "--save-coefficients", "c.safetensors"], 2, "method `ties` learns no coefficients"),
    (["--method", "ties", "--trace", "t.csv"], 2, "--trace: method `ties` learns no coefficients"),
    (["--method", "ada_merging", "--set", "method.start=1e30", "--set", "method.steps=3"], 3, "the entropy is nan in step 1"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "status", "message"), ERRORS)
def test_what_cannot_be_learned_is_told_in_one_message(
    world: AdaptedWorld, run: Run, tmp_path: Path, more: list[str], status: int, message: str
) -> None:
    ended = run("merge", world.recipe, *more, "-o", "m.safetensors")
    assert (ended.status, ended.out) == (status, ""), ended.err
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "m.safetensors").exists()
