"""Hubs on 127.0.0.1 that speak the protocols of Hugging Face and ModelScope as their clients use them.

    with HuggingFaceServer({"org/model": Repository({"config.json": b"{}", "model.safetensors": bytes_of_it}),
                            "datasets/org/pictures": Repository.of_folder(folder)}) as hub:
        run("fetch", "hf:org/model", HF_ENDPOINT=hub.endpoint)          # or **hub.environment
        assert hub.paths("/resolve/") == [...]                          # what was asked for, in order

Names are `org/name` for models and `datasets/org/name` for data sets. Large files (git LFS: by suffix) are handed out by
a second server, the CDN, to which the hub redirects; it is another host (`localhost`), so that nothing meant for the hub
must arrive there. Both answer range requests.

A test makes a server misbehave with `hub.misbehave("model.safetensors", cut(1000))`: the next request whose path has
that in it, to the hub or to its CDN, is cut after 1000 bytes; see `status`, `cut`, `stall` and `altered`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LFS = (".safetensors", ".bin", ".parquet", ".h5", ".msgpack", ".pt")


class Repository:
    """A repository: its commits, and its branches and tags. `commit` adds to a branch what it is given."""

    def __init__(self, files: Mapping[str, bytes], branch: str = "main") -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.changed: dict[str, dict[str, tuple[str, int]]] = {}
        """Commit -> path -> the commit that last changed it, and when."""
        self.branches: dict[str, str] = {}
        self.default = branch
        self.commit(files, branch)

    @classmethod
    def of_folder(cls, folder: Path, branch: str = "main", prefix: str = "") -> Repository:
        """The files of a folder; with `prefix`, in a folder of that name."""
        files = {
            prefix + path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return cls(files, branch)

    def commit(
        self,
        files: Mapping[str, bytes],
        branch: str | None = None,
        *,
        alone: bool = False,
        removed: Collection[str] = (),
    ) -> str:
        """A new commit on a branch, with these files besides those it had but for those removed; its hexadecimal digits.

        A new branch goes out from the default one, or is `alone`.
        """
        branch = branch or self.default
        before = "" if alone else self.branches.get(branch, self.branches.get(self.default, ""))
        content = {**self.commits.get(before, {}), **files}
        content = {path: data for path, data in content.items() if path not in removed}
        text = before + "".join(
            f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in content.items()
        )
        new = hashlib.sha1(text.encode()).hexdigest()
        self.commits[new] = content
        when = 1_700_000_000 + 60 * len(self.commits)
        self.changed[new] = {**self.changed.get(before, {}), **dict.fromkeys(files, (new, when))}
        self.branches[branch] = new
        return new

    @property
    def head(self) -> str:
        return self.branches[self.default]

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """What a server was asked."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def token(self) -> str:
        """Whatever it carries that tells who asks."""
        return self.headers.get("authorization", "") + self.headers.get("cookie", "")


Act = Callable[["_Handler", bytes], bool]
"""Answers in place of the server, if it returns True; gets the bytes of the file, or none."""


def status(code: int, **headers: str) -> Act:
    """An answer of that status: `status(429, Retry_After="1")`."""

    def act(handler: _Handler, data: bytes) -> bool:
        handler.answer(code, b"{}", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return act


def cut(after: int, *, reset: bool = False) -> Act:
    """The connection ends after that many bytes of the file; with `reset`, as if the machine had gone."""

    def act(handler: _Handler, data: bytes) -> bool:
        handler.begin(data)
        handler.wfile.write(handler.wanted(data)[:after])
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        handler.connection.close()
        return True

    return act


def drop() -> Act:
    """The connection ends without an answer, as if the machine had gone."""

    def act(handler: _Handler, data: bytes) -> bool:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.connection.close()
        return True

    return act


def stall(after: int, until: threading.Event) -> Act:
    """Nothing comes after that many bytes of a file, or at all for a list, until the event is set or the server ends."""

    def act(handler: _Handler, data: bytes) -> bool:
        if data:
            handler.begin(data)
            handler.wfile.write(handler.wanted(data)[:after])
            handler.wfile.flush()
        handler.owner.stalled.set()
        while not (until.wait(0.05) or handler.owner.ended.is_set()):
            pass
        handler.close_connection = True
        return True

    return act


def altered() -> Act:
    """The file with its last byte changed."""

    def act(handler: _Handler, data: bytes) -> bool:
        handler.file(data[:-1] + bytes([data[-1] ^ 1]))
        return True

    return act


@dataclass
class _Fault:
    part: str
    act: Act
    times: int


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    def do_HEAD(self) -> None:
        self.handle_one()

    def do_POST(self) -> None:
        self.handle_one()

    def do_PUT(self) -> None:
        self.handle_one()

    def handle_one(self) -> None:
        split = urlsplit(self.path)
        request = Request(
            self.command, split.path, dict(parse_qsl(split.query, keep_blank_values=True)),
            {name.lower(): value for name, value in self.headers.items()},
        )  # fmt: skip
        if length := int(self.headers.get("Content-Length", 0)):
            request = replace(request, body=self.rfile.read(length))
        self.request_now = request
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.owner.take(self, request)

    def answer(self, code: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, content: object, headers: Mapping[str, str] | None = None) -> None:
        self.answer(200, json.dumps(content).encode(), headers)

    @property
    def offset(self) -> int:
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def wanted(self, data: bytes) -> bytes:
        """The part of the file that was asked for."""
        return data[self.offset :]

    def begin(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Status and headers of a file."""
        start = self.offset
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {"Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()

    def file(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        if self.offset and self.offset >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self.begin(data, headers)
        if self.command != "HEAD":
            self.wfile.write(self.wanted(data))


@dataclass
class _Server:
    """A hub and its CDN, as a context manager."""

    repositories: dict[str, Repository]
    token: str | None = None
    """What private repositories are shown for."""
    private: set[str] = field(default_factory=set[str])
    requests: list[Request] = field(default_factory=list[Request])
    """What the hub was asked."""
    cdn_requests: list[Request] = field(default_factory=list[Request])
    """What its CDN was asked."""
    honors_ranges: bool = True
    hidden: set[str] = field(default_factory=set[str])
    """Paths that are answered as if there were nothing."""
    writers: set[str] = field(default_factory=lambda: {"org"})
    """The owners whose repositories the token may write to."""
    stored: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """SHA-256 -> large files that were sent, also those of no commit yet."""

    def __post_init__(self) -> None:
        self.ended, self.stalled = threading.Event(), threading.Event()
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._objects: dict[str, bytes] = {}
        self.hub = self._listening(self.take)
        self.cdn = self._listening(self._take_cdn)
        self.endpoint = f"http://127.0.0.1:{self.hub.server_port}"
        self.cdn_endpoint = f"http://localhost:{self.cdn.server_port}"

    def _listening(self, take: Callable[[_Handler, Request], None]) -> ThreadingHTTPServer:
        front = type("Front", (), {"take": staticmethod(take), "ended": self.ended, "stalled": self.stalled})
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": front}))
        server.daemon_threads = True
        server.block_on_close = False
        return server

    def __enter__(self) -> Any:
        for server in (self.hub, self.cdn):
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def misbehave(self, part: str, act: Act, times: int = 1) -> None:
        """The next `times` requests for a file whose path has `part` in it are answered by `act`."""
        self._faults.append(_Fault(part, act, times))

    def paths(self, part: str = "") -> list[str]:
        """The paths that the hub was asked for, of those that have `part` in them."""
        return [request.path for request in self.requests if part in request.path]

    def forget(self) -> None:
        """Empties the records of what was asked."""
        self.requests.clear()
        self.cdn_requests.clear()

    def take(self, handler: _Handler, request: Request) -> None:
        self.requests.append(request)
        if request.path.removeprefix("/api/v1") in self.hidden:
            handler.answer(404, b'{"Code": 10010205001}', {"X-Error-Code": "RepoNotFound"})
        else:
            self._route(handler, request)

    def _route(self, handler: _Handler, request: Request) -> None:
        raise NotImplementedError

    def _act(self, handler: _Handler, path: str, data: bytes) -> bool:
        with self._lock:
            fault = next((each for each in self._faults if each.times and each.part in path), None)
            if fault is None:
                return False
            fault.times -= 1
        return fault.act(handler, data)

    def _allowed(self, name: str, request: Request) -> bool:
        return name not in self.private or bool(self.token and self.token in request.token)

    def _hand_out(self, handler: _Handler, path: str, data: bytes, headers: Mapping[str, str]) -> None:
        """A file: small ones at once, large ones by a redirect to the CDN."""
        if not path.endswith(LFS):
            if not self._act(handler, path, data):
                handler.file(data, headers)
            return
        digest = hashlib.sha256(data).hexdigest()
        self._objects[digest] = data
        location = f"{self.cdn_endpoint}/{digest}/{quote(path)}?Signature=secret"
        handler.answer(302, b"", {**headers, "Location": location})

    def _may_write(self, name: str, request: Request) -> bool:
        return bool(self.token and self.token in request.token) and name.partition("/")[0] in self.writers

    def _upload_place(self, digest: str) -> str:
        """Where a large file is to be sent: to the CDN."""
        return f"{self.cdn_endpoint}/upload/{digest}?Signature=secret"

    def _take_upload(self, handler: _Handler, request: Request) -> None:
        digest = request.path.removeprefix("/upload/").partition("/")[0]
        if self._act(handler, request.path, b""):
            return
        if part := request.query.get("part"):
            self.stored[f"{digest} {int(part):05}"] = request.body
        elif hashlib.sha256(request.body).hexdigest() == digest:
            self.stored[digest] = request.body
        else:
            handler.answer(400)
            return
        handler.answer(200, b"", {"ETag": f'"{part or digest}"'})

    def _take_cdn(self, handler: _Handler, request: Request) -> None:
        self.cdn_requests.append(request)
        if request.method == "PUT":
            self._take_upload(handler, request)
            return
        if request.method == "POST":
            handler.answer(200, b"{}")
            return
        _, digest, path = request.path.split("/", 2)
        data = self._objects.get(digest)
        if data is None:
            handler.answer(404)
        elif not self._act(handler, unquote(path), data):
            if not self.honors_ranges:
                del handler.headers["Range"]
            handler.file(data)


@dataclass
class HuggingFaceServer(_Server):
    """Hugging Face: `/api/models/ID/revision/REV`, `.../tree/COMMIT` in pages, `.../refs`, `/ID/resolve/COMMIT/PATH`."""

    page: int = 1000
    """Entries of a tree in one answer."""
    part_size: int | None = None
    """Bytes of a part of a large file that is sent; None for files as a whole."""
    verify_endpoint: str | None = None
    """Where sent files are to be confirmed, if not here."""
    licenses: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be told."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}

    def _route(self, handler: _Handler, request: Request) -> None:
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        if request.method == "POST":
            self._take_post(handler, request, parts)
        elif parts == ["api", "whoami-v2"]:
            if self.token and self.token in request.token:
                handler.tell(
                    {
                        "name": "user",
                        "type": "user",
                        "orgs": [{"name": each} for each in sorted(self.writers)],
                    }
                )
            else:
                handler.answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif parts[0] == "api" and len(parts) == 2:
            self._search(handler, request, parts[1])
        elif parts[0] == "api":
            prefix = "datasets/" if parts[1] == "datasets" else ""
            self._api(handler, request, prefix + "/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:
            place = parts.index("resolve")
            self._resolve(
                handler, request, "/".join(parts[:place]), parts[place + 1], "/".join(parts[place + 2 :])
            )
        else:
            handler.answer(404)

    def _found(self, handler: _Handler, request: Request, name: str) -> Repository | None:
        """The repository; None, once that is told, where there is none or not for this one."""
        repository = self.repositories.get(name)
        if not self._allowed(name, request):
            handler.answer(401, b'{"error": "Invalid username or password."}')
            return None
        if repository is None:
            handler.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        return repository

    def _search(self, handler: _Handler, request: Request, kind: str) -> None:
        names = [
            name.removeprefix("datasets/")
            for name in self.repositories
            if name.startswith("datasets/") == (kind == "datasets")
        ]
        author = request.query.get("author", "")
        handler.tell([{"id": name} for name in names if name.startswith(f"{author}/")])

    def _api(self, handler: _Handler, request: Request, name: str, rest: list[str]) -> None:
        if self._act(handler, request.path, b"") or not (repository := self._found(handler, request, name)):
            return
        if not rest:
            about = {"id": name.removeprefix("datasets/"), "sha": repository.head, "siblings": []}
            handler.tell({**about, "private": name in self.private})
            return
        if rest[0] == "refs":
            named = [{"name": each, "targetCommit": commit} for each, commit in repository.branches.items()]
            handler.tell({"branches": named, "tags": [], "converts": []})
            return
        commit = repository.find(rest[1])
        if commit is None:
            handler.answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            handler.tell(
                {
                    "id": name.removeprefix("datasets/"), "sha": commit, "siblings": [], "private": name in self.private,
                    **({"cardData": {"license": self.licenses[name]}} if name in self.licenses else {}),
                }
            )  # fmt: skip
        else:
            entries = [_tree_entry(path, data) for path, data in sorted(repository.commits[commit].items())]
            folders = sorted({path.rpartition("/")[0] for path in repository.commits[commit]} - {""})
            entries += [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders
            ]
            start = int(request.query.get("cursor", 0))
            more = start + self.page < len(entries)
            link = f'<{self.endpoint}{request.path}?recursive=true&expand=false&cursor={start + self.page}>; rel="next"'
            handler.tell(entries[start : start + self.page], {"Link": link} if more else {})

    def _take_post(self, handler: _Handler, request: Request, parts: list[str]) -> None:
        if self._act(handler, request.path, b""):
            return
        if parts == ["api", "repos", "create"]:
            self._create(handler, request)
        elif parts == ["api", "validate-yaml"]:
            self._validate(handler, request)
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self._batch(handler, request, f"{parts[0]}/{parts[1].removesuffix('.git')}")
        elif parts[0] == "lfs":
            self._confirm(handler, request, parts)
        elif parts[:2] == ["api", "models"] and (
            repository := self._found(handler, request, "/".join(parts[2:4]))
        ):
            name = "/".join(parts[2:4])
            if not self._may_write(name, request):
                handler.answer(
                    403, b'{"error": "Forbidden: pass `create_pr=1` or use a token with write access."}'
                )
            elif parts[4] == "branch":
                repository.commit({}, parts[5])
                handler.tell({})
            elif (commit := repository.branches.get(parts[5])) is None:
                handler.answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            elif parts[4] == "preupload":
                known = repository.commits[commit]
                handler.tell({"files": [_upload_mode(each, known) for each in request.json["files"]]})
            else:
                self._commit(handler, request, name, repository, parts[5])

    def _create(self, handler: _Handler, request: Request) -> None:
        name = f"{request.json['organization']}/{request.json['name']}"
        if not (self.token and self.token in request.token):
            handler.answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif not self._may_write(name, request):
            said = (
                f'You don\'t have the rights to create a model under the namespace "{name.partition("/")[0]}"'
            )
            handler.answer(403, json.dumps({"error": said}).encode())
        elif name in self.repositories:
            handler.answer(409, b'{"error": "You already created this model repo"}')
        else:
            self.repositories[name] = Repository({".gitattributes": b"*.safetensors filter=lfs"})
            if request.json.get("visibility") == "private":
                self.private.add(name)
            handler.tell({"url": f"{self.endpoint}/{name}", "name": name})

    def _validate(self, handler: _Handler, request: Request) -> None:
        import yaml

        front = (
            yaml.safe_load(request.json["content"].split("---")[1])
            if "---" in request.json["content"]
            else {}
        )
        wrong = [each for each in front.get("base_model", []) if ":" in each]
        errors = [{"message": f'"base_model" with value "{each}" is not valid'} for each in wrong]
        warnings = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        handler.answer(400 if errors else 200, json.dumps({"errors": errors, "warnings": warnings}).encode())

    def _batch(self, handler: _Handler, request: Request, name: str) -> None:
        if not self._may_write(name, request):
            handler.answer(403, b"{}")
            return
        objects: list[dict[str, Any]] = []
        for each in request.json["objects"]:
            digest, size = each["oid"], each["size"]
            if digest in self.stored:
                objects.append(each)
                continue
            upload: dict[str, Any] = {"href": self._upload_place(digest), "header": {}}
            if self.part_size and size > self.part_size:
                count = -(-size // self.part_size)
                places = {f"{n:05}": f"{self._upload_place(digest)}&part={n}" for n in range(1, count + 1)}
                upload = {
                    "href": f"{self.endpoint}/lfs/complete/{digest}",
                    "header": {"chunk_size": str(self.part_size), **places},
                }
            verify = {"href": f"{self.verify_endpoint or self.endpoint}/lfs/verify"}
            objects.append({**each, "actions": {"upload": upload, "verify": verify}})
        handler.tell({"transfer": "multipart" if self.part_size else "basic", "objects": objects})

    def _confirm(self, handler: _Handler, request: Request, parts: list[str]) -> None:
        digest = request.json["oid"]
        if parts[1] == "complete":
            data = b"".join(self.stored[key] for key in sorted(self.stored) if key.startswith(f"{digest} "))
            if hashlib.sha256(data).hexdigest() == digest:
                self.stored[digest] = data
        handler.answer(200 if digest in self.stored else 404, b"{}")

    def _commit(
        self, handler: _Handler, request: Request, name: str, repository: Repository, branch: str
    ) -> None:
        files: dict[str, bytes] = {}
        removed: list[str] = []
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                removed.append(value["path"])
        commit = repository.commit(files, branch, removed=removed)
        handler.tell({"commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}"})

    def _resolve(self, handler: _Handler, request: Request, name: str, revision: str, path: str) -> None:
        if not (repository := self._found(handler, request, name)):
            return
        commit = repository.find(revision)
        if commit is None or path not in repository.commits[commit]:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            handler.answer(404, b"", {"X-Error-Code": code})
            return
        data = repository.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_blob(data)}"'}
        if path.endswith(LFS):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
        self._hand_out(handler, path, data, headers)


@dataclass
class ModelScopeServer(_Server):
    """ModelScope: `/api/v1/models/ID/repo/files`, `/api/v1/datasets/ID/repo/tree` in pages, `.../revisions`, `.../repo`.

    As there, a branch that does not exist is answered with status 200 and no files, and each file says which commit
    changed it last. Repositories' default branch is `master`.
    """

    created: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """What was said of each repository that was made."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be told."""
        return {"MODELSCOPE_ENDPOINT": self.endpoint, "MODELSCOPE_DOWNLOAD_TIMEOUT": "2"}

    def _route(self, handler: _Handler, request: Request) -> None:
        parts = request.path.removeprefix("/api/v1/").split("/")
        if request.method == "POST":
            self._take_post(handler, request, parts)
            return
        if len(parts) == 3 and parts[0] == "models":
            self._tell_of(handler, request, "/".join(parts[1:]))
            return
        if not request.path.startswith("/api/v1/") or len(parts) < 4:
            handler.answer(404)
            return
        name = ("datasets/" if parts[0] == "datasets" else "") + "/".join(parts[1:3])
        repository = self.repositories.get(name)
        if self._act(handler, request.path, b""):
            return
        if not self._allowed(name, request):
            handler.answer(401, _envelope(None, 401, "login required"))
        elif repository is None:
            handler.answer(404, _envelope(None, 10010205001, "record not found"))
        elif parts[3] == "revisions":
            named = [{"Revision": each, "CreatedAt": 1_700_000_000} for each in repository.branches]
            handler.answer(200, _envelope({"RevisionMap": {"Branches": named, "Tags": []}}))
        elif parts[3:] in (["repo", "files"], ["repo", "tree"]):
            self._list(handler, request, repository)
        else:
            commit = repository.find(request.query["Revision"])
            path = request.query["FilePath"]
            if commit is None or path not in repository.commits[commit]:
                handler.answer(404, _envelope(None, 10990101007, "file not found"))
            else:
                self._hand_out(handler, path, repository.commits[commit][path], {})

    def _tell_of(self, handler: _Handler, request: Request, name: str) -> None:
        if name not in self.repositories or not self._allowed(name, request):
            handler.answer(404, _envelope(None, 10010205001, "record not found"))
        else:
            owner, _, short = name.partition("/")
            visibility = 1 if name in self.private else 5
            handler.answer(200, _envelope({"Path": owner, "Name": short, "Visibility": visibility}))

    def _take_post(self, handler: _Handler, request: Request, parts: list[str]) -> None:
        if self._act(handler, request.path, b""):
            return
        if not (self.token and self.token in request.token):
            handler.answer(401, _envelope(None, 10010205002, "user not logged in"))
            return
        body = request.json
        name = f"{body['Path']}/{body['Name']}" if parts == ["models"] else "/".join(parts[2:4])
        if not self._may_write(name, request):
            handler.answer(403, _envelope(None, 10010205003, f"no permission in {name.partition('/')[0]}"))
        elif parts == ["models"]:
            if name in self.repositories:
                handler.answer(400, _envelope(None, 10010101001, "the name is already used"))
                return
            self.repositories[name] = Repository({"README.md": b"---\nlicense: x\n---\n"}, "master")
            self.created.append(body)
            if body["Visibility"] == 1:
                self.private.add(name)
            handler.answer(200, _envelope({"Path": body["Path"], "Name": body["Name"]}))
        elif parts[4] == "info":
            wanted = [each for each in body["objects"] if each["oid"] not in self.stored]
            objects = [
                {**each, "actions": {"upload": {"href": self._upload_place(each["oid"])}}} for each in wanted
            ]
            handler.answer(200, _envelope({"objects": objects}))
        else:
            self._commit(handler, body, self.repositories[name], parts[5])

    def _commit(self, handler: _Handler, body: Any, repository: Repository, branch: str) -> None:
        files: dict[str, bytes] = {}
        removed: list[str] = []
        for each in body["actions"]:
            if each["action"] == "delete":
                removed.append(each["path"])
            else:
                large = each["type"] == "lfs"
                files[each["path"]] = (
                    self.stored[each["sha256"]] if large else base64.b64decode(each["content"])
                )
        commit = repository.commit(files, branch, removed=removed)
        handler.answer(200, _envelope({"CommitId": commit}))

    def _list(self, handler: _Handler, request: Request, repository: Repository) -> None:
        commit = repository.find(request.query["Revision"])
        if commit is None:
            handler.answer(200, _envelope({"Files": None, "IsVisual": 0, "LatestCommitter": None}))
            return
        entries = [
            {
                "Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(data),
                "Sha256": hashlib.sha256(data).hexdigest(), "IsLFS": path.endswith(LFS),
                "Revision": repository.changed[commit][path][0], "CommittedDate": repository.changed[commit][path][1],
            }
            for path, data in sorted(repository.commits[commit].items())
        ]  # fmt: skip
        folders = sorted({path.rpartition("/")[0] for path in repository.commits[commit]} - {""})
        entries += [{"Path": folder, "Name": folder, "Type": "tree", "Size": 0} for folder in folders]
        if "PageNumber" in request.query:
            size = int(request.query["PageSize"])
            start = (int(request.query["PageNumber"]) - 1) * size
            entries = entries[start : start + size]
        latest = {"Id": "", "ShortId": commit[:8]}
        handler.answer(200, _envelope({"Files": entries, "IsVisual": 0, "LatestCommitter": latest}))


def _upload_mode(entry: dict[str, Any], known: Mapping[str, bytes]) -> dict[str, Any]:
    """How a file is to be sent, and the digest of the one that is there."""
    path = entry["path"]
    large = path.endswith(LFS)
    there = known.get(path)
    digest = None if there is None else hashlib.sha256(there).hexdigest() if large else git_blob(there)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": digest}


def git_blob(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(LFS):
        return {"type": "file", "oid": git_blob(data), "size": len(data), "path": path}
    digest = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
    large = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "oid": git_blob(pointer), "size": len(data), "path": path, "lfs": large}


def _envelope(data: object, code: int = 200, message: str = "success") -> bytes:
    return json.dumps(
        {"Code": code, "Data": data, "Message": message, "RequestId": "1", "Success": code == 200}
    ).encode()
