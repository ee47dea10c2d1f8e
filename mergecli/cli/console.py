"""Everything that is printed: data on stdout, messages and progress on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, TYPE_CHECKING, TextIO

from mergecli.cli import spinner
from mergecli.cli.commands import COMMANDS
from mergecli.cli.progress import Bars, Lines
from mergecli.runtime import notes, verbosity
from mergecli.runtime.distributed import is_first
from mergecli.runtime.errors import MergecliWarning, UsageError, did_you_mean
from mergecli.runtime.visible import visible, visible_message

if TYPE_CHECKING:
    from pathlib import Path

    from mergecli.results.tables import Table
    from mergecli.runtime.progress import Progress


def line(text: str) -> None:
    """A line of data on stdout, or several."""
    spinner.stop()
    print(visible(text, keep="\n\t"))


def prose(text: str) -> None:
    """Sentences on stdout; on a terminal long lines are wrapped between words."""
    width = _width()
    if width is None:
        line(text)
        return
    from mergecli.cli.layout import prose

    line(prose(visible(text, keep="\n\t"), width))


def path(written: Path) -> None:
    """A path on stdout: as it is for programs, even if it is no Unicode, and without control characters on a terminal."""
    spinner.stop()
    if sys.stdout.isatty():
        line(str(written))
        return
    sys.stdout.flush()
    try:
        sys.stdout.buffer.write(os.fsencode(written) + b"\n")
    except AttributeError:  # a stream of text only, in place of stdout
        print(written)


def json(content: object) -> None:
    """Data on stdout as JSON, in which control characters are escapes."""
    import json as library

    def safe(each: str) -> str:
        return each if each == "\n" or visible(each) == each else library.dumps(each)[1:-1]

    spinner.stop()
    print("".join(map(safe, library.dumps(content, indent=2, ensure_ascii=False))))


def remark(text: str) -> None:
    """A message without any word before it, on stderr, unless all is to be quiet."""
    if not verbosity.quiet:
        _print(visible_message(text))


def plain(text: str) -> None:
    """A message without any word before it, on stderr."""
    _print(visible_message(text))


def detail(text: str) -> None:
    """What few want to know, on stderr, only with `--verbose`; of several processes only the first says it."""
    if verbosity.verbose and is_first():
        _print(visible_message(text))


def warning(text: str) -> None:
    """Something the user should know, on stderr; of several processes only the first says it."""
    if is_first():
        _print(f"{_painted('warning:', '33', sys.stderr)} {visible_message(text)}")


def note(text: str) -> None:
    """A remark on the results, on stderr, unless all is to be quiet; of several processes only the first says it."""
    if is_first() and not verbosity.quiet:
        _print(f"note: {visible_message(text)}")


def error(message: str, hint: str = "", details: str = "") -> None:
    """What went wrong and, after `hint:`, the cure, on stderr; details with `--verbose`.

    Each of several processes says its own, since only one of them may have failed; all but the first say who they are.
    """
    spinner.stop()
    who = "" if is_first() else f"process {os.environ['RANK']}: "
    lines = [f"{who}{_painted('error:', '31', sys.stderr)} {visible_message(message)}"]
    if details:
        lines.append(visible_message(details) if verbosity.verbose else "(`--verbose` shows the details)")
    if hint:
        lines.append(f"{who}{_painted('hint:', '36', sys.stderr)} {visible_message(hint)}")
    _print("\n".join(lines))


def traceback() -> None:
    """The traceback of the exception that is being handled, on stderr."""
    import traceback as library

    _print(visible(library.format_exc(), keep="\n\t").rstrip("\n"))


def _print(text: str) -> None:
    try:
        with spinner.cleared():
            print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody reads stderr any more, or its disk is full: no reason to end the work
        drop_output(2)


@contextmanager
def warnings_of_ours() -> Generator[None]:
    """Prints the package's own Python warnings as `warning:` lines and its notes as `note:` lines, each text once."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if issubclass(category, MergecliWarning):
            warning(str(message))
        elif file is None:
            text = warnings.formatwarning(message, category, filename, lineno, line)
            _print(visible(text, keep="\n\t").rstrip("\n"))
        else:
            others(message, category, filename, lineno, file, line)

    _clean_logs()
    with warnings.catch_warnings(), notes.heard_by(note):
        warnings.simplefilter("default", MergecliWarning)
        others, warnings.showwarning = warnings.showwarning, show
        yield


def _clean_logs() -> None:
    """What libraries log, and nobody handles, goes to stderr without control characters."""
    import logging

    class Visible(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return visible(super().format(record), keep="\n\t")

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Visible())


def drop_output(stream: int = 1) -> None:
    """Discards everything that is printed from now on to stdout, or to stderr (2), since its reader has gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream)


def table(content: Table, form: str | None, drawn: Sequence[Table] = ()) -> None:
    """The table on stdout: drawn on a terminal, TSV in a pipe, or in the format asked for.

    Args:
        drawn: the same as several tables, each with a title, for terminals.
    """
    spinner.stop()
    if form is None:
        form = "table" if sys.stdout.isatty() else "tsv"
    if form == "table":
        _draw(drawn or [content])
    else:
        sys.stdout.write(content.text(form))


def check_format(form: str | None) -> str | None:
    """The format of `--format`; raises UsageError if there is no such format. Called before any work."""
    from mergecli.results.tables import FORMATS

    if form is not None and form not in FORMATS:
        raise UsageError(
            f"--format: expected one of {', '.join(FORMATS)}, got `{form}`{did_you_mean(form, FORMATS)}"
        )
    return form


def _draw(tables: Sequence[Table]) -> None:
    from mergecli.cli.layout import laid_out

    encoding = (sys.stdout.encoding or "utf-8").lower()
    laid = laid_out(tables, _width(), "─" if "utf" in encoding else "-")
    lines = [*laid.lines]
    for number, start, stop in sorted(
        laid.bold, reverse=True
    ):  # from the right, so that places stay what they are
        each = lines[number]
        lines[number] = each[:start] + _painted(each[start:stop], "", sys.stdout) + each[stop:]
    for each in lines:
        print(each)
    for each in laid.notes:
        note(each)


def _width() -> int | None:
    """The width of the terminal that stdout is, or what `COLUMNS` says; None of a file or pipe, which has none."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size().columns


def progress() -> AbstractContextManager[Progress | None]:
    """A function that shows on stderr how far the work is: bars on a terminal, else a line now and then; None if all is to be
    quiet."""
    if verbosity.quiet or not is_first():
        return nullcontext()
    if spinner.is_terminal():
        return Bars()
    return Lines(remark, _title())


def _title() -> str:
    return " ".join(["mergecli", *(each for each in sys.argv[1:] if each in COMMANDS)][:2])


def _painted(text: str, color: str, stream: IO[str]) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{';'.join(filter(None, ('1', color)))}m{text}\x1b[0m"
