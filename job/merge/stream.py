"""The merge: shards written aside by worker processes, proven row by row, then renamed.

Memory does not grow with the model: the parent knows only headers, a worker holds a block of rows
(or one MXFP4 expert). A shard gets its name once all its tensors are proven, so a shard that has
its name is whole; an interrupted merge proves those again, rather than believe them, and goes on.
Bytes are made durable once, by whoever finishes the folder (``reuse`` fsyncs it), not per shard:
after a power cut the second proof finds what is missing.
"""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from job.errors import ExitCode, JobError
from job.files import write_json
from job.merge.checkpoint import INDEX, ITEM_BYTES, SINGLE, read_header
from job.merge.plan import Output, Plan
from job.merge.task import Task, cut
from job.stop import Stop

SHARD_BYTES = 5_000_000_000
"""The largest shard; the Hub's own limit for comfortable transfers."""
MOST_WORKERS = 8
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = structlog.get_logger()


@dataclass
class Shard:
    """One file to write, and its tensors' places in it."""

    name: str
    outputs: list[Output]
    header: bytes = b""
    offsets: list[int] = field(default_factory=list)
    """Of each output, in bytes from the file's start."""

    def __post_init__(self) -> None:
        # Larger items first keeps every tensor aligned to its own items.
        self.outputs.sort(key=lambda output: -ITEM_BYTES[output.dtype])
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        starts = []
        for output in self.outputs:
            place = [position, position + output.size]
            entries[output.name] = {
                "dtype": output.dtype, "shape": list(output.shape), "data_offsets": place,
            }  # fmt: skip
            starts.append(position)
            position += output.size
        body = json.dumps(entries, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8)
        self.header = len(body).to_bytes(8, "little") + body
        self.offsets = [len(self.header) + start for start in starts]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(output.size for output in self.outputs)

    def tasks(self, path: Path, kind: Any, adapter: dict[str, Any]) -> Iterator[Task]:
        """Yield the work on this shard, as it lies (or will lie) in ``path``."""
        for output, offset in zip(self.outputs, self.offsets, strict=True):
            delta = output.delta
            a, b = (adapter[delta.a_key], adapter[delta.b_key]) if delta else (None, None)
            for spans in cut(output):
                yield Task(kind, output, str(path), offset, spans, a, b)


def lay_out(plan: Plan) -> list[Shard]:
    """Return the shards to write: the base's own, or new ones where those would be too large."""
    groups: dict[str, list[Output]] = {}
    for output in plan.outputs:
        groups.setdefault(output.shard, []).append(output)
    sizes = [sum(output.size for output in group) for group in groups.values()]
    if max(sizes) <= SHARD_BYTES:
        return [Shard(name, group) for name, group in groups.items()]
    packed: list[list[Output]] = [[]]
    for output in plan.outputs:
        if packed[-1] and sum(o.size for o in packed[-1]) + output.size > SHARD_BYTES:
            packed.append([])
        packed[-1].append(output)
    count = len(packed)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", group)
        for number, group in enumerate(packed, 1)
    ]


def write_model(
    plan: Plan, out: Path, *, stop: Stop, progress: Callable[[int, int], None] = lambda *_: None
) -> dict[str, dict[str, float]]:
    """Write the merged weights and their index into ``out``, and prove every tensor of them.

    Args:
        plan: From :func:`job.merge.plan.make_plan`.
        out: A folder; whole shards of an earlier try are proven again and kept.
        stop: Heard all the time; workers are ended at once.
        progress: Called with the bytes done and the bytes of all.

    Returns:
        Tensor → figures of its proof (see :class:`job.merge.proof.Tally`).

    Raises:
        JobError: 70 for a tensor that is not what base and adapter make, 71 for a full disk.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = lay_out(plan)
    for partial in out.glob(".*.partial"):
        partial.unlink()
    there = [shard for shard in shards if _is_whole(out / shard.name, shard)]
    check_disk(out, sum(shard.size for shard in shards if shard not in there))
    done = _Progress(progress, sum(shard.size for shard in shards))
    with _Workers(stop) as workers:
        kept = [shard for shard in there if _prove_again(workers, plan, shard, out, done)]
        for shard in shards:
            if shard not in kept:
                _write_shard(workers, plan, shard, out, done)
    _write_index(out, shards)
    return done.figures


def prove_model(plan: Plan, out: Path, *, stop: Stop) -> dict[str, dict[str, float]]:
    """Prove a merged model that lies in ``out``, whoever wrote it.

    Raises:
        JobError: 70 for a shard that is cut off or not there, or a tensor that is not right.
    """
    done = _Progress(lambda *_: None, 0)
    with _Workers(stop) as workers:
        for shard in lay_out(plan):
            if not _is_whole(out / shard.name, shard):
                raise unproven(f"{out / shard.name} is not what was planned")
            tasks = shard.tasks(out / shard.name, "prove", plan.adapter.slots)
            workers.run(tasks, done)
    return done.figures


def _is_whole(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    with open(path, "rb") as handle:
        return handle.read(len(shard.header)) == shard.header


def _prove_again(workers: _Workers, plan: Plan, shard: Shard, out: Path, done: _Progress) -> bool:
    try:
        workers.run(shard.tasks(out / shard.name, "prove", plan.adapter.slots), done)
    except JobError as error:
        if error.code is not ExitCode.NOT_PROVEN:
            raise
        log.warning("shard_written_again", shard=shard.name, reason=error.what)
        done.forget(shard)
        (out / shard.name).unlink()
        return False
    log.info("shard_reused", shard=shard.name)
    return True


def _write_shard(workers: _Workers, plan: Plan, shard: Shard, out: Path, done: _Progress) -> None:
    partial = out / f".{shard.name}.partial"
    try:
        with open(partial, "wb") as handle:
            handle.write(shard.header)
            handle.truncate(shard.size)
        workers.run(shard.tasks(partial, "merge", plan.adapter.slots), done)
        os.replace(partial, out / shard.name)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise full_disk(out, shard.size) from error
        raise
    finally:
        partial.unlink(missing_ok=True)
    # The header as a stranger reads it, not as we meant it.
    if list(read_header(out / shard.name)) != [output.name for output in shard.outputs]:
        raise unproven(f"{shard.name} does not read as it was written")


def _write_index(out: Path, shards: list[Shard]) -> None:
    if [shard.name for shard in shards] == [SINGLE]:
        return
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    total = sum(output.size for shard in shards for output in shard.outputs)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


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


class _Progress:
    """Bytes done, told on; and the proof's figures of every tensor, added up."""

    def __init__(self, tell: Callable[[int, int], None], total: int) -> None:
        self._tell, self._total, self._done = tell, total, 0
        self.figures: dict[str, dict[str, float]] = {}

    def add(self, task: Task, proven: dict[str, float]) -> None:
        sums = self.figures.setdefault(task.output.name, dict.fromkeys(proven, 0))
        for key, value in proven.items():
            sums[key] += value
        self._done += int(proven["weights"]) * ITEM_BYTES[task.output.dtype]
        self._tell(self._done, self._total)

    def forget(self, shard: Shard) -> None:
        for output in shard.outputs:
            gone = self.figures.pop(output.name, {"weights": 0})
            self._done -= int(gone["weights"]) * ITEM_BYTES[output.dtype]


class _Workers:
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

    def __enter__(self) -> _Workers:
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

    def run(self, tasks: Iterator[Task], done: _Progress) -> None:
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
    def _take(task: Task, future: Future[dict[str, Any]], done: _Progress) -> None:
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
