"""Real servers for the tests: SeaweedFS (good S3), localbucket and rclone (bad ones), a faulty proxy.

Everything listens on 127.0.0.1 on free ports, in a folder of its own, and is stopped by its
process id. ``with seaweedfs() as server: boto3.client("s3", **server.client_options())``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BUCKET = "models"
KEY, SECRET = "test-key-id", "test-secret-value"
READER_KEY, READER_SECRET = "reader-key-id", "reader-secret-value"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: where it is and who may use it."""

    endpoint: str
    folder: Path
    pid: int
    bucket: str = BUCKET
    access_key: str = KEY
    secret_key: str = SECRET

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Return the AWS variables that lead boto3 (and nobody else's profile) to this server."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client_options(self) -> dict[str, str]:
        """Return the keyword arguments for ``boto3.client("s3", ...)``."""
        return {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "region_name": "us-east-1",
        }


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def program(name: str) -> str:
    """Return the path of a program that a PyPI package put beside this interpreter."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed; install the dev dependencies")
    return found


@contextlib.contextmanager
def running(
    command: list[str], *, folder: Path, ready: Callable[[], bool], timeout_s: float = 60
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` until the block ends; its output is in ``folder/output.log``."""
    log = folder / "output.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    try:
        give_up = time.monotonic() + timeout_s
        while not ready():
            if child.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield child
    finally:
        # Their folders go with them: nobody needs them to end in good order.
        child.kill()
        child.wait()


def answers(endpoint: str) -> bool:
    """Whether an HTTP server answers there, with whatever status below 500."""
    url = urlsplit(endpoint)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=2)
    try:
        connection.request("GET", url.path or "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _identities() -> dict[str, Any]:
    def identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, Any]:
        credentials = [{"accessKey": key, "secretKey": secret}]
        return {"name": name, "credentials": credentials, "actions": actions}

    writer = identity("writer", KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"])
    reader = identity("reader", READER_KEY, READER_SECRET, ["Read", "List"])
    return {"identities": [writer, reader]}


@contextlib.contextmanager
def seaweedfs(*, bucket: str = BUCKET) -> Iterator[S3Server]:
    """Start SeaweedFS with an S3 gateway, two identities (writer, reader) and one bucket."""
    with tempfile.TemporaryDirectory(prefix="seaweedfs-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "s3.json").write_text(json.dumps(_identities()))
        kinds = ["master", "volume", "filer", "s3"]
        names = [f"-{kind}.port{grpc}" for kind in kinds for grpc in ("", ".grpc")]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        options = {
            "-ip": "127.0.0.1",
            "-ip.bind": "127.0.0.1",
            "-dir": str(folder / "data"),
            "-master.telemetry": "false",
            "-master.volumeSizeLimitMB": "1024",
            "-volume.max": "100",
            "-filer.localSocket": str(folder / "filer.sock"),
            "-s3": "true",
            "-s3.config": str(folder / "s3.json"),
            "-s3.autoCreateBucket": "false",
            "-s3.port.iceberg": "0",
            "-s3.port.lance": "0",
            **{option: str(port) for option, port in ports.items()},
        }
        command = [program("weed"), "server", *(f"{key}={value}" for key, value in options.items())]
        endpoint = f"http://127.0.0.1:{ports['-s3.port']}"
        made = threading.Event()

        def ready() -> bool:
            if answers(endpoint) and _make_bucket(endpoint, bucket):
                made.set()
            return made.is_set()

        with running(command, folder=folder, ready=ready) as child:
            yield S3Server(endpoint, folder, child.pid, bucket)


def _make_bucket(endpoint: str, bucket: str) -> bool:
    """Create the bucket and write one object: the volume server may come up after the gateway."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    options = S3Server(endpoint, Path(), 0).client_options()
    quick = Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
    client = boto3.client("s3", config=quick, **options)
    try:
        with contextlib.suppress(
            client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
        ):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
        client.delete_object(Bucket=bucket, Key="ready")
    except (BotoCoreError, ClientError):
        return False
    return True


@contextlib.contextmanager
def localbucket(*, bucket: str = BUCKET) -> Iterator[S3Server]:
    """Start localbucket: a small S3 server that ignores ``If-Match``."""
    with tempfile.TemporaryDirectory(prefix="localbucket-") as name:
        folder, [port] = Path(name), free_ports(1)
        (folder / "data" / bucket).mkdir(parents=True)
        command = [
            program("localbucket"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            str(folder / "data"),
        ]
        endpoint = f"http://127.0.0.1:{port}"
        with running(command, folder=folder, ready=lambda: answers(endpoint)) as child:
            yield S3Server(endpoint, folder, child.pid, bucket)


@contextlib.contextmanager
def rclone_s3(*, bucket: str = BUCKET) -> Iterator[S3Server]:
    """Start ``rclone serve s3``: a server that ignores every condition."""
    with tempfile.TemporaryDirectory(prefix="rclone-") as name:
        folder, [port] = Path(name), free_ports(1)
        (folder / "data" / bucket).mkdir(parents=True)
        command = [
            program("rclone"),
            "serve",
            "s3",
            f"--addr=127.0.0.1:{port}",
            f"--auth-key={KEY},{SECRET}",
        ]
        command += [f"--config={folder / 'none.conf'}", str(folder / "data")]
        endpoint = f"http://127.0.0.1:{port}"
        with running(command, folder=folder, ready=lambda: answers(endpoint)) as child:
            yield S3Server(endpoint, folder, child.pid, bucket)


@dataclass
class Proxy:
    """An HTTP proxy before a server, that does harm to the requests that ``rule`` picks.

    ``rule(method, path, headers)`` returns None or one of: ``lost`` (the server does the work, its
    answer is dropped), ``refuse`` (dropped before the server sees it), ``hang`` (no answer until
    :meth:`release`), ``half`` (half of the answer's body, then an end), ``flip`` (one bit of the
    answer's body differs), or a status such as ``503``.
    """

    upstream: str
    rule: Callable[[str, str, Any], str | None] = lambda *_: None
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""
    _released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let every hanging request end (without an answer)."""
        self._released.set()

    def first(self, fault: str, method: str, part: str, *, times: int = 1) -> None:
        """Do harm to the first ``times`` requests of ``method`` whose path contains ``part``."""
        left, lock = [times], threading.Lock()

        def rule(verb: str, path: str, headers: Any) -> str | None:
            with lock:
                if verb != method or part not in path or not left[0]:
                    return None
                left[0] -= 1
                return fault

        self.rule = rule

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request: with the upstream's answer, or with harm."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.rule(request.command, request.path, request.headers)
        self.seen.append((request.command, request.path, fault))
        if fault == "hang":
            self._released.wait(120)
        if fault in ("hang", "refuse"):
            request.close_connection = True
            return
        if fault and fault.isdigit():
            self._answer(request, int(fault), [("Retry-After", "0")], b"")
            return
        status, headers, answer = self._forward(request, body)
        if fault == "lost":
            request.close_connection = True
            return
        if fault == "flip" and answer:
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        self._answer(request, status, headers, answer, half=fault == "half")

    def _forward(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        url = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
        headers = {key: value for key, value in request.headers.items() if key != "Expect"}
        try:
            connection.request(request.command, request.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        half: bool = False,
    ) -> None:
        request.send_response_only(status)
        head = request.command == "HEAD"
        dropped = {"transfer-encoding", "connection"} | (set() if head else {"content-length"})
        for key, value in headers:
            if key.lower() not in dropped:
                request.send_header(key, value)
        if not head and status != 204:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if half else body)
        request.close_connection = half


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[Proxy]:
    """Start a :class:`Proxy` before ``upstream``; use its ``endpoint``."""
    proxy = Proxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            with contextlib.suppress(ConnectionError):
                proxy.handle(self)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """Clients that go away are part of the tests."""

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.release()
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with seaweedfs() as main_server:
        print(
            "\n".join(f"export {k}={v}" for k, v in main_server.environment().items()), flush=True
        )
        with contextlib.suppress(KeyboardInterrupt):
            os.waitpid(main_server.pid, 0)
