from __future__ import annotations

import numpy as np
import pytest

from mergecli.runtime.counts import count, is_count
from mergecli.runtime.errors import UsageError


@pytest.mark.parametrize("value", [1, 64, np.int64(3), np.uint8(200)])
def test_whole_numbers_are_an_int(value: int) -> None:
    assert (count("limit", value), type(count("limit", value))) == (int(value), int)


@pytest.mark.parametrize("value", [0, 2.0, "2", True, np.float32(2), float("nan"), None])
def test_what_is_no_whole_number_is_refused(value: object) -> None:
    assert not is_count(value)
    with pytest.raises(UsageError) as error:
        count("limit", value)
    assert str(error.value) == f"limit: expected a whole number, at least 1, got {value!r}"
