"""Sweeps: one merge for each value, every pass shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergecli
from mergecli import methods
from mergecli.merging.sweep_points import merge_sweep, parse_axis, points_of
from mergecli.methods import TwoPass
from mergecli.runtime.errors import UsageError
from tests.conftest import Run, World


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("method.scaling_factor=0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        ("method.scaling_factor=1:0:-0.5", (1.0, 0.5, 0.0)),
        ("method.steps=1:5:2", (1, 3, 5)),
        ("method.density = 0.1, 0.2", (0.1, 0.2)),
        ("method.name=ties,average", ("ties", "average")),
        ("method.weights={ a = 1, b = 2 },{ a = 2, b = 1 }", ({"a": 1, "b": 2}, {"a": 2, "b": 1})),
        ("method.weights=[1, 2],[3, 4]", ([1, 2], [3, 4])),
    ],
)
def test_an_axis_is_a_range_or_a_list(text: str, values: tuple[object, ...]) -> None:
    assert parse_axis(text).values == values


@pytest.mark.parametrize(
    "text",
    [
        "method.density", "method.weights=[1", "density=0.1", "method.=1", "method.density=", "method.density=0:1:0",
        "method.density=1:0:0.1", "method.density=a:b:c", "method.density=0.1,0.1", "method.density=0:1:0.0001", "dtype=float16",
    ],
)  # fmt: skip
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^sweep `"):
        parse_axis(text)


RANGE = "expected `FIRST:LAST:STEP`, such as 0.1:1.0:0.1"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("density=0.1,0.2", "expected `method.SETTING=FIRST:LAST:STEP` or `method.SETTING=VALUE,VALUE,...` "
         "(did you mean `method.density=0.1,0.2`?)"),
        ("method.density=0.1:0.5", RANGE),
        ("method.density=a:b:c", RANGE),
        ("method.density=0.5:0.1:0.1", f"{RANGE}: no steps of 0.1 lead from 0.5 to 0.1"),
        ("method.density=0.1:0.3:1", f"{RANGE}: no steps of 1 lead from 0.1 to 0.3"),
        ("method.density=0:1:0.0001", "has 10,001 values, of which at most 1,000 are allowed"),
    ],
)  # fmt: skip
def test_what_is_no_axis_is_told_why(text: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_axis(text)
    assert str(error.value) == f"sweep `{text}`: {what}"


SURVEYING = [
    name
    for name in methods.names()
    if issubclass(methods.find(name), TwoPass) and "scaling_factor" in methods.settings(name)
]


@pytest.mark.parametrize("name", [*SURVEYING, "task_arithmetic", "tsv_m", "dare"])
def test_each_point_is_what_a_merge_by_itself_gives(name: str, world: World, tmp_path: Path) -> None:
    files: dict[str, str | Path] = dict(world.files)
    setting = "of" if "of" in methods.settings(name) else "scaling_factor"
    values = '{ name = "ties" },{ name = "average" }' if setting == "of" else "0.2,0.7"
    points = points_of(files, [f"method.{setting}={values}"], base=world.base_file, method=name)
    for point, merged in zip(points, merge_sweep(points, tmp_path / "swept"), strict=True):
        mergecli.merge(point.recipe, output=tmp_path / "alone.safetensors")
        assert merged.path.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_a_sweep_over_methods_and_settings_writes_a_file_a_point(world: World, run: Run) -> None:
    ended = run(
        "merge", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "--sweep", "method.name=ties,task_arithmetic",
        "--sweep", "method.scaling_factor=0.1:0.2:0.1", "-o", "swept",
    )  # fmt: skip
    names = [
        f"{method},scaling_factor-{value}" for method in ("ties", "task_arithmetic") for value in (0.1, 0.2)
    ]
    assert (ended.status, ended.out, ended.err) == (
        0,
        "".join(f"swept/{name}.safetensors\n" for name in names),
        "",
    )
    assert sorted(file.stem for file in (world.folder / "swept").iterdir()) == sorted(names)


def test_a_value_that_does_not_fit_writes_nothing(world: World, run: Run) -> None:
    ended = run(
        "merge", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "--method", "ties", "--sweep",
        "method.density=0.5,1.5", "-o", "swept",
    )  # fmt: skip
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "error: --sweep: `method.density`: expected a number in (0, 1], got 1.5\n"
    assert not (world.folder / "swept").exists()


def test_a_method_that_looks_at_images_cannot_be_changed_by_another(world: World, run: Run) -> None:
    ended = run(
        "merge", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "--method", "lines", "--set",
        'method.of={ name = "fisher" }', "-o", "m.safetensors",
    )  # fmt: skip
    assert (ended.status, ended.out) == (2, "")
    assert "`method.of.name`: `fisher` looks at images, and cannot be changed by another method" in ended.err


def test_a_sweep_over_settings_by_layer_has_a_point_for_each(world: World) -> None:
    lines = "[{ match = 'layer', scaling_factor = 0.1 }, { match = 'zz*', scaling_factor = 0.2 }]"
    over = ["method.layers[0].scaling_factor=0.5,0.6", "method.layers[1].scaling_factor=0.7"]
    points = points_of(
        world.files, over, base=world.base_file, method="task_arithmetic", changes=[f"method.layers={lines}"]
    )
    assert [point.name for point in points] == [
        "task_arithmetic,layers0.scaling_factor-0.5,layers1.scaling_factor-0.7",
        "task_arithmetic,layers0.scaling_factor-0.6,layers1.scaling_factor-0.7",
    ]
    merges = merge_sweep(points, world.folder / "swept")
    got = load_file(merges[1].path)
    for name, scale in (("layer.0.bias", 0.6), ("zz.long", 0.7), ("conv", 0.3)):
        want = world.base[name] + scale * sum(each[name] - world.base[name] for each in world.tuned.values())
        assert torch.allclose(got[name], want, atol=1e-6)
