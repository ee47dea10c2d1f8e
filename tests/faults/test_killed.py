"""Programs that are killed while they replace a sharded model: what is read afterwards is the old model or the new one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergecli.merging.merge import merge
from mergecli.runtime.errors import InputError
from mergecli.storage import atomic
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.safetensors_format import generation_of
from tests.conftest import World

SHARDS = "100"

MERGES = """
import os, sys
from mergecli.merging.merge import merge
folder, target, *methods = sys.argv[1:]
models = {name: f"{folder}/{name}.safetensors" for name in ("t1", "t2", "t3")}
def work(method, output=target):
    merge(models, base=f"{folder}/base.safetensors", method=method, output=output, shard_size="100")
for method in methods:  # once, so that what is imported late is there already
    work(method, target + "-first")
for _ in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    work(methods[0])
    print(os.getpid(), flush=True)
    while True:
        for method in methods:
            work(method)
"""
"""For each line: a process that merges by one method, then over it by the next, and so on until it is killed."""


def written(world: World, target: Path, method: str) -> str:
    """The digest of a sharded merge."""
    merge(dict(world.files), base=world.base_file, method=method, output=target, shard_size=SHARDS)
    with open_checkpoint(target) as opened:
        assert len(opened.files) > 3
        return opened.digest()


def digest_of(target: Path) -> str:
    with open_checkpoint(target) as opened:
        return opened.digest()


def never_mixed(world: World, tmp_path: Path, moments: int) -> None:
    target = tmp_path / "model"
    known = {written(world, tmp_path / method, method) for method in ("average", "task_arithmetic")}
    assert len(known) == 2
    rng, found = random.Random(0), set[str]()
    command = [sys.executable, "-c", MERGES, str(world.folder), str(target), "average", "task_arithmetic"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(moments):
            process.stdin.write("\n")
            process.stdin.flush()
            merging = int(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.3))
            os.kill(merging, signal.SIGKILL)
            found.add(digest_of(target))  # it is never refused either: one of the two is whole
            assert found <= known
        process.stdin.close()
    assert not process.returncode


def test_a_merge_that_is_killed_leaves_the_old_model_or_the_new_one(world: World, tmp_path: Path) -> None:
    never_mixed(world, tmp_path, 5)


@pytest.mark.slow
def test_a_merge_that_is_killed_at_many_moments_never_leaves_a_mixed_model(
    world: World, tmp_path: Path
) -> None:
    never_mixed(world, tmp_path, 60)


def test_at_every_step_of_the_replacement_the_folder_holds_one_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    new, old = (written(world, target, method) for method in ("task_arithmetic", "average"))
    seen: list[str] = []
    replace, unlink = Path.replace, Path.unlink

    def look() -> None:
        seen.append(digest_of(target))

    def watched_replace(path: Path, to: Path) -> Path:
        done = replace(path, to)
        look()
        return done

    def watched_unlink(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        look()

    monkeypatch.setattr(atomic.Path, "replace", watched_replace)
    monkeypatch.setattr(atomic.Path, "unlink", watched_unlink)
    merge(dict(world.files), base=world.base_file, method="task_arithmetic", output=target, shard_size=SHARDS)
    turn = seen.index(new)
    assert set(seen[:turn]) == {old}
    assert set(seen[turn:]) == {new}


@pytest.mark.parametrize(("first", "then"), [(SHARDS, None), (None, SHARDS), (SHARDS, SHARDS)])
def test_the_new_model_alone_stays_in_the_folder(
    world: World, tmp_path: Path, first: str | None, then: str | None
) -> None:
    target = tmp_path / "model"
    for size, method in ((first, "average"), (then, "task_arithmetic")):
        merge(dict(world.files), base=world.base_file, method=method, output=target, shard_size=size)
    with open_checkpoint(target) as opened:
        weights = {file.name for file in opened.files}
    assert {file.name for file in target.glob("*.safetensors")} == weights
    assert (target / "model.safetensors.index.json").exists() == (then is not None)


def test_the_same_merge_gives_the_same_names_and_bytes(world: World, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert written(world, one, "average") == written(world, other, "average")
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }


def test_shards_carry_the_generation_of_their_index(world: World, tmp_path: Path) -> None:
    names: list[set[str]] = []
    for method in ("average", "task_arithmetic"):
        written(world, tmp_path / method, method)
        index = (tmp_path / method / "model.safetensors.index.json").read_text()
        generation = generation_of(index)
        assert len(generation) == 12
        names.append({file.name for file in (tmp_path / method).glob("*.safetensors")})
        assert all(name.startswith(f"model-{generation}-0000") for name in names[-1])
    assert not names[0] & names[1]


def test_an_index_that_names_shards_of_another_generation_is_refused(world: World, tmp_path: Path) -> None:
    written(world, tmp_path / "model", "average")
    index = tmp_path / "model" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(f'"{generation_of(text)}"', '"000000000000"'))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "model")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{index}: names shards of another generation than its own, `000000000000`:"
    assert lines[-1] == "hint: it was changed, or one model was copied over another: make the model again"


def test_shards_of_two_models_under_one_index_are_refused(world: World, tmp_path: Path) -> None:
    for method in ("average", "task_arithmetic"):
        written(world, tmp_path / method, method)
    ours, theirs = (
        sorted((tmp_path / method).glob("*.safetensors")) for method in ("average", "task_arithmetic")
    )
    ours[1].write_bytes(theirs[1].read_bytes())
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "average")
    assert str(caught.value) == (
        f"{tmp_path / 'average'}: its shards are of two models: `{ours[1].name}` was made of other "
        f"inputs or settings than `{ours[0].name}`\n"
        "hint: one was copied or written over the other: make the model again"
    )
