"""A stage on the GPU that does not get on for too long hangs: say so and end with 69.

Python can't interrupt a thread that is stuck in a driver or a collective, so the process ends
itself, after its last words: before any liveness probe would kill it without one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import structlog

from job.ending import Ending, write_termination_message
from job.errors import ExitCode, JobError

if TYPE_CHECKING:
    from job.context import Context

log = structlog.get_logger()

ON_DEVICE = ("train", "judge")


@contextlib.contextmanager
def watched(context: Context, ending: Ending) -> Iterator[None]:
    """Watch the beat of stages on the GPU while the block runs; end with 69 when it stops."""
    timeout_s = context.job.train.step_timeout_s
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, timeout_s / 4)):
            silent_s = time.monotonic() - context.progress.last_beat
            stage = str(context.progress.snapshot()["stage"])
            if stage in ON_DEVICE and silent_s > timeout_s:
                _last_words(context, ending, stage, silent_s)
                os._exit(int(ExitCode.HARDWARE))

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _last_words(context: Context, ending: Ending, stage: str, silent_s: float) -> None:
    what = f"no step for {silent_s:.0f} s (train.step_timeout_s)"
    do = "look at the GPU and its driver; the next attempt goes on from the last checkpoint"
    error = JobError(ExitCode.HARDWARE, stage, what, do)
    log.error("run_finished", code=int(error.code), said=str(error))
    ending.code = int(error.code)
    ending.close(error, context.progress)
    write_termination_message(ending.record)
