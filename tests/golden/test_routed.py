"""Towers that route, against image by image, and the bridges to task arithmetic and to single tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli.formats.mixture import mixture_of
from mergecli.merging.learning.objective import TaskBatches
from mergecli.merging.merge import merge
from mergecli.methods._mixture import Routed
from mergecli.methods._wemoe import WeightEnsembling
from mergecli.methods.efficient_weight_ensembling_moe import above_quantile, kept_of
from mergecli.storage.checkpoint import VISION, open_checkpoint
from tests.adapted import CLASSES, TEMPLATE, AdaptedWorld, images_of, make_adapted_world
from tests.conftest import assert_same
from tests.golden import naive_routed
from tests.golden.test_adapted import same_numbers

pytestmark = pytest.mark.usefixtures("own_store")
BATCH, STEPS, RATE = 3, 4, 1e-2
ROUNDING = 3e-6
"""The routers compute in float32, and sums over tokens in another order round otherwise."""
METHODS = ["weight_ensembling_moe", "efficient_weight_ensembling_moe"]


@dataclass(frozen=True)
class Bench:
    """A CLIP of transformers in float64, the heads and the pixels."""

    world: AdaptedWorld
    model: Any
    heads: list[Tensor]
    pixels: dict[str, Tensor]

    def tower(self) -> Any:
        return copy.deepcopy(self.model.vision_model)

    def logits(self, tower: Any) -> Callable[[Tensor, int], Tensor]:
        def logits(pixels: Tensor, place: int) -> Tensor:
            image = self.model.visual_projection(tower(pixels).pooler_output)
            return (
                self.model.logit_scale.exp()
                * (image / image.norm(dim=-1, keepdim=True))
                @ self.heads[place].T
            )

        return logits

    def batches(self, draw: int) -> list[tuple[int, Tensor]]:
        rows = {
            name: TaskBatches(0, name, each, each).rows(draw, BATCH, 0) for name, each in self.pixels.items()
        }
        return [(place, self.pixels[name][rows[name]]) for place, name in enumerate(CLASSES)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    world = make_adapted_world(tmp_path_factory.mktemp("routed"))
    folder = world.folder / "base"
    model = CLIPModel.from_pretrained(folder).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    heads: list[Tensor] = []
    for classes in CLASSES.values():
        tokens = [tokenizer([TEMPLATE.format(name)], return_tensors="pt") for name in classes]
        rows = torch.cat([model.get_text_features(**each).pooler_output for each in tokens])
        heads.append((rows / rows.norm(dim=-1, keepdim=True)).double())
    pixels = {
        name: processor(images_of(world, name, "test"), return_tensors="pt")["pixel_values"].double()
        for name in CLASSES
    }
    return Bench(world, model.double(), heads, pixels)


def mixture(bench: Bench, folder: Path, method: str, **settings: Any) -> Path:
    """The file, with few steps unless it is said otherwise."""
    given = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, **settings}
    output = folder / "mixture.safetensors"
    merge(
        bench.world.recipe,
        method=method,
        settings=given,
        output=output,
        save_coefficients=folder / "learnt.safetensors",
    )
    return output


@pytest.fixture
def installed(bench: Bench) -> Callable[..., Any]:
    """Puts a file's routing layers into a float64 tower."""

    def install(path: Path, routing: str = "sample") -> Any:
        tower = bench.tower()
        with open_checkpoint(path) as stored:
            found = mixture_of(stored)
            assert isinstance(found.method, Routed)
            for name, value in tower.state_dict().items():
                value.copy_(stored.read(VISION + name))
            handle = found.method.install(tower, stored.read, found.tasks, routing, VISION)
        return tower, handle

    return install


@pytest.mark.parametrize("routing", ["batch", "sample"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("weight_ensembling_moe", {}),
        ("efficient_weight_ensembling_moe", {}),
        ("efficient_weight_ensembling_moe", {"density": 0.5, "position_encoding": 6}),
        ("efficient_weight_ensembling_moe", {"density": 1.0, "shared_router": False}),
    ],
)
def test_learning_and_logits_equal_those_of_one_image_after_another(
    bench: Bench,
    tmp_path: Path,
    installed: Callable[..., Any],
    method: str,
    settings: dict[str, Any],
    routing: str,
) -> None:
    path = mixture(bench, tmp_path, method, train_routing=routing, **settings)
    plain = bench.tower()
    more = {"density": settings["density"]} if "density" in settings else {}
    if "shared_router" in settings:
        more["shared"] = settings["shared_router"]
    naive: dict[str, Callable[..., dict[str, Tensor]]] = {
        "weight_ensembling_moe": lambda *args, **more: naive_routed.weight_ensembling_moe(*args, **more),
        "efficient_weight_ensembling_moe": lambda *args, **more: naive_routed.efficient_weight_ensembling_moe(
            *args, **more
        ),
    }
    parameters = naive[method](
        plain, bench.world.base, bench.world.tuned, same_numbers, 0.3, routing,
        **more, **({"position": 6} if "position_encoding" in settings else {}),
    )  # fmt: skip
    trace = naive_routed.learn(bench.logits(plain), bench.batches, parameters, STEPS, RATE)
    found = load_file(tmp_path / "learnt.safetensors")
    torch.testing.assert_close(
        found["trace.entropies"].double(), torch.tensor(trace).double(), atol=2e-4, rtol=0
    )
    for key, want in parameters.items():
        # a gradient near 0 takes its sign from rounding, and Adam makes a whole step of it: all steps together are 0.04
        difference = (found[key].double() - want.detach()).abs()
        assert float(difference.median()) < 1e-5, key
        assert float((difference > 1e-3).double().mean()) < 0.02, key
    tower, _ = installed(path, routing)
    for key, want in parameters.items():
        want.data.copy_(load_file(path)[key])
    for place, pixels in bench.batches(0):
        torch.testing.assert_close(
            bench.logits(tower)(pixels, place), bench.logits(plain)(pixels, place), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_a_constant_router_is_task_arithmetic(
    bench: Bench, tmp_path: Path, installed: Callable[..., Any], routing: str
) -> None:
    path = mixture(bench, tmp_path, "weight_ensembling_moe", steps=0, router_spread=0.0)
    tower, _ = installed(path, routing)
    plain = bench.tower()
    for name, value in plain.state_dict().items():
        own = bench.world.base[VISION + name].double()
        value.copy_(own + 0.3 * sum(model[VISION + name].double() - own for model in bench.world.tuned))
    pixels = bench.pixels["one"]
    torch.testing.assert_close(tower(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_routing_weight_of_one_is_that_tasks_tower(
    bench: Bench, tmp_path: Path, installed: Callable[..., Any], method: str, layers: int
) -> None:
    path = mixture(bench, tmp_path, method, steps=0, router_layers=layers, router_spread=0.0)
    tower, handle = installed(path)
    for key, value in handle.parameters.items():
        if key.endswith(f"{max(layers - 1, 0)}.bias"):
            value.data.copy_(torch.tensor([0.0, 1.0, 0.0]))
    plain = bench.tower()
    with open_checkpoint(path) as stored:
        own = mixture_of(stored).of_task("two")
        for name, value in plain.state_dict().items():
            value.copy_(own.read(VISION + name))
            if ".mlp." in name and method == "weight_ensembling_moe":
                assert torch.equal(value.float(), bench.world.tuned[1][VISION + name]), name
    pixels = bench.pixels["two"]
    torch.testing.assert_close(tower(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(
    bench: Bench, tmp_path: Path, installed: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixture(bench, tmp_path, method, router_spread=1.0)
    tower, handle = installed(path)
    pixels = torch.cat(list(bench.pixels.values()))
    whole = tower(pixels).pooler_output
    routes = handle.routes()["encoder.layers.0.mlp"]
    assert float(routes.std(0).min()) > 1e-3, "the router tells images apart"
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tower(pixels[order]).pooler_output, whole[order], atol=ROUNDING, rtol=0)
    one = torch.cat([tower(pixel[None]).pooler_output for pixel in pixels])
    torch.testing.assert_close(one, whole, atol=ROUNDING, rtol=0)
    monkeypatch.setattr("mergecli.methods._wemoe_layers.CACHE", 10_000)
    torch.testing.assert_close(tower(pixels).pooler_output, whole, atol=ROUNDING, rtol=0)
    shared, _ = installed(path, "batch")
    assert float((shared(pixels).pooler_output - whole).detach().abs().max()) > 1e-3


def test_a_tower_that_routes_is_put_back_and_can_be_copied(
    bench: Bench, tmp_path: Path, installed: Callable[..., Any]
) -> None:
    tower, handle = installed(mixture(bench, tmp_path, METHODS[1]))
    pixels = bench.pixels["one"]
    torch.testing.assert_close(
        copy.deepcopy(tower)(pixels).pooler_output, tower(pixels).pooler_output, atol=0, rtol=0
    )
    handle.remove()
    assert sorted(tower.state_dict()) == sorted(bench.tower().state_dict())


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("entries", [1, 2, 7, 100, 1001])
def test_pruning_keeps_what_torch_quantile_leaves(density: float, entries: int) -> None:
    magnitudes = torch.rand(entries, generator=torch.Generator().manual_seed(entries)) + 0.1
    want = magnitudes > torch.quantile(magnitudes, 1 - density) if density < 1 else magnitudes > 0
    got = above_quantile(magnitudes, density)
    assert torch.equal(got, want)
    assert int(got.sum()) <= kept_of(entries, density)


def test_equal_entries_are_cut_off_together_and_leave_room(bench: Bench, tmp_path: Path) -> None:
    assert int(above_quantile(torch.ones(10), 0.5).sum()) == 0
    files = {each: mixture(bench, tmp_path, each).stat().st_size for each in METHODS}
    values = load_file(tmp_path / "mixture.safetensors")
    kept = values[f"experts.{VISION}encoder.layers.0.mlp.fc1.weight"]
    assert kept.shape == (3, kept_of(16 * 32, 0.1)) == (3, 52)
    assert files[METHODS[1]] < files[METHODS[0]]


@pytest.mark.parametrize("method", METHODS)
def test_what_was_learnt_is_applied_without_images_to_the_same_bytes(
    bench: Bench, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixture(bench, tmp_path, method)
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(WeightEnsembling, "step", None)
    again = tmp_path / "again.safetensors"
    merge(bench.world.recipe, method=method, output=again, coefficients=tmp_path / "learnt.safetensors")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_learning_that_was_interrupted_ends_with_the_same_bytes(
    bench: Bench, tmp_path: Path, method: str
) -> None:
    def stop(description: str, done: int, total: int) -> None:
        if description.startswith("adapting") and done == 2:
            raise KeyboardInterrupt

    settings = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 3e-3}
    output = tmp_path / "mixture.safetensors"
    with pytest.raises(KeyboardInterrupt):
        merge(bench.world.recipe, method=method, settings=settings, output=output, progress=stop)
    seen: list[int] = []
    merge(
        bench.world.recipe, method=method, settings=settings, output=output,
        progress=lambda description, done, total: seen.append(done) if description.startswith("adapting") else None,
    )  # fmt: skip
    assert seen == [3, 4]
    interrupted = load_file(output)
    for file in (tmp_path / "home" / "coefficients").rglob("*.safetensors"):
        file.unlink()
    merge(bench.world.recipe, method=method, settings=settings, output=output)
    assert_same(interrupted, load_file(output))
