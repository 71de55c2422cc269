"""What a run is doing right now: shown to people, put into head.json, watched by the watchdog."""

from __future__ import annotations

import threading
import time
from typing import Any


class Progress:
    """The present stage and its figures. Written by the stages, read by other threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._figures: dict[str, Any] = {"stage": "start"}
        self.last_beat = time.monotonic()

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
