"""`ModelPool`: the models of a recipe, for people who work in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.runtime.errors import InputError, UsageError
from tests.support.tiny_clip import make_image_task, make_tiny_clip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, two fine-tuned towers, one of them as a task vector, a task, and a recipe of them all."""
    from transformers import CLIPVisionModel

    folder = tmp_path_factory.mktemp("zoo")
    make_tiny_clip(folder / "clip")
    base = CLIPVisionModel.from_pretrained(folder / "clip", dtype=torch.float32).state_dict()
    for number, name in enumerate("ab"):
        torch.manual_seed(number)
        save_file(
            {f"vision_model.{key}": each + 0.1 * torch.randn_like(each) for key, each in base.items()},
            folder / f"{name}.safetensors",
        )
    mergecli.taskvector(folder / "b.safetensors", base=folder / "clip", output=folder / "vector.safetensors")
    make_image_task(folder / "images")
    (folder / "r.toml").write_text(
        'base = "clip"\n[tuned]\na = "a.safetensors"\nb = "vector.safetensors"\n'
        '[eval]\ntasks = ["tints"]\n[tasks.tints]\ndata = "images"\ntemplates = ["a {} picture"]\n'
    )
    return folder


def test_a_pool_of_a_recipe_loads_towers_that_transformers_would_load(zoo: Path) -> None:
    pool = mergecli.ModelPool(zoo / "r.toml")
    assert (pool.model_names, pool.has_base, len(pool), "base" in pool) == (("a", "b"), True, 2, True)
    for name in pool:
        got = pool.load_model(name).state_dict()
        for key, wanted in load_file(zoo / f"{name}.safetensors").items():
            torch.testing.assert_close(got[key.removeprefix("vision_model.")], wanted, rtol=0, atol=1e-6)
    first, second = pool.load_model("a"), pool.load_model("a")
    assert first is not second
    assert not first.training


def test_a_clip_of_the_pool_is_the_base_with_another_tower(zoo: Path) -> None:
    from transformers import CLIPModel

    pool = mergecli.ModelPool(zoo / "r.toml")
    base, changed = pool.load_clip_model(), pool.load_clip_model("a")
    plain = CLIPModel.from_pretrained(zoo / "clip", dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 16, 16)
    words = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": pixels}
    with torch.no_grad():
        want = plain(**words).logits_per_image
        assert torch.allclose(base(**words).logits_per_image, want, atol=1e-5)
        assert base(**words).text_embeds.equal(changed(**words).text_embeds)
        assert not base(**words).image_embeds.allclose(changed(**words).image_embeds)


def test_the_pool_gives_the_processor_and_the_images_of_its_tasks(zoo: Path) -> None:
    pool = mergecli.ModelPool(zoo / "r.toml")
    train, test = pool.load_train_dataset("tints"), pool.load_test_dataset("tints")
    assert (len(train), len(test), train.classes) == (30, 12, ("red", "green", "blue"))
    image, label = test[1]
    assert (image.mode, label) == ("RGB", 1)
    made = pool.load_processor()(images=[image], text=["a red picture"], return_tensors="pt")
    assert tuple(made["pixel_values"].shape) == (1, 3, 16, 16)
    assert made["input_ids"].shape[0] == 1


def test_an_entry_may_be_a_source_a_table_a_module_or_a_function(zoo: Path, tmp_path: Path) -> None:
    pool = mergecli.ModelPool(zoo / "r.toml")
    module = pool.load_model("b")
    mixed = mergecli.ModelPool(
        {"base": {"source": str(zoo / "clip")}, "a": lambda: pool.load_model("a"), "b": module}
    )
    assert mixed.load_model("b") is module
    merged = mergecli.merge(mixed.recipe, method="ties", output=tmp_path / "mixed.safetensors")
    files = {name: zoo / f"{name}.safetensors" for name in "ab"}
    mergecli.merge(files, base=zoo / "clip", method="ties", output=tmp_path / "files.safetensors")
    got, wanted = load_file(merged.path), load_file(tmp_path / "files.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


def test_a_pool_without_a_base_merges_by_methods_that_need_none(zoo: Path, tmp_path: Path) -> None:
    pool = mergecli.ModelPool({name: zoo / f"{name}.safetensors" for name in "ab"})
    assert not pool.has_base
    mergecli.merge(pool.recipe, method="average", output=tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="there is no base"):
        mergecli.merge(pool.recipe, method="ties", output=tmp_path / "n.safetensors")
    with pytest.raises(InputError, match=r"has no `config.json`"):
        pool.load_model("a")


def test_a_saved_tower_is_what_transformers_reads(zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    pool = mergecli.ModelPool(zoo / "r.toml")
    tower = pool.load_model("a")
    pool.save_model(tower, tmp_path / "tower")
    again = CLIPVisionModel.from_pretrained(tmp_path / "tower", dtype=torch.float32)
    assert all(again.state_dict()[key].equal(each) for key, each in tower.state_dict().items())
    saved = pool.save_model(tower, tmp_path / "tower.safetensors")
    assert all(key.startswith("vision_model.") for key in load_file(saved))


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"_pretrained_": "x"}, "the pre-trained model is called `base` here"),
        ({"a": lambda: 3}, "`a`: the function gave int, a module was expected"),
        ({"mnist": "."}, r"the pool has no model `a`"),
        ({"mnits": "."}, r"the pool has no model `a`"),
    ],
)
def test_what_a_pool_cannot_be_or_give_is_said(models: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mergecli.ModelPool(models).load_model("a")
