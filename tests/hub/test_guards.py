"""What is refused before anything is fetched or written, and what is told when it cannot be."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
import torch

from mergecli.cli import run as in_process
from mergecli.hub.client import TransientError
from mergecli.hub.environment import host_of, wait_of, without_password
from mergecli.hub.fetch import LockNotWrittenError, fetch
from mergecli.hub.retry import RetryPolicy, StoppedError
from mergecli.hub.store import commit_lock, partial_folder
from mergecli.recipe.lock import lock_path, read_lock
from mergecli.runtime.errors import HubError, InputError, UsageError
from mergecli.storage.sources import Source
from mergecli.storage.store import Store
from tests.conftest import Run
from tests.hub.conftest import Hubs, pickled
from tests.hub.servers import ModelScopeServer, Repository, status

MODEL = Source("hf", "org/x")


@pytest.mark.parametrize("commit", ["", "..", "/etc", "a/b", "refs", "0123.partial", "a:b"])
def test_the_store_has_no_folder_for_what_is_no_commit(tmp_path: Path, commit: str) -> None:
    store = Store(tmp_path / "store")
    for make in (Store.folder, partial_folder, commit_lock):
        with pytest.raises(HubError, match="cannot be a commit"):
            make(store, MODEL, commit)


@pytest.mark.parametrize("content", [b"", b"/etc", b"..", b"\xff\xfe", b"a\0b"])
def test_a_reference_that_makes_no_sense_is_none(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    path = store.repository(MODEL) / "refs/main"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert store.reference(MODEL) is None


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://hub.example", "hub.example"),
        ("http://me:p@ss@hub.example:80/x", "hub.example:80"),
        ("http://[::1]:8", "[::1]:8"),
    ],
)
def test_a_host_is_told_without_a_password(url: str, host: str) -> None:
    assert host_of(url, "X") == host
    assert "p@ss" not in without_password(f"cannot open {url!r}: x")


@pytest.mark.parametrize("url", ["hub.example", "ftp://hub.example", "http://", "http://u:secret@h:port"])
def test_an_endpoint_that_is_no_url_is_told_by_its_variable(url: str) -> None:
    with pytest.raises(UsageError, match=r"^HF_ENDPOINT: expected a URL") as refused:
        host_of(url, "HF_ENDPOINT")
    assert "secret" not in refused.value.message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "-1"),
        ("HTTPS_PROXY", "http://u:secret@[::1"),
        ("SSL_CERT_FILE", "/dev/null"),
        ("REQUESTS_CA_BUNDLE", "/not/there"),
        ("MODELSCOPE_DOWNLOAD_TIMEOUT", "soon"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    hubs: Hubs, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    prefix = "ms" if variable in ("REQUESTS_CA_BUNDLE", "MODELSCOPE_DOWNLOAD_TIMEOUT") else "hf"
    with pytest.raises(UsageError, match=variable) as refused:
        fetch(f"{prefix}:org/base")
    assert "secret" not in refused.value.message
    assert hubs.asked == []


@pytest.mark.parametrize("value", ["²", "soon", "Mon, 99 Jan 2024", ""])
def test_a_wait_that_makes_no_sense_is_none(value: str) -> None:
    assert wait_of({"Retry-After": value}) is None


def test_waits_that_a_hub_asks_for_are_noted_once_and_end() -> None:
    told: list[str] = []
    stop = threading.Event()
    stop.set()
    policy = RetryPolicy(note=told.append)
    busy = TransientError("the hub asks for fewer requests", 100)
    for _ in range(50):  # at the same time, as threads wait
        with pytest.raises(StoppedError):
            policy.pause(1, busy, stop)
    assert told == ["waiting 100 s: the hub asks for fewer requests"]
    for wait in (350, float("nan"), float("inf")):
        with pytest.raises(HubError, match="and asks to wait"):
            policy.pause(1, TransientError("busy", wait), stop)


def test_modelscope_is_tried_as_often_as_the_policy_says(hubs: Hubs) -> None:
    hubs.ms.misbehave("/repo/files", status(503), times=99)
    with pytest.raises(HubError, match="status 503, 5 times"):
        fetch("ms:org/base")
    assert len(hubs.ms.requests) == 5


def test_a_name_that_is_too_long_is_an_error_of_the_store(
    hubs: Hubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / ("x" * 300)))
    with pytest.raises(InputError, match=r"cannot be used: file name too long\nhint: .* MERGECLI_HOME"):
        fetch("hf:org/base")
    assert fetch("toy:base").paths[0].is_dir()


def test_what_cannot_be_written_down_is_found_before_anything_is_asked(hubs: Hubs, recipe: Path) -> None:
    (hubs.store / "hf/org/base/refs/a/b").mkdir(parents=True)
    with pytest.raises(InputError, match="refs/a: is a folder"):
        fetch("hf:org/base@a")
    (hubs.store / "hf/org/base/refs/main").touch()
    with pytest.raises(InputError, match="refs/main: is a file"):
        fetch("hf:org/base@main/b")
    lock_path(recipe).mkdir()
    with pytest.raises(UsageError, match=r"recipe\.lock: is a folder"):
        fetch(recipe)
    assert hubs.asked == []


@pytest.mark.parametrize(
    "arguments", [["--only", ""], ["--only", ","], ["--only", "models,"], ["--into", ""]]
)
def test_an_option_without_a_value_is_refused(run: Run, arguments: list[str]) -> None:
    ended = run("fetch", "toy:base", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {arguments[0]}: expected")


def test_kinds_may_be_repeated_and_spaced(hubs: Hubs, recipe: Path, run: Run) -> None:
    assert run("fetch", "--dry-run", recipe, "--only", "models", "--only", "data").out.count("\n") == 12
    assert run("fetch", "--dry-run", recipe, "--only", "models, data").out.count("\n") == 12


def test_a_lock_that_cannot_be_written_holds_back_no_paths(
    hubs: Hubs, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mergecli.hub.locks.write_lock", refuse)
    with pytest.raises(LockNotWrittenError, match="cannot write: permission denied") as refused:
        fetch(recipe)
    assert "`-o`" not in refused.value.hint
    assert in_process(["fetch", str(recipe)]) == 3
    assert capsys.readouterr().out.splitlines() == [str(path) for path in refused.value.done.paths]


def test_only_weights_and_folders_may_be_named_inside(hubs: Hubs) -> None:
    with pytest.raises(UsageError, match=r"`config\.json` is no file of weights"):
        fetch("hf:org/base#config.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(pickled(1), "is a pickle, whatever it is called"), (b"", r"`model\.safetensors` is empty")],
    ids=["pickle", "empty"],
)
def test_what_is_called_safetensors_and_is_none_is_refused(hubs: Hubs, content: bytes, reason: str) -> None:
    hubs.hf.repositories["org/base"].commit({"model.safetensors": content})
    with pytest.raises(HubError, match=reason):
        fetch("hf:org/base")
    assert not list(hubs.store.rglob("model.safetensors*"))


@pytest.mark.parametrize(
    "content", [b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "../x.safetensors"}}', b"["]
)
def test_an_index_that_names_no_shards_is_refused(hubs: Hubs, content: bytes) -> None:
    files = {"model.safetensors.index.json": content, "model-1.safetensors": b"x"}
    hubs.hf.repositories["org/base"].commit(files, alone=True)
    with pytest.raises(HubError, match=r"`model\.safetensors\.index\.json`"):
        fetch("hf:org/base")


def test_all_failures_are_told_by_what_was_asked_for(hubs: Hubs) -> None:
    buffer = io.BytesIO()
    torch.save({"a": Path()}, buffer)
    hubs.hf.repositories["org/old"] = Repository({"pytorch_model.bin": buffer.getvalue()})
    with pytest.raises(InputError) as refused:
        fetch(["hf:org/old", "hf:datasets/org/none"], allow_pickle=True)
    message = refused.value.message
    assert "hf:org/old: pytorch_model.bin: " in message
    assert "hf:datasets/org/none: 127.0.0.1" in message
    assert message.count("hf:org/old") == message.count("hf:datasets/org/none") == 1
    assert ".partial" not in message


def test_a_lock_with_a_byte_order_mark_is_read(hubs: Hubs, recipe: Path) -> None:
    fetch(recipe)
    lock = read_lock(lock_path(recipe))
    lock_path(recipe).write_bytes(b"\xef\xbb\xbf" + lock_path(recipe).read_bytes())
    assert read_lock(lock_path(recipe)) == lock


def test_what_another_program_brought_meanwhile_is_not_counted(
    hubs: Hubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = "mergecli.hub.download.acquire"
    from mergecli.hub import download

    plain = download.acquire

    def after_another(*arguments: object) -> None:
        monkeypatch.setattr(acquire, plain)
        fetch("hf:org/base")
        plain(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(acquire, after_another)
    assert fetch("hf:org/base").downloads == ()


def test_the_same_conversion_is_not_used_for_other_content(hubs: Hubs, tmp_path: Path) -> None:
    paths: list[Path] = []
    for name, value in (("one.ckpt", 1.0), ("two.ckpt", 2.0)):
        torch.save({"a": torch.tensor(value)}, tmp_path / name)
        paths += fetch(tmp_path / name, allow_pickle=True).paths
    assert paths[0] != paths[1]
    assert fetch(tmp_path / "one.ckpt").paths == (paths[0],)


def test_a_refused_connection_of_modelscope_needs_one_try(
    hubs: Hubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ModelScopeServer({}) as gone:
        pass
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", gone.endpoint)
    monkeypatch.setattr(RetryPolicy, "pause", lambda *_: pytest.fail("was tried again"))
    with pytest.raises(HubError, match=r"cannot reach .*: connection refused"):
        fetch(["ms:org/base", "ms:org/tuned"])
