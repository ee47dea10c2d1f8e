"""Weight-ensembling mixtures of the adapted world: written, installed in a float64 tower, compared with a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.formats.mixture import mixture_of
from mergecli.merging.merge import merge
from mergecli.methods._mixture import Routed
from mergecli.storage.checkpoint import VISION, open_checkpoint
from tests.methods.reference._wemoe import learn
from tests.support.exact_clip import BATCH, ExactClip

STEPS, RATE = 4, 1e-2
METHODS = ("weight_ensembling_moe", "efficient_weight_ensembling_moe")


def mixture(clip: ExactClip, folder: Path, method: str, **settings: Any) -> Path:
    """The file `mixture.safetensors`, with few steps unless it is said otherwise; beside it what was learned."""
    given = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, **settings}
    output = folder / "mixture.safetensors"
    merge(
        clip.world.recipe, method=method, settings=given, output=output,
        save_coefficients=folder / "learned.safetensors",
    )  # fmt: skip
    return output


def install(clip: ExactClip, path: Path, routing: str = "sample") -> Any:
    """A float64 tower with a file's routing layers, and their handle."""
    tower = clip.tower()
    with open_checkpoint(path) as stored:
        found = mixture_of(stored)
        assert isinstance(found.method, Routed)
        for name, value in tower.state_dict().items():
            value.copy_(stored.read(VISION + name))
        handle = found.method.install(tower, stored.read, found.tasks, routing, VISION)
    return tower, handle


def learns_and_routes_like(
    reference: Callable[..., dict[str, Tensor]], clip: ExactClip, folder: Path, method: str, routing: str,
    **settings: Any,
) -> None:  # fmt: skip
    """The entropies of each step, the routers and the logits are those of the reference.

    A gradient near 0 takes its sign from rounding, and Adam makes a whole step of it: all steps together are 0.04.
    """
    path = mixture(clip, folder, method, train_routing=routing, **settings)
    plain = clip.tower()
    parameters = reference(plain, clip.world.base, clip.world.tuned, 0.3, routing, **settings)
    trace = learn(clip.logits(plain), clip.batches(), parameters, STEPS, RATE)
    found = load_file(folder / "learned.safetensors")
    entropies = found["trace.entropies"].double()
    torch.testing.assert_close(entropies, torch.tensor(trace).double(), atol=2e-4, rtol=0)
    for key, want in parameters.items():
        difference = (found[key].double() - want.detach()).abs()
        assert float(difference.median()) < 1e-5, key
        assert float((difference > 1e-3).double().mean()) < 0.02, key
    tower, _ = install(clip, path, routing)
    for key, want in parameters.items():
        want.data.copy_(load_file(path)[key])
    for place, pixels in clip.batches()(0):
        torch.testing.assert_close(
            clip.logits(tower)(pixels, place), clip.logits(plain)(pixels, place), atol=1e-5, rtol=0
        )
