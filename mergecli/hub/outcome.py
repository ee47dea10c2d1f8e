"""What a fetch leaves: the recipes' locks, or one error for all that failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergecli.errors import HubError, InputError, MergecliError, UsageError, listed
from mergecli.hub.needs import KINDS, named, of_recipe
from mergecli.hub.plan import Part
from mergecli.hub.store import Store, writing
from mergecli.hub.wishes import Wishes
from mergecli.lock import Entry, Key, Lock, LockedFile, key_of, lock_path, write_lock
from mergecli.output import check_target


def raise_failures(failures: Mapping[Key, MergecliError], wishes: Wishes, offline: bool) -> None:
    """Raises what went wrong, if anything did: a line for each reason, whatever kinds of error they are."""
    if not failures:
        return
    reasons: dict[str, list[str]] = {}
    for key, error in ((key, failures[key]) for key in wishes.needs if key in failures):
        name = named(wishes.needs[key].source)
        reasons.setdefault(error.message.removeprefix(f"{name}: "), []).append(name)
    lines = [f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {reason}"
             for reason, names in reasons.items()]  # fmt: skip
    errors = list(failures.values())
    kind = next(
        (kind for kind in (UsageError, InputError) for each in errors if isinstance(each, kind)), HubError
    )
    hints = "; ".join(list(dict.fromkeys(error.hint for error in errors if error.hint))[:2])
    if offline and kind is HubError:
        hints = "run `mergecli fetch` where there is a network, without `--offline` and HF_HUB_OFFLINE"
    if len(lines) == 1:
        raise kind(lines[0], hints)
    raise kind(f"{len(failures)} of {len(wishes.needs)} sources failed:\n{listed(lines, 50)}", hints)


def check_locks(wishes: Wishes) -> None:
    """Raises UsageError if a lock cannot have the name that it should get."""
    for wish in wishes.each:
        if wish.recipe and wish.recipe.path:
            check_target(lock_path(wish.recipe.path))


def write_locks(wishes: Wishes, parts: Mapping[Key, Part], store: Store) -> tuple[Path, ...]:
    """The locks of the recipes: what was fetched now, and of what they had before what their recipe still names.

    Raises:
        InputError: one cannot be written.
    """
    written: list[Path] = []
    for wish in wishes.each:
        if not wish.recipe or not wish.recipe.path:
            continue
        entries = [
            entry_of(part, store.manifest(part.source, part.commit).files)
            for need in wish.needs
            if (part := parts.get(key_of(need.source)))
        ]
        known = {key_of(need.source) for need in of_recipe(wish.recipe, KINDS)}
        before = Lock({key: entry for key, entry in (wish.lock or Lock()).entries.items() if key in known})
        lock, path = before.merged(entries), lock_path(wish.recipe.path)
        if lock.entries and lock != wish.lock:
            with writing(path, "a lock lies beside its recipe: check the folder's permissions"):
                write_lock(path, lock)
            written.append(path)
    return tuple(written)


def entry_of(part: Part, files: Mapping[str, LockedFile]) -> Entry:
    """What a lock says of a fetched part."""
    used = [*(file.path for file in part.files), *([part.converted] if part.converted else [])]
    return Entry(
        source=str(part.need.source),
        is_data=part.need.source.is_data,
        fetched=f"{part.source.kind}:{part.source.name}",
        commit=part.commit,
        files=tuple(sorted((files[path] for path in used), key=lambda file: file.path)),
    )
