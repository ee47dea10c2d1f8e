"""Models that do not belong together: every difference in one message, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.merging.merge import merge
from mergecli.runtime.errors import InputError, UsageError
from tests.conftest import Run, World, assert_same


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


def test_what_one_model_alone_has_may_be_left_out(world: World, run: Run) -> None:
    save_file(world.tuned["t1"] | {"head.weight": torch.ones(3)}, world.files["t1"])
    line = ["merge", "t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors"]
    ended = run(*line, "--base", "base.safetensors")
    assert (ended.status, ended.err) == (3, (
        "error: the checkpoints do not fit together:\n  t1: has an extra tensor `head.weight`\n"
        'hint: `leave_out = ["head."]` in the recipe, or with `merge --set`, reads the models without them\n'
    ))  # fmt: skip
    assert run(*line, "--base", "base.safetensors", "--set", 'leave_out=["head."]').status == 0


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
        InputError,
        match=r"the merged values do not fit float16\nhint: use smaller settings, or `--set dtype=float32`",
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


def test_a_head_that_every_model_has_is_named_once_and_left_out_when_asked_for(
    world: World, run: Run
) -> None:
    plain = run("merge", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors",
                "--method", "task_arithmetic", "-o", "plain.safetensors")  # fmt: skip
    for number, name in enumerate(("t1", "t2")):
        head = {"classifier.weight": torch.ones(3 + number, 5), "classifier.bias": torch.ones(3 + number)}
        save_file(world.tuned[name] | head, world.files[name])
    command = ["merge", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "--method",
               "task_arithmetic", "-o", "m.safetensors"]  # fmt: skip
    ended = run(*command)
    assert (plain.status, ended.status) == (0, 3)
    assert ended.err.splitlines() == [
        "error: the checkpoints do not fit together:",
        "  every model has what the base has not, such as a head of its own: `classifier.bias`, `classifier.weight`",
        'hint: `leave_out = ["classifier."]` in the recipe, or with `merge --set`, reads the models without them',
    ]
    assert run(*command, "--set", 'leave_out=["classifier."]').status == 0
    assert_same(load_file(world.folder / "m.safetensors"), load_file(world.folder / "plain.safetensors"))


def test_batches_that_normalization_has_seen_are_the_base_s(world: World) -> None:
    counter = "bn.num_batches_tracked"
    save_file(world.base | {counter: torch.tensor(7)}, world.base_file)
    save_file(world.tuned["t1"] | {counter: torch.tensor(900)}, world.files["t1"])
    save_file(world.tuned["t2"] | {counter: torch.tensor([8], dtype=torch.int32)}, world.files["t2"])
    merge(world.files, base=world.base_file, method="average", output=world.folder / "m.safetensors")
    assert load_file(world.folder / "m.safetensors")[counter].equal(torch.tensor(7))


@pytest.mark.parametrize("lead", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_torch_in_every_name_are_read_through(world: World, lead: str) -> None:
    merge(world.files, base=world.base_file, method="ties", output=world.folder / "plain.safetensors")
    save_file({lead + name: each for name, each in world.tuned["t2"].items()}, world.files["t2"])
    merge(world.files, base=world.base_file, method="ties", output=world.folder / "m.safetensors")
    assert_same(load_file(world.folder / "m.safetensors"), load_file(world.folder / "plain.safetensors"))


def test_names_after_a_beginning_of_their_own_are_said(world: World) -> None:
    save_file({f"net.{name}": each for name, each in world.tuned["t2"].items()}, world.files["t2"])
    with pytest.raises(
        InputError, match=r"hint: .*t2.safetensors has the names of the others after `net.`: save its tensors"
    ):
        merge(world.files, base=world.base_file, method="average", output=world.folder / "m.safetensors")


def tower(width: int, layers: int) -> dict[str, torch.Tensor]:
    """The beginnings of a vision transformer."""
    weights = {"vision_model.embeddings.class_embedding": torch.ones(width)}
    for layer in range(layers):
        weights[f"vision_model.encoder.layers.{layer}.layer_norm1.bias"] = torch.ones(width)
    return weights


def test_another_architecture_is_told_first_and_its_tensors_only_when_asked_for(
    tmp_path: Path, run: Run
) -> None:
    for name, weights in {"base": tower(8, 3), "same": tower(8, 3), "small": tower(4, 2)}.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    line = [
        "merge",
        "same.safetensors",
        "small.safetensors",
        "--base",
        "base.safetensors",
        "--method",
        "ties",
        "-o",
        "m",
    ]
    ended = run(*line)
    assert (ended.status, ended.err.splitlines()) == (3, [
        "error: the checkpoints do not fit together:",
        "  small: width 4, 2 layers; the base has width 8, 3 layers",
        "(`--verbose` shows the details)",
        "hint: merge only models that were fine-tuned from the same base",
    ])  # fmt: skip
    assert run(*line, "--verbose").err.splitlines()[1:4] == [
        "  small: width 4, 2 layers; the base has width 8, 3 layers",
        "  small: lacks tensor `vision_model.encoder.layers.2.layer_norm1.bias`",
        "  small: `vision_model.embeddings.class_embedding` has shape (4,), the base has (8,)",
    ]
