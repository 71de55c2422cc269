"""What every stage gets beside its artifacts: the job, where to work, the run, and when to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.config import JobConfig
from job.progress import Progress
from job.stop import Stop
from job.store.runs import Attempt

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One attempt's surroundings."""

    job: JobConfig
    work: Path
    """This run's folder on the local disk; a stage's artifact lies in ``work/<stage>``."""
    cache: Path | None
    """Folder for base weights that outlives the run (a PVC, a node's disk), or None."""
    attempt: Attempt
    """The run as the store knows it: epoch, inputs, checkpoints, publishing."""
    stop: Stop
    progress: Progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, time it, and hear a stop before it begins."""
        self.stop.check()
        self.progress.end("start")
        self.progress.enter(name)
        began = time.monotonic()
        with structlog.contextvars.bound_contextvars(stage=name):
            log.info("stage_started")
            yield
            self.progress.end(name)
            log.info("stage_finished", duration_s=round(time.monotonic() - began, 2))
