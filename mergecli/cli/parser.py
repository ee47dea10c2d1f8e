"""Commands as the parser sees them: every one has the global options too, so that they may stand before or after its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from mergecli.runtime import verbosity
from mergecli.runtime.errors import UsageError

_QUIET = "Print warnings and errors only: no notes, progress or line at the end."
_VERBOSE = "Show whole lists, and the details of messages."
_DEBUG = "Show the traceback of every error."


def _be_quiet(wanted: bool) -> None:
    if wanted:
        verbosity.quiet = True
        _expect_one()


def _be_verbose(wanted: bool) -> None:
    if wanted:
        verbosity.verbose = True
        _expect_one()


def _expect_one() -> None:
    if verbosity.quiet and verbosity.verbose:
        raise UsageError("--quiet: does not go with --verbose", "leave one of them out")


def _debug(wanted: bool) -> None:
    if wanted:
        verbosity.debug = True


Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_be_quiet, is_eager=True, help=_QUIET)]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=_be_verbose, is_eager=True, help=_VERBOSE)]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, is_eager=True, help=_DEBUG)]
"""For the program itself; a command has its own, which mean the same."""


class Interrupted(Exception):  # noqa: N818  it is no error
    """Ctrl-C in a command, of which the parser would only leave the status; its cause says what is kept."""


class Command(TyperCommand):
    """A command that knows the global options."""

    def __init__(self, name: str | None, **more: Any) -> None:
        super().__init__(name, **more)
        self.params += [
            _option(["-q", "--quiet"], _be_quiet, _QUIET),
            _option(["-v", "--verbose"], _be_verbose, _VERBOSE),
            _option(["--debug"], _debug, _DEBUG),
        ]

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error


def _option(names: list[str], hear: Callable[[bool], None], text: str) -> TyperOption:
    def callback(_context: object, _parameter: object, value: bool) -> None:
        hear(value)

    return TyperOption(
        param_decls=names, is_flag=True, expose_value=False, is_eager=True, help=text, callback=callback
    )
