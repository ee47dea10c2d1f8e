"""Merges by methods that learn coefficients or masks, and how near they must be to a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mergecli.merging.merge import merge
from tests.conftest import Weights, assert_same
from tests.methods.reference._adamerging_loop import Found
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import BATCH


def learned(world: AdaptedWorld, folder: Path, method: str, **settings: Any) -> tuple[Weights, Weights]:
    """The merged tower `m.safetensors`, and the file `learned.safetensors` of what was learned."""
    output, file = folder / "m.safetensors", folder / "learned.safetensors"
    merge(
        world.recipe, method=method, settings={"batch_size": BATCH, **settings}, output=output,
        save_coefficients=file,
    )  # fmt: skip
    return load_file(output), load_file(file)


def agrees(got: tuple[Weights, Weights], want: Found, rate: float, merged: float) -> None:
    """Entropies, coefficients and mask logits are the reference's, up to a small share of a step of Adam; the merged
    weights at most `merged` apart.

    Adam divides a gradient by its own size. Where it is zero but for rounding the result is noise: for the biases of
    the keys, which change no prediction, and for one entry of the masks in a hundred.
    """
    tower, kept = got
    entropies, every = torch.tensor(want.entropies), kept["trace.entropies"]
    assert ((every[:, every.any(0)] - entropies).abs() < 2e-5 + 1e-5 * entropies).all(), "as float32 rounds"
    matter = [number for number, name in enumerate(want.merged) if not name.endswith("k_proj.bias")]
    if "coefficients" in kept:
        columns = matter if want.coefficients.shape[1] > 1 else [0]
        assert (kept["coefficients"] - want.coefficients)[:, columns].abs().max() < 1e-4 * rate
    names = [list(want.merged)[number] for number in matter]
    if want.logits:
        apart = torch.cat([(kept[f"logits.{name}"] - want.logits[name]).abs().view(-1) for name in names])
        assert apart.quantile(0.99) < 1e-3 * rate
        assert apart.mean() < 1e-4 * rate
    assert_same(
        {name: tower[name].double() for name in names}, {name: want.merged[name] for name in names}, merged
    )
