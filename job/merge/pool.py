"""The merge's worker processes: tasks out, answers back, and what their ends mean."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.merge.checkpoint import ITEM_BYTES
from job.merge.plan import Output
from job.merge.task import Task
from job.stop import Stop

MOST_WORKERS = 8
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit.

    Raises:
        JobError: 71, with the bytes needed and free.
    """
    if needed > shutil.disk_usage(folder).free:
        raise full_disk(folder, needed)


def full_disk(folder: Path, needed: int) -> JobError:
    """Return the error of a disk that does not hold ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    return JobError(
        ExitCode.OUT_OF_RESOURCES,
        str(folder),
        f"the merged model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
        "give the working folder more space",
    )


def unproven(what: str) -> JobError:
    """Return the error of a merge that is not base + adapter."""
    return JobError(
        ExitCode.NOT_PROVEN, "merge", what,
        "start it again; if it comes back, suspect the disk or memory of this machine",
    )  # fmt: skip


class Progress:
    """Bytes done, told on; and the proof's figures of every tensor, added up."""

    def __init__(self, tell: Callable[[int, int], None], total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0
        self.figures: dict[str, dict[str, float]] = {}

    def add(self, task: Task, proven: dict[str, float]) -> None:
        """Count a task that is done and proven."""
        sums = self.figures.setdefault(task.output.name, dict.fromkeys(proven, 0))
        for key, value in proven.items():
            sums[key] += value
        self._done += int(proven["weights"]) * ITEM_BYTES[task.output.dtype]
        self._tell(self._done, self._total)

    def forget(self, outputs: list[Output]) -> None:
        """Take back what was said of tensors that turned out wrong."""
        for output in outputs:
            gone = self.figures.pop(output.name, {"weights": 0})
            self._done -= int(gone["weights"]) * ITEM_BYTES[output.dtype]


class Workers:
    """A few worker processes; each does one task at a time."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        count = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes = [self._start() for _ in range(count)]
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count)

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
            process.wait()
        self._threads.shutdown()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                # What was not sent goes nowhere: the worker is gone.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]

    def run(self, tasks: Iterator[Task], done: Progress) -> None:
        """Do all tasks, the largest first."""
        ordered = sorted(tasks, key=lambda task: -task.output.size)
        waiting = {self._threads.submit(self._do, task): task for task in ordered}
        try:
            while waiting:
                self._stop.check()
                ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ready:
                    self._take(waiting.pop(future), future, done)
        finally:
            for future in waiting:
                future.cancel()

    @staticmethod
    def _take(task: Task, future: Future[dict[str, Any]], done: Progress) -> None:
        answer = future.result()
        if answer.get("errno") in DISK_ERRORS:
            raise full_disk(Path(task.path).parent, task.output.size)
        if "failed" in answer:
            raise unproven(answer["failed"])
        done.add(task, answer["proven"])

    def _do(self, task: Task) -> dict[str, Any]:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(task.to_line())
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            # Put back, so that no other thread waits for it for ever.
            self._idle.put(process)
            raise _worker_ended(process)
        self._idle.put(process)
        answer: dict[str, Any] = json.loads(line)
        return answer


def _worker_ended(process: subprocess.Popen[bytes]) -> Exception:
    code = process.wait()
    if code == -9:
        return JobError(
            ExitCode.OUT_OF_RESOURCES, "merge", "a worker process was killed; out of memory?",
            "give the job 1 GB of memory more",
        )  # fmt: skip
    return RuntimeError(f"a merge worker ended with {code}")
