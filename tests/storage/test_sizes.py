"""Sizes as users write them."""

from __future__ import annotations

import pytest

from mergecli.runtime.errors import UsageError
from mergecli.storage.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("500", 500), (" 500B ", 500), ("3kb", 3000), ("1.5 GB", 1_500_000_000), ("2T", 2 * 10**12)],
)
def test_a_size_has_a_number_and_maybe_a_unit(text: str, size: int) -> None:
    assert parse_size(text, "size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e3", "5 XB", "0", "0.5", "9" * 400])
def test_what_is_no_size_or_too_small_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--size: expected a size such as `500MB`"):
        parse_size(text, "--size", least=1)
