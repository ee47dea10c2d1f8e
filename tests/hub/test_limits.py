"""Hubs that answer without end, and pages at other hosts: time, memory and the token have limits."""

from __future__ import annotations

import gzip
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from mergecli.hub import limits
from mergecli.hub.fetch import fetch
from mergecli.hub.limits import LimitError, same_origin, unpacked, whole, within
from mergecli.hub.retry import StoppedError
from mergecli.runtime.errors import HubError
from tests.hub.conftest import REPOSITORIES, USED, Hubs
from tests.hub.servers import Act, HuggingFaceServer, Repository, Request

PLACES = pytest.mark.parametrize(("prefix", "part"), [("hf", "/tree/"), ("ms", "/repo/files")])


def server(hubs: Hubs, prefix: str) -> Any:
    return hubs.hf if prefix == "hf" else hubs.ms


def told(requests: list[Request]) -> list[Request]:
    return [request for request in requests if any("secret" in value for value in request.headers.values())]


def sends(body: bytes, code: int = 200, **headers: str) -> Act:
    """An answer of these bytes."""

    def act(handler: Any, data: bytes) -> bool:
        handler.answer(code, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return act


def endless(
    block: bytes, pause: float = 0.0, code: int = 200, *, in_headers: bool = False, **headers: str
) -> Act:
    """An answer that never ends: the block again and again."""

    def act(handler: Any, data: bytes) -> bool:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.flush_headers()
        if not in_headers:
            handler.end_headers()
        handler.close_connection = True
        while not handler.owner.ended.wait(pause):
            handler.wfile.write(block)
        return True

    return act


def refused(prefix: str, **arguments: Any) -> str:
    """Why a fetch of a model fails."""
    with pytest.raises(HubError) as caught:
        fetch(f"{prefix}:org/tuned", **arguments)
    return caught.value.message.partition(" 127.0.0.1:")[2].partition(" ")[2]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 1.0)


@pytest.fixture
def other() -> Iterator[HuggingFaceServer]:
    """A host that has the same repositories, and should be told nothing."""
    with HuggingFaceServer({name: Repository(files) for name, files in REPOSITORIES.items()}) as found:
        yield found


def points_to(endpoint: str) -> Act:
    """The first page of a list, whose next page is at another host."""

    def act(handler: Any, data: bytes) -> bool:
        handler.tell([], {"Link": f'<{endpoint}{handler.request_now.path}?recursive=true>; rel="next"'})
        return True

    return act


def test_a_next_page_at_another_host_is_read_without_the_token(
    hubs: Hubs, other: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hubs.hf.misbehave("/tree/", points_to(other.endpoint))
    (path,) = fetch("hf:org/tuned", token_to_endpoint=True).paths
    assert sorted(file.name for file in path.iterdir()) == sorted([*USED, ".mergecli.json"])
    assert told(hubs.hf.requests) == hubs.hf.requests
    assert len(other.requests) == 1
    assert told(other.requests) == []


@pytest.mark.parametrize("prefix", ["hf", "ms"])
def test_a_redirect_to_another_port_of_the_host_carries_no_token(
    hubs: Hubs, other: HuggingFaceServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    part = "/tree/" if prefix == "hf" else "/repo/files"
    server(hubs, prefix).misbehave(part, sends(b"", 302, Location=f"{other.endpoint}/elsewhere"))
    with pytest.raises(HubError):
        fetch(f"{prefix}:org/tuned", token_to_endpoint=True)
    assert [request.path for request in other.requests] == ["/elsewhere"]
    assert told(other.requests) == []


def test_the_next_page_may_be_named_without_its_host(hubs: Hubs) -> None:
    hubs.hf.misbehave("/tree/", points_to(""))
    assert len(fetch("hf:org/tuned").downloads) == 4


def test_pages_that_begin_again_are_refused(hubs: Hubs) -> None:
    hubs.hf.misbehave("/tree/", points_to(""), times=3)
    assert refused("hf") == "does not answer as Hugging Face does: the pages of its list of files begin again"


def test_a_list_of_endless_pages_is_refused(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIST_PAGES", 20)

    def act(handler: Any, data: bytes) -> bool:
        number = int(handler.request_now.query.get("cursor", 0)) + 1
        handler.tell([], {"Link": f'<{handler.request_now.path}?cursor={number}>; rel="next"'})
        return True

    hubs.hf.misbehave("/tree/", act, times=1000)
    assert refused("hf") == "lists its files on more than 20 pages"
    assert len(hubs.hf.paths("/tree/")) == 21


def test_modelscope_lists_of_endless_pages_are_refused(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIST_PAGES", 20)
    entry = {"Path": "a.parquet", "Type": "blob", "Size": 1, "Revision": "0" * 40, "CommittedDate": 1}
    page = json.dumps({"Code": 200, "Data": {"Files": [entry] * 200}, "Success": True}).encode()
    hubs.ms.misbehave("/repo/tree", sends(page), times=1000)
    with pytest.raises(HubError, match="lists its files on more than 20 pages"):
        fetch("ms:datasets/org/birds")


@PLACES
@pytest.mark.usefixtures("short")
def test_a_list_that_drips_is_given_up(hubs: Hubs, prefix: str, part: str) -> None:
    server(hubs, prefix).misbehave(part, endless(b" ", 0.1), times=100)
    began = time.monotonic()
    assert refused(prefix) == "takes longer than 1 s to answer"
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("short")
def test_headers_that_drip_are_given_up(hubs: Hubs) -> None:
    hubs.hf.misbehave("/tree/", endless(b"X: y\r\n", 0.1, in_headers=True), times=100)
    assert refused("hf") == "takes longer than 1 s to answer"
    hubs.hf.misbehave("config.json", endless(b"X: y\r\n", 0.1, in_headers=True), times=100)
    assert refused("hf") == "takes longer than 1 s to answer"


@PLACES
def test_an_endless_list_is_refused(
    hubs: Hubs, prefix: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ANSWER_BYTES", 1_000_000)
    server(hubs, prefix).misbehave(part, endless(b" " * 65536), times=100)
    assert refused(prefix) == "answers with more than 1,000,000 bytes"


@PLACES
@pytest.mark.parametrize("code", [302, 404, 500])
def test_of_a_redirect_and_an_error_no_endless_body_is_read(
    hubs: Hubs, prefix: str, part: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ANSWER_BYTES", 1_000_000)
    where = f"{server(hubs, prefix).endpoint}/elsewhere"
    server(hubs, prefix).misbehave(part, endless(b" " * 65536, code=code, Location=where), times=100)
    began = time.monotonic()
    assert refused(prefix)
    assert time.monotonic() - began < 10


@PLACES
def test_a_gzip_bomb_is_refused_before_it_is_large(hubs: Hubs, prefix: str, part: str) -> None:
    bomb = gzip.compress(b" " * (limits.ANSWER_BYTES + 1))
    assert len(bomb) < 100_000
    server(hubs, prefix).misbehave(part, sends(bomb, Content_Encoding="gzip"))
    assert refused(prefix) == "answers with more than 33,554,432 bytes"


@PLACES
@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd", "compress"])
def test_an_answer_that_is_packed_otherwise_than_once_by_gzip_is_refused(
    hubs: Hubs, prefix: str, part: str, encoding: str
) -> None:
    body = gzip.compress(gzip.compress(b"[]"))
    server(hubs, prefix).misbehave(part, sends(body, Content_Encoding=encoding))
    assert refused(prefix) == f"compresses its answer as `{encoding}`, which was not asked for"


@pytest.mark.parametrize("prefix", ["hf", "ms"])
def test_an_answer_and_a_file_that_are_packed_unasked_are_read(hubs: Hubs, prefix: str) -> None:
    def act(handler: Any, data: bytes) -> bool:
        handler.answer(200, gzip.compress(data), {"Content-Encoding": "gzip"})
        return True

    server(hubs, prefix).misbehave("config.json", act)
    (path,) = fetch(f"{prefix}:org/tuned").paths
    assert (path / "config.json").read_bytes() == REPOSITORIES["org/tuned"]["config.json"]


def test_what_is_unpacked_comes_in_blocks_of_bounded_size() -> None:
    content = b"ab" * 5_000_000
    for packed, encoding in ((gzip.compress(content), "gzip"), (zlib.compress(content), "Deflate")):
        blocks = list(unpacked([packed[:100], packed[100:]], encoding))
        assert b"".join(blocks) == content
        assert max(map(len, blocks)) <= 65536
    assert b"".join(unpacked(iter(io.BytesIO(content)), "")) == content
    with pytest.raises(LimitError, match="says that its answer is compressed, and it is not"):
        whole([b"{}"], "gzip")


def test_a_token_is_for_one_scheme_host_and_port() -> None:
    endpoint = "https://hub.example/api"
    for url in ("https://hub.example/x", "https://HUB.example:443/x", "https://a@hub.example"):
        assert same_origin(url, endpoint)
    for url in (
        "http://hub.example/x", "https://hub.example:444/", "https://hub.example.evil/", "https://evil/hub.example",
        "https://hub.example@evil/", "https://hub.example:x/", "//hub.example/", "hub.example", "",
    ):  # fmt: skip
        assert not same_origin(url, endpoint), url


def test_work_in_a_thread_gives_its_result_its_error_and_up() -> None:
    stop = threading.Event()
    assert within(5, lambda: 3, stop) == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"], stop)
    with pytest.raises(LimitError, match="takes longer than 0 s to answer"):
        within(0.05, lambda: time.sleep(1), stop)
    stop.set()
    with pytest.raises(StoppedError):
        within(5, lambda: time.sleep(2), stop)
