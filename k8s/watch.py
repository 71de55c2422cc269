"""Watching what a server may stop telling at any time: cut, too old (410), or restarted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from job.errors import ExitCode, JobError
from k8s.cluster import Cluster
from k8s.refusals import CutError, GoneError
from k8s.render import Object

T = TypeVar("T")

Wait = Callable[[float], None]

AWAY_S, FORGETFUL_S = 300.0, 30.0


def until(
    call: Callable[[], T], *, wait: Wait, allowed_before: bool = False, away_s: float = AWAY_S
) -> T:
    """Return ``call()``, again while the server is away, for at most ``away_s`` seconds.

    An API server that has just started knows no Roles yet and refuses everybody: what was
    ``allowed_before``, or before which the server was away, is asked again for half a minute.

    Raises:
        CutError: the server stayed away.
        JobError: what the server refuses.
    """
    pause, away_left, forgetful_left = 0.5, away_s, FORGETFUL_S if allowed_before else 0.0
    while True:
        try:
            return call()
        except CutError:
            if away_left <= 0:
                raise
            away_left -= pause
            # However long it was away: its half minute begins when it answers.
            forgetful_left = FORGETFUL_S
        except JobError as error:
            if error.code is not ExitCode.NOT_ALLOWED or forgetful_left <= 0:
                raise
            forgetful_left -= pause
        wait(pause)
        pause = min(10.0, pause * 2)


def changes(
    cluster: Cluster,
    kind: str,
    *,
    wait: Wait,
    seconds: int = 300,
    give_up: float = math.inf,
    **query: Any,
) -> Iterator[list[Object]]:
    """Yield all selected objects, again after each change, over cuts, 410s and server restarts.

    They are listed anew after ``seconds``, and when the clock (monotonic) passes ``give_up``.
    """
    known = False
    while True:
        body = until(lambda: cluster.page(kind, **query), wait=wait, allowed_before=known)
        known = True
        found = {item["metadata"]["name"]: item for item in body["items"]}
        yield list(found.values())
        version = body["metadata"]["resourceVersion"]
        lasts = math.ceil(max(1.0, min(seconds, give_up - time.monotonic())))
        try:
            for event in cluster.watch(kind, resource_version=version, seconds=lasts, **query):
                item = event["object"]
                if event["type"] == "DELETED":
                    found.pop(item["metadata"]["name"], None)
                else:
                    found[item["metadata"]["name"]] = item
                yield list(found.values())
        except GoneError:
            continue
        except JobError as error:
            if error.code not in (ExitCode.STORE, ExitCode.NOT_ALLOWED):
                raise
            # Listing anew tells whether it has passed.
            wait(0.5)
