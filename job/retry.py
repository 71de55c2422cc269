"""The one retry layer: what may pass is tried again, with jitter, until patience ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from job.errors import ExitCode, JobError
from job.stop import Stop

T = TypeVar("T")
log = structlog.get_logger()

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0


class TransientError(Exception):
    """A failure that may pass: the network, a busy server. Clients turn their own into this one."""

    def __init__(self, what: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


def retry(what: str, call: Callable[[], T], *, stop: Stop) -> T:
    """Return ``call()``, again and again while it raises :class:`TransientError`.

    Raises:
        JobError: 74 once the stop's patience is at its end, or the stop's own reason.
    """
    give_up = time.monotonic() + stop.patience_s
    for attempt in range(1_000_000):
        stop.check()
        try:
            return call()
        except TransientError as error:
            backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 10))
            wait_s = max(error.retry_after_s, backoff * random.uniform(0.5, 1.0))
            if time.monotonic() + wait_s > give_up:
                late = f"no success within {stop.patience_s:.0f} s: {error}"
                do = "see whether the server can be reached from here, then start again"
                raise JobError(ExitCode.STORE, what, late, do) from error
            log.warning("retried", what=what, reason=str(error)[:300], wait_s=round(wait_s, 2))
            stop.wait(wait_s)
    raise AssertionError("unreachable")
