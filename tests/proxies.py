"""Connections that break on purpose: toxiproxy between a client and a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
from processes import Server, free_ports, listens

PROGRAM = Path(__file__).parents[1] / ".tools/bin/toxiproxy"


class Proxy:
    """A port that leads to ``upstream`` until it is told otherwise."""

    def __init__(self, api: str, name: str, listen: str, upstream: str) -> None:
        self.listen = listen
        self.port = int(listen.rpartition(":")[2])
        self._path = f"{api}/proxies/{name}"
        self._http = urllib3.PoolManager()
        body = {"name": name, "listen": listen, "upstream": upstream}
        self._ask("POST", f"{api}/proxies", body)

    def cut(self) -> None:
        """Break every connection, and refuse new ones until :meth:`mend`."""
        self._ask("POST", self._path, {"enabled": False})

    def mend(self) -> None:
        """Let connections through again."""
        self._ask("POST", self._path, {"enabled": True})

    @contextlib.contextmanager
    def toxic(self, kind: str, *, stream: str = "downstream", **attributes: Any) -> Iterator[None]:
        """Add a toxic (``latency``, ``timeout``, ``reset_peer``, ``limit_data``…) for a while."""
        body = {"name": kind, "type": kind, "stream": stream, "attributes": attributes}
        self._ask("POST", f"{self._path}/toxics", body)
        try:
            yield
        finally:
            self._ask("DELETE", f"{self._path}/toxics/{kind}")

    def _ask(self, method: str, url: str, body: Any = None) -> None:
        answer = self._http.request(method, url, json=body)
        if answer.status >= 300:
            raise RuntimeError(f"toxiproxy: {method} {url}: {answer.data.decode()}")


@contextlib.contextmanager
def toxiproxy(
    folder: Path, *, address: str = "127.0.0.1", **upstreams: str
) -> Iterator[dict[str, Proxy]]:
    """Run toxiproxy with a proxy at ``address`` for each named upstream (``host:port``)."""
    if not PROGRAM.exists():
        raise RuntimeError("toxiproxy is not built; run tests/cluster/build.sh toxiproxy")
    [api] = free_ports(1)
    ports = free_ports(len(upstreams), address)
    command = [PROGRAM, "-host", "127.0.0.1", "-port", str(api)]
    server = Server(command, folder / "toxiproxy.log").start()
    try:
        server.ready(lambda: listens(api), within_s=20)
        base = f"http://127.0.0.1:{api}"
        yield {
            name: Proxy(base, name, f"{address}:{port}", upstream)
            for (name, upstream), port in zip(upstreams.items(), ports, strict=True)
        }
    finally:
        server.stop()
