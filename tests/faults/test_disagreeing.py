"""Models that do not belong together: every difference in one message, and nothing written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mergecli.merging.merge import merge
from mergecli.runtime.errors import InputError, UsageError
from tests.conftest import Run, World


def test_missing_extra_and_reshaped_tensors_are_all_listed(world: World, run: Run) -> None:
    first = {k: v for k, v in world.tuned["t1"].items() if k != "scale"} | {"extra": torch.ones(1)}
    second = world.tuned["t2"] | {"layer.0.bias": torch.ones(2), "conv": torch.arange(96).reshape(3, 2, 4, 4)}
    save_file(first, world.files["t1"])
    save_file(second, world.files["t2"])
    before = sorted(world.folder.iterdir())
    ended = run(
        "merge", "--base", "base.safetensors", *[f"t{i}.safetensors" for i in (1, 2, 3)],
        "--method", "average", "-o", "m.safetensors",
    )  # fmt: skip
    assert (ended.status, ended.out) == (3, "")
    assert ended.err.splitlines() == [
        "error: the checkpoints do not fit together:",
        "  t1: lacks tensor `scale`",
        "  t1: has an extra tensor `extra`",
        "  t2: `conv` has dtype I64, the base has F32",
        "  t2: `layer.0.bias` has shape (2,), the base has (7,)",
        "hint: merge only models that were fine-tuned from the same base",
    ]
    assert sorted(world.folder.iterdir()) == before


def test_whole_numbers_must_be_equal(world: World) -> None:
    save_file(world.tuned["t3"] | {"steps": torch.tensor([0, 1, 2, 4])}, world.files["t3"])
    with pytest.raises(
        InputError, match=r"t3: `steps` \(I64\) differs from that of the base, and is not averaged"
    ):
        merge(world.files, base=world.base_file, method="average", output=world.folder / "m.safetensors")


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
@pytest.mark.parametrize(("where", "method"), [("t2", "average"), ("t2", "ties"), ("base", "ties")])
def test_nan_and_infinity_are_named_by_file_task_and_tensor(
    world: World, value: float, word: str, where: str, method: str
) -> None:
    weights = dict(world.base if where == "base" else world.tuned["t2"])
    weights["zz.long"] = weights["zz.long"].clone()
    weights["zz.long"][4321] = value
    save_file(weights, world.folder / f"{where}.safetensors")
    output = world.folder / "m.safetensors"
    with pytest.raises(InputError, match=rf"{where}.safetensors: {where}: `zz.long` has {word}"):
        merge(world.files, base=world.base_file, method=method, output=output)
    assert not output.exists()


def test_large_but_finite_values_are_no_infinity(world: World) -> None:
    for name, file in {**world.files, "base": world.base_file}.items():
        weights = dict(world.base if name == "base" else world.tuned[name])
        weights["zz.long"] = torch.full((5000,), 3e38)
        save_file(weights, file)
    merge(world.files, base=world.base_file, method="task_arithmetic", output=world.folder / "m.safetensors")


def test_a_result_too_large_for_its_dtype_is_refused(world: World) -> None:
    output = world.folder / "m.safetensors"
    with pytest.raises(
        InputError, match=r"the merged values do not fit float16\nhint: use smaller settings, or dtype"
    ):
        merge(
            world.files, base=world.base_file, method="task_arithmetic", settings={"scaling_factor": 1e6},
            changes=["dtype=float16"], output=output,
        )  # fmt: skip
    assert not output.exists()


def test_models_without_any_weights_are_refused(world: World) -> None:
    for file in (world.base_file, *world.files.values()):
        save_file({"steps": torch.arange(3)}, file)
    with pytest.raises(InputError, match="the base has no floating point tensors"):
        merge(world.files, base=world.base_file, method="average", output=world.folder / "m.safetensors")


def test_nothing_to_merge_and_no_base_are_said(world: World) -> None:
    with pytest.raises(UsageError, match="there are no fine-tuned models to merge"):
        merge({}, base=world.base_file, method="average", output=world.folder / "m.safetensors")
    with pytest.raises(UsageError, match="there is no base, and differences to it are needed"):
        merge(world.files, method="ties", output=world.folder / "m.safetensors")
    with pytest.raises(UsageError, match="no method is named"):
        merge(world.files, base=world.base_file, output=world.folder / "m.safetensors")
