"""Locks, and fetching by them: --locked, --offline, --verify."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.hub.fetch import fetch
from mergecli.merging.sweep_points import points_of
from mergecli.recipe import lock
from mergecli.recipe.lock import Lock, LockedSource, lock_path, pin, pinned_source, read_lock, write_lock
from mergecli.recipe.reading import recipe_of
from mergecli.results.licenses import licenses, strictest
from mergecli.runtime.errors import HubError, InputError, UsageError
from mergecli.storage.sources import parse_source
from mergecli.storage.store import StoredFile, locate
from tests.conftest import Run
from tests.hub.conftest import RECIPE, USED, Hubs, pickled
from tests.hub.servers import Repository

TEXT = """# Written by `mergecli fetch`; `mergecli fetch --locked a.toml` fetches the same again.
schema = 1

[[source]]
source = "hf:org/a"
fetched = "ms:mirror/a"
commit = "0123456789abcdef0123456789abcdef01234567"
files = [
  { path = "b/model.bin", size = 4, sha256 = "{1}" },
  { path = "b/model.safetensors", size = 3, sha256 = "{0}", made_from = "b/model.bin" },
  { path = "config.json", size = 2, sha256 = "{1}" },
]

[[source]]
source = "hf:org/a"
data = true
fetched = "hf:org/a"
commit = "0123456789abcdef0123456789abcdef01234567"
files = [
  { path = "test.parquet", size = 5, sha256 = "{1}" },
]
""".replace("{0}", "a" * 64).replace("{1}", "b" * 64)


def test_a_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = (
        StoredFile("config.json", 2, "b" * 64),
        StoredFile("b/model.safetensors", 3, "a" * 64, "b/model.bin"),
        StoredFile("b/model.bin", 4, "b" * 64),
    )
    model = LockedSource("hf:org/a", False, "ms:mirror/a", commit, files)
    data = LockedSource("hf:org/a", True, "hf:org/a", commit, (StoredFile("test.parquet", 5, "b" * 64),))
    path = tmp_path / "a.lock"
    write_lock(path, Lock().merged([data, model]))
    assert path.read_text() == TEXT
    assert set(read_lock(path).sources) == {model.key, data.key}
    write_lock(path, read_lock(path))
    assert path.read_text() == TEXT


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("schema = 1", "schema = 2", "expected `schema = 1`"),
        ("schema = 1", "schema = 1\nname = 3", "expected `schema = 1`"),
        ("commit = ", "comit = ", "`source.comit`: unknown key (did you mean `commit`?)"),
        ('commit = "0123', 'commit = "xyz', "`commit`: expected a commit's"),
        ('path = "config.json"', 'path = "../config.json"', "`path`: expected a file inside"),
        (
            '  { path = "test.parquet", size = 5, sha256 = "' + "b" * 64 + '" },\n',
            "",
            "`files`: expected at least one of `hf:org/a`",
        ),
        ('made_from = "b/model.bin"', 'made_from = "../model.bin"', "`made_from`: expected one of the files"),
        ("size = 2", "size = -2", "`size`: expected a whole number, at least 0, got -2"),
        ("b" * 64, "b", "`sha256`: expected 64"),
        ("ms:mirror/a", "mirror/a", "`fetched`: expected `hf:org/name`"),
        ("[[source]]", "[[source", ""),
        (TEXT, "[tuned]\na = 3\n", "expected `schema = 1`"),
    ],
)
def test_a_lock_that_is_damaged_or_something_else_is_one_clear_error(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    path = tmp_path / "a.lock"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(InputError, match=r"a\.lock: is not a lock file: ") as refused:
        read_lock(path)
    assert reason in refused.value.message
    assert "\n" not in refused.value.message
    assert "delete it" in refused.value.hint


def test_a_recipe_is_pinned_by_the_lock_beside_it(hubs: Hubs, recipe: Path) -> None:
    known = recipe_of(recipe)
    (recipe.with_suffix(".lock")).unlink(missing_ok=True)
    assert pin(known) == known
    paths = fetch(recipe).paths
    pinned = pin(known)
    assert pinned.base is not None
    assert pinned.base.pinned is not None
    assert (str(pinned.base), pinned.base.pinned.revision) == ("hf:org/base", paths[0].name)
    for repository in hubs.hf.repositories.values():
        repository.commit({"config.json": b"{ }"})
    fetch(["hf:org/base", "hf:org/tuned"])
    data = pinned.tasks["birds"].data
    assert data is not None
    assert [locate(source) for source in (pinned.base, pinned.tuned["birds"], data)] == list(paths)


def test_all_points_of_a_sweep_are_pinned_by_one_look_at_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(lock, "read_lock", lambda path: seen.append(path) or read_lock(path))
    recipe = tmp_path / "a.toml"
    recipe.write_text('base = "hf:org/a"\n[tuned]\nx = "hf:org/a"\n[method]\nname = "task_arithmetic"\n')
    for kept in (TEXT, TEXT.replace("mirror/a", "another/mirror")):
        lock_path(recipe).write_text(kept)
        points = points_of(recipe, ["method.scaling_factor=0.1:0.9:0.1"])
        (origin,) = {point.recipe.tuned["x"].pinned for point in points}
        assert origin is not None
        assert f'fetched = "{origin.kind}:{origin.name}"' in kept
        assert len(points) == 9
    assert seen == [lock_path(recipe)] * 2


def test_an_adapter_is_pinned_too(tmp_path: Path) -> None:
    from dataclasses import replace

    entry = LockedSource("hf:org/a", False, "ms:mirror/a", "0123456", ())
    lock = Lock({entry.key: entry})
    source = replace(parse_source("toy:base", Path()), adapter=parse_source("hf:org/a", Path()))
    adapter = pinned_source(lock, source).adapter
    assert adapter is not None
    assert str(adapter.pinned) == "ms:mirror/a@0123456"
    assert pinned_source(lock, parse_source("hf:org/b", Path())).pinned is None


def test_the_lock_says_what_lies_in_the_store(hubs: Hubs, recipe: Path, run: Run) -> None:
    ended = run("fetch", recipe.name)
    assert ", wrote recipe.lock (sha256:" in ended.end
    lock = read_lock(lock_path(recipe))
    assert list(lock.sources) == [(False, "hf:org/base"), (False, "hf:org/tuned"), (True, "hf:org/birds")]
    for entry, folder in zip(lock.sources.values(), ended.out.splitlines(), strict=True):
        assert Path(folder).name == entry.commit
        for file in entry.files:
            data = (Path(folder) / file.path).read_bytes()
            assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [file.path for file in lock.sources[False, "hf:org/base"].files] == USED
    before = lock_path(recipe).read_bytes()
    assert run("fetch", recipe.name).err == ""
    assert lock_path(recipe).read_bytes() == before


def test_fetching_a_part_leaves_the_rest_of_the_lock(hubs: Hubs, recipe: Path) -> None:
    fetch(recipe)
    hubs.hf.repositories["org/base"].commit({"config.json": b"{ }"})
    before = read_lock(lock_path(recipe))
    fetch(recipe, only=["data"])
    assert read_lock(lock_path(recipe)) == before
    recipe.write_text(RECIPE.replace('base = "hf:org/base"', ""))
    fetch(recipe)
    assert (False, "hf:org/base") not in read_lock(lock_path(recipe)).sources


def test_what_needs_no_hub_needs_no_lock(recipe: Path, hubs: Hubs) -> None:
    recipe.write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\n')
    assert len(fetch(recipe).paths) == 2
    assert not lock_path(recipe).exists()
    assert hubs.asked == []


def test_locked_fetches_the_locked_commit_though_the_branch_moved(
    hubs: Hubs, recipe: Path, tmp_path: Path
) -> None:
    paths = fetch(recipe).paths
    lock = lock_path(recipe).read_bytes()
    for repository in hubs.hf.repositories.values():
        repository.commit({"config.json": b"{ }"})
    hubs.forget()
    got = fetch(recipe, locked=True, into=tmp_path / "other").paths
    assert [path.name for path in got] == [path.name for path in paths]
    assert all("/resolve/" in path for path in hubs.hf.paths())
    assert lock_path(recipe).read_bytes() == lock
    hubs.forget()
    assert fetch(recipe, locked=True).paths == paths
    assert hubs.asked == []


def test_locked_refuses_what_the_lock_does_not_say(hubs: Hubs, recipe: Path, run: Run) -> None:
    ended = run("fetch", "--locked", recipe.name)
    assert (ended.status, ended.err.splitlines()[0]) == (2, "error: --locked: recipe.toml has no lock")
    fetch(recipe)
    recipe.write_text(RECIPE.replace("[tuned]", '[tuned]\nnew = "hf:org/new"\nnewer = "hf:org/newer"'))
    ended = run("fetch", "--locked", recipe.name)
    assert ended.status == 2
    assert "hf:org/new: is not in the lock\n  hf:org/newer: is not in the lock\n" in ended.err
    with pytest.raises(UsageError, match="--locked: `hf:org/base` has no lock"):
        fetch("hf:org/base", locked=True)
    recipe.write_text(RECIPE)
    with pytest.raises(UsageError, match="has it from Hugging Face, whose commits ModelScope does not know"):
        fetch(recipe, locked=True, platform="ms")


def test_locked_refuses_a_file_that_is_not_the_locked_one(hubs: Hubs, recipe: Path, tmp_path: Path) -> None:
    fetch(recipe)
    path = lock_path(recipe)
    digest = next(
        file.sha256 for file in read_lock(path).sources[False, "hf:org/base"].files if file.size > 10_000
    )
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(
        HubError, match=r"hf:org/base: `model\.safetensors`: expected SHA-256 0000000000000000\.\.\."
    ):
        fetch(recipe, locked=True, into=tmp_path / "other")
    with pytest.raises(HubError, match="expected SHA-256"):
        fetch(recipe, locked=True)


@pytest.mark.parametrize("way", ["--offline", "HF_HUB_OFFLINE"])
def test_offline_lists_what_is_missing_and_finds_the_rest(
    hubs: Hubs, recipe: Path, run: Run, way: str
) -> None:
    offline = ["--offline"] if way == "--offline" else []
    environment = {} if offline else {"HF_HUB_OFFLINE": "1"}
    fetch("hf:org/base")
    hubs.forget()
    ended = run("fetch", *offline, recipe.name, **environment)
    assert (ended.status, ended.out) == (4, "")
    assert "2 of 3 sources failed" not in ended.err
    assert "hf:org/tuned, hf:datasets/org/birds: has not been fetched" in ended.err
    assert "where there is a network" in ended.err
    fetch(recipe)
    hubs.forget()
    ended = run("fetch", *offline, recipe.name, **environment)
    assert (ended.status, len(ended.out.splitlines()), ended.err) == (0, 3, "")
    assert hubs.asked == []


def test_offline_takes_what_the_lock_says_and_else_what_was_fetched_last(hubs: Hubs, recipe: Path) -> None:
    paths = fetch(recipe).paths
    hubs.hf.repositories["org/base"].commit({"config.json": b"{ }"})
    (newer,) = fetch("hf:org/base").paths
    assert fetch(recipe, offline=True).paths == paths
    assert fetch("hf:org/base", offline=True).paths == (newer,)
    (paths[0] / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"hf:org/base: the store lacks `model\.safetensors`"):
        fetch(recipe, offline=True)


def test_a_folder_put_there_by_hand_is_found(hubs: Hubs) -> None:
    folder = hubs.store / "hf/org/mine/my-commit"
    folder.mkdir(parents=True)
    (folder.parent / "refs").mkdir()
    (folder.parent / "refs/main").write_text("my-commit\n")
    assert fetch("hf:org/mine", offline=True).paths == (folder,)


@pytest.mark.parametrize("with_lock", [True, False])
def test_verify_names_every_damaged_and_missing_file(
    hubs: Hubs, recipe: Path, run: Run, with_lock: bool
) -> None:
    base, tuned, data = fetch(recipe).paths
    if not with_lock:
        lock_path(recipe).unlink()
    hubs.forget()
    ended = run("fetch", "--verify", recipe.name)
    assert (ended.status, ended.out) == (0, f"{base}\n{tuned}\n{data}\n")
    weights = base / "model.safetensors"
    data_bytes = weights.read_bytes()
    weights.write_bytes(data_bytes[:-1] + bytes([data_bytes[-1] ^ 1]))
    (tuned / "vocab.json").write_text("longer than before")
    (data / "data/train-00001-of-00002.parquet").unlink()
    ended = run("fetch", "--verify", recipe.name)
    assert (ended.status, ended.out) == (3, "")
    lines = ended.err.splitlines()
    assert lines[0] == "error: 3 files are not as fetched:"
    assert lines[1].startswith(f"  {weights}: is damaged: its SHA-256 is not ")
    assert lines[2] == f"  {tuned}/vocab.json: is damaged: expected 3 bytes, it has 18"
    assert lines[3] == f"  {data}/data/train-00001-of-00002.parquet: is missing"
    assert lines[4] == f"hint: delete what is damaged, then run `mergecli fetch {recipe.name}`"
    assert hubs.asked == []


def test_verify_says_that_nothing_has_been_fetched(hubs: Hubs, recipe: Path, run: Run) -> None:
    ended = run("fetch", "--verify", recipe.name)
    assert (ended.status, ended.out) == (3, "")
    assert ended.err == (
        f"error: {recipe.name}: nothing has been fetched, so there is nothing to verify\n"
        f"hint: run `mergecli fetch {recipe.name}`\n"
    )
    fetch("hf:org/base")
    assert run("fetch", "--verify", recipe.name).err == (
        "error: 2 of 3 sources cannot be verified:\n"
        "  hf:org/tuned: has not been fetched\n"
        "  hf:datasets/org/birds: has not been fetched\n"
        f"hint: run `mergecli fetch {recipe.name}`\n"
    )


def test_a_dry_run_offline_shows_what_recipe_and_lock_say(hubs: Hubs, recipe: Path, run: Run) -> None:
    fetch("hf:org/base")
    hubs.forget()
    ended = run("fetch", "--dry-run", "--offline", recipe.name)
    assert (ended.status, [line.split("\t")[:3] for line in ended.out.splitlines()]) == (
        0, [["source", "file", "bytes"], ["hf:org/tuned", "", ""], ["hf:datasets/org/birds", "", ""]],
    )  # fmt: skip
    assert re.fullmatch(r"would fetch 2 sources from \S+, whose files only the hub knows, .*", ended.end)
    fetch(recipe)
    plan = fetch(recipe, dry_run=True, offline=True, into="elsewhere")
    assert {each.source for each in plan.downloads} == {
        "hf:org/base",
        "hf:org/tuned",
        "hf:datasets/org/birds",
    }
    assert all(each.path and each.size for each in plan.downloads)
    assert not Path("elsewhere").exists()


def test_what_is_missing_or_of_another_size_is_fetched_again(hubs: Hubs) -> None:
    (path,) = fetch("hf:org/base").paths
    (path / "vocab.json").unlink()
    (path / "config.json").write_text("")
    assert [each.path for each in fetch("hf:org/base").downloads] == ["config.json", "vocab.json"]
    fetch("hf:org/base", verify=True)


def test_what_was_a_pickle_is_locked_as_such_and_never_opened_without_leave(
    hubs: Hubs, recipe: Path, tmp_path: Path
) -> None:
    hubs.hf.repositories["org/base"] = Repository({"config.json": b"{}", "pytorch_model.bin": pickled(3)})
    with pytest.raises(HubError, match="only as `pytorch_model"):
        fetch(recipe)
    first = fetch(recipe, allow_pickle=True).paths[0]
    files = {file.path: file for file in read_lock(lock_path(recipe)).sources[False, "hf:org/base"].files}
    assert files["model.safetensors"].made_from == "pytorch_model.bin"
    fetch(recipe, verify=True)
    assert fetch(recipe, locked=True).paths[0] == first
    with pytest.raises(HubError, match=r"the lock has its weights only as `pytorch_model\.bin`, a pickle"):
        fetch(recipe, locked=True, into=tmp_path / "other")
    other = fetch(recipe, locked=True, into=tmp_path / "other", allow_pickle=True).paths[0]
    assert (other / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_the_license_that_the_hub_gives_is_in_the_store_and_in_the_lock(
    hubs: Hubs, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hubs.hf.licenses = {"org/base": "mit", "org/tuned": "apache-2.0"}
    fetch(recipe, only=["models"])
    lock = lock_path(recipe)
    assert {each.source: each.license for each in read_lock(lock).sources.values()} == {
        "hf:org/base": "mit", "hf:org/tuned": "apache-2.0"
    }  # fmt: skip
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "another"))
    fetch(recipe, only=["models"], locked=True)
    sources = [parse_source(each, tmp_path) for each in ("hf:org/base", "hf:org/tuned")]
    pinned = [replace(each, pinned=read_lock(lock).sources[False, str(each)].origin) for each in sources]
    assert strictest(licenses(pinned))[0] == "apache-2.0"
