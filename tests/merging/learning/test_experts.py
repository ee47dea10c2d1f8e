"""What the tasks' own models predict, as labels for a merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.merging.learning import experts
from mergecli.methods._adapted import expert_loss
from mergecli.storage.store import home
from tests.support.adapted_world import CLASSES, VISION, AdaptedWorld, learn, make_adapted_world
from tests.support.exact_clip import ExactClip, make_exact_clip

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def adapted_world(tmp_path_factory: pytest.TempPathFactory) -> AdaptedWorld:
    return make_adapted_world(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def clip(adapted_world: AdaptedWorld) -> ExactClip:
    return make_exact_clip(adapted_world)


def kept_files() -> list[Path]:
    return sorted((home() / "experts").glob("*.safetensors"))


def test_labels_and_confidences_are_those_of_the_expert_with_its_zero_shot_head(
    clip: ExactClip, tmp_path: Path
) -> None:
    learn(clip.world, tmp_path, objective="experts")
    found = [load_file(path) for path in kept_files()]
    assert len(found) == len(CLASSES)
    for place, (name, weights) in enumerate(zip(CLASSES, clip.world.tuned, strict=True)):
        tower = clip.tower()
        tower.load_state_dict({key.removeprefix(VISION): value.double() for key, value in weights.items()})
        with torch.no_grad():
            want = clip.logits(tower)(clip.pixels["test"][name], place).softmax(1).max(1)
        (own,) = [each for each in found if len(each["labels"]) == len(want.values)]
        assert own["labels"].equal(want.indices)
        torch.testing.assert_close(own["confidences"].double(), want.values, atol=1e-5, rtol=0)


def test_experts_are_asked_once_whatever_the_method_and_its_settings(
    adapted_world: AdaptedWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn(adapted_world, tmp_path, objective="experts")
    before = {path: path.read_bytes() for path in kept_files()}

    def asked(*_: object) -> None:
        raise AssertionError("an expert was asked again")

    monkeypatch.setattr(experts, "_predicted", asked)
    learn(adapted_world, tmp_path, objective="experts", learning_rate=2e-2)
    learn(adapted_world, tmp_path, "concrete_task_arithmetic", objective="experts")
    learn(adapted_world, tmp_path, "weight_ensembling_moe", objective="experts")
    assert {path: path.read_bytes() for path in kept_files()} == before


def test_a_damaged_file_of_labels_is_made_again(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    want = learn(adapted_world, tmp_path, objective="experts")
    path = kept_files()[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(match="it is computed again"):
        got = learn(adapted_world, tmp_path, objective="experts", learning_rate=1.1e-2)
    assert path.read_bytes() == whole
    assert got != want


def test_the_trace_is_called_after_the_loss(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    learn(adapted_world, tmp_path, objective="experts", trace=tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().startswith("step,cross-entropy,cross-entropy one,")


def loss_of(rows: list[list[float]], labels: list[int], confidences: list[float]) -> tuple[float, Tensor]:
    logits = torch.tensor(rows).log().requires_grad_()
    loss = expert_loss(logits, torch.tensor(labels), torch.tensor(confidences))
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


def test_images_on_which_the_merged_model_differs_and_is_surer_do_not_count() -> None:
    agrees, differs, surer = [0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]
    loss, gradient = loss_of([agrees, differs, surer], [0, 0, 0], [0.5, 0.6, 0.7])
    want = -(torch.tensor(0.7).log() + torch.tensor(0.2).log()) / 2
    assert loss == pytest.approx(float(want))
    assert gradient[2].equal(torch.zeros(3))
    torch.testing.assert_close(gradient[0], (torch.tensor(agrees) - torch.tensor([1.0, 0, 0])) / 2)


def test_a_batch_without_any_such_image_has_no_loss_and_no_gradient() -> None:
    loss, gradient = loss_of([[0.1, 0.9]], [0], [0.6])
    assert loss == 0
    assert gradient.equal(torch.zeros(1, 2))
