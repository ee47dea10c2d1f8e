"""What differs between the tensors of a file and those that were expected."""

from __future__ import annotations

from mergecli.storage.checkpoint import TensorEntry
from mergecli.storage.differences import Form, differences, other_architecture


def entry(dtype: str, *shape: int) -> TensorEntry:
    return TensorEntry(dtype, shape, 0, 0)


def test_missing_extra_reshaped_and_otherwise_typed_tensors_have_a_line_each() -> None:
    have = {"a": entry("F32", 2, 3), "b": entry("I64", 2), "c": entry("F16"), "d": entry("F32")}
    want = {
        "a": Form((3, 2), "F32"),
        "b": Form((2,), "F32", any_float=True),
        "c": Form((), "F32"),
        "e": Form(()),
    }
    assert differences(have, want, "the base has") == [
        "lacks tensor `e`",
        "has an extra tensor `d`",
        "`a` has shape (2, 3), the base has (3, 2)",
        "`b` has dtype I64, the base has F32",
        "`c` has dtype F16, the base has F32",
    ]


def test_what_fits_has_no_lines() -> None:
    have = {"a": entry("F16", 2), "b": entry("U8"), "c": entry("BF16", 1)}
    want = {"a": Form((2,), "F32", any_float=True), "b": Form(()), "c": Form((1,), "BF16")}
    assert differences(have, want) == []


def tower(width: int, layers: int, patch: int = 4) -> dict[str, TensorEntry]:
    """The shapes of a vision transformer."""
    entries = {
        "vision_model.embeddings.class_embedding": entry("F32", width),
        "vision_model.embeddings.patch_embedding.weight": entry("F32", width, 3, patch, patch),
    }
    return entries | {
        f"vision_model.encoder.layers.{layer}.mlp.fc1.weight": entry("F32", 4 * width, width)
        for layer in range(layers)
    }


def wanted(width: int, layers: int, patch: int = 4) -> dict[str, Form]:
    return {name: Form(each.shape) for name, each in tower(width, layers, patch).items()}


def test_another_architecture_is_told_by_width_and_layers() -> None:
    told = "width 64, 2 layers; the base has width 128, 4 layers"
    assert other_architecture(tower(64, 2), wanted(128, 4), "the base has") == told
    told = "width 64, 2 layers; the base has width 64, 12 layers"
    assert other_architecture(tower(64, 2, 16), wanted(64, 12), "the base has") == told


def test_another_architecture_of_the_same_size_is_told_by_what_differs() -> None:
    told = "patches of 16 pixels; the base has patches of 32 pixels"
    assert other_architecture(tower(64, 2, 16), wanted(64, 2, 32), "the base has") == told
    assert other_architecture(tower(64, 2), wanted(64, 2), "the base has") == ""
    assert other_architecture({"a": entry("F32", 2)}, {"a": Form((3,))}, "the base has") == ""


def test_models_without_a_common_name_are_told_by_some_of_their_names() -> None:
    head = {name: TensorEntry("F32", (3,), 0, 0) for name in ("weight", "bias")}
    tower = {f"vision_model.{name}": Form((3,)) for name in "abc"} | {"visual_projection.weight": Form((3,))}
    assert other_architecture(head, tower, "the base has") == (
        "none of the same tensors, but `bias`, `weight`; the base has `vision_model.a`, `vision_model.b` (and 1 more)"
    )
    projection = {"visual_projection.weight": TensorEntry("F32", (3,), 0, 0)}
    assert other_architecture(head | projection, tower).startswith("none of the same tensors, but `bias`")
