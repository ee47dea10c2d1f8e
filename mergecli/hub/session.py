"""What all work of one `fetch` shares: the store, the hubs, and how long to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from mergecli.hub.client import Hub, Publisher
from mergecli.hub.retry import RetryPolicy, in_threads
from mergecli.hub.transfer import content
from mergecli.runtime.progress import Progress
from mergecli.storage.sources import Source
from mergecli.storage.store import RemoteFile, Store

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """One `fetch`."""

    store: Store
    policy: RetryPolicy
    jobs: int = 4
    """Files, or questions, at a time."""
    allow_pickle: bool = False
    token_to_endpoint: bool = False
    progress: Progress | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the work is given up."""
    _hubs: dict[str, Hub] = field(default_factory=dict[str, Hub])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hub(self, source: Source) -> Hub:
        """The source's hub, connected to when it is first needed."""
        with self._lock:
            if source.kind not in self._hubs:
                if source.kind == "hf":
                    from mergecli.hub.hugging_face import HuggingFace as Chosen
                else:
                    from mergecli.hub.model_scope import ModelScope as Chosen
                self._hubs[source.kind] = Chosen(
                    self.stop, self.policy, token_to_endpoint=self.token_to_endpoint
                )
            return self._hubs[source.kind]

    def publisher(self, target: Source) -> Publisher:
        """The target's hub, as models are brought to it."""
        trusts = self.token_to_endpoint
        if target.kind == "hf":
            from mergecli.hub.hugging_face import HuggingFace
            from mergecli.hub.hugging_face_push import HuggingFacePublisher

            hub = HuggingFace(self.stop, self.policy, token_to_endpoint=trusts)
            return HuggingFacePublisher(hub, self.stop, self.policy)
        from mergecli.hub.model_scope import ModelScope
        from mergecli.hub.model_scope_push import ModelScopePublisher

        return ModelScopePublisher(
            ModelScope(self.stop, self.policy, token_to_endpoint=trusts), self.stop, self.policy
        )

    def read(self, source: Source, commit: str, file: RemoteFile) -> bytes:
        """What is in a small file: from the store if it is there, else from the hub."""
        if self.store.missing(source, commit, [file]):
            return content(self.hub(source), source, commit, file, self.stop, self.policy)
        return (self.store.folder(source, commit) / file.path).read_bytes()

    def in_threads(self, actions: Iterable[Callable[[], T]]) -> Iterator[tuple[int, T | Exception]]:
        """(number, result or error) of each action as it ends."""
        return in_threads(actions, self.jobs, self.stop)

    def report(self, description: str, done: int, total: int) -> None:
        """Reports progress, where somebody listens."""
        if self.progress:
            self.progress(description, done, total)
