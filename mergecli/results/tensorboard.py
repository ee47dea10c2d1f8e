"""Traces for TensorBoard; needs the extra `tensorboard`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.runtime.errors import UsageError
from mergecli.storage.atomic import whole_folder

if TYPE_CHECKING:
    from mergecli.results.tables import Table

_SUFFIX = ".mergecli"


def require_tensorboard() -> None:
    """Raises UsageError if tensorboard is not installed; called before any work."""
    if find_spec("tensorboard") is None:
        raise UsageError("there is no tensorboard", 'install it: `pip install "mergecli[tensorboard]"`')


def write_tensorboard(folder: Path, table: Table) -> None:
    """Writes a TensorBoard run: a scalar for each column of numbers after the first, which is `step`.

    A column `loss digits` becomes `loss/digits`, so that TensorBoard groups the losses. Cells without a number are left
    out. Our previous run in the folder is replaced; other files stay.

    Raises:
        UsageError: tensorboard is not installed. InputError: the folder cannot be written.
    """
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    if table.columns[0].name != "step":
        raise ValueError(f"expected `step` as the first column, got `{table.columns[0].name}`")
    before = list(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
    with whole_folder(folder, [file.name for file in before]) as written:
        with SummaryWriter(str(written), filename_suffix=_SUFFIX) as writer:
            for step, *cells in table.rows:
                for column, cell in zip(table.columns[1:], cells, strict=True):
                    value: Any = cell
                    while hasattr(value, "value"):  # an interval, or a cell with its own unit
                        value = value.value
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        writer.add_scalar(column.name.replace(" ", "/", 1), value, int(str(step)))
        for file in before:
            file.unlink(missing_ok=True)
