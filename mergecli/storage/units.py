"""The results of units of work: files by key in a hidden folder of the output, or in the cache while there is no such folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from mergecli.runtime import verbosity
from mergecli.runtime.engines.contract import Report, Unit
from mergecli.runtime.errors import InputError
from mergecli.runtime.notes import note
from mergecli.storage.atomic import whole_file, write_errors
from mergecli.storage.cache import cache_path, kept, make_room
from mergecli.storage.checkpoint import Checkpoint

FOLDER = ".units"
"""In the folder of the output."""
LOG = "units.jsonl"
"""Beside it: a line for each unit that was done."""

T = TypeVar("T")


class UnitFiles:
    """Where the results of a command's units are."""

    def __init__(self, output: Path | None, max_size: int, *, what: str = "it is done") -> None:
        """Args:
        output: the command's folder; without it the cache is used, which may take `max_size` bytes.
        what: what a note says of a damaged file: `its images are counted` again.
        """
        self._folder = output / FOLDER if output is not None else None
        self._log = output / LOG if output is not None else None
        self._max_size, self._what = max_size, what
        self._held: dict[str, bytes] = {}

    def path(self, unit: Unit) -> Path:
        """Its file, whether it is there or not."""
        name = f"{unit.key}.safetensors"
        return self._folder / name if self._folder else cache_path("results", unit.key)

    def save(self, unit: Unit, report: Report) -> None:
        """Writes the file whole, and the line about it. What is in the cache is held in memory too, since it may have to make
        room there."""
        if self._folder is not None:
            _write(self.path(unit), report.result)
        else:
            self._held[unit.key] = report.result
            if make_room(len(report.result), self._max_size):
                with contextlib.suppress(InputError):
                    _write(self.path(unit), report.result)
        self.tell(unit, report)

    def read(self, unit: Unit, read: Callable[[Checkpoint], T | None]) -> T | None:
        """What `read` makes of the unit's file; None if there is none, or it is damaged, which is then removed."""
        if unit.key in self._held:
            return _of_bytes(self._held[unit.key], read)
        if self._folder is None and not self._max_size:
            return None
        found = kept(self.path(unit), self._what, read)
        if found is not None and self._folder is None:
            with contextlib.suppress(OSError):
                self._held[unit.key] = self.path(unit).read_bytes()
        return found

    def forget(self, units: Iterable[Unit]) -> None:
        """Removes their files."""
        for unit in units:
            self._held.pop(unit.key, None)
            with contextlib.suppress(OSError):
                self.path(unit).unlink(missing_ok=True)

    def finish(self, units: Iterable[Unit]) -> None:
        """Called when the results are written: in the cache nobody needs the files any more, in the output they stay."""
        if self._folder is None:
            self.forget(units)

    def tell(self, unit: Unit, report: Report) -> None:
        """Writes the line about a unit that was done."""
        if self._log is not None:
            facts = {"node": report.node, "device": report.device, "seconds": round(report.seconds, 3)}
            line = json.dumps({"unit": unit.name, "key": unit.key, **facts}, ensure_ascii=False) + "\n"
            with write_errors(self._log):
                # one write at the end of the file: programs that share the folder do not tear each other's lines
                opened = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                try:
                    os.write(opened, line.encode(errors="backslashreplace"))
                finally:
                    os.close(opened)
        if verbosity.verbose:
            note(f"{unit.name}: {report.node}, {report.device}, {report.seconds:.1f} s")


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def _of_bytes(content: bytes, read: Callable[[Checkpoint], T | None]) -> T | None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="mergecli-unit-") as folder:
        path = Path(folder) / "unit.safetensors"
        path.write_bytes(content)
        return kept(path, "", read)
