"""Results as pandas has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> DataFrame:
    """The rows as a DataFrame.

    Raises:
        UsageError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise UsageError("to_frame: pandas is not installed", "install it: `pip install pandas`") from error
    return pd.DataFrame(list(rows), columns=list(columns))
