"""Models to ModelScope, through `modelscope_hub`: its calls that make a repository, send large files and make a commit.

Its own `upload_folder` is not used: it keeps a file in the folder, and waits for minutes before it gives up. Here files go one
by one, and what has arrived stays although no commit follows, so that a push that was interrupted goes on.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from mergecli.hub.client import LocalFile, Remote
from mergecli.hub.model_scope import ModelScope
from mergecli.hub.outgoing import Outgoing
from mergecli.hub.requirements import named
from mergecli.hub.retry import RetryPolicy, retried
from mergecli.runtime.errors import HubError, quoted
from mergecli.storage.sources import DEFAULT_BRANCH, Source

_PRIVATE, _PUBLIC = 1, 5
_OTHER = "Other"


class ModelScopePublisher:
    """The hub as models are brought to it."""

    def __init__(self, hub: ModelScope, stop: threading.Event, policy: RetryPolicy) -> None:
        self._hub, self._stop, self._policy = hub, stop, policy
        self._client = hub.client

    @contextmanager
    def working(self) -> Generator[None]:
        yield

    def check(self, target: Source) -> None:
        if not self._client.token:
            raise HubError(f"{named(target)}: a token that may write is needed", self._hub.token_hint)

    def look(self, target: Source) -> Remote | None:
        from modelscope_hub.errors import NotExistError

        def ask() -> dict[str, Any] | None:
            with self._calling(target):
                try:
                    return self._client.get_repo_info(target.name, "model")
                except NotExistError:
                    return None

        about = retried(ask, self._stop, self._policy)
        if about is None:
            if (target.revision or DEFAULT_BRANCH["ms"]) != DEFAULT_BRANCH["ms"]:
                raise _no_branch(target, [DEFAULT_BRANCH["ms"]])
            return None
        branch = target.revision or DEFAULT_BRANCH["ms"]
        files = self._hub.files(target, branch)
        if not files and target.revision and branch not in (known := self._hub.branches(target)):
            raise _no_branch(target, known)
        return Remote(about.get("Visibility") == _PRIVATE, branch, files)

    def create(self, target: Source, *, private: bool, license: str | None) -> None:
        from modelscope_hub.constants import License
        from modelscope_hub.errors import AlreadyExistsError, APIError, PermissionDeniedError

        owner, _, name = target.name.partition("/")
        known = {str(each.value).lower(): str(each.value) for each in License}
        body = {
            "Path": owner, "Name": name, "Visibility": _PRIVATE if private else _PUBLIC,
            "License": known.get((license or "").lower(), _OTHER),
        }  # fmt: skip

        def action() -> None:
            with self._calling(target):
                try:
                    self._client.create_repo("model", body)
                except AlreadyExistsError as error:
                    raise HubError(
                        f"{named(target)}: the name is taken, by a repository that you may not see",
                        "choose another name",
                    ) from error
                except APIError as error:
                    if isinstance(error, PermissionDeniedError) or error.status_code in (400, 404):
                        raise HubError(
                            f"{named(target)}: you may make no repository under `{owner}`{_said(error)}",
                            f"check the spelling; it takes a member of `{owner}` with a token that may write",
                        ) from error
                    raise

        retried(action, self._stop, self._policy)

    def make_branch(self, target: Source) -> None:
        raise _no_branch(target, [])

    def upload(self, target: Source, file: LocalFile, tell: Callable[[int], None]) -> None:
        if not _is_large(file):
            return

        def action() -> None:
            with self._calling(target, file.path), Outgoing(file.file, self._stop, tell) as content:
                objects = [{"oid": file.sha256, "size": file.size}]
                place = self._client.validate_blobs(target.name, "model", objects).get(file.sha256)
                if place is not None:
                    self._client.upload_blob(place, content, file.size)

        retried(action, self._stop, self._policy)

    def commit(
        self, target: Source, files: Sequence[LocalFile], removed: Sequence[str], message: str
    ) -> None:
        operations = [_creation(file) for file in files]
        operations += [
            {
                "action": "delete",
                "path": path,
                "type": "normal",
                "size": 0,
                "sha256": "",
                "content": "",
                "encoding": "",
            }
            for path in removed
        ]

        def action() -> None:
            with self._calling(target):
                self._client.create_commit(
                    target.name, "model", operations, message, target.revision or DEFAULT_BRANCH["ms"]
                )

        retried(action, self._stop, self._policy)

    def url(self, target: Source) -> str:
        return f"{self._hub.endpoint}/models/{target.name}"

    @contextmanager
    def _calling(self, target: Source, path: str | None = None) -> Generator[None]:
        """Says in our words what went wrong while the library works."""
        from modelscope_hub import errors

        with self._hub.in_our_words(target, path):
            try:
                yield
            except errors.AuthenticationError as error:
                raise HubError(
                    f"{named(target)}: {self._hub.host} does not accept the token",
                    "check MODELSCOPE_API_TOKEN, or make a new one",
                ) from error
            except errors.PermissionDeniedError as error:
                raise HubError(
                    f"{named(target)}: you may not write to it{_said(error)}",
                    "the token must be allowed to write there",
                ) from error
            except (errors.InvalidParameter, errors.QuotaExceededError) as error:
                raise HubError(f"{named(target)}: {self._hub.host} refuses it{_said(error)}") from error


def _no_branch(target: Source, known: Sequence[str]) -> HubError:
    has = f"; it has {quoted(known)}" if known else ""
    return HubError(
        f"{named(target)}: there is no branch `{target.revision}`{has}",
        "make it on the repository's page, then push again",
    )


def _is_large(file: LocalFile) -> bool:
    from modelscope_hub import _upload

    large: Any = _upload._is_lfs  # pyright: ignore[reportPrivateUsage]  which files its commits take as pointers
    return bool(large(file.path, file.size, "model"))


def _creation(file: LocalFile) -> dict[str, Any]:
    if _is_large(file):
        return {
            "action": "create", "path": file.path, "type": "lfs", "size": file.size, "sha256": file.sha256,
            "content": "", "encoding": "",
        }  # fmt: skip
    content = base64.b64encode(file.file.read_bytes()).decode()
    return {
        "action": "create", "path": file.path, "type": "normal", "size": file.size, "sha256": "",
        "content": content, "encoding": "base64",
    }  # fmt: skip


def _said(error: Any) -> str:
    """What the hub says itself, after a colon."""
    body: Any = getattr(error, "response_body", None)
    said = body.get("Message") or body.get("message") if isinstance(body, dict) else None
    return f": {str(said).partition(chr(10))[0].rstrip('.')}" if said else ""
