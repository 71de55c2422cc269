"""The exit codes, and the one exception that a user's mistake becomes.

The table is an API: ``k8s`` renders its ``action`` column into a Job's ``podFailurePolicy``,
and the README prints it. Numbers are those of sysexits where one fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

Action = Literal["complete", "fail", "count", "ignore"]


class ExitCode(IntEnum):
    """How an attempt ended. Anything else (1, 2, 126 to 143) is a bug, or a kill from outside."""

    VERIFIED = 0
    USAGE = 64
    DATA = 65
    NOT_FOUND = 66
    HARDWARE = 69
    NOT_PROVEN = 70
    OUT_OF_RESOURCES = 71
    NO_PROGRESS = 72
    TAKEN = 73
    STORE = 74
    PREEMPTED = 75
    FENCED = 76
    NOT_ALLOWED = 77
    CONFIG = 78
    GATE = 79


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: what a code is called, what it says, and what the Job does with it."""

    name: str
    means: str
    action: Action


TABLE: dict[ExitCode, Row] = {
    ExitCode.VERIFIED: Row("verified", "published, read back, proven", "complete"),
    ExitCode.USAGE: Row("usage", "wrong command line, or an extra is not installed", "fail"),
    ExitCode.DATA: Row(
        "data refused",
        "bad or too many bad rows, unusable template, checkpoint of another config",
        "fail",
    ),
    ExitCode.NOT_FOUND: Row("not found", "model, data or file is not there", "fail"),
    ExitCode.HARDWARE: Row(
        "hardware", "GPU, driver or collective failed, or a watchdog saw no step", "count"
    ),
    ExitCode.NOT_PROVEN: Row("not proven", "merge proof, hash or finite-loss check failed", "fail"),
    ExitCode.OUT_OF_RESOURCES: Row(
        "out of memory or disk", "with what was needed and what there was", "fail"
    ),
    ExitCode.NO_PROGRESS: Row(
        "no progress", "attempts come and go and no checkpoint is newer", "fail"
    ),
    ExitCode.TAKEN: Row("taken", "a living run of another owner holds this name", "fail"),
    ExitCode.STORE: Row("store unreachable", "past the deadline", "count"),
    ExitCode.PREEMPTED: Row("preempted", "SIGTERM; checkpoint durable", "ignore"),
    ExitCode.FENCED: Row("fenced", "a newer attempt owns the run", "ignore"),
    ExitCode.NOT_ALLOWED: Row("not allowed", "credentials missing or refused", "fail"),
    ExitCode.CONFIG: Row("config", "the job file is wrong", "fail"),
    ExitCode.GATE: Row(
        "gate refused", "trained and proven, but not better: channel unmoved", "fail"
    ),
}


class JobError(Exception):
    """What a person can mend, in one line: *where: what; do this*. Never shown with a traceback."""

    def __init__(self, code: ExitCode, where: str, what: str, do: str) -> None:
        super().__init__(f"{where}: {what}; {do}")
        self.code = code
        self.where = where
        self.what = what
        self.do = do

    def __reduce__(self) -> tuple[Any, ...]:
        return JobError, (self.code, self.where, self.what, self.do)  # from a worker process


def name_of(code: int) -> str:
    """Return the table's name for ``code``, or ``unexpected`` for a code that is not in it."""
    # `code in ExitCode` raises for a plain int before Python 3.12.
    row = {int(known): row for known, row in TABLE.items()}.get(code)
    return row.name if row else "unexpected"
