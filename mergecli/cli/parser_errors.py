"""What the parser of the command line refuses, in the words of all other messages."""

from __future__ import annotations

import re
from typing import Any

from mergecli.runtime.errors import did_you_mean, nearest


def message_of(error: Any) -> str:
    """What was expected and what was got, for an error of the parser."""
    kind, parameter = type(error).__name__, getattr(error, "param", None)
    if kind == "MissingParameter" and parameter is not None:
        return f"{_name(parameter)} is missing"
    if kind == "BadParameter" and parameter is not None:
        return f"{_name(parameter)}: {_expected(parameter, str(error.message))}"
    if kind == "NoSuchOption":
        known = {name.strip("-"): name for each in error.ctx.command.params for name in each.opts}
        near = known.get(nearest(error.option_name.strip("-"), known))
        return f"no such option `{error.option_name}`" + (f" (did you mean `{near}`?)" if near else "")
    message = str(error.format_message()).strip().rstrip(".")
    if command := re.match(r"No such command '(.+?)'", message):
        return f"no such command `{command[1]}`{did_you_mean(command[1], error.ctx.command.commands)}"
    return message[:1].lower() + message[1:]


def _name(parameter: Any) -> str:
    """`-o`/`--output` of an option; of an argument, what the help calls it."""
    if parameter.param_type_name == "option":
        return "/".join(parameter.opts)
    return "argument " + str(parameter.metavar or parameter.name)


def _expected(parameter: Any, message: str) -> str:
    kind = parameter.type
    found = re.match(r"(.+?) is not (?:a valid|in the range)", message)
    what = {"int": "a whole number", "float": "a number"}.get(
        str(getattr(kind, "name", "")).removesuffix(" range")
    )
    if not found or not what:
        return message[:1].lower() + message[1:].rstrip(".")
    least, most = getattr(kind, "min", None), getattr(kind, "max", None)
    if least is not None:
        what += f", at least {least}" if most is None else f" from {least} to {most}"
    return f"expected {what}, got `{found[1].strip(chr(39))}`"
