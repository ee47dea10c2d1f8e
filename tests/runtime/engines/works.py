"""Work that workers of tests do; they import it."""

from __future__ import annotations

import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from mergecli.runtime.engines.contract import Unit
from mergecli.runtime.errors import InputError, MergecliWarning


@dataclass(frozen=True)
class Echo:
    """Gives back the unit's name; a unit called `bad` fails, `bug` breaks, `lost` is lost as often as its file has no line
    for, `slow` takes long, `loud` warns and prints, `who` tells its process."""

    folder: Path
    device: str = "cpu"

    def expect_sources(self) -> None:
        if (self.folder / "lacking").exists():
            raise InputError("data.parquet: no such file or folder", "copy it")

    def leave(self) -> None:
        (self.folder / "left").touch()

    def __call__(self, unit: Unit) -> bytes:
        name = unit.of[0]
        if name == "bad":
            raise InputError("bad.safetensors: is damaged", "fetch it again")
        if name == "bug":
            raise ZeroDivisionError("none")
        if name == "lost":
            lives = self.folder / "lives"
            if lives.stat().st_size:
                lives.write_bytes(lives.read_bytes()[1:])
                os.kill(os.getpid(), signal.SIGKILL)
        if name == "slow":
            (self.folder / f"{os.getpid()}.pid").touch()
            time.sleep(600)
        if name == "who":
            return str(os.getpid()).encode()
        if name == "loud":
            print("a library talks")
            warnings.warn("something odd", MergecliWarning, stacklevel=1)
        return f"{name} {os.environ.get('CUDA_VISIBLE_DEVICES')}".encode()
