"""The program: its parser, and the one place where an error becomes a message and an exit status."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import console, ending, spinner
from mergecli.cli.commands import COMMANDS, SHARED
from mergecli.cli.parser import Command, Debug, Group, Interrupted, Quiet, Verbose
from mergecli.cli.parser_errors import message_of
from mergecli.runtime import interrupts, verbosity
from mergecli.runtime.distributed import alone, are_several, check_environment, is_first
from mergecli.runtime.errors import ExitStatus, InputError, MergecliError, ThresholdError


def app(names: Iterable[str] = tuple(COMMANDS)) -> typer.Typer:
    """The parser of these commands."""
    made = typer.Typer(
        name="mergecli",
        cls=Group,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    made.callback()(_main)
    for name in names:
        module = COMMANDS[name]
        made.command(name, cls=Command)(getattr(import_module(module), module.rpartition(".")[2]))
    return made


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        parts = [f"{name} {version(name)}" for name in ("mergecli", "torch", "safetensors", "transformers")]
        console.line(", ".join(parts) + f", Python {sys.version.split()[0]}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Merge fine-tuned CLIP vision models: small commands that read and write files.

    stdout is data (a path a line, or a table that is TSV in a pipe); messages and progress go to stderr. Exit
    status: 0 done, 1 a bug, 2 wrong flag or recipe, 3 a file is missing, damaged or does not fit, 4 hub or network,
    5 a threshold was not met, 130 interrupted.
    """
    del version, quiet, verbose, debug  # their callbacks have been called


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    interrupts.watch_endings()
    verbosity.reset()
    ending.begin()
    given = sys.argv[1:] if arguments is None else arguments
    named = next((each for each in given if not each.startswith("-")), "")
    with console.warnings_of_ours():
        try:
            _check_surroundings()
        except MergecliError as error:
            console.error(error.message, error.hint)
            return error.status
        if not are_several() or named in SHARED:
            return _run(given, named)
        if not is_first():
            return ExitStatus.DONE
        with alone():
            status = _run(given, named)
        if named in COMMANDS:
            console.note(
                f"`{named}` is not shared by the processes of `torchrun`: the first one did all of it"
            )
        return status


def _check_surroundings() -> None:
    """Raises MergecliError if no command can work in this folder, or with this environment."""
    check_environment()
    try:
        Path.cwd()
    except OSError as error:
        raise InputError("the working folder was removed, or cannot be entered", "`cd` to another") from error


def _run(given: Sequence[str], named: str) -> int:
    try:
        parser = app([named] if named in COMMANDS else COMMANDS)  # others would only cost time
        status = parser(args=given, prog_name="mergecli", standalone_mode=False)
        if status == ExitStatus.INTERRUPTED:  # while the parser was at work
            return _interrupted(None)
        sys.stdout.flush()
        ending.say()
        return int(status) if isinstance(status, int) else ExitStatus.DONE
    except MergecliError as error:
        if interrupts.received:
            return _interrupted(error)
        if isinstance(error, ThresholdError):  # the command did its work
            ending.say()
        if verbosity.debug:
            console.traceback()
        console.error(error.message, error.hint, error.details)
        return error.status
    except Interrupted as error:
        return _interrupted(error.__cause__)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _interrupted(error)
    except BrokenPipeError:
        console.drop_output()
        return ExitStatus.DONE
    except SystemExit as stopped:
        if isinstance(stopped.code, int) and stopped.code > 128:
            _interrupted(stopped)
        # the parser turns a broken pipe into status 1; only the stream that it leaves behind shows that it was one
        if type(sys.stdout).__name__ != "PacifyFlushWrapper":
            raise
        console.drop_output()
        return ExitStatus.DONE
    except Exception as error:  # noqa: BLE001  the boundary: usage errors of the parser, and bugs
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _wrong_usage(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO) and not error.filename:
            console.error(f"stdout: cannot write: {(error.strerror or '').lower()}")
            console.drop_output()
            return ExitStatus.INPUT
        if interrupts.received:
            return _interrupted(error)
        console.traceback()
        console.error(
            "this is a bug in mergecli",
            "please report it with the command, the recipe and everything above",
        )
        return ExitStatus.BUG


def _interrupted(error: BaseException | None) -> int:
    spinner.stop()
    if verbosity.debug:
        console.traceback()
    if is_first():
        kept = interrupts.kept_by(error) if error else ""
        how = (
            f"{kept}; the same command goes on"
            if kept
            else "nothing new is kept; the same command starts again"
        )
        console.plain(f"interrupted: {how}")
    return 128 + (interrupts.received or signal.SIGINT)


def _wrong_usage(error: Exception) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(str(error.format_message()).strip())  # pyright: ignore[reportAttributeAccessIssue]
        return ExitStatus.USAGE
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "mergecli"
    console.error(message_of(error), f"`{command} --help` shows what is expected")
    return ExitStatus.USAGE
