"""Methods of several towers: files written from groups made by hand, towers read back from them, layers that route."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergecli import methods
from mergecli.methods._base import Group, PerTensor, TwoPass
from mergecli.methods._bitmasks import pack, packed_size, unpack
from mergecli.methods._mixture import Conditioned, Installed, Mixture, Routed, outcomes
from mergecli.methods._smile_layers import SmileLinear
from tests.conftest import Weights, assert_same, random_weights
from tests.golden import naive, naive_mixtures, naive_more
from tests.golden.layers import layered_weights

BASE = {**layered_weights(0), **random_weights(0)}
TUNED = [{**layered_weights(i, BASE), **random_weights(i, BASE)} for i in (1, 2, 3)]
"""Three models with tensors of every awkward shape."""
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "same": torch.float32}


class InMemory:
    """One pass after another over models in memory, as methods see it."""

    def __init__(self, base: Weights, tuned: Sequence[Weights]) -> None:
        self.base, self.tuned = base, tuned
        self.tensors = sorted(name for name, value in base.items() if value.is_floating_point())

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        tasks = tuple(f"t{number}" for number, _ in enumerate(self.tuned, 1))
        for name in self.tensors:
            rows = torch.stack([model[name] for model in self.tuned])
            yield Group(name, self.base[name].clone(), rows, (False,) * len(rows), tasks)

    def map(self, look: Callable[[Group], Any], sample: int = 1) -> Iterator[Any]:
        return map(look, self(sample))


def written(method: methods.Method, base: Weights, tuned: Sequence[Weights]) -> Weights:
    """The file's tensors: just those that the method announces, of the shapes and dtypes it announces."""
    assert isinstance(method, Mixture)
    groups, tasks = InMemory(base, tuned), len(tuned)
    learnt = method.survey(groups) if isinstance(method, TwoPass) else None
    result: Weights = {}
    for group in groups():
        result |= outcomes(method, group, learnt)
    result |= method.values(learnt)
    shapes = {name: tuple(base[name].shape) for name in groups.tensors}
    parts = method.extras(shapes, tasks)
    for name, shape in shapes.items():
        parts |= method.parts(name, shape, tasks)
    assert {key: (each.dtype, tuple(each.shape)) for key, each in result.items()} == {
        key: (DTYPES[part.dtype], part.shape) for key, part in parts.items()
    }
    assert all(bool(each.isfinite().all()) for each in result.values())
    return result


def towers(name: str, base: Weights, tuned: Sequence[Weights], **settings: Any) -> list[Weights]:
    """Every task's tower, read from the file that a method writes."""
    method = methods.create(name, settings)
    assert isinstance(method, Mixture)
    read = written(method, base, tuned).__getitem__
    names = InMemory(base, tuned).tensors
    return [{each: method.weights(each, place, read) for each in names} for place, _ in enumerate(tuned)]


def all_same(got: Sequence[Weights], want: Sequence[Weights], atol: float = 0.0) -> None:
    for one, other in zip(got, want, strict=True):
        assert_same(one, other, atol)


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 9, 5000])
def test_masks_come_back_from_bits(entries: int) -> None:
    mask = torch.rand(3, entries, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = pack(mask)
    assert bits.shape == (3, packed_size(entries))
    assert unpack(bits, entries).equal(mask)
    assert unpack(bits[1], entries).equal(mask[1])


def test_emr_equals_the_naive_one() -> None:
    all_same(towers("emr", BASE, TUNED), naive_mixtures.emr(BASE, TUNED), atol=1e-6)


def test_emr_of_one_task_is_that_tasks_tower() -> None:
    method = methods.create("emr", {})
    assert written(method, BASE, TUNED[:1])["rescalers"].tolist() == [1.0]
    all_same(towers("emr", BASE, TUNED[:1]), [naive.floats(TUNED[0])], atol=1e-6)


def test_emr_by_hand() -> None:
    base = {"w": torch.zeros(4)}
    tuned = [{"w": torch.tensor([1.0, -2, 0, 3])}, {"w": torch.tensor([2.0, 1, 0, -3])}]
    file = written(methods.create("emr", {}), base, tuned)
    assert file["unified.w"].tolist() == [2, -2, 0, -3]  # of 3 and -3 that cancel, the negative one
    assert unpack(file["masks.w"], 4).int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    assert file["rescalers"].tolist() == pytest.approx([6 / 4, 6 / 5])
    assert towers("emr", base, tuned)[0]["w"].tolist() == [3, -3, 0, 0]


def test_emr_of_a_task_with_no_sign_of_its_own_gives_the_base() -> None:
    base, far = {"w": torch.zeros(3)}, {"w": torch.full((3,), 5.0)}
    got = towers("emr", base, [far, {"w": -torch.ones(3)}, base])
    all_same(got, [far, base, base])


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_tall_masks_of_all_tasks_are_those_of_each(threshold: float) -> None:
    got = towers("tall_mask", BASE, TUNED, mask_threshold=threshold)
    want = [naive_more.tall_mask(BASE, TUNED, place, threshold) for place in range(3)]
    all_same(got, want, atol=1e-6)
    for place, tower in enumerate(got):
        one = methods.create("tall_mask", {"task": f"t{place + 1}", "mask_threshold": threshold})
        assert isinstance(one, Mixture)
        assert not one.is_mixture
        assert one.by_blocks
        plain: Weights = {}
        for group in InMemory(BASE, TUNED)():
            plain |= outcomes(one, group, None)
        assert_same(tower, plain)


def test_a_mask_threshold_of_zero_keeps_what_a_task_changed() -> None:
    got = towers("tall_mask", BASE, TUNED, mask_threshold=0)
    all_same(got, [naive.task_arithmetic(BASE, TUNED, 1.0)] * 3, atol=1e-6)


@pytest.mark.parametrize("fraction", [None, 0.1, 0.4, 1.0])
def test_tsv_c_equals_the_naive_one(fraction: float | None) -> None:
    settings = {} if fraction is None else {"rank_fraction": fraction}
    got = towers("tsv_c", BASE, TUNED, **settings)
    all_same(got, naive_mixtures.tsv_c(BASE, TUNED, fraction), atol=1e-6)
    if fraction == 1:
        all_same(got, [naive.floats(model) for model in TUNED], atol=1e-6)


def test_tsv_c_of_task_vectors_of_low_rank_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"fc.weight": torch.randn(40, 30, generator=generator)}
    factors = [[torch.randn(size, 4, generator=generator) for size in (40, 30)] for _ in range(5)]
    tuned = [{"fc.weight": base["fc.weight"] + 0.1 * left @ right.T} for left, right in factors]
    file = written(methods.create("tsv_c", {}), base, tuned)
    assert file["left.fc.weight"].shape == (5, 40, 6)
    all_same(towers("tsv_c", base, tuned), tuned, atol=1e-5)


def test_a_position_embedding_is_a_matrix_if_it_is_said_to_be() -> None:
    name = "embeddings.position_embedding.weight"
    for setting, key in (("table", f"deltas.{name}"), ("matrix", f"right.{name}")):
        assert key in written(methods.create("tsv_c", {"position_embedding": setting}), BASE, TUNED)


@pytest.mark.parametrize("name", ["emr", "tall_mask", "tsv_c"])
def test_files_in_half_precision_give_towers_in_float32(name: str) -> None:
    method = methods.create(name, {})
    assert isinstance(method, Conditioned)
    file = written(method, BASE, TUNED)
    want = towers(name, BASE, TUNED)
    half = {key: each.bfloat16() if each.dtype.is_floating_point else each for key, each in file.items()}
    half |= method.values(method.survey(InMemory(BASE, TUNED)) if isinstance(method, TwoPass) else None)
    got = [{each: method.weights(each, place, half.__getitem__) for each in want[0]} for place in range(3)]
    all_same(got, want, atol=0.06)  # bfloat16 keeps 8 bits of weights up to 8


@pytest.mark.parametrize("name", ["emr", "tall_mask", "tsv_c", "smile"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (4, 3), (2, 3, 2, 2)])
def test_tasks_equal_to_the_base_have_its_tower_whatever_its_shapes(
    name: str, shape: tuple[int, ...]
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    base = {"patch": value, "mlp.fc1.weight": value, "q_proj.bias": value}
    for tasks in (1, 13):
        all_same(towers(name, base, [base] * tasks), [base] * tasks)


class Tower(nn.Module):
    """Linear layers of the names that are upscaled, and one of another."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q_proj = nn.Linear(12, 20)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(20, 9), "fc2": nn.Linear(9, 6, bias=False)})
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = self.mlp["fc1"](self.q_proj(inputs).tanh()).tanh()
        return self.head(self.norm(self.mlp["fc2"](inner)))


LAYERS = ("mlp.fc1", "mlp.fc2", "q_proj")


def inputs(images: int = 8) -> Tensor:
    return torch.randn(images, 7, 12, generator=torch.Generator().manual_seed(2))


def tuned_towers(tasks: int, base: nn.Module) -> list[Weights]:
    """Weights near the base's, of other directions for each task."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: value + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in base.state_dict().items()
        }
        for _ in range(tasks)
    ]


def upscaled(tower: nn.Module, tuned: Sequence[Weights], prefix: str = "", **settings: Any) -> Installed:
    """Layers that route, in the tower."""
    method = methods.create("smile", settings)
    assert isinstance(method, Routed)
    assert isinstance(method, PerTensor)
    base = {f"{prefix}{name}": value.clone() for name, value in tower.state_dict().items()}
    file = written(method, base, [{f"{prefix}{k}": v for k, v in model.items()} for model in tuned])
    for name, value in tower.state_dict().items():
        value.copy_(file[f"{prefix}{name}"])
    names = [f"t{number}" for number, _ in enumerate(tuned, 1)]
    return method.install(tower, file.__getitem__, names, "sample", prefix)


@pytest.mark.parametrize(
    ("rank", "gate_rank", "experts"), [(4, 1, 1), (4, 3, 2), (99, 1, 1), (5, 2, 3), (3, 1, 9)]
)
@torch.no_grad()
def test_smile_equals_the_naive_one(rank: int, gate_rank: int, experts: int) -> None:
    tower = Tower(1)
    base, tuned = {k: v.clone() for k, v in tower.state_dict().items()}, tuned_towers(3, tower)
    installed = upscaled(
        tower, tuned, "vision_model.", rank=rank, gate_rank=gate_rank, experts_per_token=experts
    )
    for model in (base, *tuned):
        model["mlp.fc2.bias"] = torch.zeros(6)
    for layer in LAYERS:
        module = tower.get_submodule(layer)
        assert isinstance(module, SmileLinear)
        x = torch.randn(4, 7, module.in_features, generator=torch.Generator().manual_seed(4))
        want, routes = naive_mixtures.smile(base, tuned, layer, x, rank, gate_rank, experts)
        assert float((module(x) - want).abs().max()) < 5e-6
        assert float((installed.routes()[layer] - routes.mean(1)).abs().max()) < 1e-6


@pytest.mark.parametrize("tasks", [1, 3])
@torch.no_grad()
def test_smile_of_equal_tasks_and_full_rank_is_their_tower(tasks: int) -> None:
    tower, tuned_tower = Tower(1), Tower(1)
    tuned = tuned_towers(1, tower)
    tuned_tower.load_state_dict(tuned[0])
    upscaled(tower, tuned * tasks, average_others=True)
    assert float((tower(inputs()) - tuned_tower(inputs())).abs().max()) < 1e-5
    method = methods.create("smile", {"average_others": True})
    assert_same(towers("smile", Tower(1).state_dict(), tuned, average_others=True)[0], tuned[0], atol=1e-6)
    assert hash(method) == hash(methods.create("smile", {"average_others": True}))


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


def test_smile_needs_a_gate_within_its_rank() -> None:
    with pytest.raises(methods.SettingsError) as caught:
        methods.create("smile", {"rank": 2, "gate_rank": 3}, ("t1",))
    assert caught.value.problems == (("gate_rank", "expected at most `rank`, 2, got 3"),)


@torch.no_grad()
def test_smile_routes_the_linear_layers_of_a_clip_tower(tmp_path: Path) -> None:
    from mergecli.clip.model import load_clip
    from tests.tiny import make_tiny_clip

    tower = load_clip(make_tiny_clip(tmp_path)).tower
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    tuned, tuned_tower = tuned_towers(1, tower), copy.deepcopy(tower)
    linear = {name: value for name, value in tuned[0].items() if "_proj" in name or ".fc" in name}
    tuned_tower.load_state_dict(linear, strict=False)
    installed = upscaled(tower, tuned, "vision_model.")
    got = tower(pixel_values=pixels).pooler_output
    assert float((got - tuned_tower(pixel_values=pixels).pooler_output).abs().max()) < 1e-5
    ends = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{each}_proj" for each in ("k", "out", "q", "v")))
    assert sorted(installed.routes()) == [f"encoder.layers.{n}.{each}" for n in (0, 1) for each in ends]
