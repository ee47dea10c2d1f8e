"""The line at the end of a command, on stderr: what was done, what was written where, its digest, seconds, peak memory.

A command tells what it has done with `did` and `wrote`; the line appears when it has ended, also where a threshold was not
met. A command that tells nothing, such as `--help`, has no line.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mergecli.cli import console, spinner
from mergecli.cli.amounts import duration, memory
from mergecli.runtime import verbosity
from mergecli.runtime.distributed import is_first
from mergecli.runtime.errors import MergecliError
from mergecli.runtime.memory import peak_memory


@dataclass
class _Ending:
    began: float = field(default_factory=time.perf_counter)
    done: list[str] = field(default_factory=list[str])
    files: dict[Path, str] = field(default_factory=dict[Path, str])
    """Path -> digest of its content, empty if it is not known yet."""
    beside: list[Path] = field(default_factory=list[Path])


_ending = _Ending()


def begin() -> None:
    """A command begins: nothing is done yet, and its time counts from now."""
    global _ending
    _ending = _Ending()


def did(text: str) -> None:
    """What the command has done, such as `evaluated 3 checkpoints on 8 tasks`."""
    _ending.done.append(text)


def wrote(*paths: Path | str, digest: str = "") -> None:
    """What the command is for: files or folders that it has written, with the digest if it is known."""
    _ending.files |= {Path(each): digest for each in paths}


def wrote_beside(*paths: Path | str | None) -> None:
    """What was written besides, such as a picture; None is none."""
    _ending.beside += [Path(each) for each in paths if each is not None]


def say() -> None:
    """Prints the line, once; after it, with `--verbose`, each of several files with its digest."""
    ending = _ending
    begin()
    if not (ending.done or ending.files or ending.beside) or not is_first():
        return
    spinner.stop()
    seconds = time.perf_counter() - ending.began
    peak = f"peak {memory(peak_memory())}{_peak_of_gpu()}"
    console.remark(", ".join([*ending.done, *_written(ending), duration(seconds), peak]))
    if len(ending.files) > 1 and verbosity.verbose:
        for path, digest in ending.files.items():
            console.detail(f"wrote {_with_digest(path, digest)}")


def _written(ending: _Ending) -> list[str]:
    """`wrote` and one file with its digest, or how many there are and where; then what is beside them."""
    found: list[str] = []
    if len(ending.files) == 1 and not verbosity.quiet:
        found = [_with_digest(*each) for each in ending.files.items()]
    elif ending.files:
        folders = {path.parent for path in ending.files}
        where = f" in {folders.pop()}" if len(folders) == 1 else ""
        found = [f"{len(ending.files):,} files{where}"]
    found += [str(each) for each in ending.beside]
    return ["wrote " + " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))] if found else []


def _with_digest(path: Path, digest: str) -> str:
    digest = digest or _digest(path)
    if digest.startswith("sha256:") and not verbosity.verbose:
        digest = digest[:23]
    return f"{path} ({digest})" if digest else str(path)


def _digest(path: Path) -> str:
    """Of weights the digest that `info` shows, of another file its SHA-256; empty of a folder without weights."""
    import hashlib

    from mergecli.formats.info import info

    with suppress(OSError, MergecliError):
        if path.is_dir() or path.suffix == ".safetensors":
            return info(path).digest
        with path.open("rb") as opened:
            return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
    return ""


def _peak_of_gpu() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    sizes = [torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())]
    return f", GPU {memory(max(sizes, default=0))}"
