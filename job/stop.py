"""The one way to ask a run to end early, and the one exception that it ends with."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from types import FrameType

from job.errors import ExitCode, JobError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RUNS_PATIENCE_S, PERSONS_PATIENCE_S = 20 * 60.0, 30.0
"""A run outlasts a server's restart; somebody who waits at a terminal is told soon."""
GIVEN_UP = 130
"""What a shell calls the end by SIGINT."""


class Stop:
    """A request to end, set by a signal (75), a newer attempt (76) or a full disk share (71).

    Every stage calls :meth:`check` between units of work and :meth:`wait` instead of sleeping.
    Training looks at :attr:`requested` itself, because it saves a checkpoint first. ``patience_s``
    is for how long what hears this stop tries a server again that does not answer.
    """

    def __init__(self, *, patience_s: float = RUNS_PATIENCE_S) -> None:
        self.patience_s = patience_s
        self._event = threading.Event()
        self._error: JobError | None = None

    @property
    def requested(self) -> bool:
        """Whether somebody asked this attempt to end."""
        return self._event.is_set()

    def request(self, error: JobError) -> None:
        """Ask for the end. A signal (75) gives way to a later reason, a fence (76) to none."""
        known = self._error.code if self._error else ExitCode.PREEMPTED
        if self._error is None or (
            known is not ExitCode.FENCED and error.code is not ExitCode.PREEMPTED
        ):
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
    do = "start it again: it goes on from its last checkpoint"
    return JobError(ExitCode.PREEMPTED, "run", f"stopped by {signal_name}", do)


def install_signals(stop: Stop) -> None:
    """Make SIGTERM, SIGINT and SIGHUP ask ``stop`` for the end, saved, with 75.

    A second Ctrl-C does not disturb the saving; a third ends the process at once, with 130.
    """
    num_interrupts = 0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += number == signal.SIGINT
        if number == signal.SIGINT and num_interrupts == 2:
            _say("saving, then ending; Ctrl-C once more to give up")
        elif number == signal.SIGINT and num_interrupts > 2:
            _say("given up; the next run goes on from the last checkpoint that was saved")
            os._exit(GIVEN_UP)
        stop.request(preempted(signal.Signals(number).name))

    for number in SIGNALS:
        signal.signal(number, handle)
    # A dying interpreter gives signals their own meaning back: the exit code would be lost.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


def _say(words: str) -> None:
    # Not print: the handler may have come in the middle of one.
    os.write(2, f"lora-job: {words}\n".encode())
