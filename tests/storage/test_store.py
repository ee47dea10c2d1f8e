"""Where sources lie on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mergecli.runtime.errors import InputError
from mergecli.storage.sources import Source, parse_source
from mergecli.storage.store import MANIFEST, RemoteFile, Store, StoredFile, locate


def test_what_was_not_fetched_says_how_to_fetch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path))
    with pytest.raises(
        InputError,
        match=r"hf:org/name@v1: has not been fetched\nhint: `mergecli fetch hf:org/name@v1` brings",
    ):
        locate(parse_source("hf:org/name@v1", Path()))


def test_what_was_fetched_is_found_by_branch_and_by_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path))
    commit = tmp_path / "ms" / "org" / "name" / "0123abcd"
    commit.mkdir(parents=True)
    (commit.parent / "refs").mkdir()
    (commit.parent / "refs" / "master").write_text("0123abcd\n")
    assert locate(parse_source("ms:org/name", Path())) == commit
    assert locate(parse_source("ms:org/name@0123abcd", Path())) == commit


def test_a_hub_name_without_its_prefix_gets_a_hint() -> None:
    with pytest.raises(
        InputError,
        match=r"openai/clip: no such file or folder\nhint: for the hub's model write `hf:openai/clip`",
    ):
        locate(parse_source("openai/clip", Path()))


def test_an_unknown_toy_is_named_with_those_there_are() -> None:
    with pytest.raises(
        InputError, match=r"toy:bas: there is no such toy \(did you mean `base`\?\)\nhint: the toys are `toy:"
    ):
        locate(parse_source("toy:bas", Path()))


def test_the_manifest_says_what_is_there_and_damage_is_an_error(tmp_path: Path) -> None:
    store, source, commit = Store(tmp_path), Source("hf", "org/x"), "0" * 40
    assert store.manifest(source, commit).files == {}
    folder = store.folder(source, commit)
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"123")
    files = {"a.bin": {"size": 3, "sha256": "f" * 64, "made_from": None}}
    manifest = {"files": files, "listing": [{"path": "a.bin", "size": 3}], "converted_from": None}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert store.manifest(source, commit).files == {"a.bin": StoredFile("a.bin", 3, "f" * 64)}
    others = [RemoteFile("a.bin", 3, "e" * 64), RemoteFile("a.bin", 4), RemoteFile("b.bin", 3)]
    assert list(store.missing(source, commit, [RemoteFile("a.bin", 3), *others])) == others
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match=r"\.mergecli\.json: is damaged"):
        store.manifest(source, commit)


def test_a_commit_that_is_not_as_it_was_fetched_is_refused_and_one_put_there_by_hand_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path))
    source, commit = parse_source("hf:org/x", tmp_path), "0" * 40
    folder = Store(tmp_path).folder(source, commit)
    folder.mkdir(parents=True)
    Store(tmp_path).reference_file(source).parent.mkdir()
    Store(tmp_path).reference_file(source).write_text(commit)
    assert locate(source) == folder
    files = {"a.bin": {"size": 3, "sha256": "f" * 64, "made_from": None}}
    (folder / MANIFEST).write_text(json.dumps({"files": files, "listing": None, "converted_from": None}))
    with pytest.raises(InputError, match=r"`a\.bin` in .* is missing or not as fetched"):
        locate(source)
    (folder / MANIFEST).write_text('{"of": "another version"}')
    assert locate(source) == folder


def fetched(home: Path, files: dict[str, bytes], made_from: dict[str, str] | None = None) -> Path:
    """A commit in the store with these files, `hf:org/x`."""
    source, commit = parse_source("hf:org/x", Path()), "0" * 40
    folder = Store(home).folder(source, commit)
    folder.mkdir(parents=True)
    Store(home).reference_file(source).parent.mkdir()
    Store(home).reference_file(source).write_text(commit)
    facts: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        facts[name] = {"size": len(content), "sha256": digest, "made_from": (made_from or {}).get(name)}
    (folder / MANIFEST).write_text(json.dumps({"files": facts, "listing": None, "converted_from": None}))
    return folder


def test_a_pickle_is_never_taken_for_another_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.pt").write_bytes(b"pickle")
    (tmp_path / "m.safetensors").write_bytes(b"another model")
    assert locate(parse_source("m.pt", tmp_path)) == tmp_path / "m.pt"
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    folder = fetched(tmp_path / "home", {"m.pt": b"pickle", "m.safetensors": b"another model"})
    assert locate(parse_source("hf:org/x#m.pt", Path())) == folder / "m.pt"


def test_a_fetched_pickle_is_read_as_what_was_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path))
    files = {"m.pt": b"pickle", "m.safetensors": b"another model", "m.pt.safetensors": b"weights"}
    folder = fetched(tmp_path, files, {"m.pt.safetensors": "m.pt"})
    assert locate(parse_source("hf:org/x#m.pt", Path())) == folder / "m.pt.safetensors"


def test_a_fetched_configuration_that_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path))
    folder = fetched(tmp_path, {"config.json": b'{"hidden_act": "gelu"}', "model.safetensors": b"weights"})
    assert locate(parse_source("hf:org/x", Path())) == folder
    (folder / "config.json").write_bytes(b'{"hidden_act": "relu"}')
    with pytest.raises(InputError) as caught:
        locate(parse_source("hf:org/x", Path()))
    assert str(caught.value) == (
        f"hf:org/x: `config.json` in {folder} is damaged\nhint: delete that folder and fetch again"
    )


def test_a_file_of_a_like_name_is_suggested(tmp_path: Path) -> None:
    for name in ("average.safetensors", "average.json", "ties.safetensors"):
        (tmp_path / name).touch()
    for written in ("average", "averge.safetensors", "average.safetensor"):
        with pytest.raises(InputError) as error:
            locate(parse_source(written, tmp_path))
        assert (
            error.value.message == f"{written}: no such file or folder (did you mean `average.safetensors`?)"
        )
    with pytest.raises(InputError, match=r"nosuch\.safetensors: no such file or folder$"):
        locate(parse_source("nosuch.safetensors", tmp_path))
