"""What differs between the tensors of a file and those that were expected."""

from __future__ import annotations

from mergecli.storage.checkpoint import TensorEntry
from mergecli.storage.differences import Form, differences


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
