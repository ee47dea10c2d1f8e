from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mergecli.data import tasks
from mergecli.data.images import balanced, load_images
from mergecli.evaluation.evaluate import evaluate
from mergecli.storage.checkpoint import open_checkpoint
from tests.evaluation.test_scoring import counted


def test_features_are_the_class_token_after_each_layer(place, recipe, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    evaluate([place / "other"], recipe=recipe, tasks=["tints"], features=tmp_path / "f", limit=9)
    found = load_file(tmp_path / "f" / "tints.safetensors")
    assert sorted(found) == ["index", "labels", "layer_00", "layer_01"]
    model = CLIPVisionModel.from_pretrained(place / "other").eval()
    images = load_images(tasks.find("tints", recipe))
    numbers = balanced(images.labels, 9)
    assert found["index"].tolist() == numbers
    assert found["labels"].tolist() == [images.labels[number] for number in numbers]
    batch = CLIPImageProcessorPil.from_pretrained(place / "other")(
        [images[number][0] for number in numbers], return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True).hidden_states
    for layer in range(2):
        assert torch.allclose(found[f"layer_0{layer}"], states[layer + 1][:, 0], atol=1e-5)


def test_features_of_several_checkpoints_have_a_folder_each(place, recipe, tmp_path):
    evaluate([place / "base", place / "tower.safetensors"], recipe=recipe, features=tmp_path / "f")
    names = sorted(str(file.relative_to(tmp_path / "f")) for file in (tmp_path / "f").rglob("*.safetensors"))
    assert names == [f"{name}/{task}.safetensors" for name in ("base", "tower") for task in ("more", "tints")]
    with open_checkpoint(tmp_path / "f" / "tower" / "tints.safetensors") as stored:
        about = stored.metadata
    assert (about["kind"], about["task"], about["split"]) == ("features", "tints", "test")


def test_features_that_were_saved_before_an_interruption_are_not_made_again(
    place, recipe, tmp_path, monkeypatch
):
    given = {"recipe": recipe, "features": tmp_path / "f"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(place / "other", **given)
    assert [file.name for file in (tmp_path / "f").iterdir()] == ["tints.safetensors"]
    seen = counted(monkeypatch)
    evaluate(place / "other", **given)
    assert seen == ["more 1"]
    assert len(list((tmp_path / "f").iterdir())) == 2
