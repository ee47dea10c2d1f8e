"""Fetching: what is asked for, what lands where, and that nothing is asked for twice."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from mergecli.clip.model import features, load_clip
from mergecli.formats.opening import model_path
from mergecli.hub.fetch import fetch
from mergecli.runtime.errors import HubError, InputError, UsageError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from mergecli.storage.store import locate
from tests.conftest import Run
from tests.formats.test_open_clip_config import open_clip_folder
from tests.hub.conftest import USED, Hubs, pickled
from tests.hub.servers import Repository, altered
from tests.support.tiny_clip import make_tiny_clip


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_fetch_prints_where_the_model_lies(hubs: Hubs, run: Run) -> None:
    ended = run("fetch", "hf:org/tuned")
    folder = hubs.store / "hf/org/tuned" / hubs.hf.repositories["org/tuned"].head
    assert (ended.status, ended.out) == (0, f"{folder}\n")
    assert ended.end.startswith("fetched 4 files, ")
    assert files_in(folder) == [".mergecli.json", *USED]
    assert locate(parse_source("hf:org/tuned", Path())) == folder


@pytest.mark.parametrize("kind", ["hf", "ms"])
def test_a_repository_of_open_clip_is_ready_after_one_fetch(hubs: Hubs, tmp_path: Path, kind: str) -> None:
    base = make_tiny_clip(tmp_path / "base")
    theirs = open_clip_folder(base, tmp_path / "theirs", quick_gelu=True)
    server, branch = (hubs.hf, "main") if kind == "hf" else (hubs.ms, "master")
    server.repositories["laion/tiny"] = Repository.of_folder(theirs, branch)
    (path,) = fetch(f"{kind}:laion/tiny").paths
    assert path.is_relative_to(hubs.store / "converted")
    assert path == model_path(parse_source(f"{kind}:laion/tiny", Path()))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features(load_clip(path), pixels), features(load_clip(base), pixels))
    hubs.forget()
    assert fetch(f"{kind}:laion/tiny", offline=True).paths == (path,)
    assert hubs.asked == []


def test_a_repository_of_open_clip_that_is_no_clip_of_openai_s_is_one_error(
    hubs: Hubs, tmp_path: Path, run: Run
) -> None:
    base = make_tiny_clip(tmp_path / "base")
    theirs = open_clip_folder(base, tmp_path / "theirs", custom_text=True, init_logit_bias=-10)
    hubs.hf.repositories["timm/siglip"] = Repository.of_folder(theirs)
    ended = run("fetch", "hf:timm/siglip")
    assert ended.status == 3
    assert (
        "is not of OpenAI's architecture, and cannot be evaluated:\n  `init_logit_bias` is -10" in ended.err
    )


@pytest.mark.parametrize("source", ["hf:org/tuned", "ms:org/tuned"])
def test_only_what_is_used_is_asked_for(hubs: Hubs, source: str) -> None:
    fetch(source)
    server = hubs.hf if source.startswith("hf") else hubs.ms
    asked = [
        request.query.get("FilePath") or request.path.rpartition("/")[2]
        for request in server.requests
        if "resolve" in request.path or "FilePath" in request.query
    ]
    assert sorted(asked) == USED
    assert len(server.cdn_requests) == 1


@pytest.mark.parametrize("source", ["hf:org/tuned", "ms:org/tuned"])
def test_a_second_fetch_makes_one_request_and_no_download(hubs: Hubs, source: str) -> None:
    first = fetch(source)
    hubs.forget()
    second = fetch(source)
    assert (second.paths, second.downloads) == (first.paths, ())
    assert len(hubs.asked) == 1


@pytest.mark.parametrize("prefix", ["hf", "ms"])
def test_a_commit_that_is_in_the_store_needs_no_request(hubs: Hubs, prefix: str) -> None:
    commit = fetch(f"{prefix}:org/tuned").paths[0].name
    hubs.forget()
    fetch(f"{prefix}:org/tuned@{commit}")
    assert hubs.asked == []


def test_a_branch_that_moved_is_fetched_again_beside_the_old_commit(hubs: Hubs) -> None:
    old = fetch("hf:org/tuned").paths[0]
    new = hubs.hf.repositories["org/tuned"].commit({"config.json": b"{}\n"})
    (path,) = fetch("hf:org/tuned").paths
    assert path.name == new
    assert old.is_dir()
    assert locate(parse_source("hf:org/tuned", Path())) == path


def test_a_branch_and_a_tag_are_found_by_name(hubs: Hubs) -> None:
    repository = hubs.hf.repositories["org/tuned"]
    commit = repository.commit({"config.json": b"{}\n"}, "refs/pr/1")
    (path,) = fetch("hf:org/tuned@refs/pr/1").paths
    assert path.name == commit
    assert locate(parse_source("hf:org/tuned@refs/pr/1", Path())) == path


def test_lists_are_followed_from_page_to_page(hubs: Hubs) -> None:
    hubs.hf.page = 2
    assert files_in(fetch("hf:org/tuned").paths[0]) == [".mergecli.json", *USED]
    assert len(hubs.hf.paths("/tree/")) == 5


def test_data_sets_of_many_files_are_listed_page_by_page_on_modelscope(hubs: Hubs) -> None:
    many = {f"notes/{number}.txt": b"x" for number in range(250)}
    hubs.ms.repositories["datasets/org/birds"].commit(many)
    assert len(fetch("ms:datasets/org/birds").downloads) == 3
    assert [request.query["PageNumber"] for request in hubs.ms.requests if "tree" in request.path] == [
        "1",
        "2",
    ]


def test_both_platforms_give_the_same_content(hubs: Hubs, recipe: Path) -> None:
    on_one, on_other = (fetch(recipe, platform=platform) for platform in ("hf", "modelscope"))
    assert all("/ms/" in str(path) for path in on_other.paths)
    for one, other in zip(on_one.paths[:2], on_other.paths[:2], strict=True):
        with open_checkpoint(one) as a, open_checkpoint(other) as b:
            assert a.digest() == b.digest()
    names = [name for name in files_in(on_one.paths[2]) if name.endswith(".parquet")]
    assert len(names) == 3
    for name in names:
        assert (on_one.paths[2] / name).read_bytes() == (on_other.paths[2] / name).read_bytes()


def test_a_recipe_may_say_another_id_for_modelscope(hubs: Hubs, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('base = { source = "hf:openai/clip", modelscope = "org/base" }\n[tuned]\n')
    (where,) = fetch(path, platform="ms").paths
    assert where.parent == hubs.store / "ms/org/base"
    assert 'source = "hf:openai/clip"\nfetched = "ms:org/base"' in (tmp_path / "r.lock").read_text()


def test_into_names_another_store(hubs: Hubs, tmp_path: Path) -> None:
    (path,) = fetch("hf:org/tuned", into=tmp_path / "usb").paths
    assert path.is_relative_to(tmp_path / "usb/hf/org/tuned")
    assert not hubs.store.exists()


def test_dry_run_tells_files_bytes_and_hosts_and_writes_nothing(hubs: Hubs, recipe: Path, run: Run) -> None:
    before = files_in(recipe.parent)
    ended = run("fetch", "--dry-run", recipe)
    rows = [line.split("\t") for line in ended.out.splitlines()]
    weights = hubs.hf.repositories["org/base"].commits[hubs.hf.repositories["org/base"].head][
        "model.safetensors"
    ]
    assert rows[0] == ["source", "file", "bytes", "host"]
    assert [
        "hf:org/base",
        "model.safetensors",
        str(len(weights)),
        hubs.hf.endpoint.removeprefix("http://"),
    ] in rows
    assert len(rows) == 1 + 2 * len(USED) + 3
    assert ended.end.startswith("would fetch 11 files, ")
    assert files_in(recipe.parent) == before
    assert hubs.hf.paths("/resolve/") == []


def test_models_or_data_alone(hubs: Hubs, recipe: Path) -> None:
    assert [path.parent.name for path in fetch(recipe, only=["data"]).paths] == ["birds"]
    assert [path.parent.name for path in fetch(recipe, only=["models"]).paths] == ["base", "tuned"]
    with pytest.raises(UsageError, match="--only: expected models or data, got `model`"):
        fetch(recipe, only=["model"])


def test_what_lies_inside_a_repository_comes_with_what_lies_beside_it(hubs: Hubs) -> None:
    files = {
        f"vision/{name}": data for name, data in hubs.hf.repositories["org/base"].commits.popitem()[1].items()
    }
    hubs.hf.repositories["org/tuned"].commit(files)
    (path,) = fetch("hf:org/tuned#vision").paths
    assert path.name == "vision"
    assert files_in(path) == USED
    (path,) = fetch("hf:org/tuned#vision/model.safetensors").paths
    assert path.is_file()
    hubs.forget()
    (path,) = fetch("hf:org/tuned").paths
    assert files_in(path) == sorted([".mergecli.json", *USED, *(f"vision/{name}" for name in USED)])
    with pytest.raises(HubError, match=r"there is no `text`\nhint: its folders are `onnx`"):
        fetch("hf:org/tuned#text")


def test_shards_come_with_their_index(hubs: Hubs) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": b"shard %d" % n for n in (1, 2)}
    index = json.dumps({"weight_map": {str(number): name for number, name in enumerate(shards)}}).encode()
    hubs.hf.repositories["org/sharded"] = Repository(
        {"config.json": b"{}", "model.safetensors.index.json": index, "other.safetensors": b"x", **shards}
    )
    names = [each.path for each in fetch("hf:org/sharded").downloads]
    assert names == ["config.json", *sorted(shards), "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "linearized_adapter_model.safetensors"])
def test_an_adapter_comes_with_its_configuration(hubs: Hubs, name: str) -> None:
    hubs.hf.repositories["org/lora"] = Repository(
        {"adapter_config.json": b"{}", name: b"x", "training_args.bin": b""}
    )
    assert [each.path for each in fetch("hf:org/lora").downloads] == ["adapter_config.json", name]


def test_pickled_weights_are_refused_and_converted_only_on_request(hubs: Hubs) -> None:
    hubs.hf.repositories["org/old"] = Repository({"config.json": b"{}", "pytorch_model.bin": pickled(3)})
    with pytest.raises(HubError, match=r"has its weights only as `pytorch_model\.bin`: pickles") as refused:
        fetch("hf:org/old")
    assert "--allow-pickle" in refused.value.hint
    assert hubs.hf.paths("/resolve/") == []
    (path,) = fetch("hf:org/old", allow_pickle=True).paths
    assert files_in(path) == [".mergecli.json", "config.json", "model.safetensors", "pytorch_model.bin"]
    with open_checkpoint(path) as stored:
        assert "scale" in stored.entries
    hubs.forget()
    fetch("hf:org/old", allow_pickle=True)
    assert len(hubs.asked) == 1
    (path / "model.safetensors").unlink()
    fetch("hf:org/old", allow_pickle=True)
    assert (path / "model.safetensors").is_file()


def test_a_wrong_digest_is_refused_and_the_file_removed(hubs: Hubs, run: Run) -> None:
    hubs.hf.misbehave("model.safetensors", altered())
    ended = run("fetch", "hf:org/tuned")
    assert ended.status == 4
    assert ended.err.startswith("error: hf:org/tuned: `model.safetensors`: expected SHA-256 ")
    assert "the file was removed" in ended.err
    assert not [name for name in files_in(hubs.store) if "model.safetensors" in name]
    assert run("fetch", "hf:org/tuned").status == 0


@pytest.mark.parametrize("prefix", ["hf", "ms"])
def test_a_small_files_digest_is_checked_too(hubs: Hubs, prefix: str) -> None:
    (hubs.hf if prefix == "hf" else hubs.ms).misbehave("vocab.json", altered())
    with pytest.raises(HubError, match=r"`vocab.json`: expected (git blob|SHA-256)"):
        fetch(f"{prefix}:org/tuned")


def test_everything_that_failed_is_listed_and_the_rest_is_kept(hubs: Hubs, run: Run) -> None:
    ended = run("fetch", "hf:org/tuned", "hf:org/tunde", "hf:org/base@v9", "ms:nobody/x")
    assert ended.status == 4
    assert "3 of 4 sources failed:" in ended.err
    assert "  hf:org/tunde: " in ended.err
    assert "has no such model (did you mean `org/tuned`?)" in ended.err
    assert "  hf:org/base@v9: there is no branch, tag or commit `v9`; it has `main`" in ended.err
    assert "Traceback" not in ended.err
    assert len(list((hubs.store / "hf/org/tuned").glob("*/model.safetensors"))) == 1


def test_a_name_that_leaves_the_store_is_refused(hubs: Hubs) -> None:
    for source in ("hf:../..", "hf:org/tuned@../../x"):
        with pytest.raises(UsageError):
            fetch(source)
    hubs.hf.repositories["org/evil"] = Repository({"../../config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(HubError, match="a file outside of the repository"):
        fetch("hf:org/evil")


def test_no_space_is_told_before_the_first_byte(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs(hubs.store.parent)
    usage = type("usage", (), {"free": 10, "total": full.f_blocks, "used": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="bytes are to be fetched, and the disk has room for 10"):
        fetch("hf:org/tuned")


def test_a_store_that_cannot_be_written_is_told(hubs: Hubs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write: not a directory"):
        fetch("hf:org/tuned", into=tmp_path / "file")


def test_the_store_records_what_was_fetched(hubs: Hubs) -> None:
    (path,) = fetch("hf:org/tuned").paths
    files = json.loads((path / ".mergecli.json").read_text())["files"]
    assert sorted(files) == USED
    for name in USED:
        data = (path / name).read_bytes()
        assert files[name] == {
            "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "made_from": None,
        }  # fmt: skip
