"""Weight-ensembling mixtures: what their file and their learning keep to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecli.formats.mixture import mixture_of
from mergecli.merging.merge import merge
from mergecli.methods._wemoe import WeightEnsembling
from mergecli.storage.checkpoint import VISION, open_checkpoint
from tests.conftest import assert_same
from tests.support.exact_clip import BATCH, ExactClip
from tests.support.routed_tower import METHODS, STEPS, install, mixture

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_routing_weight_of_one_is_that_tasks_tower(
    clip: ExactClip, tmp_path: Path, method: str, layers: int
) -> None:
    path = mixture(clip, tmp_path, method, steps=0, router_layers=layers, router_spread=0.0)
    tower, handle = install(clip, path)
    for key, value in handle.parameters.items():
        if key.endswith(f"{max(layers - 1, 0)}.bias"):
            value.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    plain, tuned = clip.tower(), clip.world.tuned[1]
    with open_checkpoint(path) as stored:
        own = mixture_of(stored).of_task("two")
        for name, value in plain.state_dict().items():
            value.copy_(own.read(VISION + name))
            if ".mlp." in name and method == "weight_ensembling_moe":
                assert torch.equal(value.float(), tuned[VISION + name]), name
    pixels = clip.pixels["test"]["two"]
    torch.testing.assert_close(tower(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learned_is_applied_without_images_to_the_same_bytes(
    clip: ExactClip, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixture(clip, tmp_path, method)
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(WeightEnsembling, "step", None)
    again = tmp_path / "again.safetensors"
    merge(clip.world.recipe, method=method, output=again, coefficients=tmp_path / "learned.safetensors")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_learning_that_was_interrupted_ends_with_the_same_bytes(
    clip: ExactClip, tmp_path: Path, method: str
) -> None:
    def stop(description: str, done: int, total: int) -> None:
        if description.startswith("adapting") and done == 2:
            raise KeyboardInterrupt

    settings = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-3}
    recipe, output = clip.world.recipe, tmp_path / "mixture.safetensors"
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, method=method, settings=settings, output=output, progress=stop)
    seen: list[int] = []
    merge(
        recipe, method=method, settings=settings, output=output,
        progress=lambda description, done, total: seen.append(done) if description.startswith("adapting") else None,
    )  # fmt: skip
    assert seen == [3, 4]
    interrupted = load_file(output)
    for file in (tmp_path / "home" / "coefficients").rglob("*.safetensors"):
        file.unlink()
    merge(recipe, method=method, settings=settings, output=output)
    assert_same(interrupted, load_file(output))
