"""Layers whose weights are put together for each image: in towers, and product by product."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergecli.methods._wemoe_layers import Dense, Pruned, linear
from tests.support.exact_clip import ExactClip
from tests.support.routed_tower import METHODS, install, mixture

pytestmark = pytest.mark.usefixtures("own_store")
ROUNDING = 3e-6
"""The routers compute in float32, and sums over tokens in another order round otherwise."""
LIMITS = "mergecli.methods._wemoe_layers"
T, M, N, B, S = 3, 23, 5, 7, 4


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(
    clip: ExactClip, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixture(clip, tmp_path, method, router_spread=1.0)
    tower, handle = install(clip, path)
    pixels = torch.cat(list(clip.pixels["test"].values()))
    whole = tower(pixels).pooler_output
    routes = handle.routes()["encoder.layers.0.mlp"]
    assert float(routes.std(0).min()) > 1e-3, "the router tells images apart"
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tower(pixels[order]).pooler_output, whole[order], atol=ROUNDING, rtol=0)
    one = torch.cat([tower(pixel[None]).pooler_output for pixel in pixels])
    torch.testing.assert_close(one, whole, atol=ROUNDING, rtol=0)
    monkeypatch.setattr(f"{LIMITS}.CACHE", 10_000)
    torch.testing.assert_close(tower(pixels).pooler_output, whole, atol=ROUNDING, rtol=0)
    shared, _ = install(clip, path, "batch")
    assert float((shared(pixels).pooler_output - whole).detach().abs().max()) > 1e-3


def test_a_tower_that_routes_is_put_back_and_can_be_copied(clip: ExactClip, tmp_path: Path) -> None:
    tower, handle = install(clip, mixture(clip, tmp_path, METHODS[1]))
    pixels = clip.pixels["test"]["one"]
    torch.testing.assert_close(
        copy.deepcopy(tower)(pixels).pooler_output, tower(pixels).pooler_output, atol=0, rtol=0
    )
    handle.remove()
    assert sorted(tower.state_dict()) == sorted(clip.tower().state_dict())


@pytest.fixture(params=[(1, 1), (1, 5), (40, 1), (1 << 15, 16)])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row, of five, which do not divide 23, of eight, and of all."""
    entries, fewest = request.param
    monkeypatch.setattr(f"{LIMITS}.BLOCK", entries)
    monkeypatch.setattr(f"{LIMITS}.FEWEST", fewest)
    monkeypatch.setattr(f"{LIMITS}.CACHE", 8 * 5 * N * 2)  # two images at a time where blocks have five rows


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def pruned(vectors: Tensor) -> Pruned:
    """The entries that are not 0."""
    rows: Sequence[Tensor] = vectors.flatten(1).unbind()
    return Pruned([(row.nonzero()[:, 0], row[row != 0]) for row in rows], *vectors.shape[1:])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("kind", [Dense, pruned])
def test_products_and_gradients_are_those_of_weights_that_are_written_down(
    kind: type[Dense], images: int, density: float
) -> None:
    keep = torch.rand(T, M, N, generator=torch.Generator().manual_seed(5)) < density
    vectors, offsets, weight, bias = numbers(T, M, N) * keep, numbers(T, M), numbers(M, N), numbers(M)
    inputs, shares = numbers(B, S, N).requires_grad_(True), numbers(images, T).requires_grad_(True)
    got = linear(inputs, shares, weight, bias, kind(vectors), offsets)
    mixed = weight + torch.einsum("bt,tmn->bmn", shares, vectors)
    want = torch.einsum("bsn,bmn->bsm", inputs, mixed.expand(B, M, N)) + (bias + shares @ offsets)[:, None]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    gradient = numbers(B, S, M)
    found = torch.autograd.grad(got, (inputs, shares), gradient)
    expected = torch.autograd.grad(want, (inputs, shares), gradient)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
