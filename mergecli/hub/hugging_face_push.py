"""Models to Hugging Face, through `huggingface_hub`: its `create_repo`, `preupload_lfs_files` and `create_commit`.

Large files go by HTTP to git LFS and not by Xet, as in `fetch`, and one by one: what has arrived stays there although no
commit follows, so that a push that was interrupted goes on. The library's client never gives up on a silent server, and
sends the token wherever the hub says that an upload is to be confirmed: a hook sets limits, and takes the token away from
other hosts.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from mergecli.hub.client import LocalFile, Remote, TransientError
from mergecli.hub.hugging_face import HuggingFace
from mergecli.hub.limits import same_origin
from mergecli.hub.outgoing import Outgoing
from mergecli.hub.requirements import named
from mergecli.hub.retry import RetryPolicy, retried
from mergecli.runtime.errors import HubError, InputError, did_you_mean
from mergecli.storage.sources import DEFAULT_BRANCH, Source

SILENT_SECONDS = 300.0
"""Without a byte in either direction, while a file is sent or a commit is made."""


class HuggingFacePublisher:
    """The hub as models are brought to it."""

    def __init__(self, hub: HuggingFace, stop: threading.Event, policy: RetryPolicy) -> None:
        from huggingface_hub import HfApi

        from mergecli.storage.metadata import version

        self._hub, self._stop, self._policy = hub, stop, policy
        self._api: Any = HfApi(
            endpoint=hub.endpoint,
            token=hub.token or False,
            library_name="mergecli",
            library_version=version(),
        )
        self._lock = threading.Lock()
        self._additions: dict[str, Any] = {}

    @contextmanager
    def working(self) -> Generator[None]:
        with _limited(self._hub.endpoint), _quiet(self._policy):
            yield

    def check(self, target: Source) -> None:
        if self._hub.token is None:
            raise HubError(f"{named(target)}: a token that may write is needed", self._hub.token_hint)

    def look(self, target: Source) -> Remote | None:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def ask(revision: str | None) -> Any:
            def action() -> Any:
                with self._calling(target):
                    try:
                        return self._api.model_info(target.name, revision=revision)
                    except RevisionNotFoundError:
                        return None
                    except RepositoryNotFoundError:
                        return None

            return retried(action, self._stop, self._policy)

        about = ask(None)
        if about is None:
            return None
        branch = target.revision or DEFAULT_BRANCH["hf"]
        found = ask(branch)
        commit = str(found.sha) if found is not None and found.sha else None
        # a new branch begins with what the default one has
        return Remote(bool(about.private), commit, self._hub.files(target, commit or str(about.sha)))

    def create(self, target: Source, *, private: bool, license: str | None) -> None:
        del license  # the hub reads it in the card
        from huggingface_hub.errors import HfHubHTTPError

        def action() -> None:
            with self._calling(target):
                try:
                    self._api.create_repo(target.name, private=private or None)
                except HfHubHTTPError as error:
                    if error.response.status_code == 409:
                        raise HubError(
                            f"{named(target)}: the name is taken, by a repository that you may not see",
                            "choose another name",
                        ) from error
                    if error.response.status_code in (402, 403, 404):
                        raise self._no_room(target, error) from error
                    raise

        retried(action, self._stop, self._policy)

    def _no_room(self, target: Source, error: Any) -> Exception:
        """Why no repository could be made, with what this user could have meant."""
        owner = target.name.partition("/")[0]
        known: list[str] = []
        with contextlib.suppress(Exception):  # only a suggestion is lost
            who = self._api.whoami()
            known = [str(who["name"]), *(str(each["name"]) for each in who.get("orgs", []))]
        if owner in known:
            return self._refused(target, error) or HubError(f"{named(target)}: you may not write to it")
        whose = f"; this one is that of `{known[0]}`" if known else ""
        return HubError(
            f"{named(target)}: you may make no repository under `{owner}`{did_you_mean(owner, known)}",
            f"check the spelling; it takes a member of `{owner}` with a token that may write{whose}",
        )

    def make_branch(self, target: Source) -> None:
        def action() -> None:
            with self._calling(target):
                self._api.create_branch(target.name, branch=target.revision, exist_ok=True)

        retried(action, self._stop, self._policy)

    def upload(self, target: Source, file: LocalFile, tell: Callable[[int], None]) -> None:
        from huggingface_hub import CommitOperationAdd

        addition: Any = CommitOperationAdd(file.path, str(file.file))
        addition.upload_info.sha256 = bytes.fromhex(
            file.sha256
        )  # known already: the library would read it again
        with self._calling(target, file.path), Outgoing(file.file, self._stop, tell) as content:
            addition.path_or_fileobj = content  # what is open goes by HTTP
            self._api.preupload_lfs_files(
                target.name, [addition], revision=_branch(target), free_memory=False, num_threads=1
            )
        addition.path_or_fileobj = str(file.file)
        with self._lock:
            self._additions[file.path] = addition

    def commit(
        self, target: Source, files: Sequence[LocalFile], removed: Sequence[str], message: str
    ) -> None:
        from huggingface_hub import CommitOperationDelete

        operations = [self._additions[file.path] for file in files]
        operations += [CommitOperationDelete(path, is_folder=False) for path in removed]
        with self._calling(target):
            self._api.create_commit(target.name, operations, commit_message=message, revision=_branch(target))

    def url(self, target: Source) -> str:
        branch = (
            f"/tree/{target.revision}" if target.revision and target.revision != DEFAULT_BRANCH["hf"] else ""
        )
        return f"{self._hub.endpoint}/{target.name}{branch}"

    @contextmanager
    def _calling(self, target: Source, path: str | None = None) -> Generator[None]:
        """Says in our words what went wrong while the library works."""
        from huggingface_hub.errors import HfHubHTTPError

        with self._hub.in_our_words(target, path, first=path is None):
            try:
                yield
            except HfHubHTTPError as error:
                if reason := self._refused(target, error):
                    raise reason from error
                raise
            except RuntimeError as error:  # around what went wrong with a file
                if isinstance(error.__cause__, HfHubHTTPError) and (
                    reason := self._refused(target, error.__cause__)
                ):
                    raise reason from error
                raise (error.__cause__ or error) from error
            except ValueError as error:
                text = str(error)
                if text.startswith("Invalid metadata in README.md"):
                    what = (
                        "; ".join(line.removeprefix("- ") for line in text.splitlines()[1:])
                        or "it is not valid"
                    )
                    raise InputError(
                        f"README.md: {self._hub.host} refuses its front matter: {what}"
                    ) from error
                if text.startswith("LFS batch API returned errors"):
                    raise HubError(
                        f"{named(target)}: {self._hub.host} takes no file: {text.rpartition('`')[2]}"
                    ) from error
                raise

    def _refused(self, target: Source, error: Any) -> HubError | TransientError | None:
        status = int(error.response.status_code)
        if status == 401 and "credentials" in (_said(error) + str(error)).lower():
            return HubError(
                f"{named(target)}: {self._hub.host} does not accept the token",
                "check HF_TOKEN, or make a new one",
            )
        if status in (401, 403):
            said = _said(error)
            return HubError(
                f"{named(target)}: you may not write to it" + (f": {said}" if said else ""),
                "the token must be allowed to write there: see huggingface.co/settings/tokens",
            )
        if status in (408, 429) or status >= 500:
            return None
        said = _said(error)
        return HubError(f"{named(target)}: {self._hub.host} refuses it: {said or f'status {status}'}")


def _branch(target: Source) -> str:
    return target.revision or DEFAULT_BRANCH["hf"]


def _said(error: Any) -> str:
    """What the hub says itself, in a line."""
    headers = error.response.headers
    said: Any = headers.get("X-Error-Message")
    with contextlib.suppress(Exception):  # an answer of any form
        said = said or error.response.json().get("error")
    return str(said or "").strip().partition("\n")[0].rstrip(".")


@contextmanager
def _limited(endpoint: str) -> Generator[None]:
    """Gives the library's client, also the one that it makes anew after a failure, limits of time, and keeps the token from
    hosts other than the endpoint."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    sessions: Any = importlib.import_module("huggingface_hub.utils._http")

    def hook(request: Any) -> None:
        if not same_origin(str(request.url), endpoint) and str(
            request.headers.get("user-agent", "")
        ).startswith("mergecli/"):
            request.headers.pop("authorization", None)
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            part: SILENT_SECONDS if limits.get(part) is None else limits[part]
            for part in ("connect", "read", "write", "pool")
        }

    def hooked(client: Any) -> Any:
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks.get("request", []), hook]}
        return client

    before, telemetry = sessions._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_TELEMETRY
    # else each request would name the program that started this one, after a list that the endpoint is asked for
    constants.HF_HUB_DISABLE_TELEMETRY = True
    sessions._GLOBAL_CLIENT_FACTORY = lambda: hooked(before())
    first = hooked(sessions.get_session()) if sessions._GLOBAL_CLIENT is not None else None
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry
        sessions._GLOBAL_CLIENT_FACTORY = before
        for client in {
            id(each): each for each in (first, sessions._GLOBAL_CLIENT) if each is not None
        }.values():
            requests = [each for each in client.event_hooks.get("request", []) if each is not hook]
            client.event_hooks = {**client.event_hooks, "request": requests}


@contextmanager
def _quiet(policy: RetryPolicy) -> Generator[None]:
    """Keeps what the library warns of from the terminal, but for what the hub says about the card, which becomes a note."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = str(message)
        if text.startswith("Warnings while validating") and policy.note:
            policy.note("README.md: " + "; ".join(line.removeprefix("- ") for line in text.splitlines()[1:]))

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        disable_progress_bars()
        try:
            yield
        finally:
            if bars:
                enable_progress_bars()
