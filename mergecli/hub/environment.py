"""What both hubs share of the network: variables that are checked before a library stumbles over them, host names and
reasons that give no password away, and the wait that an answer asks for."""

from __future__ import annotations

import http.client
import os
import re
import socket
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from mergecli.runtime.errors import UsageError

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def host_of(url: str, variable: str) -> str:
    """Host name and port of a hub's URL, without the user's name and password.

    Raises:
        UsageError: it is no URL; `variable` is what it comes from.
    """
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError:
        split = host = port = None
    if split is None or not host or split.scheme not in ("http", "https"):
        raise UsageError(
            f"{variable}: expected a URL such as `https://hub.example`, got `{url.rpartition('@')[2]}`"
        )
    host = f"[{host}]" if ":" in host else host
    return host if port is None else f"{host}:{port}"


def check_variables(*, certificates: Sequence[str], seconds: Sequence[str]) -> None:
    """Reads the variables that name certificates, numbers of seconds and proxies as the hubs' libraries will.

    Raises:
        UsageError: one of them cannot be used.
    """
    for name in certificates:
        if path := os.environ.get(name):
            _check_certificates(name, path)
    for name in seconds:
        if (value := os.environ.get(name, "").strip()) and not (value.isdecimal() and value.isascii()):
            raise UsageError(f"{name}: expected a number of seconds, got `{value}`")
    for name in (*_PROXIES, *(name.lower() for name in _PROXIES)):
        if value := os.environ.get(name, "").strip():
            try:
                _ = urlsplit(value if "://" in value else f"http://{value}").port
            except ValueError:
                raise UsageError(
                    f"{name}: expected a URL such as `http://proxy.example:3128`"
                    f", got `{value.rpartition('@')[2]}`"
                ) from None


def _check_certificates(name: str, path: str) -> None:
    import ssl

    if Path(path).is_dir():
        return
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else reason_of(error)
        raise UsageError(f"{name}: the certificates in `{path}` cannot be read: {reason}") from error


def without_password(text: str) -> str:
    """The text without names and passwords in the URLs that it quotes."""
    return re.sub(r"(?<=//)[^/\s'\"`]*@", "", text)


def _root(error: BaseException) -> BaseException:
    reason = error
    while (deeper := reason.__cause__ or reason.__context__) is not None:
        reason = deeper
    return reason


def reason_of(error: BaseException) -> str:
    """The reason at the bottom of an error, in words."""
    reason = _root(error)
    if isinstance(reason, socket.gaierror):
        return "its name is not known"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror.lower()
    return without_password(str(reason)) or type(reason).__name__


def was_broken_off(error: BaseException) -> bool:
    """Whether there was a connection, and it ended too early."""
    return isinstance(_root(error), ConnectionError | http.client.HTTPException) and not isinstance(
        _root(error), ConnectionRefusedError
    )


def wait_of(headers: Mapping[str, str]) -> float | None:
    """The seconds that `Retry-After`, a number or a date, asks for; None if it does not, or makes no sense."""
    from datetime import UTC, datetime

    value = str(headers.get("Retry-After") or "").strip()
    try:
        if value.isdecimal():
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()) if value else None
    except (ValueError, TypeError, OverflowError):
        return None
