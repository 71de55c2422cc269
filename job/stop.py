"""The one way to ask a run to end early, and the one exception that it ends with."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from job.errors import ExitCode, JobError


class Stop:
    """A request to end, set by a signal (75), by a newer attempt (76) or by the watchdog (69).

    Every stage calls :meth:`check` between units of work and :meth:`wait` instead of sleeping.
    Training looks at :attr:`requested` itself, because it saves a checkpoint first.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: JobError | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody asked this attempt to end."""
        return self._event.is_set()

    def request(self, error: JobError) -> None:
        """Ask for the end. The first reason wins, but a fence (76) replaces a signal (75)."""
        if self._error is None or error.code is ExitCode.FENCED:
            self._error = error
        self._event.set()

    def check(self) -> None:
        """Raise the reason if an end was asked for."""
        if self._event.is_set():
            assert self._error is not None
            raise self._error

    def wait(self, seconds: float) -> None:
        """Sleep for ``seconds``, or raise the reason as soon as an end is asked for."""
        self._event.wait(seconds)
        self.check()


def preempted(signal_name: str) -> JobError:
    """Return the error of an attempt that a signal ended."""
    return JobError(
        ExitCode.PREEMPTED,
        "run",
        f"stopped by {signal_name}",
        "start it again: it goes on from its last checkpoint",
    )


def install_signals(stop: Stop) -> None:
    """Make SIGTERM, SIGINT and SIGHUP ask ``stop`` for the end; a second SIGINT kills at once."""

    def handle(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested:
            raise KeyboardInterrupt
        stop.request(preempted(signal.Signals(number).name))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handle)
