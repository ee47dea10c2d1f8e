"""Adaptations that stop and go on: interrupted ones to the same bytes, and those that end a phase early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli.merging.learning import adaptation_loop as adaptation_run
from mergecli.runtime.errors import MergecliWarning
from tests.support.adapted_world import CASES, AdaptedWorld, learn, make_adapted_world, stopping

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("adapting"))


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    world: AdaptedWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
) -> None:
    whole = learn(world, tmp_path, method, **settings)
    merged = (tmp_path / "merged.safetensors").read_bytes()
    for after in (1, 5, 6):
        home = tmp_path / f"home after {after}"
        monkeypatch.setenv("MERGECLI_HOME", str(home))
        with pytest.raises(KeyboardInterrupt):
            learn(world, tmp_path, method, progress=stopping(after), **settings)
        (partial,) = (home / "coefficients").rglob("*.partial.safetensors")
        done: list[int] = []

        def progress(text: str, step: int, _: int, done: list[int] = done) -> None:
            if text.startswith("adapting"):
                done.append(step)

        assert learn(world, tmp_path, method, progress=progress, **settings) == whole
        assert done[:1] == ([after + 1] if after < 6 else [])
        assert not partial.exists()
        assert (tmp_path / "merged.safetensors").read_bytes() == merged


def test_an_interruption_in_the_middle_of_a_step_leaves_it_out(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergecli.merging.learning.objective import TowerObjective

    original, calls = TowerObjective.losses_and_gradients, 0

    def losses_and_gradients(self: TowerObjective, draw: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # the second half of the third step
            raise KeyboardInterrupt
        return original(self, draw)

    settings = {"mask_steps": 4, "steps": 2, "order": "published"}
    monkeypatch.setattr(TowerObjective, "losses_and_gradients", losses_and_gradients)
    with pytest.raises(KeyboardInterrupt):
        learn(world, tmp_path, "concrete_ada_merging", **settings)
    resumed = learn(world, tmp_path, "concrete_ada_merging", **settings)
    assert calls == 6 + 2 * 2 + 2
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    assert learn(world, tmp_path, "concrete_ada_merging", **settings) == resumed


def test_the_state_is_saved_on_the_way_too(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation_run, "SAVE_EVERY", 0.0)
    seen: list[int] = []

    def progress(description: str, done: int, total: int) -> None:
        seen.extend(
            len(load_file(file)["trace.entropies"]) for file in (tmp_path / "home").rglob("*.partial.*")
        )

    learn(world, tmp_path, progress=progress)
    assert seen
    assert not list((tmp_path / "home").rglob("*.partial.*"))


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_state_is_begun_anew(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(world, tmp_path, progress=stopping(3))
    (partial,) = (tmp_path / "home").rglob("*.partial.safetensors")
    partial.write_bytes(partial.read_bytes()[:-7] if damage is None else damage)
    with pytest.warns(MergecliWarning, match="; the adaptation starts again$"):
        again = learn(world, tmp_path)
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    assert learn(world, tmp_path) == again


def test_early_stopping_ends_when_the_entropy_stands_still(world: AdaptedWorld, tmp_path: Path) -> None:
    learn(world, tmp_path, steps=400, learning_rate=0.0, patience=10)
    trace = load_file(tmp_path / "learned.safetensors")["trace.entropies"]
    assert 20 <= len(trace) < 400
    before, after = trace[-20:-10].double().sum(), trace[-10:].double().sum()
    assert after >= before


def entropies_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "learned.safetensors")["trace.entropies"]


@pytest.mark.parametrize("method", ["ada_merging", "ada_rank", "weight_ensembling_moe"])
def test_the_trace_has_the_coefficients_or_routes_after_each_step(
    world: AdaptedWorld, tmp_path: Path, method: str
) -> None:
    rows: list[torch.Tensor] = []
    for steps in (1, 2, 3):
        learn(world, tmp_path, method, steps=steps)
        rows.append(load_file(tmp_path / "learned.safetensors")["trace.coefficients"])
    assert len({tuple(row.tolist()) for row in rows[-1]}) == 3
    for before in rows[:-1]:
        torch.testing.assert_close(before, rows[-1][: len(before)], rtol=0, atol=0)


STILL: dict[str, Any] = {"mask_steps": 40, "steps": 30, "mask_rate": 0.0, "inner_rate": 0.0, "patience": 4}
"""No mask is better than another."""


def test_a_mask_that_stands_still_is_followed_by_the_coefficients(
    world: AdaptedWorld, tmp_path: Path
) -> None:
    told = list[int]()
    learn(
        world, tmp_path, "concrete_ada_merging", **STILL,
        progress=lambda text, step, _: told.append(step) if text.startswith("adapting") else None,
    )  # fmt: skip
    jump = told.index(40)
    assert jump + 1 < 40, "the mask's steps end early"
    assert told[jump + 1 : -1] == [*range(41, 41 + len(told) - jump - 2)]
    assert len(entropies_of(tmp_path)) == len(told)
    learned = load_file(tmp_path / "learned.safetensors")
    assert (learned["coefficients"] - 0.3).abs().max() > 1e-2


def test_steps_are_not_compared_with_those_of_another_phase(world: AdaptedWorld, tmp_path: Path) -> None:
    settings = {**STILL, "mask_steps": 6, "steps": 6}
    learn(world, tmp_path, "concrete_ada_merging", **settings)
    assert len(entropies_of(tmp_path)) == 12, "of neither phase there are two times four steps"


def test_a_run_stopped_near_the_end_of_a_phase_goes_on_to_the_same_bytes(
    world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(world, tmp_path, "concrete_ada_merging", **STILL)
    masks = sum(
        bool((row == 0.3).all()) for row in load_file(tmp_path / "learned.safetensors")["trace.coefficients"].double().round(decimals=6)
    )  # fmt: skip
    for more in (-1, 0, 1, 3):
        monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / f"home {more}"))
        seen = 0

        def progress(description: str, done: int, total: int, stop: int = masks + more) -> None:
            nonlocal seen
            seen += description.startswith("adapting")
            if description.startswith("adapting") and seen == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            learn(world, tmp_path, "concrete_ada_merging", progress=progress, **STILL)
        assert learn(world, tmp_path, "concrete_ada_merging", **STILL) == whole
