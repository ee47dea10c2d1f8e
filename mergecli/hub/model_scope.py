"""ModelScope, through `modelscope_hub`, the client on which the `modelscope` package rests.

`MODELSCOPE_ENDPOINT`, its predecessor `MODELSCOPE_DOMAIN`, `MODELSCOPE_API_TOKEN` (and `modelscope login`),
`MODELSCOPE_DOWNLOAD_TIMEOUT`, the proxy and the certificate variables mean what they mean to that library, whose
sessions make every request here. Its own repeated tries are turned off, since they would multiply with those of
`hub.retry`; its downloader is not used: `hub.transfer` says why. Each of its requests passes through `_Guard`: bodies are
read as `hub.limits` allows, and no host but the endpoint gets the token.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from mergecli.hub import limits
from mergecli.hub.client import Body, TransientError
from mergecli.hub.environment import check_variables, host_of, reason_of, was_broken_off, without_password
from mergecli.hub.limits import LimitError, ListBudget, same_origin, unpacked, whole, within
from mergecli.hub.requirements import named
from mergecli.hub.retry import RetryPolicy, retried
from mergecli.runtime.errors import HubError, did_you_mean, quoted
from mergecli.storage.sources import DEFAULT_BRANCH, Source, is_commit
from mergecli.storage.store import RemoteFile

OWN = tuple(f"https://{www}modelscope.{land}" for www in ("", "www.") for land in ("cn", "ai"))
"""The hub's own endpoints, which the token is for."""

_BLOCK = 1 << 16


class ModelScope:
    """The hub at `MODELSCOPE_ENDPOINT`, or modelscope.cn. A token goes to another endpoint only with
    `token_to_endpoint`."""

    def __init__(
        self, stop: threading.Event, policy: RetryPolicy, *, token_to_endpoint: bool = False
    ) -> None:
        check_variables(
            certificates=("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), seconds=("MODELSCOPE_DOWNLOAD_TIMEOUT",)
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # MODELSCOPE_DOMAIN still works, which is what counts
            from modelscope_hub.api import HubApi
            from modelscope_hub.config import HubConfig

            config = HubConfig()
            self._endpoint = str(config.endpoint)
            own = os.environ.get("MODELSCOPE_ENDPOINT") or not os.environ.get("MODELSCOPE_DOMAIN")
            self._host = host_of(self._endpoint, "MODELSCOPE_ENDPOINT" if own else "MODELSCOPE_DOMAIN")
            self._trusted = token_to_endpoint or self._endpoint in OWN
            self._api = HubApi(
                config if self._trusted else HubConfig(endpoint=self._endpoint, token="")
            ).legacy
        _turn_off_retries(self._api)
        self._guard = _Guard(self._endpoint, self._api)
        if not os.environ.get("MODELSCOPE_LOG_LEVEL"):
            logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self._stop, self._policy = stop, policy
        self._unreachable: HubError | None = None
        self._lists: dict[tuple[Source, str], list[dict[str, Any]]] = {}

    @property
    def host(self) -> str:
        return self._host

    @property
    def endpoint(self) -> str:
        """Where requests go, as a URL."""
        return self._endpoint

    @property
    def client(self) -> Any:
        """The library's client, with the guard before it."""
        return self._api

    @property
    def token_hint(self) -> str:
        """How a token gets there."""
        if self._trusted:
            return "set MODELSCOPE_API_TOKEN, or run `modelscope login`"
        return f"set MODELSCOPE_API_TOKEN, and `--token-to-endpoint` so that {self.host} gets it"

    def resolve(self, source: Source) -> str:
        """The commit of the newest change to any file: ModelScope's lists name it for each file, and no request asks
        for a branch's own. What the branch has, that commit has with the same content."""
        if self._unreachable:
            raise self._unreachable
        revision = source.revision or DEFAULT_BRANCH["ms"]
        files = self._list(source, revision)
        if not files:
            known = self.branches(source)
            if revision in known:
                raise HubError(f"{named(source)}: has no files")
            near = did_you_mean(revision, known) or (f"; it has {quoted(known)}" if known else "")
            raise HubError(f"{named(source)}: there is no branch or tag `{revision}`{near}")
        with self.in_our_words(source, None):
            newest = max(int(each["CommittedDate"]) for each in files)
            commits = sorted(
                {str(each["Revision"]) for each in files if int(each["CommittedDate"]) == newest}
            )
            if not all(is_commit(each) for each in commits):
                raise ValueError(f"{quoted(commits)}: expected a commit's hexadecimal digits")
        content = {(each["Path"], each.get("Sha256")) for each in files}
        for commit in commits:
            if len(commits) == 1 or content <= {
                (e["Path"], e.get("Sha256")) for e in self._list(source, commit)
            }:
                self._lists[source, commit] = files
                return commit
        raise HubError(
            f"{named(source)}: {self.host} does not tell which commit `{revision}` is",
            "name a commit after `@`",
        )

    def license(self, source: Source) -> str | None:
        del source  # its lists of files do not say
        return None

    def files(self, source: Source, commit: str) -> tuple[RemoteFile, ...]:
        found = self._lists.get((source, commit)) or self._list(source, commit)
        with self.in_our_words(source, None):
            return tuple(_remote(each) for each in found)

    def open(self, source: Source, commit: str, path: str, start: int) -> AbstractContextManager[Body]:
        return self._opened(source, commit, path, start)

    @contextmanager
    def _opened(self, source: Source, commit: str, path: str, start: int) -> Generator[Body]:
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}

        def begin() -> Any:
            with self._guard.leaves_bodies():
                return self._api.download_stream(source.name, _kind(source), path, commit, headers=headers)

        with self.in_our_words(source, path):
            response = within(limits.ANSWER_SECONDS, begin, self._stop)
        with self.in_our_words(source, path), response:
            begins = start if response.status_code == 206 else 0
            if begins and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise TransientError(f"`{path}`: the hub sent another part of it than was asked for")
            yield Body(begins, self._blocks(source, path, response))

    def _blocks(self, source: Source, path: str, response: Any) -> Iterator[bytes]:
        with self.in_our_words(source, path):
            yield from unpacked(_raw(response), response.headers.get("Content-Encoding", ""))

    def _list(self, source: Source, revision: str) -> list[dict[str, Any]]:
        def ask() -> list[dict[str, Any]]:
            with self.in_our_words(source, None), self._guard.one_list(source.name):
                list_files: Callable[[], list[dict[str, Any]]] = partial(
                    self._api.list_repo_files, source.name, _kind(source), revision
                )
                found = within(limits.LIST_SECONDS, list_files, self._stop)
                return [each for each in found if each.get("Type") != "tree"]

        return retried(ask, self._stop, self._policy)

    def branches(self, source: Source) -> list[str]:
        """Its branches and tags."""
        return [str(each.get("Revision")) for each in self._revisions(source)]

    def _revisions(self, source: Source) -> list[dict[str, Any]]:
        def ask() -> list[dict[str, Any]]:
            with self.in_our_words(source, None):
                list_revisions: Callable[[], list[dict[str, Any]]] = partial(
                    self._api.list_revisions, source.name, _kind(source)
                )
                return within(limits.ANSWER_SECONDS, list_revisions, self._stop)

        return retried(ask, self._stop, self._policy)

    @contextmanager
    def in_our_words(self, source: Source, path: str | None) -> Generator[None]:
        """Says in our words what went wrong, and whether another try may help."""
        import requests
        from modelscope_hub import errors
        from urllib3.exceptions import HTTPError

        where = named(source) + (f": `{path}`" if path else "")
        token = self.token_hint
        try:
            yield
        except LimitError as error:
            hint = "try again later, or check MODELSCOPE_ENDPOINT"
            raise HubError(f"{where}: {self.host} {error}", hint) from error
        except errors.RateLimitError as error:
            raise TransientError(f"{self.host} asks for fewer requests", error.retry_after) from error
        except errors.ServerError as error:
            wait = getattr(error, "retry_after", None)
            raise TransientError(f"{self.host} answered with status {error.status_code}", wait) from error
        except errors.AuthenticationError as error:
            raise HubError(f"{where}: {self.host} asks for a token", token) from error
        except errors.PermissionDeniedError as error:
            raise HubError(
                f"{where}: access is not granted", f"ask for it on the repository's page; {token}"
            ) from error
        except errors.NotExistError as error:
            if path:
                raise HubError(f"{where}: there is no such file") from error
            kind = "data set" if source.is_data else "model"
            raise HubError(
                f"{where}: {self.host} has no such {kind}",
                'ids may differ from Hugging Face\'s: a recipe gives them as `modelscope = "org/name"` beside '
                f"`source`; if it is private, {token}",
            ) from error
        except (errors.RequestTimeoutError, requests.Timeout) as error:
            raise TransientError(f"{self.host} was silent for too long") from error
        except (
            errors.NetworkError, requests.ConnectionError, requests.exceptions.ChunkedEncodingError, HTTPError
        ) as error:  # fmt: skip
            if isinstance(error.__cause__, errors.PermissionDeniedError):
                raise TransientError(f"{self.host} denies access") from error
            if path is None and not was_broken_off(error):
                hint = "check the network, MODELSCOPE_ENDPOINT, and the proxy and certificate variables"
                self._unreachable = HubError(f"cannot reach {self.host}: {reason_of(error)}", hint)
                raise self._unreachable from error
            raise TransientError(f"{self.host} broke off the connection") from error
        except (
            errors.HubError,
            requests.RequestException,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            reason = without_password(str(error)).partition("\n")[0]
            raise HubError(
                f"{where}: {self.host} does not answer as ModelScope does: {reason}",
                "check MODELSCOPE_ENDPOINT and the proxy variables",
            ) from error


def _kind(source: Source) -> str:
    return "dataset" if source.is_data else "model"


def _remote(entry: Any) -> RemoteFile:
    if (size := int(entry["Size"])) < 0:
        raise ValueError(f"a size of {size} bytes")
    return RemoteFile(str(entry["Path"]), size, str(entry.get("Sha256") or "") or None)


def _raw(response: Any) -> Iterator[bytes]:
    """The bytes of a body as the server has sent them, as soon as they are here."""
    read = getattr(response.raw, "read1", None)
    if read is None:  # urllib3 1 waits for whole blocks
        yield from response.raw.stream(_BLOCK, decode_content=False)
        return
    while block := read(_BLOCK, decode_content=False):
        yield block


class _Guard:
    """What stands between the library's sessions and the network."""

    def __init__(self, endpoint: str, client: Any) -> None:
        self._endpoint = endpoint
        self._left = threading.local()
        self._lists: dict[str, ListBudget] = {}
        for session in (client._session, client._read_session):
            for adapter in session.adapters.values():
                adapter.send = partial(self._send, adapter.send)

    def _is_own(self, url: str) -> bool:
        """Whether the URL is another host of the hub's own: large files are sent to one, which wants the token."""
        own, asked = urlsplit(self._endpoint).hostname or "", urlsplit(url)
        land = re.search(r"(?:^|\.)(modelscope\.(?:cn|ai))$", asked.hostname or "")
        return bool(land) and asked.scheme == "https" and self._endpoint in OWN and own.endswith(land[1])

    @contextmanager
    def leaves_bodies(self) -> Generator[None]:
        """Requests of this thread are for a file, whose body the caller reads."""
        self._left.bodies = True
        try:
            yield
        finally:
            self._left.bodies = False

    @contextmanager
    def one_list(self, name: str) -> Generator[None]:
        """Answers about a repository are pages of one list, which the library asks for in threads of its own."""
        self._lists[name] = ListBudget()
        try:
            yield
        finally:
            self._lists.pop(name, None)

    def _send(self, send: Any, request: Any, *given: Any, **named: Any) -> Any:
        if not (same_origin(request.url, self._endpoint) or self._is_own(request.url)):
            # requests takes another port of a host, and `http:` in place of `https:`, for the same where cookies go
            for header in ("Authorization", "Cookie"):
                request.headers.pop(header, None)
        response = send(request, *given, **named)
        if getattr(self._left, "bodies", False) and response.status_code < 300:
            return response
        with _requests_errors(), contextlib.closing(response.raw):
            content = whole(_raw(response), response.headers.get("Content-Encoding", ""))
        for name, budget in list(self._lists.items()):
            if f"/{name}/repo/" in request.url:
                budget.add(len(content))
        from urllib3 import HTTPResponse

        response.headers.pop("Content-Encoding", None)
        response.raw = HTTPResponse(io.BytesIO(content), status=response.status_code, preload_content=False)
        return response


@contextmanager
def _requests_errors() -> Generator[None]:
    """Errors while a body is read, as requests has them."""
    import requests
    from urllib3 import exceptions

    try:
        yield
    except exceptions.ReadTimeoutError as error:
        raise requests.Timeout(error) from error
    except exceptions.ProtocolError as error:
        raise requests.exceptions.ChunkedEncodingError(error) from error


def _turn_off_retries(client: Any) -> None:
    """One try for each request: the library has no setting for it that reaches all of them."""
    client._request_repo_tree = partial(client._request_repo_tree, max_attempts=1)
    for adapter in client._session.adapters.values():
        adapter.max_retries = type(adapter.max_retries)(0, read=False)
