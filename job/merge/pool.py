"""The merge's worker processes: tasks out, answers back, and what their ends mean."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.files import explained
from job.merge.task import Task
from job.stop import Stop

MOST_WORKERS = 8
STOP_SECONDS = 0.2


def unproven(what: str) -> JobError:
    """Return the error of a merge that is not base + adapter."""
    return JobError(
        ExitCode.NOT_PROVEN, "merge", what,
        "start it again; if it comes back, suspect the disk or memory of this machine",
    )  # fmt: skip


class Workers:
    """A few worker processes, one for each core; each does one task at a time."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        count = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._processes = [self._start() for _ in range(count)]

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", "job.merge.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            # Read when numpy is loaded: the workers themselves are the parallelism.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            # What was not sent goes nowhere: the worker is gone.
            with contextlib.suppress(BrokenPipeError):
                process.communicate()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, dict[str, float]]]:
        """Do all tasks, those of the largest tensors first; yield each with what it proved.

        Raises:
            JobError: 70 for what is not proven (the workers can do other tasks then), 71 for a
                full disk or a worker that was killed.
        """
        waiting = sorted(tasks, key=lambda task: task.output.size)
        idle = list(self._processes)
        busy: dict[Any, tuple[subprocess.Popen[bytes], Task]] = {}
        failed: JobError | None = None
        while busy or (waiting and not failed):
            while idle and waiting and not failed:
                process = idle.pop()
                busy[process.stdout] = process, waiting.pop()
                _send(*busy[process.stdout])
            self._stop.check()
            for pipe in select.select(busy, [], [], STOP_SECONDS)[0]:
                process, task = busy.pop(pipe)
                idle.append(process)
                answer = _receive(process)
                if isinstance(answer, Exception):
                    failed = failed or _meaning(answer, task)
                else:
                    yield task, answer
        if failed:
            raise failed


def _send(process: subprocess.Popen[bytes], task: Task) -> None:
    assert process.stdin is not None
    # A worker that is gone is noticed where its answer is missing.
    with contextlib.suppress(BrokenPipeError):
        pickle.dump(task, process.stdin)
        process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> dict[str, float] | Exception:
    assert process.stdout is not None
    try:
        answer: dict[str, float] | Exception = pickle.load(process.stdout)
    except EOFError:
        code = process.wait()
    else:
        return answer
    if code == -9:
        raise JobError(
            ExitCode.OUT_OF_RESOURCES, "merge", "a worker process was killed; out of memory?",
            "give the job 1 GB of memory more",
        )  # fmt: skip
    raise RuntimeError(f"a merge worker ended with {code}")


def _meaning(error: Exception, task: Task) -> JobError:
    """Return a worker's refusal as a person should read it."""
    refusal = explained(error, task.path) if isinstance(error, OSError) else None
    return refusal or unproven(f"{task.output.name}: {error}")
