from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage import cache as caching
from mergecli.storage.cache import allowed_size, cache, make_room
from tests.conftest import Run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path))
    monkeypatch.delenv("MERGECLI_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


def put(kind: str, key: str, used: int, size: int = 1000) -> Path:
    """A file of the cache that was last used `used` seconds after 1970."""
    path = caching.cache_path(kind, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(size, dtype=torch.uint8)}, path, {"what": f"thing {key}"})
    os.utime(path, (used, used))
    return path


def test_an_empty_cache_is_empty(folder):
    found = cache()
    assert (found.folder, found.entries, found.removed, found.size) == (folder, (), (), 0)


def test_entries_say_what_they_are_and_the_last_used_comes_first():
    old, new = put("pixels", "a", 10), put("heads", "xxh3:b", 20)
    found = cache()
    assert [(entry.kind, entry.what, entry.last_used, entry.path) for entry in found.entries] == [
        ("heads", "thing xxh3:b", "1970-01-01T00:00:20Z", new),
        ("pixels", "thing a", "1970-01-01T00:00:10Z", old),
    ]
    assert found.size == old.stat().st_size + new.stat().st_size
    assert [entry.kind for entry in cache(["pixels"]).entries] == ["pixels"]


def test_a_file_that_was_used_counts_as_new():
    old = put("pixels", "a", 10)
    put("pixels", "b", 20)
    caching.touch(old)
    assert [entry.what for entry in cache().entries] == ["thing a", "thing b"]


def test_damaged_and_unfinished_files_are_shown_as_such(folder):
    put("pixels", "a", 10).write_bytes(b"no")
    (folder / "pixels" / ".b.safetensors.1234.part").write_bytes(b"half")
    assert {entry.what for entry in cache().entries} == {"damaged", "not finished"}
    assert cache(clear=True).entries == ()


def test_kinds_are_cleared_and_others_stay(folder):
    pixels, heads = put("pixels", "a", 10), put("heads", "b", 20)
    assert [entry.path for entry in cache(["pixels"], clear=True).removed] == [pixels]
    assert [entry.path for entry in cache().entries] == [heads]
    assert len(cache(clear=True).removed) == 1
    assert [file for file in folder.rglob("*") if file.is_file()] == []


def test_other_files_beside_are_never_touched(folder):
    put("pixels", "a", 10)
    kept = [folder / "pixels" / "notes.txt", folder / "other" / "x.safetensors", folder / ("f" * 32) / "x"]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    cache(clear=True)
    assert all(file.exists() for file in kept)


def test_the_longest_unused_go_until_the_rest_fits():
    paths = [put("pixels", name, used) for name, used in (("a", 30), ("b", 10), ("c", 20))]
    size = paths[0].stat().st_size
    found = cache(max_size=f"{2 * size}B")
    assert [entry.path for entry in found.removed] == [paths[1]]
    assert [entry.path for entry in found.entries] == [paths[0], paths[2]]
    assert cache(max_size=0).entries == ()


def test_of_the_kinds_that_are_named_only_those_are_made_smaller():
    pixels, heads = put("pixels", "a", 10), put("heads", "b", 5)
    assert [entry.path for entry in cache(["pixels", "statistics"], max_size=0).removed] == [pixels]
    assert heads.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500", 500), ("500B", 500), ("3kb", 3000), ("1.5 GB", 1_500_000_000), ("2T", 2 * 10**12)],
)
def test_sizes_are_read(monkeypatch, text, size):
    assert allowed_size(text) == size
    monkeypatch.setenv("MERGECLI_CACHE_SIZE", text)
    assert allowed_size() == size
    assert allowed_size("7") == 7


def test_by_default_half_of_the_room_on_the_disk_at_most_20_gb_is_taken(monkeypatch):
    monkeypatch.setattr(caching, "_free", lambda: 10**12)
    assert allowed_size() == 20 * 10**9
    monkeypatch.setattr(caching, "_free", lambda: 10**9)
    assert allowed_size() == 10**9 // 2


@pytest.mark.parametrize("text", ["", "many", "-1", "5 XB", "1e3", "9" * 400])
def test_what_is_no_size_is_refused(monkeypatch, text):
    with pytest.raises(UsageError, match="cache size: expected a size such as `500MB`"):
        cache(max_size=text)
    monkeypatch.setenv("MERGECLI_CACHE_SIZE", text)
    with pytest.raises(UsageError, match="MERGECLI_CACHE_SIZE: expected a size"):
        allowed_size()


def test_what_merges_measured_and_learned_is_shown_and_goes_only_by_name(folder, tmp_path):
    put("pixels", "a", 10)
    for number, (kind, about) in enumerate((("statistics", "fisher"), ("coefficients", "ada_merging"))):
        path = tmp_path / kind / about / "x.safetensors"
        path.parent.mkdir(parents=True)
        inputs = '{"base": "xxh3:1", "digits": "xxh3:2", "letters": "xxh3:3"}'
        save_file({"x": torch.zeros(9)}, path, {"method": about, "inputs": inputs})
        os.utime(path, (20 + number, 20 + number))
    assert [(each.kind, each.what) for each in cache().entries] == [
        ("coefficients", "ada_merging of digits, letters"),
        ("statistics", "fisher of digits, letters"),
        ("pixels", "thing a"),
    ]
    assert [each.kind for each in cache(max_size=0).removed] == ["pixels"]
    put("pixels", "a", 10)
    assert make_room(1, 1)
    assert [each.kind for each in cache().entries] == ["coefficients", "statistics"]
    assert cache(clear=True).removed == ()
    assert [each.kind for each in cache(["statistics"], clear=True).removed] == ["statistics"]
    assert [each.kind for each in cache().entries] == ["coefficients"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match=r"got `pixel` \(did you mean `pixels`\?\)"):
        cache(["pixel"])


def test_room_is_made_for_what_fits_and_only_for_that(monkeypatch):
    old, new = put("pixels", "a", 10), put("pixels", "b", 20)
    size = old.stat().st_size
    assert not make_room(3 * size, 2 * size)
    assert make_room(size, 3 * size)
    assert old.exists()
    assert make_room(size, 2 * size)
    assert (old.exists(), new.exists()) == (False, True)
    monkeypatch.setattr(caching, "_free", lambda: caching.SPARE + 10)
    assert make_room(10, 10**9)
    assert not make_room(11, 10**9)


def test_what_a_killed_program_left_goes_after_a_day(folder):
    (folder / "pixels").mkdir(parents=True)
    left, fresh = (folder / "pixels" / f".{name}.safetensors.00.part" for name in "ab")
    for file in (left, fresh):
        file.write_bytes(b"half")
    os.utime(left, (10, 10))
    make_room(1, 10**9)
    assert (left.exists(), fresh.exists()) == (False, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_cannot_be_removed_is_an_error(folder):
    put("pixels", "a", 10)
    (folder / "pixels").chmod(0o500)
    with pytest.raises(InputError, match="cannot be removed: permission denied"):
        cache(clear=True)


def test_the_command_shows_a_table_and_says_what_it_removed(run: Run) -> None:
    put("pixels", "a", 10)
    size = caching.cache_path("pixels", "a").stat().st_size
    shown = run("cache")
    assert shown.out.splitlines() == [
        "kind\twhat\tbytes\tlast used",
        f"pixels\tthing a\t{size}\t1970-01-01T00:00:10Z",
    ]
    assert shown.end.startswith("looked at 1 cached file, ")
    assert run("cache", "heads", "--clear").out == "kind\twhat\tbytes\tlast used\n"
    assert run("cache", "pixels", "--clear").end.startswith("removed 0.0 MB in 1 entry, ")


def test_the_cache_can_lie_apart_from_the_store(tmp_path, monkeypatch):
    from mergecli.storage.store import cache_folder, home

    assert cache_folder() == home() / "cache"
    monkeypatch.setenv("MERGECLI_CACHE", str(tmp_path / "apart"))
    assert cache_folder() == tmp_path / "apart"
    assert cache().folder == tmp_path / "apart"
