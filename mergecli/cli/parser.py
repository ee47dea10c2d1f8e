"""Commands as the parser sees them: every one has the global options too, so that they may stand before or after its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from mergecli.cli import help, spellings
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
    """A command that knows the global options, and other ways to say the same."""

    def __init__(self, name: str | None, **more: Any) -> None:
        super().__init__(name, **more)
        known = {option for each in self.params for option in each.opts}
        if spellings.takes_recipe(self.params):
            self.params.append(_option(["--recipe"], "The recipe, in place of the argument.", metavar="FILE"))
        if "--format" in known:
            self.params.append(_option(["--json"], "The same as --format json."))
        self.params += [
            _option(["-q", "--quiet"], _QUIET, _be_quiet),
            _option(["-v", "--verbose"], _VERBOSE, _be_verbose),
            _option(["--debug"], _DEBUG, _debug),
        ]
        for each in self.params:
            if each.param_type_name == "option":
                each.metavar = help.metavar(each)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses today's spelling of the arguments."""
        say = not ctx.resilient_parsing  # else it is the shell that wants to complete something
        return super().parse_args(ctx, spellings.rewritten(self.name or "", self.params, args, say=say))

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error

    def format_help_text(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  the parser gives it
        """Writes the prose."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(help.prose(self.help))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments and options in panels."""
        for name, rows in help.panels(self.name or "", self.get_params(ctx), ctx).items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Writes the examples."""
        lines = list(help.examples(self.help, formatter.width - 2))
        if lines:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {each}\n" for each in lines))


class Group(TyperGroup):
    """The program: its help shows the first sentence about each command whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands."""
        rows = [
            (name, self.commands[name].get_short_help_str(1000).rstrip("."))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _option(
    names: list[str],
    text: str,
    hear: Callable[[bool], None] | None = None,
    metavar: str | None = None,
) -> TyperOption:
    """An option that the command's function does not see: a flag, or one with a value."""

    def callback(_context: object, _parameter: object, value: bool) -> None:
        if hear:
            hear(value)

    return TyperOption(
        param_decls=names, is_flag=metavar is None, metavar=metavar, expose_value=False, is_eager=hear is not None,
        help=text, callback=callback,
    )  # fmt: skip
