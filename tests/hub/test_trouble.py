"""Networks and hubs that fail: what is tried again, what goes on from where it was, and what is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergecli.hub.client import TransientError
from mergecli.hub.fetch import fetch
from mergecli.hub.retry import RetryPolicy, StoppedError, in_threads, retried
from mergecli.runtime.errors import HubError
from tests.conftest import Run
from tests.hub.conftest import Hubs
from tests.hub.servers import ModelScopeServer, Repository, Request, cut, stall, status

BIG = os.urandom(1 << 20)
PLACES = pytest.mark.parametrize("prefix", ["hf", "ms"])


def server(hubs: Hubs, prefix: str) -> Any:
    return hubs.hf if prefix == "hf" else hubs.ms


def make_big(hubs: Hubs) -> None:
    for hub in (hubs.hf, hubs.ms):
        hub.repositories["org/tuned"].commit({"model.safetensors": BIG})


def ranges(requests: list[Request]) -> list[str | None]:
    return [request.headers.get("range") for request in requests]


@pytest.mark.parametrize("reset", [False, True])
@PLACES
def test_a_killed_connection_is_taken_up_where_it_broke(hubs: Hubs, prefix: str, reset: bool) -> None:
    make_big(hubs)
    hub = server(hubs, prefix)
    hub.misbehave("model.safetensors", cut(600_000, reset=reset))
    (path,) = fetch(f"{prefix}:org/tuned").paths
    assert (path / "model.safetensors").read_bytes() == BIG
    first, second = ranges(hub.cdn_requests)
    assert first is None
    assert second is not None
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 600_000
    if not reset:
        assert start > 600_000 - (1 << 16)  # at most the block in flight is lost


@PLACES
def test_a_server_that_ignores_ranges_is_read_from_the_start(hubs: Hubs, prefix: str) -> None:
    make_big(hubs)
    hub = server(hubs, prefix)
    hub.honors_ranges = False
    hub.misbehave("model.safetensors", cut(300_000))
    (path,) = fetch(f"{prefix}:org/tuned").paths
    assert (path / "model.safetensors").read_bytes() == BIG


@PLACES
def test_a_later_fetch_goes_on_from_what_an_earlier_one_left(hubs: Hubs, prefix: str) -> None:
    make_big(hubs)
    hub = server(hubs, prefix)
    partial = hubs.store / prefix / "org/tuned" / f"{hub.repositories['org/tuned'].head}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors.incomplete").write_bytes(BIG[:400_000])
    (path,) = fetch(f"{prefix}:org/tuned").paths
    assert ranges(hub.cdn_requests) == ["bytes=400000-"]
    assert (path / "model.safetensors").read_bytes() == BIG


def test_a_left_over_that_turns_out_wrong_is_fetched_once_more_as_a_whole(hubs: Hubs) -> None:
    make_big(hubs)
    partial = hubs.store / "hf/org/tuned" / f"{hubs.hf.repositories['org/tuned'].head}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors.incomplete").write_bytes(b"?" * 1000)
    (path,) = fetch("hf:org/tuned").paths
    assert ranges(hubs.hf.cdn_requests) == ["bytes=1000-", None]
    assert (path / "model.safetensors").read_bytes() == BIG


@pytest.mark.parametrize("part", ["/revision/main", "/tree/", "model.safetensors", "config.json"])
def test_a_hub_that_fails_once_is_asked_again(hubs: Hubs, part: str) -> None:
    hubs.hf.misbehave(part, status(500))
    assert len(fetch("hf:org/tuned").downloads) == 4


@pytest.mark.parametrize("part", ["/repo/files", "model.safetensors"])
def test_modelscope_is_asked_again_too(hubs: Hubs, part: str) -> None:
    hubs.ms.misbehave(part, status(503))
    assert len(fetch("ms:org/tuned").downloads) == 4


@pytest.mark.parametrize(("prefix", "value"), [("hf", "1"), ("hf", "date"), ("ms", "1")])
def test_a_hub_that_asks_to_wait_is_waited_for(
    hubs: Hubs, prefix: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime, timedelta
    from email.utils import format_datetime

    pauses: list[float | None] = []
    pause = RetryPolicy.pause

    def noted(self: RetryPolicy, failures: int, reason: TransientError, stop: threading.Event) -> None:
        pauses.append(reason.wait)
        pause(self, failures, TransientError(reason.reason, 0.0), stop)

    monkeypatch.setattr(RetryPolicy, "pause", noted)
    if value == "date":
        value = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server(hubs, prefix).misbehave("model.safetensors", status(429, Retry_After=value))
    fetch(f"{prefix}:org/tuned")
    assert len(pauses) == 1
    assert pauses[0] == 1.0 if value == "1" else 90 < (pauses[0] or 0) <= 100


def test_tries_end() -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise TransientError("the hub answered with status 503")

    with pytest.raises(HubError, match="status 503, 3 times\nhint: try again later"):
        retried(fail, threading.Event(), RetryPolicy(tries=3, first=0.01))
    assert len(tries) == 3
    with pytest.raises(HubError, match="and asks to wait 3600 s"):
        RetryPolicy().pause(1, TransientError("the hub asks for fewer requests", 3600), threading.Event())


def test_a_wait_ends_at_once_when_the_work_is_given_up() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        RetryPolicy().pause(1, TransientError("x", 200), stop)


def test_threads_stop_when_nobody_listens_any_more() -> None:
    stop, started = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        stop.wait(30)

    actions: list[Callable[[], None]] = [lambda: None, wait]
    results = in_threads(actions, 1, stop)
    assert next(results) == (0, None)
    started.wait(5)
    results.close()
    assert stop.is_set()


@PLACES
def test_a_server_that_stalls_is_left_and_taken_up_again(hubs: Hubs, prefix: str, run: Run) -> None:
    make_big(hubs)
    hub = server(hubs, prefix)
    hub.misbehave("model.safetensors", stall(500_000, threading.Event()))
    ended = run("fetch", f"{prefix}:org/tuned", HF_HUB_DOWNLOAD_TIMEOUT="1", MODELSCOPE_DOWNLOAD_TIMEOUT="1")
    assert (ended.status, ended.out.count("\n")) == (0, 1)
    first, second = ranges(hub.cdn_requests)
    assert (first, (second or "").startswith("bytes=")) == (None, True)


def test_a_hub_that_is_silent_when_asked_for_a_list_is_asked_again(hubs: Hubs, run: Run) -> None:
    hubs.hf.misbehave("/tree/", stall(0, threading.Event()))
    assert run("fetch", "hf:org/tuned", HF_HUB_ETAG_TIMEOUT="1").status == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:org/tunde", r"has no such model \(did you mean `org/tuned`\?\)\nhint: check the spelling"),
        ("hf:datasets/org/bird", r"has no such data set \(did you mean `org/birds`\?\)"),
        (
            "hf:nobody/nothing",
            r"hf:nobody/nothing: 127.0.0.1:\d+ has no such model\nhint: check the spelling",
        ),
        ("hf:org/tuned@mian", r"no branch, tag or commit `mian` \(did you mean `main`\?\)"),
        ("ms:org/tunde", r"has no such model\nhint: ids may differ from Hugging Face's"),
        ("ms:org/tuned@mastre", r"there is no branch or tag `mastre` \(did you mean `master`\?\)"),
    ],
)
def test_what_does_not_exist_is_told_with_what_may_have_been_meant(
    hubs: Hubs, source: str, message: str
) -> None:
    with pytest.raises(HubError, match=message):
        fetch(source)


@PLACES
def test_a_refused_connection_is_told_at_once(hubs: Hubs, prefix: str, run: Run) -> None:
    with ModelScopeServer({}) as gone:
        pass
    variable = "HF_ENDPOINT" if prefix == "hf" else "MODELSCOPE_ENDPOINT"
    ended = run("fetch", f"{prefix}:org/tuned", f"{prefix}:org/base", **{variable: gone.endpoint})
    host = gone.endpoint.removeprefix("http://")
    assert ended.status == 4
    assert ended.err == (
        f"error: {prefix}:org/tuned, {prefix}:org/base: cannot reach {host}: connection refused\n"
        f"hint: check the network, {variable}, and the proxy and certificate variables\n"
    )


@PLACES
def test_a_host_that_nobody_knows_is_told(hubs: Hubs, prefix: str, run: Run) -> None:
    variable = "HF_ENDPOINT" if prefix == "hf" else "MODELSCOPE_ENDPOINT"
    ended = run("fetch", f"{prefix}:org/tuned", **{variable: "http://hub.invalid"})
    assert ended.status == 4
    assert "cannot reach hub.invalid: its name is not known" in ended.err


@PLACES
def test_an_endpoint_that_is_no_hub_is_told(hubs: Hubs, prefix: str) -> None:
    part, name = ("/revision/", "Hugging Face") if prefix == "hf" else ("/repo/files", "ModelScope")
    server(hubs, prefix).misbehave(part, lambda handler, data: handler.answer(200, b"<html>") or True)
    with pytest.raises(HubError, match=f"does not answer as {name} does"):
        fetch(f"{prefix}:org/tuned")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mergecli", "fetch", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@PLACES
def test_an_interrupted_fetch_loses_nothing_that_arrived(hubs: Hubs, prefix: str, tmp_path: Path) -> None:
    make_big(hubs)
    hub = server(hubs, prefix)
    hub.misbehave("model.safetensors", stall(1 << 19, threading.Event()))
    process = start(tmp_path, f"{prefix}:org/tuned")
    (incomplete,) = wait_for(lambda: [
        path for path in hubs.store.rglob("model.safetensors.incomplete") if path.stat().st_size == 1 << 19
    ])  # fmt: skip
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == f"interrupted: what has arrived is kept in {hubs.store}; the same command goes on\n"
    assert incomplete.stat().st_size == 1 << 19
    hub.forget()
    (path,) = fetch(f"{prefix}:org/tuned").paths
    assert ranges(hub.cdn_requests) == [f"bytes={1 << 19}-"]
    assert (path / "model.safetensors").read_bytes() == BIG


def test_two_fetches_at_once_share_the_work(hubs: Hubs, tmp_path: Path) -> None:
    make_big(hubs)
    release = threading.Event()
    hubs.hf.misbehave("model.safetensors", stall(1000, release))
    first = start(tmp_path, "hf:org/tuned")
    wait_for(lambda: hubs.hf.cdn_requests)
    second = start(tmp_path, "hf:org/tuned", "hf:org/base")
    wait_for(lambda: hubs.hf.paths("/api/models/org/base/tree"))
    release.set()
    outs = [process.communicate(timeout=30) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outs
    assert outs[1][0].startswith(outs[0][0])
    assert len(hubs.hf.paths("/org/tuned/resolve/")) == 5  # the four files, and the one that stalled again
    head = hubs.hf.repositories["org/tuned"].head
    assert (hubs.store / "hf/org/tuned" / head / "model.safetensors").read_bytes() == BIG
    assert not list(hubs.store.rglob("*.partial"))


def test_files_come_several_at_a_time(hubs: Hubs) -> None:
    together = threading.Barrier(3, timeout=20)
    for number in range(3):
        hubs.hf.repositories[f"org/m{number}"] = Repository({"model.safetensors": b"%d" % number})
        hubs.hf.misbehave("model.safetensors", lambda handler, data: together.wait() < 0)
    assert len(fetch([f"hf:org/m{number}" for number in range(3)], jobs=3).downloads) == 3


def wait_for(found: Callable[[], Any]) -> Any:
    """What there is as soon as there is something; half a minute at most."""
    import time

    for _ in range(600):
        try:
            if result := found():
                return result
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError("nothing came")
