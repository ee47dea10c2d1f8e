from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.formats.info import info
from mergecli.merging.rebase import Transport
from mergecli.merging.taskvector import taskvector
from mergecli.methods._base import Group
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from tests.conftest import World, random_weights


@pytest.fixture
def other(world: World) -> Path:
    """Another base; one of its tensors is that of the first."""
    weights = random_weights(9, world.base, step=0.3) | {"conv": world.base["conv"]}
    save_file(weights, world.folder / "other.safetensors")
    return world.folder / "other.safetensors"


def moved(world: World, other: Path, transport: str | None) -> dict[str, Tensor]:
    (path,) = taskvector(
        world.files["t1"],
        output=world.folder / "moved.safetensors",
        rebase=(world.base_file, other),
        transport=transport,
    )
    return load_file(path)


def vector(world: World) -> dict[str, Tensor]:
    every = world.tuned["t1"]
    return {key: each - world.base[key] for key, each in every.items() if each.is_floating_point()}


def test_identity_keeps_the_task_vector_and_says_whose_it_is_now(world: World, other: Path) -> None:
    got = moved(world, other, "identity")
    assert got.keys() == vector(world).keys()
    assert all(each.equal(vector(world)[key]) for key, each in got.items())
    with open_checkpoint(world.folder / "moved.safetensors") as found, open_checkpoint(other) as goal:
        assert found.is_task_vector
        assert found.metadata["transport"] == "identity"
        inputs = json.loads(found.metadata["inputs"])
        assert inputs["base"] == goal.digest()
    with open_checkpoint(world.base_file) as start:
        assert inputs["moved from"] == start.digest()


def test_orthogonal_takes_out_what_lies_along_the_way_between_the_bases(world: World, other: Path) -> None:
    got, tau, theirs = moved(world, other, None), vector(world), load_file(other)
    for key, each in got.items():
        way = (theirs[key] - world.base[key]).double().flatten()
        assert abs(float(each.double().flatten() @ way)) <= 1e-5 * float(way.norm()) * float(tau[key].norm())
        rest = (tau[key] - each).double().flatten()
        if each.numel() > 1:  # what is taken out is a multiple of the way
            assert float((rest - way * (rest @ way) / (way @ way).clamp(min=1e-30)).abs().max()) < 1e-6
    assert got["conv"].equal(tau["conv"])  # both bases have the same
    assert not got["scale"].abs() > 1e-7  # of one entry, all lies along the way


@pytest.mark.parametrize("name", ["gradient_sign", "gradient_force"])
def test_signs_of_the_gradient_mask_or_are_forced(name: str) -> None:
    transport = Transport(name, parse_source("a", Path()), parse_source("b", Path()))
    tau, sign = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0]), torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    want = {"gradient_sign": [1.0, 0.0, 0.0, -4.0, 0.0], "gradient_force": [1.0, 2.0, -3.0, -4.0, 0.0]}[name]

    def move(values: Tensor, key: str = "w") -> Tensor:
        group = Group(key, torch.zeros(5), torch.stack([values, torch.ones(5)]), (True, False), ("t", "b"))
        return transport.move(group, {"w": sign})

    assert move(tau).tolist() == want
    assert move(move(tau)).tolist() == want
    assert move(tau, "without a gradient").equal(tau)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_loss_at_the_goal(tmp_path: Path) -> None:
    from mergecli.training.finetune import finetune

    finetune(base="toy:base", task="digits", output=tmp_path / "b.safetensors", steps=2, learning_rate=1e-4)
    rebase = ("toy:base", tmp_path / "b.safetensors")
    options: dict[str, Any] = {"rebase": rebase, "examples": 8}
    (kept,) = taskvector(
        "toy:letters", output=tmp_path / "letters.safetensors", transport="gradient_sign", **options
    )
    (forced,) = taskvector(
        "toy:letters", output=tmp_path / "f.safetensors", transport="identity", rebase=rebase
    )
    share = sum(int((each != 0).sum()) for each in load_file(kept).values())
    whole = sum(int((each != 0).sum()) for each in load_file(forced).values())
    assert 0.3 < share / whole < 0.95
    assert info(kept).metadata["transport"] == "gradient_sign"
    with pytest.raises(UsageError, match="unknown task `x`"):
        taskvector("x=toy:letters", output=tmp_path / "x.safetensors", transport="gradient_sign", **options)


def test_a_base_of_other_shapes_is_refused_with_the_reason(world: World) -> None:
    goal = world.folder / "wide.safetensors"
    save_file({**world.base, "layer.0.bias": torch.zeros(8)}, goal)
    with pytest.raises(InputError) as error:
        moved(world, goal, "identity")
    assert error.value.message == (
        f"{goal}: a task vector of {world.base_file} cannot be moved to it:\n"
        f"  `layer.0.bias` has shape (8,), {world.base_file} has (7,)"
    )
    assert error.value.hint.startswith("both bases must have the same architecture")


def test_a_task_vector_of_a_third_base_is_moved_with_a_warning(world: World, other: Path) -> None:
    (path,) = taskvector(world.files["t1"], base=world.files["t2"], output=world.folder / "v.safetensors")
    with pytest.warns(MergecliWarning, match=r"`v` is a task vector of another base \(xxh3:"):
        taskvector(path, output=world.folder / "w.safetensors", rebase=(world.base_file, other))
    with pytest.raises(InputError, match=r"v.safetensors: is a task vector, a base was expected"):
        taskvector(world.files["t1"], output=world.folder / "w.safetensors", rebase=(world.base_file, path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transport": "identity"}, "transport: is for task vectors that are moved"),
        ({"examples": 8}, "examples: is for task vectors that are moved"),
        ({"rebase": ("a",)}, "rebase: expected two bases, FROM and TO, got 1"),
        ({"rebase": ("a", "b"), "base": "a"}, "base: `--rebase FROM TO` names both bases"),
        ({"rebase": ("a", "b"), "quantize": 4}, "quantize: a task vector is moved as it is"),
        ({"rebase": ("a", "b"), "examples": 8}, "examples: `orthogonal` looks at no images"),
        (
            {"rebase": ("a", "b"), "transport": "gradient_sign", "examples": -1},
            "examples: expected a whole number, at least 1, got -1",
        ),
        (
            {"rebase": ("a", "b"), "transport": "identiy"},
            "transport: expected one of identity, orthogonal, gradient_sign, gradient_force, got `identiy` "
            "(did you mean `identity`?)",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(world: World, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        taskvector(world.files["t1"], output=world.folder / "v.safetensors", **given)
    assert error.value.message == message
