"""Linear layers that send each token to experts."""

from __future__ import annotations

import copy

import torch

from mergecli.methods._smile_layers import SmileLinear
from tests.support.smile_tower import LAYERS, Tower, inputs, tuned_towers, upscaled


@torch.no_grad()
def test_both_ways_of_computing_experts_agree() -> None:
    tower = Tower(1)
    upscaled(tower, tuned_towers(4, tower), experts_per_token=2)
    layer, tokens = tower.q_proj, inputs().view(-1, 12)
    assert isinstance(layer, SmileLinear)
    shares = layer.shares(tokens)
    assert (shares > 0).sum(1).eq(2).all()
    assert float((layer.each_expert(tokens, shares) - layer.all_experts(tokens, shares)).abs().max()) < 1e-6


@torch.no_grad()
def test_an_image_is_routed_by_itself() -> None:
    tower = Tower(1)
    installed = upscaled(tower, tuned_towers(3, tower), rank=3)
    want, routes = tower(inputs()), dict(installed.routes())
    assert sorted(routes) == sorted(LAYERS)
    assert all(route.shape == (8, 3) for route in routes.values())
    assert all(torch.allclose(route.sum(1), torch.ones(8)) for route in routes.values())
    assert len({tuple(row) for row in routes["q_proj"].tolist()}) > 1, "images differ"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    assert float((tower(inputs()[order]) - want[order]).abs().max()) < 1e-5
    assert installed.routes()["q_proj"].equal(routes["q_proj"][order])
    for row in range(8):
        assert float((tower(inputs()[row : row + 1]) - want[row]).abs().max()) < 1e-5


def test_what_is_installed_can_be_copied_moved_saved_and_removed() -> None:
    tower = Tower(1)
    with torch.no_grad():
        before, names, plain = tower(inputs()), list(tower.state_dict()), tower.q_proj
    installed = upscaled(tower, tuned_towers(3, tower))
    assert dict(installed.parameters) == {}
    with torch.inference_mode():
        want = tower(inputs())
    other = copy.deepcopy(tower).requires_grad_(False)
    assert other(inputs()).equal(want)
    assert float((other.double()(inputs().double()) - want).abs().max()) < 1e-5
    assert list(tower.state_dict()) == names
    tower(inputs()).sum().backward()  # gradients reach what lies before
    assert tower.q_proj.weight.grad is not None
    installed.remove()
    assert tower.q_proj is plain
    assert tower(inputs()).equal(before)
    assert float((other(inputs().double()) - want).abs().max()) < 1e-5
