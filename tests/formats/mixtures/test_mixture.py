"""Files of more than one tower that are not what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergecli
from mergecli.runtime.errors import InputError
from tests.support.mixture_scores import LEARNED, WEIGHT, counts

Tensors = dict[str, Tensor]
Lie = Callable[[dict[str, str], Tensors], object]
NAME = "vision_model.post_layernorm.weight"
LIES: dict[str, tuple[str, Lie]] = {
    "an unknown method": ("unknown method `emmr`", lambda about, _: about.update(method="emmr")),
    "no mixture's method": ("not that of a mixture", lambda about, _: about.update(method="average")),
    "one task's own method": (
        "not that of a mixture",
        lambda about, _: about.update(method="tall_mask", settings_table='{"task": "one"}'),
    ),
    "no method": ("not that of a mixture", lambda about, _: about.pop("method")),
    "settings that are no table": (
        "not that of a mixture",
        lambda about, _: about.update(settings_table="[1]"),
    ),
    "settings of a wrong type": (
        "mask_threshold",
        lambda about, _: about.update(method="tall_mask", settings_table='{"mask_threshold": "much"}'),
    ),
    "unknown settings": ("depth", lambda about, _: about.update(settings_table='{"depth": 1}')),
    "settings nested without end": (
        "not that of a mixture",
        lambda about, _: about.update(settings_table="[" * 100_000),
    ),
    "no tasks": ("not that of a mixture", lambda about, _: about.pop("tasks")),
    "an empty list of tasks": ("not that of a mixture", lambda about, _: about.update(tasks="[]")),
    "tasks that are no list": ("not that of a mixture", lambda about, _: about.update(tasks='{"one": 1}')),
    "tasks that are no names": ("", lambda about, _: about.update(tasks="[1, [2], null]")),
    "a task twice": ("not that of a mixture", lambda about, _: about.update(tasks='["one", "two", "one"]')),
    "more tasks than rows": (
        "has shape",
        lambda about, _: about.update(tasks='["one", "two", "three", "four"]'),
    ),
    "another mixture's method": ("lacks tensor `summed.", lambda about, _: about.update(method="tall_mask")),
    "a tensor is missing": (
        f"lacks tensor `masks.{NAME}`",
        lambda _, tensors: tensors.pop(f"masks.{NAME}"),
    ),
    "a shared tensor is missing": (
        f"has an extra tensor `masks.{NAME}`",
        lambda _, tensors: tensors.pop(NAME),
    ),
    "an extra tensor": (
        "has an extra tensor `masks.else`",
        lambda _, tensors: tensors.update({"masks.else": torch.zeros(1)}),
    ),
    "an extra tensor of no known kind": (
        "else`",
        lambda _, tensors: tensors.update({"else": torch.zeros(1)}),
    ),
    "a wrong shape": (
        f"`unified.{NAME}` has shape",
        lambda _, tensors: tensors.update({f"unified.{NAME}": torch.zeros(3)}),
    ),
    "a wrong dtype": (
        f"`masks.{NAME}` has dtype I16",
        lambda _, tensors: tensors.update({f"masks.{NAME}": tensors[f"masks.{NAME}"].short()}),
    ),
    "whole numbers for weights": (f"{NAME}`", lambda _, tensors: tensors.update({NAME: tensors[NAME].int()})),
    "no tensors but the masks": (
        "lacks",
        lambda _, tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith("masks.")],
    ),
    "called a checkpoint": ("has an extra tensor `masks.", lambda about, _: about.update(kind="checkpoint")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_whose_metadata_lies_is_refused_by_name(place: Path, tmp_path: Path, lie: str) -> None:
    what, change = LIES[lie]
    with safe_open(place / "emr.safetensors", "pt") as file:
        metadata: dict[str, str] = file.metadata()
    tensors = load_file(place / "emr.safetensors")
    change(metadata, tensors)
    save_file(tensors, tmp_path / "liar.safetensors", metadata)
    with pytest.raises(InputError, match=r"liar\.safetensors: ") as raised:
        counts(place, tmp_path / "liar.safetensors", limit=3)
    assert what in raised.value.message
    assert raised.value.hint


BITS = f"masks.{WEIGHT}"
OWN_LIES: dict[str, tuple[str, str, Lie]] = {
    f"{method}: {lie}": (method, what, change)
    for method, *lies in (
        ("tall_mask", ("a part is missing", f"lacks tensor `summed.{NAME}`", f"summed.{NAME}")),
        ("tsv_c", ("a factor is missing", f"lacks tensor `right.{WEIGHT}`", f"right.{WEIGHT}")),
        ("smile", ("a factor is missing", f"lacks tensor `right.{WEIGHT}`", f"right.{WEIGHT}")),
        *(
            (each, ("an expert is missing", f"lacks tensor `experts.{WEIGHT}`", f"experts.{WEIGHT}"))
            for each in LEARNED
        ),
    )
    for lie, what, gone in lies
    for change in [lambda _, tensors, gone=gone: tensors.pop(gone)]
}
CONTRADICTIONS: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "every bit is set": (
        rf"`{BITS}`: expected at most 52 bits that are set, one for a value, got 512",
        lambda tensors: tensors[BITS].fill_(255),
    ),
    "no bit is set": (
        rf"`{BITS}`: expected a bit for each value that is not 0, got 0",
        lambda tensors: tensors[BITS].zero_(),
    ),
    "one bit too few in one row": (
        rf"`{BITS}`: expected a bit for each value that is not 0, got \d\d",
        lambda tensors: tensors[BITS][1].__setitem__(int(tensors[BITS][1].nonzero()[0]), 0),
    ),
}


@pytest.mark.parametrize("lie", OWN_LIES)
def test_a_file_that_lacks_a_part_of_its_method_is_refused_by_name(
    place: Path, tmp_path: Path, lie: str
) -> None:
    method, what, change = OWN_LIES[lie]
    file = changed(place, tmp_path, method, change)
    for attempt in (lambda: counts(place, file, limit=3), lambda: mergecli.info(file)):
        with pytest.raises(InputError, match=r"liar\.safetensors: is not what its metadata says") as raised:
            attempt()
        assert what in raised.value.message


@pytest.mark.parametrize("lie", CONTRADICTIONS)
def test_masks_that_are_not_those_of_the_values_are_refused_by_name(
    place: Path, tmp_path: Path, lie: str
) -> None:
    what, change = CONTRADICTIONS[lie]
    file = changed(place, tmp_path, LEARNED[1], lambda _, tensors: change(tensors))
    pool = mergecli.ModelPool({"base": place / "clip", "m": file})
    for attempt in (
        lambda: counts(place, file, limit=3),
        lambda: mergecli.info(f"{file}#two"),
        lambda: pool.load_model("m"),
    ):
        with pytest.raises(InputError, match=rf"liar\.safetensors: {what}\n") as raised:
            attempt()
        assert raised.value.hint


def test_a_file_of_ours_of_a_kind_that_is_not_known_is_refused_as_a_model_and_shown(
    place: Path, tmp_path: Path
) -> None:
    file = changed(place, tmp_path, "emr", lambda about, _: about.update(kind="banana"))
    with pytest.raises(InputError, match=r"liar\.safetensors: its kind: expected .*, got `banana`") as raised:
        counts(place, file)
    assert "a later version" in raised.value.hint
    found = mergecli.info(file)
    assert (found.kind, found.is_model) == ("banana", False)
    save_file(load_file(place / "one.safetensors"), file, {"kind": "banana"})  # another program's
    assert mergecli.info(file).is_model
    assert counts(place, file, limit=3) == counts(place, place / "one.safetensors", limit=3)


def test_what_another_command_left_out_of_a_checkpoint_does_not_keep_it_from_evaluation(
    place: Path, tmp_path: Path
) -> None:
    about = {"mergecli": "0", "kind": "checkpoint", "left_out": '["logit_scale"]'}
    save_file(load_file(place / "one.safetensors"), tmp_path / "m.safetensors", about)
    assert counts(place, tmp_path / "m.safetensors") == counts(place, place / "one.safetensors")


def changed(place: Path, folder: Path, method: str, change: Lie) -> Path:
    """The mixture of a method, of which something is no longer true."""
    with safe_open(place / f"{method}.safetensors", "pt") as file:
        metadata: dict[str, str] = file.metadata()
    tensors = load_file(place / f"{method}.safetensors")
    change(metadata, tensors)
    save_file(tensors, folder / "liar.safetensors", metadata)
    return folder / "liar.safetensors"
