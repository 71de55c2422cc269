"""Ranks that tests start in place of the real ones: named functions, found by a fresh process."""

from __future__ import annotations

import os
import signal
from typing import Any

from job.errors import ExitCode, JobError
from job.train import rank

# Taken before a test puts one of those below in its place.
real = rank.rank_main


def out_of_memory(task: Any) -> Any:
    """Rank 1 fails in its second step; the others wait for it in a collective."""
    error = JobError(ExitCode.OUT_OF_RESOURCES, "train on cpu", "out of memory", "give it more")
    return _failing(task, error)


def broken(task: Any) -> Any:
    """Rank 1 has a bug in its second step."""
    return _failing(task, ZeroDivisionError("a bug of rank 1"))


def killed(task: Any) -> Any:
    """The kernel ends rank 1 in its second step."""
    return _failing(task, None)


def _failing(task: Any, error: Exception | None) -> Any:
    if os.environ["RANK"] == "1":
        from job.train.callbacks import Life

        begin = Life.on_step_begin

        def fail(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin(self, args, state, control, **kwargs)
            if state.global_step == 1:
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    raise error

        Life.on_step_begin = fail  # type: ignore[method-assign]
    return real(task)
