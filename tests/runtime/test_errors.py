"""Names that are near, and lists in words."""

from __future__ import annotations

import pytest

from mergecli.runtime.errors import did_you_mean, either, nearest


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("densty", ["density", "dropout"], "density"),
        ("TA8", ["ta8", "ta14"], "ta8"),
        ("scaling-factor", ["density", "scaling_factor"], "scaling_factor"),
        ("fp16", ["float32", "float16", "bfloat16"], "float16"),
        ("bf16", ["float32", "float16", "bfloat16"], "bfloat16"),
        ("zzz", ["density"], ""),
    ],
)
def test_case_and_dashes_make_no_difference_to_what_was_meant(
    name: str, known: list[str], meant: str
) -> None:
    assert nearest(name, known) == meant
    assert did_you_mean(name, known) == (f" (did you mean `{meant}`?)" if meant else "")


def test_alternatives_are_listed_with_or() -> None:
    assert (either([]), either([".md"]), either([".md", ".tex", ".csv"])) == ("", ".md", ".md, .tex or .csv")
