"""ESM++."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.formats.mixture import mixture_of
from mergecli.merging.learning.measure import measure
from mergecli.merging.merge import merge
from mergecli.methods._essential_layers import EssentialLinear, EssentialRouter
from mergecli.methods.esm_plus_plus import EsmPlusPlus
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import VISION, open_checkpoint
from tests.conftest import Weights, assert_same
from tests.methods.reference.esm_plus_plus import esm_plus_plus, run
from tests.support.image_zoo import FEW, Zoo, measured_merge
from tests.support.merging import same_bytes

pytestmark = pytest.mark.usefixtures("own_store")
METHOD = "esm_plus_plus"


def task_tower(path: Path, task: str) -> Weights:
    with open_checkpoint(path) as stored:
        tower = mixture_of(stored).of_task(task)
        return {name: tower.read(name) for name in tower.entries}


def installed(zoo: Zoo, routing: Any = "sample") -> Any:
    """A float64 tower with the file's routing layers, and their handle."""
    tower = copy.deepcopy(zoo.clip().tower).double()
    with open_checkpoint(zoo.folder / "measured.safetensors") as stored:
        found = mixture_of(stored)
        tower.load_state_dict(
            {name.removeprefix(VISION): found.shared.read(name).double() for name in found.shared.entries}
        )
        return tower, found.install(tower, routing)


def pixels(zoo: Zoo) -> Tensor:
    return torch.cat([zoo.pixels(task, 3, shuffle=False) for task in zoo.tuned]).double()


@torch.no_grad()
def test_esm_plus_plus_equals_full_decompositions_image_by_image(
    zoo: Zoo, layer_inputs: list[Weights]
) -> None:
    want = esm_plus_plus(dict(zoo.base), list(zoo.tuned.values()), layer_inputs, 3)
    file = measured_merge(zoo, METHOD, lora_rank=3)
    assert_same({name: file[name] for name in want.merged}, want.merged, atol=2e-4)
    for number, task in enumerate(zoo.tuned):
        got = task_tower(zoo.folder / "measured.safetensors", task)
        changed = {
            name: value + want.changes[number].get(name, torch.zeros(())).float()
            for name, value in want.merged.items()
        }
        assert_same(got, changed, atol=4e-4)
        for name, value in file.items():
            if name.startswith("prototypes."):
                same = want.prototypes[number][name.removeprefix("prototypes.")].float()
                assert torch.allclose(value[number], same, atol=1e-5)
    for routing in ("sample", "batch"):
        tower, handle = installed(zoo, routing)
        plain = copy.deepcopy(zoo.clip().tower).double()
        known = want._replace(merged={name: file[name] for name in want.merged})
        expected = run(plain, known, pixels(zoo), VISION, batch=routing == "batch")
        assert torch.allclose(tower(pixels(zoo)), expected, atol=1e-3)
        assert handle.keeps_batches_whole is (routing == "batch")
        handle.remove()


def test_at_full_rank_a_tasks_routed_weights_are_its_models(zoo: Zoo) -> None:
    measured_merge(zoo, METHOD, lora_rank=999)
    for task, weights in zoo.tuned.items():
        got = task_tower(zoo.folder / "measured.safetensors", task)
        names = [name for name in got if name.endswith(("q_proj.weight", "v_proj.weight", "fc1.weight"))]
        assert len(names) == 6
        assert_same({name: got[name] for name in names}, {name: weights[name] for name in names}, atol=1e-3)


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(zoo: Zoo) -> None:
    measured_merge(zoo, METHOD, lora_rank=3)
    tower, handle = installed(zoo)
    together = tower(pixels(zoo))
    routes = handle.routes()
    alone = torch.cat([tower(each[None]) for each in pixels(zoo)])
    assert torch.allclose(together, alone, atol=1e-9)
    assert sorted(routes) == [
        f"encoder.layers.{layer}.{each}" for layer in (0, 1) for each in ("mlp.fc1", "self_attn.q_proj")
    ]
    assert all(bool((each.sum(1) == 1).all()) and len(each) == 9 for each in routes.values())


@torch.no_grad()
def test_one_task_is_always_chosen(zoo: Zoo) -> None:
    recipe = replace(zoo.recipe, tuned={"a": zoo.recipe.tuned["a"]})
    merge(recipe, method=METHOD, settings=FEW, output=zoo.folder / "measured.safetensors")
    tower, handle = installed(zoo)
    tower(pixel_values=pixels(zoo))
    assert all(bool((each == 1).all()) for each in handle.routes().values())
    handle.remove()


@torch.no_grad()
def test_models_equal_to_the_merged_tower_change_nothing(zoo: Zoo) -> None:
    recipe = replace(zoo.recipe, tuned=dict.fromkeys(zoo.recipe.tuned, zoo.recipe.base))  # type: ignore[arg-type]
    merge(recipe, method=METHOD, settings=FEW, output=zoo.folder / "measured.safetensors")
    file = load_file(zoo.folder / "measured.safetensors")
    assert_same({name: file[name] for name in zoo.base}, dict(zoo.base))
    assert all(not bool(value.any()) for name, value in file.items() if name.startswith(("left.", "right.")))


def test_one_router_answers_queries_keys_and_values_once() -> None:
    router = EssentialRouter(torch.randn(2, 3, 6), torch.randn(2, 6), "sample")
    tokens = torch.randn(4, 5, 6)
    first = router(tokens)
    assert router(tokens) is first
    assert router(tokens.clone()) is not first


@pytest.mark.parametrize("by", ["sample", "batch"])
def test_layers_keep_the_state_dict_and_add_two_thin_products(by: Any) -> None:
    linear = torch.nn.Linear(6, 8)
    left, right, prototypes = torch.randn(2, 8, 3), torch.randn(2, 3, 6), torch.eye(2, 6)
    layer = EssentialLinear(linear, left, EssentialRouter(right, prototypes, by))
    assert list(layer.state_dict()) == ["weight", "bias"]
    tokens = torch.zeros(2, 5, 6)
    tokens[:, :, 0], tokens[:, :, 1] = 1.0, 0.5
    tokens[1, :, :2] = torch.tensor([0.0, 0.75])
    chosen = (0, 1) if by == "sample" else (1, 1)
    want = torch.stack([linear(x) + x @ (left[t] @ right[t]).T for x, t in zip(tokens, chosen, strict=True)])
    assert torch.allclose(layer(tokens), want, atol=1e-6)


def test_parts_of_the_file_have_few_columns_and_share_what_layers_share() -> None:
    parts = EsmPlusPlus().parts("encoder.layers.0.self_attn.q_proj.weight", (768, 768), 8)
    parts |= EsmPlusPlus().parts("encoder.layers.0.self_attn.k_proj.weight", (768, 768), 8)
    parts |= EsmPlusPlus().parts("encoder.layers.0.self_attn.v_proj.weight", (768, 768), 8)
    parts |= EsmPlusPlus().parts("encoder.layers.0.mlp.fc1.weight", (3072, 768), 8)
    parts |= EsmPlusPlus().parts("encoder.layers.0.mlp.fc2.weight", (768, 3072), 8)
    added = sum(
        torch.Size(part.shape).numel() for key, part in parts.items() if key.startswith(("left.", "right."))
    )
    assert added == 32 * (4 * 768 + 5 * 768) * 8


def test_queries_without_keys_need_matrices_of_their_own() -> None:
    shapes = {"encoder.layers.0.self_attn.q_proj.weight": (4, 4)}
    with pytest.raises(InputError) as caught:
        EsmPlusPlus().layout(shapes)
    assert caught.value.message == (
        "`encoder.layers.0.self_attn.q_proj.weight`: expected the weights of queries, keys and values of a layer as "
        "matrices of one shape"
    )
    assert "encoder.layers.0.self_attn.k_proj.weight.mean" in EsmPlusPlus(fuse_qkv=False).layout(shapes)


def test_the_rank_changes_without_measuring_again_and_exclusion_keeps_the_base(
    zoo: Zoo, tmp_path: Path
) -> None:
    measure(zoo.recipe, method=METHOD, settings=FEW, output=tmp_path / "s")
    done = measure(zoo.recipe, method=METHOD, settings={**FEW, "lora_rank": 2}, output=tmp_path / "s")
    assert done.new == ()
    file = measured_merge(
        zoo, METHOD, tmp_path / "s", fuse_qkv=False, exclude=["vision_model.encoder.layers.0"]
    )
    kept = [name for name in zoo.base if "layers.0." in name]
    assert all(file[name].equal(zoo.base[name]) for name in kept)
    assert not bool(file[f"left.{VISION}encoder.layers.0.mlp.fc1.weight"].any())
    assert bool(file[f"right.{VISION}encoder.layers.1.self_attn.k_proj.weight"].any())


def test_threads_change_no_byte(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    want = measured_merge(zoo, METHOD)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    same_bytes(measured_merge(zoo, METHOD), want)
