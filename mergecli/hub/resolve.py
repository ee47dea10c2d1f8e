"""What there is to do: for each need the commit, the files, and which of them the store lacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mergecli.hub import file_selection as choose
from mergecli.hub.client import Hub, RemoteFile
from mergecli.hub.retry import Patience
from mergecli.hub.store import COMMIT, Manifest, Store, size_of
from mergecli.hub.transfer import content
from mergecli.hub.wanted import Need, named
from mergecli.recipe.lock import Entry, is_safe
from mergecli.runtime.errors import HubError
from mergecli.storage.sources import DEFAULT_BRANCH, Source


@dataclass(frozen=True)
class Part:
    """One need, settled."""

    need: Need
    source: Source
    """The repository it comes from."""
    commit: str
    files: tuple[RemoteFile, ...]
    """What the need uses of it."""
    missing: tuple[RemoteFile, ...]
    """Those of them that the store lacks."""
    manifest: Manifest
    """What is known of the commit."""
    pinned: Entry | None = None
    """The lock's entry, where it decided."""

    @property
    def pickled(self) -> str | None:
        """The file among them that has to be converted."""
        found = [file.path for file in self.files if file.path.endswith(choose.PICKLED)]
        index = [file.path for file in self.files if file.path.endswith(".bin.index.json")]
        return (index or found or [None])[0]

    @property
    def converted(self) -> str | None:
        """What the pickled file becomes, which the hub does not have."""
        if self.pickled is None:
            return None
        path = PurePosixPath(self.pickled.removesuffix(".index.json"))
        stem = "model" if path.stem == "pytorch_model" else path.stem
        return path.with_name(f"{stem}.safetensors").as_posix()

    def path(self, store: Store) -> Path:
        """Where the source lies once it is fetched."""
        folder = store.folder(self.source, self.commit)
        inside = self.source.inside
        if inside and inside == self.pickled:
            inside = self.converted
        return folder / inside if inside else folder


class Hubs:
    """The hubs, each connected to when it is first needed."""

    def __init__(self, stop: threading.Event, patience: Patience, token_to_endpoint: bool) -> None:
        self._known: dict[str, Hub] = {}
        self._lock = threading.Lock()
        self._stop, self._patience, self._token_to_endpoint = stop, patience, token_to_endpoint

    def of(self, source: Source) -> Hub:
        with self._lock:
            if source.kind not in self._known:
                if source.kind == "hf":
                    from mergecli.hub.hugging_face import HuggingFace as Chosen
                else:
                    from mergecli.hub.model_scope import ModelScope as Chosen
                self._known[source.kind] = Chosen(
                    self._stop, self._patience, token_to_endpoint=self._token_to_endpoint
                )
            return self._known[source.kind]

    def content(self, source: Source, commit: str, file: RemoteFile) -> bytes:
        """What is in a small file of a repository."""
        return content(self.of(source), source, commit, file, self._stop, self._patience)


def is_converted(part: Part, store: Store) -> bool:
    """Whether the store has what the part's pickled file becomes; also if it has none."""
    if part.converted is None:
        return True
    known = store.manifest(part.source, part.commit).files
    return (
        part.converted in known
        and size_of(store.folder(part.source, part.commit) / part.converted) is not None
    )


def settle(need: Need, source: Source, store: Store, hubs: Hubs, allow_pickle: bool) -> Part:
    """The need as the hub has it now. What is in the store is asked for only by one request, which tells what the
    revision is; a commit needs none.

    Raises:
        HubError: the hub cannot be reached, refuses, or has nothing that could be used.
    """
    before = store.reference(source)
    if COMMIT.fullmatch(source.revision or "") and before:
        return _part(need, source, source.revision or "", store, hubs, allow_pickle)
    hub = hubs.of(source)
    commit = hub.resolve(source)
    if before and store.manifest(source, before).converted_from == commit:
        return _part(need, source, before, store, hubs, allow_pickle)
    try:
        return _part(need, source, commit, store, hubs, allow_pickle)
    except choose.NoParquetError as refused:
        if source.kind != "hf" or source.revision not in (None, DEFAULT_BRANCH["hf"]):
            raise
        from mergecli.hub.hugging_face import CONVERTED

        try:
            converted = hub.resolve(replace(source, revision=CONVERTED))
            part = _part(need, source, converted, store, hubs, allow_pickle)
        except (HubError, choose.NoParquetError):
            raise refused from None
        return replace(part, manifest=replace(part.manifest, converted_from=commit))


def settle_locked(need: Need, entry: Entry, store: Store, allow_pickle: bool = True) -> Part:
    """The need as the lock has it; no request is made.

    Raises:
        OnlyPickledError: the lock has pickled weights, which are not converted yet, and `allow_pickle` is not set.
    """
    files = tuple(
        RemoteFile(file.path, file.size, file.sha256) for file in entry.files if file.made_from is None
    )
    source = replace(entry.origin, inside=need.source.inside)
    missing = tuple(file for file in files if not store.has(source, entry.commit, file))
    part = Part(need, source, entry.commit, files, missing, store.manifest(source, entry.commit), entry)
    if part.pickled and not allow_pickle and (missing or not is_converted(part, store)):
        raise choose.OnlyPickledError(
            f"{named(need.source)}: the lock has its weights only as `{part.pickled}`, a pickle",
            "`--allow-pickle` fetches and converts it with torch's restricted reader",
        )
    return part


def settle_offline(need: Need, source: Source, entry: Entry | None, store: Store, *, whole: bool) -> Part:
    """The need as the store has it: at the lock's commit, else at the one that the revision was when it was fetched.

    Raises:
        HubError: the store has no such commit, or not all files though it should be `whole`.
    """
    if entry:
        part = settle_locked(need, entry, store)
    else:
        commit = store.reference(source)
        manifest = store.manifest(source, commit) if commit else Manifest()
        if commit is None or not store.folder(source, commit).is_dir():
            raise HubError(f"{named(need.source)}: is not in the store")
        if not manifest.files:  # put there by hand: whatever is there is taken
            return Part(need, source, commit, (), (), manifest)
        listing = manifest.listing or tuple(
            RemoteFile(f.path, f.size, f.sha256) for f in manifest.files.values()
        )
        files = _chosen(need, source, listing, True, _reader(need, source, commit, store, None))
        missing = tuple(file for file in files if not store.has(source, commit, file))
        part = Part(need, source, commit, files, missing, manifest)
    if part.missing and whole:
        folder = store.folder(part.source, part.commit)
        lacking = f"lacks `{part.missing[0].path}`" if folder.is_dir() else f"lacks commit {part.commit[:12]}"
        raise HubError(f"{named(need.source)}: the store {lacking}")
    if whole and not is_converted(part, store):
        raise HubError(
            f"{named(need.source)}: the store lacks `{part.converted}`, made from `{part.pickled}`"
        )
    return part


def _part(need: Need, source: Source, commit: str, store: Store, hubs: Hubs, allow_pickle: bool) -> Part:
    manifest = store.manifest(source, commit)
    if manifest.listing is None:
        listing = hubs.of(source).files(source, commit)
        for file in listing:
            if not is_safe(file.path):
                raise HubError(
                    f"{named(source)}: the hub lists a file outside of the repository: `{file.path}`"
                )
        manifest = replace(manifest, listing=listing)
    listing, read = manifest.listing or (), _reader(need, source, commit, store, hubs)

    def part_of(files: tuple[RemoteFile, ...]) -> Part:
        missing = tuple(file for file in files if not store.has(source, commit, file))
        return Part(need, source, commit, files, missing, manifest)

    try:
        return part_of(_chosen(need, source, listing, allow_pickle, read))
    except choose.OnlyPickledError:
        if not any(file.made_from for file in manifest.files.values()):
            raise
        before = part_of(_chosen(need, source, listing, True, read))
        if before.missing or not is_converted(before, store):
            raise
        return before  # nothing has to be opened any more


def _reader(
    need: Need, source: Source, commit: str, store: Store, hubs: Hubs | None
) -> Callable[[RemoteFile], bytes]:
    """What reads a small file: from the store if it is there, else from the hub."""

    def read(file: RemoteFile) -> bytes:
        if store.has(source, commit, file):
            return (store.folder(source, commit) / file.path).read_bytes()
        if hubs is None:
            raise HubError(f"{named(need.source)}: the store lacks `{file.path}`")
        return hubs.content(source, commit, file)

    return read


def _chosen(
    need: Need,
    source: Source,
    listing: Sequence[RemoteFile],
    allow_pickle: bool,
    read: Callable[[RemoteFile], bytes],
) -> tuple[RemoteFile, ...]:
    where = named(source)
    if not source.is_data:
        return choose.model_files(listing, source.inside, allow_pickle, where, read)
    inside = source.inside
    files = [
        file for file in listing if not inside or file.path == inside or file.path.startswith(f"{inside}/")
    ]
    return choose.data_files(files, need.config, need.splits, need.wanted, where)
