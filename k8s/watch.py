"""Watching what a server may stop telling at any time: cut, too old (410), or restarted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from k8s.cluster import Cluster, CutError, GoneError
from k8s.render import Object

T = TypeVar("T")


def until(call: Callable[[], T], *, wait: Callable[[float], None], seconds: float = 300.0) -> T:
    """Return ``call()``, again while the server is away, for at most ``seconds``."""
    pause, waited = 0.5, 0.0
    while True:
        try:
            return call()
        except CutError:
            if waited > seconds:
                raise
            wait(pause)
            waited, pause = waited + pause, min(10.0, pause * 2)


def changes(
    cluster: Cluster, kind: str, *, wait: Callable[[float], None], seconds: int = 300, **query: Any
) -> Iterator[list[Object]]:
    """Yield all selected objects, again after each change, over cuts, 410s and server restarts."""
    while True:
        body = until(lambda: cluster.page(kind, **query), wait=wait)
        found = {item["metadata"]["name"]: item for item in body["items"]}
        yield list(found.values())
        version = body["metadata"]["resourceVersion"]
        try:
            for event in cluster.watch(kind, resource_version=version, seconds=seconds, **query):
                item = event["object"]
                if event["type"] == "DELETED":
                    found.pop(item["metadata"]["name"], None)
                else:
                    found[item["metadata"]["name"]] = item
                yield list(found.values())
        except GoneError:
            continue
        except CutError:
            wait(0.5)
