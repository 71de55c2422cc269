"""What a run is doing right now: shown to people, put into head.json, watched by the watchdog."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()

FIRST_STEP = "first_step"


class Progress:
    """The present stage and its figures. Written by the stages, read by other threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._figures: dict[str, Any] = {"stage": "start"}
        self.last_beat = time.monotonic()
        self._ended: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """Begin ``stage``; figures of the one before are dropped, but for step and save_s."""
        with self._lock:
            kept = {key: it for key, it in self._figures.items() if key in ("step", "save_s")}
            self._figures = {**kept, "stage": stage}
            self.last_beat = time.monotonic()

    def update(self, **figures: Any) -> None:
        """Say that something moved.

        Known figures: step, num_steps, loss, tokens_per_s, eta_s, and save_s: what SIGTERM would
        have to wait for, the step in flight, and a checkpoint written and uploaded.
        """
        with self._lock:
            self._figures.update(figures)
            self.last_beat = time.monotonic()

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the stage and its figures."""
        with self._lock:
            return dict(self._figures)

    def end(self, part: str) -> None:
        """Note that a part of the start-up is over; the first step ends it, and tells how long."""
        if FIRST_STEP not in self._ended:
            self._ended.setdefault(part, process_age_s())
            if part == FIRST_STEP:
                log.info("startup", **self.startup())

    def startup(self) -> dict[str, float]:
        """Return the seconds of each part from the process's start to the end of the first step."""
        if FIRST_STEP not in self._ended:
            return {}
        ages = [0.0, *self._ended.values()]
        parts = zip(self._ended, ages[1:], ages, strict=False)
        return {f"{part}_s": round(age - before, 1) for part, age, before in parts} | {
            "total_s": round(ages[-1], 1)
        }


def process_age_s() -> float:
    """Return the seconds since this process began: in a container, since that did."""
    # Fields after the name, which may have spaces; the 22nd of all is the start in clock ticks.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
