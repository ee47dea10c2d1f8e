"""Hugging Face, through `huggingface_hub`.

`HF_ENDPOINT`, `HF_TOKEN` (and `hf auth login`), `HF_HUB_DOWNLOAD_TIMEOUT`, `HF_HUB_ETAG_TIMEOUT`, the proxy and the
certificate variables mean what they mean to that library, whose client makes every request here. Tries are repeated by
`hub.retry` and not by the library's `http_backoff`, which sleeps as long as a server says, however long that is, and
takes 23 s to tell that a connection is refused. Xet is never used, with whatever endpoint: all files come by HTTP, which
is what can be resumed. Pages of a list are followed here, since the library's own paging waits for a silent server
for ever. Bodies are read here too, as `hub.limits` allows, and the token goes to the endpoint alone: to no other host
that a page or a redirect names.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import quote, urljoin

from mergecli.hub import limits
from mergecli.hub.client import Body, TransientError
from mergecli.hub.environment import check_variables, host_of, reason_of, wait_of, without_password
from mergecli.hub.limits import LimitError, ListBudget, same_origin, unpacked, whole, within
from mergecli.hub.requirements import named
from mergecli.hub.retry import RetryPolicy, retried
from mergecli.runtime.errors import HubError, did_you_mean, quoted
from mergecli.storage.sources import DEFAULT_BRANCH, Source, is_commit
from mergecli.storage.store import RemoteFile

OWN = ("https://huggingface.co", "https://hf.co", "https://hub-ci.huggingface.co")
"""The hub's own endpoints, which the token is for."""
CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps a data set's images as Parquet files."""
_REDIRECTS = 10


class HuggingFace:
    """The hub at `HF_ENDPOINT`, or huggingface.co. A token goes to another endpoint only with `token_to_endpoint`."""

    def __init__(
        self, stop: threading.Event, policy: RetryPolicy, *, token_to_endpoint: bool = False
    ) -> None:
        check_variables(
            certificates=("SSL_CERT_FILE",), seconds=("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
        )
        if own := os.environ.get("HF_ENDPOINT"):
            host_of(own, "HF_ENDPOINT")
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.utils import get_token_to_send, logging

        from mergecli.storage.metadata import version

        if not os.environ.get("HF_HUB_VERBOSITY") and not constants.HF_DEBUG:
            logging.set_verbosity_error()
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._host = host_of(self._endpoint, "HF_ENDPOINT")
        self._trusted = token_to_endpoint or self._endpoint in OWN
        # not `build_hf_headers`: it asks the endpoint for a list of other programs, to name the one that started this
        self._headers = {"user-agent": f"mergecli/{version()}; hf_hub/{huggingface_hub.__version__}"}
        if self._trusted and (token := get_token_to_send(None)):
            self._headers["authorization"] = f"Bearer {token}"
        self._stop, self._policy = stop, policy
        self._unreachable: HubError | None = None
        self._licenses: dict[Source, str] = {}
        self._timeouts = constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT

    @property
    def host(self) -> str:
        return self._host

    @property
    def endpoint(self) -> str:
        """Where requests go, as a URL."""
        return self._endpoint

    @property
    def token(self) -> str | None:
        """The token, if there is one that the endpoint may get."""
        return self._headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def token_hint(self) -> str:
        """How a token gets there."""
        if self._trusted:
            return "set HF_TOKEN, or run `hf auth login`"
        return f"set HF_TOKEN, and `--token-to-endpoint` so that {self.host} gets it"

    def resolve(self, source: Source) -> str:
        if self._unreachable:
            raise self._unreachable
        revision = source.revision or DEFAULT_BRANCH["hf"]
        answer: Any = self._get(
            source, f"{self._api(source)}/revision/{quote(revision, safe='')}", True
        ).json()
        commit: Any = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not is_commit(commit):
            raise HubError(
                f"{named(source)}: {self.host} does not answer as Hugging Face does", "check HF_ENDPOINT"
            )
        if license := _license(answer):
            self._licenses[source] = license
        return commit

    def license(self, source: Source) -> str | None:
        return self._licenses.get(source)

    def files(self, source: Source, commit: str) -> tuple[RemoteFile, ...]:
        found: list[RemoteFile] = []
        url: str | None = f"{self._api(source)}/tree/{commit}?recursive=true&expand=false"
        budget, asked = ListBudget(), set[str]()
        while url:
            response = self._get(source, url)
            asked.add(url)
            with self.in_our_words(source, None):
                budget.add(len(response.content))
                found += [_remote(each) for each in response.json() if each["type"] == "file"]
                following = response.links.get("next", {}).get("url")
                url = urljoin(url, following) if following else None
                if url in asked:
                    raise ValueError("the pages of its list of files begin again")
        return tuple(found)

    def open(self, source: Source, commit: str, path: str, start: int) -> AbstractContextManager[Body]:
        return self._opened(source, commit, path, start)

    @contextmanager
    def _opened(self, source: Source, commit: str, path: str, start: int) -> Generator[Body]:
        from huggingface_hub import hf_hub_url

        kind = "dataset" if source.is_data else "model"
        url = hf_hub_url(source.name, path, repo_type=kind, revision=commit, endpoint=self._endpoint)
        part = {"Range": f"bytes={start}-"} if start else {}
        with self.in_our_words(source, path):
            response = within(
                limits.ANSWER_SECONDS, lambda: self._begun(url, self._timeouts[1], **part), self._stop
            )
        with self.in_our_words(source, path), contextlib.closing(response):
            begins = start if response.status_code == 206 else 0
            if begins and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise TransientError(f"`{path}`: the hub sent another part of it than was asked for")
            yield Body(begins, self._blocks(source, path, response))

    def _blocks(self, source: Source, path: str, response: Any) -> Iterator[bytes]:
        with self.in_our_words(source, path):
            yield from unpacked(response.iter_raw(), response.headers.get("Content-Encoding", ""))

    def _begun(self, url: str, timeout: float, **headers: str) -> Any:
        """The answer to a request, of which nothing is read yet; raises what the library has for one that refuses.

        The library would read the body of each redirect and of each error, however large.
        """
        from huggingface_hub.utils import get_session, hf_raise_for_status

        client, own = get_session(), self._headers
        if not same_origin(url, self._endpoint):
            own = {name: value for name, value in own.items() if name != "authorization"}
        every = {**own, "Accept-Encoding": "identity", **headers}
        request: Any = client.build_request("GET", url, headers=every, timeout=timeout)
        for _ in range(_REDIRECTS):
            response: Any = client.send(request, stream=True, follow_redirects=False)
            if not response.has_redirect_location:
                break
            response.close()
            # the library leaves out the token where the redirect goes to another host
            request = response.next_request
            if request is None:
                raise ValueError("it redirects to nowhere")
        else:
            raise ValueError(f"it redirects more than {_REDIRECTS} times")
        if response.status_code >= 400:
            with contextlib.closing(response):
                hf_raise_for_status(self._read(response))
        return response

    def _read(self, response: Any) -> Any:
        """The response with its whole body."""
        http: Any = importlib.import_module(type(response).__module__.partition(".")[0])
        packed = ("content-encoding", "content-length", "transfer-encoding")
        content = whole(response.iter_raw(), response.headers.get("Content-Encoding", ""))
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in packed]
        return http.Response(response.status_code, headers=headers, content=content, request=response.request)

    def _api(self, source: Source) -> str:
        return f"{self._endpoint}/api/{'datasets' if source.is_data else 'models'}/{source.name}"

    def _get(self, source: Source, url: str, first: bool = False) -> Any:
        def get() -> Any:
            with self.in_our_words(source, None, first):
                response = within(limits.ANSWER_SECONDS, lambda: self._answer(url), self._stop)
                response.json()
                return response

        return retried(get, self._stop, self._policy)

    def _answer(self, url: str) -> Any:
        with contextlib.closing(self._begun(url, self._timeouts[0])) as response:
            return self._read(response)

    @contextmanager
    def in_our_words(self, source: Source, path: str | None, first: bool = False) -> Generator[None]:
        """Says in our words what went wrong, and whether another try may help."""
        from huggingface_hub.errors import HfHubHTTPError

        http: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
        where = named(source) + (f": `{path}`" if path else "")
        try:
            yield
        except HfHubHTTPError as error:
            raise self._refused(source, where, path, error) from error
        except LimitError as error:
            raise HubError(
                f"{where}: {self.host} {error}", "try again later, or check HF_ENDPOINT"
            ) from error
        except (http.ConnectError, http.ConnectTimeout, http.ProxyError) as error:
            reason = f"cannot reach {self.host}: {reason_of(error)}"
            if first:
                hint = "check the network, HF_ENDPOINT, and the proxy and certificate variables"
                self._unreachable = HubError(reason, hint)
                raise self._unreachable from error
            raise TransientError(reason) from error
        except http.TimeoutException as error:
            raise TransientError(f"{self.host} was silent for too long") from error
        except (http.NetworkError, http.RemoteProtocolError) as error:
            raise TransientError(f"{self.host} broke off the connection") from error
        except (
            http.HTTPError, http.InvalidURL, ImportError, ValueError, KeyError, TypeError, AttributeError,
            OverflowError, RecursionError,
        ) as error:  # fmt: skip
            reason = without_password(str(error)).partition("\n")[0]
            raise HubError(
                f"{where}: {self.host} does not answer as Hugging Face does: {reason}",
                "check HF_ENDPOINT and the proxy variables",
            ) from error

    def _refused(self, source: Source, where: str, path: str | None, error: Any) -> Exception:
        response = error.response
        status, code = int(response.status_code), str(response.headers.get("X-Error-Code") or "")
        if status in (408, 429) or status >= 500:
            words = {408: "was too slow", 429: "asks for fewer requests"}
            reason = words.get(status, f"answered with status {status}")
            return TransientError(f"{self.host} {reason}", _wait(response.headers))
        token = self.token_hint
        if code == "GatedRepo" or status == 403:
            page = f"https://huggingface.co/{'datasets/' if source.is_data else ''}{source.name}"
            return HubError(f"{where}: access is not granted", f"accept its terms at {page}; {token}")
        if code == "RevisionNotFound":
            return HubError(
                f"{where}: there is no branch, tag or commit `{source.revision or 'main'}`"
                + self._near(source, "refs"),
            )
        if code == "EntryNotFound" or (path and status == 404):
            return HubError(f"{where}: there is no such file")
        sent = "authorization" in self._headers
        if status == 401 and "credentials" in str(response.headers.get("X-Error-Message") or "").lower():
            return HubError(f"{where}: {self.host} does not accept the token", "check HF_TOKEN, or unset it")
        if status in (401, 404):
            kind = "data set" if source.is_data else "model"
            near = self._near(source, "names")
            if status == 401 and not sent and code != "RepoNotFound":
                reason = f"{self.host} shows no such {kind} without a token{near}"
            else:
                reason = f"{self.host} has no such {kind}{near}"
            other = "" if source.is_data else "; data sets are written `hf:datasets/org/name`"
            return HubError(f"{where}: {reason}", f"check the spelling; if it is private, {token}{other}")
        return HubError(f"{where}: {self.host} answered with status {status}")

    def _near(self, source: Source, what: str) -> str:
        """What may have been meant, as far as the hub tells."""
        kind = "datasets" if source.is_data else "models"
        if what == "names":
            owner = source.name.partition("/")[0]
            known = self._plain(f"{self._endpoint}/api/{kind}?author={quote(owner)}&limit=1000")
            return did_you_mean(source.name, [str(each.get("id")) for each in known or []])
        known = self._plain(f"{self._api(source)}/refs") or {}
        names = [str(each["name"]) for part in ("branches", "tags") for each in known.get(part, [])]
        near = did_you_mean(source.revision or "main", names)
        return near or (f"; it has {quoted(names)}" if names else "")

    def _plain(self, url: str) -> Any:
        """What a URL answers; None if it does not."""
        try:
            return within(limits.ANSWER_SECONDS, lambda: self._answer(url), self._stop).json()
        except Exception:  # noqa: BLE001  only a suggestion is lost
            return None


def _remote(entry: Any) -> RemoteFile:
    """A file of a list, whose own digest is that of the git blob: of a large file, only a pointer's."""
    large = entry.get("lfs")
    if (size := int((large or entry)["size"])) < 0:
        raise ValueError(f"a size of {size} bytes")
    path = str(entry["path"])
    return (
        RemoteFile(path, size, str(large["oid"])) if large else RemoteFile(path, size, git=str(entry["oid"]))
    )


def _license(answer: dict[str, Any]) -> str | None:
    """The license in what the hub says about a repository: in its card, else among its tags."""
    card = answer.get("cardData")
    found = card.get("license") if isinstance(card, dict) else None
    tags = answer.get("tags")
    named = (
        [tag.partition(":")[2] for tag in tags if str(tag).startswith("license:")]
        if isinstance(tags, list)
        else []
    )
    return found if isinstance(found, str) and found else next(iter(named), None)


def _wait(headers: Any) -> float | None:
    """The seconds that `Retry-After`, or the hub's own `ratelimit`, asks for."""
    from huggingface_hub.utils import parse_ratelimit_headers

    wait = wait_of(headers)
    if wait is not None or headers.get("Retry-After"):
        return wait
    with contextlib.suppress(ValueError):
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None
    return None
