"""A small Hugging Face Hub on real HTTP, for the real client: repositories, LFS, commits, faults.

What it knows was taken from the requests that huggingface_hub sends. Xet is not spoken here:
:func:`hub_environment` turns it off in the client.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_fortestsonly"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".gguf")


@dataclass
class Repo:
    """A repository: its commits in order, each name → bytes."""

    kind: str
    gated: bool = False
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        """Make ``files`` the new head and return its id."""
        seed = f"{self.kind} {len(self.commits)} {sorted(files)}".encode()
        oid = hashlib.sha1(seed + b"".join(files.values()), usedforsecurity=False).hexdigest()
        self.commits.append((oid, dict(files)))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit that ``revision`` means, if there is one."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What goes wrong, for the next ``times`` requests whose line matches ``pattern``.

    ``kind``: ``status`` (with ``status`` and ``headers``), ``lost`` (done, but not answered),
    ``cut`` (half of the body), ``corrupt`` (a flipped bit), ``hold`` (waits for the hub's end).
    """

    pattern: str
    kind: str
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None


class Hub:
    """The state of the server, to arrange and to look into."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.over = threading.Event()
        self.endpoint = ""
        self.role = "write"
        self._lock = threading.Lock()

    def add(
        self, repo_id: str, files: dict[str, bytes], *, kind: str = "model", **more: Any
    ) -> str:
        """Create ``repo_id`` with ``files`` and return its commit."""
        repo = self.repos[f"{kind}s/{repo_id}"] = Repo(kind, **more)
        return repo.commit(files)

    def files(self, repo_id: str, *, kind: str = "model") -> dict[str, bytes]:
        """Return the files at the head of a repository."""
        return self.repos[f"{kind}s/{repo_id}"].commits[-1][1]

    def count(self, pattern: str) -> int:
        """Return how many requests matched."""
        return sum(re.search(pattern, line) is not None for line in self.requests)

    def take_fault(self, line: str) -> Fault | None:
        """Return the fault that this request meets, and use it up."""
        with self._lock:
            self.requests.append(line)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


def git_sha1(body: bytes) -> str:
    """Return git's id of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


class _Answer(Exception):  # noqa: N818 - an answer, not an error
    def __init__(
        self, status: int, body: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status)
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.headers = headers or {}


def _refusal(status: int, code: str, message: str) -> _Answer:
    return _Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        self.url = urlsplit(self.path)
        self.sent = self._body()
        fault = self.hub.take_fault(f"{self.command} {self.path}")
        if fault and fault.before:
            fault.before()
        if fault and fault.kind == "hold":
            self.hub.over.wait()
        if fault and fault.kind == "status":
            return self._send(_Answer(fault.status, {"error": "a fault"}, fault.headers))
        try:
            self._route()
            answer = _refusal(404, "", f"no route for {self.path}")
        except _Answer as found:
            answer = found
        if fault and fault.kind == "lost":
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        return self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - http.server's names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: _Answer, fault: Fault | None = None) -> None:
        body = answer.body
        if fault and fault.kind == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault and fault.kind == "cut":
            body = body[: len(body) // 2]
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def _route(self) -> None:
        for pattern, call in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.url.path}"):
                call(self, *(unquote(part or "") for part in found.groups()))

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_write(self) -> None:
        if not self._authorized():
            raise _refusal(401, "", "Invalid credentials in Authorization header")

    def _repo(self, kind: str, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.hub.repos.get(f"{kind}s/{repo_id}")
        if repo is None or (repo.private and not self._authorized()):
            raise _refusal(
                404 if self._authorized() else 401, "RepoNotFound", "Repository not found"
            )
        if repo.gated and not self._authorized():
            raise _refusal(401, "GatedRepo", f"Access to {repo_id} is restricted")
        found = repo.at(revision)
        if found is None:
            raise _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self) -> None:
        if not self._authorized():
            raise _refusal(401, "", "Invalid credentials in Authorization header")
        raise _Answer(200, {"type": "user", "name": "tester", "auth": self._auth()})

    def _auth(self) -> dict[str, Any]:
        return {"type": "access_token", "accessToken": {"role": self.hub.role}}

    def create(self) -> None:
        self._require_write()
        asked = json.loads(self.sent)
        repo_id, kind = f"{asked['organization']}/{asked['name']}", asked.get("type", "model")
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if f"{kind}s/{repo_id}" in self.hub.repos:
            raise _Answer(409, {**url, "error": "You already created this model repo"})
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.add(repo_id, {".gitattributes": b"*.bin lfs\n"}, kind=kind, private=private)
        raise _Answer(200, url)

    def validate_yaml(self) -> None:
        parts = json.loads(self.sent)["content"].split("---\n", 2)
        if len(parts) < 3 or not isinstance(yaml.safe_load(parts[1]), dict):
            raise _Answer(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        raise _Answer(200, {"errors": [], "warnings": []})

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        oid, files = self._repo(kind, repo_id, revision or "main")
        answer: dict[str, Any] = {"id": repo_id, "sha": oid, "siblings": []}
        parts = files.get("README.md", b"").decode().split("---\n", 2)
        if len(parts) == 3:
            answer["cardData"] = yaml.safe_load(parts[1])
        raise _Answer(200, answer)

    def tree(self, kind: str, repo_id: str, revision: str) -> None:
        _, files = self._repo(kind, repo_id, revision)
        entries = []
        for path, blob in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob)}
            entry["oid"] = git_sha1(blob)
            if path.endswith(LFS_SUFFIXES):
                oid = hashlib.sha256(blob).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(blob), "pointerSize": 134}
            entries.append(entry)
        raise _Answer(200, json.dumps(entries).encode())

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        self._require_write()
        self._repo(kind, repo_id, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.sent)["files"]
        ]
        raise _Answer(200, {"files": files})

    def lfs_batch(self, _: str) -> None:
        self._require_write()
        objects = []
        for wanted in json.loads(self.sent)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        self.hub.lfs[oid] = self.sent
        raise _Answer(200)

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        self._require_write()
        head, files = self._repo(kind, repo_id, revision)
        lines = [json.loads(line) for line in self.sent.splitlines()]
        if lines[0]["value"].get("parentCommit", head) != head:
            raise _refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                del files[value["path"]]
        oid = self.hub.repos[f"{kind}s/{repo_id}"].commit(files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        raise _Answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def resolve(self, prefix: str, repo_id: str, revision: str, path: str) -> None:
        oid, files = self._repo("dataset" if prefix else "model", repo_id, revision)
        if path not in files:
            raise _refusal(404, "EntryNotFound", "Entry not found")
        blob = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{git_sha1(blob)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked:
            raise _Answer(200, blob, headers)
        self.hub.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        headers["Content-Range"] = f"bytes {start}-{len(blob) - 1}/{len(blob)}"
        raise _Answer(206, blob[start:], headers)


_REPO = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_yaml),
    (f"GET /api/(model|dataset)s/{_REPO}", _Handler.info),
    (f"GET /api/(model|dataset)s/{_REPO}/revision/([^/]+)", _Handler.info),
    (f"GET /api/(model|dataset)s/{_REPO}/tree/([^/]+)", _Handler.tree),
    (f"POST /api/(model|dataset)s/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (f"POST /api/(model|dataset)s/{_REPO}/commit/([^/]+)", _Handler.commit),
    (f"POST /{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT /lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (f"(?:GET|HEAD) /(datasets/)?{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Start a Hub on a free port of the loopback, and end it with the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(hub: Hub, monkeypatch: Any, *, token: str | None = TOKEN) -> None:
    """Point this process's client to ``hub``: endpoint, token, and no Xet."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
