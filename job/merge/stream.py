"""The merge: shards written aside by worker processes, proven row by row, then renamed.

Memory does not grow with the model: the parent knows only headers, a worker holds a block of rows
(or one MXFP4 expert). A shard gets its name once all its tensors are proven, so a shard that has
its name is whole; an interrupted merge proves those again, rather than believe them, and goes on.
Bytes are made durable once, by whoever finishes the folder (``reuse`` fsyncs it), not per shard:
after a power cut the second proof finds what is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from job.errors import ExitCode, JobError
from job.files import write_json
from job.merge.checkpoint import INDEX, ITEM_BYTES, SINGLE, read_header
from job.merge.plan import Output, Plan
from job.merge.pool import DISK_ERRORS, Progress, Workers, check_disk, full_disk, unproven
from job.merge.task import Task, cut
from job.stop import Stop

SHARD_BYTES = 5_000_000_000
"""The largest shard; the Hub's own limit for comfortable transfers."""
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
    done = Progress(progress, sum(shard.size for shard in shards))
    with Workers(stop) as workers:
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
    done = Progress(lambda *_: None, 0)
    with Workers(stop) as workers:
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


def _prove_again(workers: Workers, plan: Plan, shard: Shard, out: Path, done: Progress) -> bool:
    try:
        workers.run(shard.tasks(out / shard.name, "prove", plan.adapter.slots), done)
    except JobError as error:
        if error.code is not ExitCode.NOT_PROVEN:
            raise
        log.warning("shard_written_again", shard=shard.name, reason=error.what)
        done.forget(shard.outputs)
        (out / shard.name).unlink()
        return False
    log.info("shard_reused", shard=shard.name)
    return True


def _write_shard(workers: Workers, plan: Plan, shard: Shard, out: Path, done: Progress) -> None:
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
