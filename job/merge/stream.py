"""The merge: shards written aside by worker processes, proven row by row, then renamed.

Memory does not grow with the model: the parent knows only headers, a worker holds a block of rows
(or one MXFP4 expert). A shard gets its name once all its tensors are proven, so a shard that has
its name is whole; an interrupted merge proves those again, rather than believe them, and goes on.
Bytes are made durable once, by whoever finishes the folder (``reuse`` fsyncs it), not per shard:
after a power cut the second proof finds what is missing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog

from job.errors import ExitCode, JobError
from job.files import explained, write_json
from job.merge.checkpoint import INDEX, ITEM_BYTES, SINGLE, read_header
from job.merge.plan import Output, Plan
from job.merge.pool import Workers, unproven
from job.merge.task import Task, cut
from job.stop import Stop

log = structlog.get_logger()
SHARD_BYTES = 5_000_000_000
"""The largest shard; the Hub's own limit for comfortable transfers."""
Figures = dict[str, dict[str, float]]
"""Tensor → figures of its proof (see :meth:`job.merge.proof.Proof.finish`)."""


class Shard:
    """One file to write, and its tensors' places in it."""

    def __init__(self, name: str, outputs: list[Output]) -> None:
        self.name = name
        # Larger items first keeps every tensor aligned to its own items.
        self.outputs = sorted(outputs, key=lambda output: -ITEM_BYTES[output.dtype])
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, position = [], 0
        for output in self.outputs:
            starts.append(position)
            position += output.size
            entries[output.name] = {
                "dtype": output.dtype, "shape": list(output.shape),
                "data_offsets": [starts[-1], position],
            }  # fmt: skip
        body = json.dumps(entries, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8)
        self.header = len(body).to_bytes(8, "little") + body
        self.offsets = [len(self.header) + start for start in starts]
        """Of each output, in bytes from the file's start."""
        self.size = len(self.header) + position

    def tasks(self, plan: Plan, path: Path, *, write: bool) -> Iterator[Task]:
        """Yield the work on this shard, as it lies (or will lie) in ``path``."""
        slots = plan.adapter.slots
        for output, offset in zip(self.outputs, self.offsets, strict=True):
            delta = output.delta
            factors = (slots[delta.a_key], slots[delta.b_key]) if delta else (None, None)
            for spans in cut(output):
                yield Task(write, output, str(path), offset, spans, *factors)

    def is_whole(self, path: Path) -> bool:
        """Return whether the file in ``path`` has this shard's header and size."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with open(path, "rb") as handle:
            return handle.read(len(self.header)) == self.header


def lay_out(plan: Plan) -> list[Shard]:
    """Return the shards to write: the base's own, or new ones where those would be too large."""
    groups: dict[str, list[Output]] = defaultdict(list)
    for output in plan.outputs:
        groups[output.shard].append(output)
    shards = [Shard(name, group) for name, group in groups.items()]
    if all(shard.size <= SHARD_BYTES for shard in shards):
        return shards
    packed: list[list[Output]] = [[]]
    for output in plan.outputs:
        if packed[-1] and sum(o.size for o in packed[-1]) + output.size > SHARD_BYTES:
            packed.append([])
        packed[-1].append(output)
    return [
        Shard(f"model-{number:05d}-of-{len(packed):05d}.safetensors", group)
        for number, group in enumerate(packed, 1)
    ]


def write_model(
    plan: Plan, out: Path, *, stop: Stop, progress: Callable[[int, int], None] = lambda *_: None
) -> Figures:
    """Write the merged weights and their index into ``out``, and prove every tensor of them.

    Args:
        plan: From :func:`job.merge.plan.make_plan`.
        out: A folder; whole shards of an earlier try are proven again and kept.
        stop: Heard all the time; workers are ended at once.
        progress: Called with the bytes done and the bytes of all.

    Raises:
        JobError: 70 for a tensor that is not what base and adapter make, 71 for a full disk.
    """
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.glob(".*.partial"):
        partial.unlink()
    shards = lay_out(plan)
    missing = [shard for shard in shards if not shard.is_whole(out / shard.name)]
    _check_disk(out, sum(shard.size for shard in missing))
    with Workers(stop) as workers:
        writer = _Writer(plan, out, workers, progress)
        for shard in shards:
            if shard in missing or not writer.prove_again(shard):
                writer.write(shard)
    _write_index(out, shards)
    return writer.figures


def prove_model(plan: Plan, out: Path, *, stop: Stop) -> Figures:
    """Prove a merged model that lies in ``out``, whoever wrote it.

    Raises:
        JobError: 70 for a shard that is cut off or not there, or a tensor that is not right.
    """
    with Workers(stop) as workers:
        writer = _Writer(plan, out, workers, lambda *_: None)
        for shard in lay_out(plan):
            if not shard.is_whole(out / shard.name):
                raise unproven(f"{out / shard.name} is not what was planned")
            writer.work(shard, out / shard.name, write=False)
    return writer.figures


class _Writer:
    """The work on one folder: what was proven of it, and how far it is."""

    def __init__(
        self, plan: Plan, out: Path, workers: Workers, tell: Callable[[int, int], None]
    ) -> None:
        self._plan, self._out, self._workers, self._tell = plan, out, workers, tell
        self.figures: Figures = {}
        self._done = 0

    def work(self, shard: Shard, path: Path, *, write: bool) -> None:
        """Write and prove a shard in ``path``, or only prove it; it counts when all of it is right."""
        figures: dict[str, Counter[str]] = defaultdict(Counter)
        done = self._done
        for task, proven in self._workers.run(shard.tasks(self._plan, path, write=write)):
            figures[task.output.name].update(proven)
            done += int(proven["weights"]) * ITEM_BYTES[task.output.dtype]
            self._tell(done, self._plan.size)
        for output in shard.outputs:
            if figures[output.name]["weights"] != math.prod(output.shape):
                raise unproven(f"{output.name} was not proven in every weight")
        self.figures |= {name: dict(sums) for name, sums in figures.items()}
        self._done = done

    def prove_again(self, shard: Shard) -> bool:
        """Return whether a shard of an earlier try is right; one that is not goes."""
        path = self._out / shard.name
        try:
            self.work(shard, path, write=False)
        except JobError as error:
            if error.code is not ExitCode.NOT_PROVEN:
                raise
            log.warning("shard_written_again", shard=shard.name, reason=error.what)
            path.unlink()
            return False
        log.info("shard_reused", shard=shard.name)
        return True

    def write(self, shard: Shard) -> None:
        """Write a shard aside, prove it, and give it its name."""
        path, partial = self._out / shard.name, self._out / f".{shard.name}.partial"
        try:
            with open(partial, "wb") as handle:
                handle.write(shard.header)
                handle.truncate(shard.size)
            self.work(shard, partial, write=True)
            os.replace(partial, path)
        except OSError as error:
            raise explained(error, str(partial)) or error from error
        finally:
            partial.unlink(missing_ok=True)
        # The header as a stranger reads it, not as we meant it.
        if list(read_header(path)) != [output.name for output in shard.outputs]:
            raise unproven(f"{shard.name} does not read as it was written")


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"the merged model needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        do = "give the working folder more space"
        raise JobError(ExitCode.OUT_OF_RESOURCES, str(folder), what, do)


def _write_index(out: Path, shards: list[Shard]) -> None:
    if [shard.name for shard in shards] == [SINGLE]:
        return
    weight_map = {output.name: shard.name for shard in shards for output in shard.outputs}
    total = sum(output.size for shard in shards for output in shard.outputs)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
