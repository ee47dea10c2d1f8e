"""OPCM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecli.merging.merge import merge
from tests.conftest import World, assert_same
from tests.methods.reference.opcm import norm, opcm, projected
from tests.support.layered_world import MATRICES, layered_world
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_opcm_equals_the_paper_step_by_step(layered: World, alpha: float) -> None:
    want = opcm(layered.base, list(layered.tuned.values()), alpha)
    assert_same(merged(layered, "opcm", alpha=alpha), with_integers(want, layered), atol=1e-6)


def test_awkward_shapes_are_merged_as_in_the_paper(world: World) -> None:
    want = opcm(world.base, list(world.tuned.values()))
    assert_same(merged(world, "opcm"), with_integers(want, world), atol=1e-6)


def test_a_step_of_a_chain_adds_what_is_orthogonal_and_keeps_the_length(tmp_path: Path) -> None:
    world = layered_world(tmp_path, 5, steps=[0.1, 0.3, 0.2, 0.1, 0.4])
    base = {name: value.double() for name, value in world.base.items() if value.is_floating_point()}
    lengths: list[float] = []
    last = dict(base)
    output = world.base_file
    for number, (name, file) in enumerate(world.files.items(), 1):
        done = merge({name: file}, onto=output, method="opcm", output=tmp_path / f"{number}.safetensors")
        output = done.path
        now = {key: value.double() for key, value in load_file(output).items() if key in base}
        expert = {key: world.tuned[name][key].double() for key in base}
        lengths.append(norm(expert, base))
        assert norm(now, base) == pytest.approx(sum(lengths) / number, rel=1e-5)
        for key in MATRICES if number > 1 else ():
            before, new = last[key] - base[key], expert[key] - base[key]
            added = (
                now[key]
                - base[key]
                - before
                * float((now[key] - base[key]).flatten() @ before.flatten())
                / float(before.square().sum())
            )
            along = added.flatten() @ before.flatten()
            assert abs(float(along)) < 1e-6 * float(before.norm() * new.norm())
            part = projected(before, new, 0.5)
            assert torch.nn.functional.cosine_similarity(added.flatten(), part.flatten(), dim=0) > 1 - 1e-8
        last = now


def test_nothing_is_added_on_the_leading_directions(layered: World) -> None:
    first, second = list(layered.tuned.values())[:2]
    got = merged(layered, "opcm", ["t1", "t2"])
    key = MATRICES[2]
    before = (first[key] - layered.base[key]).double()
    change = (got[key] - layered.base[key]).double()
    left, values, right = torch.linalg.svd(before)
    kept = int((values.cumsum(0) / values.sum() <= 0.5).sum())
    assert kept > 1
    inner = left.T @ change @ right.T
    off = inner[:kept, :kept] - inner[:kept, :kept].diagonal().diag()
    assert float(off.abs().max()) < 1e-6
    assert second is not first


def test_one_model_is_itself_and_models_equal_to_the_base_are_the_base(layered: World) -> None:
    assert_same(merged(layered, "opcm", ["t2"]), layered.tuned["t2"], atol=2e-7)
    same = with_models(layered, layered.base, layered.base, layered.base)
    assert_same(merged(same, "opcm"), layered.base)
