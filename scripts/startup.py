"""Milliseconds that each command's --help takes, best of ten."""

from __future__ import annotations

import subprocess
import sys
import time

from mergecli.cli import COMMANDS

BUDGET = 150


def best(arguments: list[str], times: int = 10) -> float:
    """Milliseconds of the fastest of `times` runs."""
    seconds: list[float] = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "mergecli", *arguments, "--help"], check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


for command in [[], *[[each] for each in COMMANDS]]:
    print(f"{best(command):6.0f} ms  mergecli {' '.join([*command, '--help'])}")
print(f"budget {BUDGET} ms")
