"""An attempt's log goes to the store in pieces while it runs, so that it outlives the pod."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import structlog

from job import logs
from job.ending import tell_bug
from job.errors import JobError
from job.store.runs import Attempt

log = structlog.get_logger()

EVERY_S = 60.0


@contextlib.contextmanager
def shipped_log(attempt: Attempt, work: Path) -> Iterator[None]:
    """Copy the log to ``work/log-<epoch>.jsonl``, and its new lines to the store every minute."""
    path = work / f"log-{attempt.epoch}.jsonl"
    logs.configure(copy_to=path)
    over = threading.Event()

    def ship() -> None:
        sent, number = 0, 0
        while True:
            last = over.wait(EVERY_S)
            piece = path.read_bytes()[sent:]
            piece = piece[: piece.rfind(b"\n") + 1]
            if piece:
                try:
                    attempt.put(f"log-{number:05d}.jsonl", piece)
                except JobError as error:
                    log.warning("log_not_shipped", reason=str(error))
                else:
                    sent, number = sent + len(piece), number + 1
            if last:
                return

    thread = threading.Thread(target=ship, name="log-shipping", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        tell_bug(error)  # before the last piece goes
        raise
    finally:
        over.set()
        thread.join(timeout=30)
