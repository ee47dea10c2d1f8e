from __future__ import annotations

import numpy as np
import pytest

from mergecli.runtime.counts import expect_count
from mergecli.runtime.errors import UsageError


@pytest.mark.parametrize("value", [None, 1, 64, np.int64(3)])
def test_whole_numbers_and_nothing_are_taken(value: object) -> None:
    expect_count("limit", value)


@pytest.mark.parametrize("value", [0, 2.0, "2", True, np.float32(2), float("nan")])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(UsageError) as error:
        expect_count("limit", value)
    assert str(error.value) == f"limit: expected a whole number, at least 1, got {value!r}"
