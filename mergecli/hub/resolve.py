"""What a requirement is on a hub or in the store: the commit, the files, and which of them the store lacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mergecli.hub.file_selection import PICKLED, NoParquetError, OnlyPickledError, data_files, model_files
from mergecli.hub.requirements import Requirement, named
from mergecli.hub.session import Session
from mergecli.recipe.lock import LockedSource
from mergecli.runtime.errors import HubError
from mergecli.storage.sources import DEFAULT_BRANCH, Source, is_safe
from mergecli.storage.store import Manifest, RemoteFile, Store, size_of

_WHOLE_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_READ = Callable[[RemoteFile], bytes]


@dataclass(frozen=True)
class Resolved:
    """A requirement, and where it comes from."""

    requirement: Requirement
    source: Source
    """The repository it comes from."""
    commit: str
    files: tuple[RemoteFile, ...]
    """What the requirement uses of it."""
    missing: tuple[RemoteFile, ...]
    """Those of them that the store lacks."""
    manifest: Manifest
    """What is known of the commit."""
    locked: LockedSource | None = None
    """What the lock says, where it decided."""

    @property
    def pickled(self) -> str | None:
        """The file among them that has to be converted."""
        found = [file.path for file in self.files if file.path.endswith(PICKLED)]
        index = [file.path for file in self.files if file.path.endswith(".bin.index.json")]
        return (index or found or [None])[0]

    @property
    def converted(self) -> str | None:
        """What the pickled file becomes, which the hub does not have."""
        if self.pickled is None:
            return None
        path = PurePosixPath(self.pickled.removesuffix(".index.json"))
        stem = "model" if path.stem == "pytorch_model" else path.stem
        own = {file.path for file in self.manifest.listing or ()}
        own |= {file.path for file in self.manifest.files.values() if not file.made_from}
        usual = path.with_name(f"{stem}.safetensors").as_posix()
        return path.with_name(f"{path.name}.safetensors").as_posix() if usual in own else usual

    @property
    def used(self) -> list[str]:
        """The paths of its files, what is converted included."""
        return [*(file.path for file in self.files), *([self.converted] if self.converted else [])]

    def is_converted(self, store: Store) -> bool:
        """Whether the store has what the pickled file becomes; also if there is no pickled file."""
        if self.converted is None:
            return True
        known = store.manifest(self.source, self.commit).files.get(self.converted)
        return (
            known is not None
            and known.made_from is not None
            and size_of(self.folder(store) / self.converted) is not None
        )

    def folder(self, store: Store) -> Path:
        """The folder of its commit."""
        return store.folder(self.source, self.commit)

    def path(self, store: Store) -> Path:
        """Where the source lies once it is fetched."""
        inside = self.source.inside
        if inside and inside == self.pickled:
            inside = self.converted
        return self.folder(store) / inside if inside else self.folder(store)


NOT_FETCHED = "has not been fetched"


class NotInStoreError(HubError):
    """A source, or some of its files, that would have to be fetched."""


def resolve(requirement: Requirement, source: Source, session: Session) -> Resolved:
    """The requirement as the hub has it now.

    What is in the store is asked for only by one request, which tells what the revision is; a commit needs none.

    Raises:
        HubError: the hub cannot be reached, refuses, or has nothing that could be used.
    """
    before = session.store.reference(source)
    if _WHOLE_COMMIT.fullmatch(source.revision or "") and before:
        return _at_commit(requirement, source, source.revision or "", session)
    hub = session.hub(source)
    commit = hub.resolve(source)
    if before and session.store.manifest(source, before).converted_from == commit:
        return _at_commit(requirement, source, before, session)
    try:
        return _at_commit(requirement, source, commit, session)
    except NoParquetError as refused:
        # Hugging Face converts many data sets to Parquet by itself, in a branch of their repository
        if source.kind != "hf" or source.revision not in (None, DEFAULT_BRANCH["hf"]):
            raise
        from mergecli.hub.hugging_face import CONVERTED

        try:
            converted = hub.resolve(replace(source, revision=CONVERTED))
            found = _at_commit(requirement, source, converted, session)
        except (HubError, NoParquetError):
            raise refused from None
        return replace(found, manifest=replace(found.manifest, converted_from=commit))


def resolve_locked(
    requirement: Requirement, locked: LockedSource, store: Store, allow_pickle: bool = True
) -> Resolved:
    """The requirement as the lock has it; no request is made.

    Raises:
        OnlyPickledError: the lock has pickled weights, which are not converted yet, and `allow_pickle` is not set.
    """
    files = tuple(
        RemoteFile(file.path, file.size, file.sha256) for file in locked.files if file.made_from is None
    )
    source = replace(locked.origin, inside=requirement.source.inside)
    found = replace(_resolved(requirement, source, locked.commit, files, store), locked=locked)
    found = replace(found, manifest=replace(found.manifest, license=locked.license or found.manifest.license))
    if found.pickled and not allow_pickle and (found.missing or not found.is_converted(store)):
        raise OnlyPickledError(
            f"{named(requirement.source)}: the lock has its weights only as `{found.pickled}`, a pickle",
            "`--allow-pickle` fetches and converts it with torch's restricted reader",
        )
    return found


def resolve_offline(
    requirement: Requirement, source: Source, locked: LockedSource | None, store: Store, *, whole: bool
) -> Resolved:
    """The requirement as the store has it: at the lock's commit, else at the one that the revision was when fetched.

    Raises:
        NotInStoreError: the store has no such commit, or not all files though it should be `whole`.
    """
    name = named(requirement.source)
    found = resolve_locked(requirement, locked, store) if locked else _in_store(requirement, source, store)
    if found.missing and whole:
        missing = (
            f"`{found.missing[0].path}`" if found.folder(store).is_dir() else f"commit {found.commit[:12]}"
        )
        raise NotInStoreError(f"{name}: the store lacks {missing}")
    if whole and not found.is_converted(store):
        raise NotInStoreError(f"{name}: the store lacks `{found.converted}`, made from `{found.pickled}`")
    return found


def _in_store(requirement: Requirement, source: Source, store: Store) -> Resolved:
    """The requirement at the commit that the revision was when it was fetched."""
    commit = store.reference(source)
    if commit is None or not (folder := store.folder(source, commit)).is_dir():
        raise NotInStoreError(f"{named(requirement.source)}: {NOT_FETCHED}")
    manifest = store.manifest(source, commit)
    if not manifest.files:  # put there by hand: whatever is there is taken
        return Resolved(requirement, source, commit, (), (), manifest)
    listing = manifest.listing or tuple(
        RemoteFile(file.path, file.size, file.sha256) for file in manifest.files.values()
    )

    def read(file: RemoteFile) -> bytes:
        if store.missing(source, commit, [file]):
            raise NotInStoreError(f"{named(requirement.source)}: the store lacks `{file.path}`")
        return (folder / file.path).read_bytes()

    files = _chosen(requirement, source, listing, True, read)
    return _resolved(requirement, source, commit, files, store)


def _at_commit(requirement: Requirement, source: Source, commit: str, session: Session) -> Resolved:
    """The requirement at a commit, whose files the hub is asked for unless the store knows them."""
    store = session.store
    manifest = store.manifest(source, commit)
    if manifest.listing is None:
        listing = session.hub(source).files(source, commit)
        if outside := [file.path for file in listing if not is_safe(file.path)]:
            raise HubError(f"{named(source)}: the hub lists a file outside of the repository: `{outside[0]}`")
        manifest = replace(manifest, listing=listing, license=session.hub(source).license(source))
    listing = manifest.listing or ()

    def found(allow_pickle: bool) -> Resolved:
        files = _chosen(
            requirement, source, listing, allow_pickle, lambda file: session.read(source, commit, file)
        )
        return replace(_resolved(requirement, source, commit, files, store), manifest=manifest)

    try:
        return found(session.allow_pickle)
    except OnlyPickledError:
        if not any(file.made_from for file in manifest.files.values()):
            raise
        before = found(True)
        if before.missing or not before.is_converted(store):
            raise
        return before  # an earlier fetch was allowed to open the pickle: nothing has to be opened any more


def _resolved(
    requirement: Requirement, source: Source, commit: str, files: tuple[RemoteFile, ...], store: Store
) -> Resolved:
    missing = store.missing(source, commit, files)
    return Resolved(requirement, source, commit, files, missing, store.manifest(source, commit))


def _chosen(
    requirement: Requirement, source: Source, listing: Sequence[RemoteFile], allow_pickle: bool, read: _READ
) -> tuple[RemoteFile, ...]:
    """The files of a listing that the requirement uses."""
    inside = source.inside
    if not source.is_data:
        return model_files(listing, inside, allow_pickle, named(source), read)
    files = [
        file for file in listing if not inside or file.path == inside or file.path.startswith(f"{inside}/")
    ]
    return data_files(files, requirement.config, requirement.splits, requirement.wanted, named(source))
