"""Whom the tokens reach, and the variables that the hubs' libraries promise to heed."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mergecli.hub.fetch import fetch
from mergecli.runtime.errors import HubError
from tests.conftest import Run
from tests.hub.conftest import USED, Hubs
from tests.hub.servers import Request, status

TOKENS = {"HF_TOKEN": "hf_secret", "MODELSCOPE_API_TOKEN": "ms-secret"}
PLACES = pytest.mark.parametrize("prefix", ["hf", "ms"])


def told(requests: list[Request]) -> list[Request]:
    return [request for request in requests if any("secret" in value for value in request.headers.values())]


@PLACES
def test_a_foreign_endpoint_gets_no_token_unless_asked(
    hubs: Hubs, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    hub = hubs.hf if prefix == "hf" else hubs.ms
    fetch(f"{prefix}:org/tuned")
    assert hub.requests
    assert told(hub.requests) == []
    hubs.forget()
    fetch(f"{prefix}:org/base", token_to_endpoint=True)
    assert told(hub.requests) == hub.requests
    assert hub.cdn_requests
    assert told(hub.cdn_requests) == []


@PLACES
def test_a_private_repository_opens_to_the_token(hubs: Hubs, prefix: str, run: Run) -> None:
    hub = hubs.hf if prefix == "hf" else hubs.ms
    hub.private, hub.token = {"org/tuned"}, "secret"
    name = "HF_TOKEN" if prefix == "hf" else "MODELSCOPE_API_TOKEN"
    ended = run("fetch", f"{prefix}:org/tuned", **TOKENS)
    assert ended.status == 4
    assert "token" in ended.err.splitlines()[0]
    assert f"set {name}, and `--token-to-endpoint` so that 127.0.0.1:" in ended.err
    assert "secret" not in ended.err
    ended = run("fetch", f"{prefix}:org/tuned", "--token-to-endpoint", **TOKENS)
    assert ended.status == 0, ended.err


@PLACES
def test_a_gated_repository_tells_how_it_opens(hubs: Hubs, prefix: str) -> None:
    hub = hubs.hf if prefix == "hf" else hubs.ms
    hub.misbehave("vocab.json", status(403, X_Error_Code="GatedRepo"))
    with pytest.raises(
        HubError, match=r"`vocab\.json`: access is not granted\nhint: (accept its terms at|ask for it)"
    ):
        fetch(f"{prefix}:org/tuned")


def test_a_token_that_is_not_accepted_is_told(hubs: Hubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answer = status(401, X_Error_Message="Invalid credentials in Authorization header")
    hubs.hf.misbehave("/revision/", answer)
    with pytest.raises(HubError, match="does not accept the token\nhint: check HF_TOKEN"):
        fetch("hf:org/tuned", token_to_endpoint=True)


def test_the_predecessor_of_modelscope_endpoint_still_works(hubs: Hubs, run: Run) -> None:
    ended = run("fetch", "ms:org/tuned", MODELSCOPE_ENDPOINT="", MODELSCOPE_DOMAIN=hubs.ms.endpoint)
    assert ended.status == 0, ended.err
    assert ended.err == ""


class _Proxy(BaseHTTPRequestHandler):
    """A proxy: for `http:` it asks in its own name, for `https:` it connects everything to one server of its choice."""

    asked: list[str]
    behind: tuple[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        split = urlsplit(self.path)
        del self.headers["Connection"]
        self.headers["Connection"] = "close"
        where = (split.hostname, split.port) if split.hostname == "127.0.0.1" else self.behind
        self._pipe(f"GET {split.path}?{split.query} HTTP/1.1\r\n{self.headers}".encode(), where)

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self._pipe(b"", self.behind)

    def _pipe(self, first: bytes, where: tuple[str, int]) -> None:
        self.close_connection = True
        with socket.create_connection(where) as other:
            other.sendall(first)
            back = threading.Thread(target=_copy, args=(other, self.connection), daemon=True)
            back.start()
            _copy(self.connection, other)
            back.join(5)


def _copy(one: socket.socket, other: socket.socket) -> None:
    try:
        while block := one.recv(65536):
            other.sendall(block)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def proxy(hubs: Hubs) -> Iterator[tuple[str, list[str], type[_Proxy]]]:
    """Its URL, what it was asked for, and its handler."""
    asked: list[str] = []
    handler = type("Proxy", (_Proxy,), {"asked": asked, "behind": ("127.0.0.1", hubs.hf.hub.server_port)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, handler
    server.shutdown()
    server.server_close()


@PLACES
def test_a_proxy_is_used(
    hubs: Hubs, prefix: str, process: Run, proxy: tuple[str, list[str], type[_Proxy]]
) -> None:
    url, asked, handler = proxy
    hub = hubs.hf if prefix == "hf" else hubs.ms
    handler.behind = "127.0.0.1", hub.hub.server_port
    hub.cdn_endpoint = f"http://127.0.0.1:{hub.cdn.server_port}"
    variable = "HF_ENDPOINT" if prefix == "hf" else "MODELSCOPE_ENDPOINT"
    ended = process(
        "fetch", f"{prefix}:org/tuned", HTTP_PROXY=url, http_proxy=url, **{variable: "http://hub.example"}
    )
    assert ended.status == 0, ended.err
    assert asked
    assert len([path for path in asked if path.startswith("http://hub.example/")]) == len(hub.requests)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
@PLACES
def test_the_hub_itself_gets_the_token_by_https_and_its_cdn_does_not(
    hubs: Hubs, prefix: str, process: Run, proxy: tuple[str, list[str], type[_Proxy]], tmp_path: Path
) -> None:
    names = ("huggingface.co", "cdn.hf.example") if prefix == "hf" else ("modelscope.cn", "cdn.ms.example")
    certificate, key = tmp_path / "hub.pem", tmp_path / "hub.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=hub", "-addext", f"subjectAltName=DNS:{names[0]},DNS:{names[1]}",
         "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True,
    )  # fmt: skip
    url, asked, handler = proxy
    hub = hubs.hf if prefix == "hf" else hubs.ms
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    front = _TlsFront(context, {names[0]: hub.hub.server_port, names[1]: hub.cdn.server_port})
    handler.behind = "127.0.0.1", front.port
    hub.cdn_endpoint = f"https://{names[1]}"
    environment = {
        **TOKENS, "HTTPS_PROXY": url, "https_proxy": url, "SSL_CERT_FILE": str(certificate),
        "REQUESTS_CA_BUNDLE": str(certificate), "HF_ENDPOINT": "https://huggingface.co", "MODELSCOPE_ENDPOINT": "",
    }  # fmt: skip
    ended = process("fetch", f"{prefix}:org/tuned", **environment)
    assert ended.status == 0, ended.err
    assert set(asked) == {f"{name}:443" for name in names}
    assert len(told(hub.requests)) == len(hub.requests) >= len(USED)
    assert hub.cdn_requests
    assert told(hub.cdn_requests) == []
    known = {"SSL_CERT_FILE": "", "REQUESTS_CA_BUNDLE": ""}
    ended = process("fetch", f"{prefix}:org/base", **{**environment, **known})
    front.close()
    assert ended.status == 4
    assert f"cannot reach {names[0]}: " in ended.err
    assert "certificate" in ended.err.lower()


class _TlsFront:
    """Takes TLS connections and passes what is in them on to the server that the client's greeting names."""

    def __init__(self, context: ssl.SSLContext, ports: dict[str, int]) -> None:
        self._ports = ports
        self._context = context
        self._named: dict[int, str] = {}
        context.sni_callback = self._greeted
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _greeted(self, inner: ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        self._named[inner.fileno()] = name or ""

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            inner = self._context.wrap_socket(raw, server_side=True)
            port = self._ports[self._named[inner.fileno()]]
            with inner, socket.create_connection(("127.0.0.1", port)) as other:
                back = threading.Thread(target=_copy, args=(other, inner), daemon=True)
                back.start()
                _copy(inner, other)
                back.join(5)
        except (OSError, KeyError):
            raw.close()
