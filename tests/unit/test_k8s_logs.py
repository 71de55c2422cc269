"""Following a log over broken connections, against an HTTP server that breaks them on purpose."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
import yaml

from job.stop import Stop
from k8s.cluster import Cluster
from k8s.connect import connect
from k8s.logs import Position, stream

LINES = [
    f"2026-11-22T02:00:{n // 4:02}.{(n * 7) % 10:09}Z line {n}\n".encode() for n in range(200)
] + [b"2026-11-22T02:00:50.000000001Z same\n", b"2026-11-22T02:00:50.000000001Z same\n"]
LAST = b"2026-11-22T02:00:51.000000001Z no newline"
WANTED = [line.partition(b" ")[2] for line in LINES] + [b"no newline\n"]


class Kubelet:
    """A pod's log behind the API server: each follow is cut after some bytes, by ``cuts``."""

    def __init__(self, cuts: list[int | str]) -> None:
        self.cuts = cuts
        self.requests: list[dict[str, list[str]]] = []

    def body(self, query: dict[str, list[str]]) -> bytes:
        """Return what lies at or after ``sinceTime``, as a kubelet selects it: by whole seconds."""
        since = query.get("sinceTime", [""])[0].rstrip("Z").encode()
        return b"".join(line for line in [*LINES, LAST] if line[:19] >= since)

    def pod(self) -> bytes:
        """Return the pod: its container ends when there are no cuts left."""
        state = {"running": {}} if self.cuts else {"terminated": {"exitCode": 0}}
        status = {"phase": "Running", "containerStatuses": [{"name": "job", "state": state}]}
        return json.dumps({"metadata": {"name": "p"}, "status": status}).encode()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function that serves a Kubelet and gives a Cluster that talks to it."""
    servers: list[ThreadingHTTPServer] = []

    def start(kubelet: Kubelet) -> Cluster:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(kubelet))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        config = {
            "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "clusters": [{"name": "x", "cluster": {"server": url}}],
            "users": [{"name": "x", "user": {"token": "t"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setenv("KUBECONFIG", str(path))
        return connect()

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _handler(kubelet: Kubelet) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlparse(self.path)
            query = parse_qs(url.query)
            if not url.path.endswith("/log"):
                self.reply(kubelet.pod())
                return
            kubelet.requests.append(query)
            cut = kubelet.cuts.pop(0) if "follow" in query and kubelet.cuts else None
            if cut == "503":
                self.reply(b'{"message": "busy"}', 503)
                return
            body = kubelet.body(query)
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            part = body if cut is None else body[: int(cut)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if cut is None or int(cut) % 2:
                self.wfile.write(b"0\r\n\r\n")  # an end like any other, as a proxy makes it
            self.close_connection = True

        def reply(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [1],
        [301, "503", 402],
        [100, 2000, 3001, 7],
        [5000, 10, 6001, 4000, 1_000_001],
    ],
    ids=str,
)
def test_no_line_doubled_and_none_lost(serve: object, cuts: list[int | str]) -> None:
    """Cut in the middle of lines, by a broken and by a clean end, in seconds with many lines."""
    kubelet = Kubelet(list(cuts))
    cluster = serve(kubelet)  # type: ignore[operator]
    written: list[bytes] = []
    stream(cluster, "p", written.append, _impatient())
    assert written == WANTED


def test_after_a_cut_only_the_last_seconds_are_asked_for_again(serve: object) -> None:
    """Not the whole log: it may be gigabytes."""
    kubelet = Kubelet([8001])
    cluster = serve(kubelet)  # type: ignore[operator]
    stream(cluster, "p", lambda _: None, _impatient())
    assert "sinceTime" not in kubelet.requests[0]
    assert kubelet.requests[1]["sinceTime"] > ["2026-11-22T02:00:30Z"]


def test_what_is_remembered_stays_small() -> None:
    """Lines older than two seconds are forgotten, however long the log."""
    position = Position()
    lines = (b"2026-11-22T02:%02d:%02d.0Z x\n" % (n // 60, n % 60) for n in range(3600))
    assert len(list(position.unseen(lines))) == 3600
    assert len(position._recent) <= 4


def _impatient() -> Stop:
    stop = Stop()
    stop.wait = lambda _: None  # type: ignore[method-assign]
    return stop
