"""From the rows of a source to tokens: read, recognise, normalise, render, encode.

This process reads; the rest is done beside it, a batch at a time: in a thread for small data, in a
process for each core for large data. The order of the rows stays.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.artifacts import Source
from job.config import JobConfig
from job.data.normalise import SAMPLE_ROWS, Normaliser, Shape, recognise
from job.data.read import Row, RowFault, data_files, read_rows
from job.data.render import Hidden, Rendered, Renderer
from job.data.report import NUM_SAMPLES, Report
from job.data.tokens import Encoder, Tokens, read_template
from job.errors import ExitCode, JobError
from job.stop import Stop

BATCH_ROWS = 128
SMALL_BYTES = 16 << 20
"""Files that are read before worker processes would have started."""
MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as tokens, or what is wrong with it.

    Rows of the same text have the same ``key``: 64 bits, random between texts and seeds.
    """

    place: str
    fault: str | None = None
    key: int = 0
    examples: list[Tokens] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)
    """The first example's segments as people read them."""


Encode = Callable[[Shape, list[Row], int], list[Encoded]]


class Recipe:
    """What is the same for every row.

    Args:
        job: The job file.
        model: Folder of the base, whose configs name ends of text.
        tokenizer: Folder of the tokenizer and its template.
        started: Unix seconds: today, for templates that ask for the date.
    """

    def __init__(self, job: JobConfig, model: Path, tokenizer: Path, started: float) -> None:
        self._arguments = (job, model, tokenizer, started)
        self.job, self.encoder = job, Encoder(tokenizer)
        self.template = read_template(tokenizer, started=started)
        self.stop_token_ids = self.encoder.stop_token_ids(model, self.template)
        self._hidden = Hidden(self.encoder.special_tokens)
        self._renderer: Renderer | None = None
        if self.template is not None:
            self._renderer = Renderer(
                template=self.template,
                special_tokens=self.encoder.special_tokens,
                train_on=job.data.train_on,
                thinking=job.data.thinking,
            )

    def rows(
        self, source: Source, report: Report, stop: Stop, *, held_out: bool = False
    ) -> Iterator[Encoded]:
        """Yield the rows that became examples, in order; count the others in ``report``."""
        names = data_files(source, held_out=held_out)
        paths = [source.folder / name for name in names]
        batches = itertools.chain.from_iterable(map(self._batches, paths, names))
        waiting: deque[tuple[Shape, Future[list[Encoded]]]] = deque()
        pool, encode, most_waiting = self._pool(paths)
        try:
            for batch in itertools.chain(batches, [None]):
                stop.check()
                if batch is not None:
                    shape, rows = batch
                    samples = NUM_SAMPLES - len(report.samples)
                    waiting.append((shape, pool.submit(encode, shape, rows, samples)))
                while waiting and (batch is None or len(waiting) > most_waiting):
                    shape, future = waiting.popleft()
                    yield from _counted(future.result(), shape, report)
        except BrokenProcessPool:
            what, do = "a worker process was killed; out of memory?", "give the job 1 GB more"
            raise JobError(ExitCode.OUT_OF_RESOURCES, "prepare", what, do) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _pool(self, paths: list[Path]) -> tuple[Executor, Encode, int]:
        """Return who encodes these files, by which call, and how many batches may wait for it."""
        if sum(path.stat().st_size for path in paths if path.exists()) <= SMALL_BYTES:
            return ThreadPoolExecutor(1), self.encode, 2
        workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        # Not forked: this process has threads, and may hold a model.
        fresh = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, fresh, _start_worker, self._arguments)
        return pool, _in_worker, 2 + 2 * workers

    def _batches(self, path: Path, name: str) -> Iterator[tuple[Shape, list[Row]]]:
        rows, mapping = read_rows(path, name), self.job.data.mapping
        sample = list(itertools.islice(rows, SAMPLE_ROWS))
        values = [row.value for row in sample if row.fault is None]
        shape: Shape = "mapping" if mapping else recognise(values, name) if values else "text"
        rest = itertools.chain(sample, rows)
        while batch := list(itertools.islice(rest, BATCH_ROWS)):
            yield shape, batch

    def encode(self, shape: Shape, rows: list[Row], num_samples: int) -> list[Encoded]:
        """Return what becomes of each row; the first few with a sample."""
        data = self.job.data
        normalise = Normaliser(shape, data.mapping, as_chat=self.template is not None)
        found = [self._rendered(row, normalise) for row in rows]
        texts = [one for made in found if not isinstance(made, str) for one in made]
        tokens = iter(self.encoder.encode(texts))
        encoded = []
        for row, made in zip(rows, found, strict=True):
            if isinstance(made, str):
                encoded.append(Encoded(row.place, fault=made))
                continue
            sample = made[0].as_dicts() if num_samples > 0 else []
            num_samples -= 1
            key = _key(self.job.seed, made[-1])
            encoded.append(Encoded(row.place, None, key, [next(tokens) for _ in made], sample))
        return encoded

    def _rendered(self, row: Row, normalise: Normaliser) -> list[Rendered] | str:
        """Return a row's examples as text, or what is wrong with it."""
        if row.fault is not None:
            return row.fault
        slots: list[str] = []
        try:
            example = normalise(row.value)
            if example.text is None:
                assert self._renderer is not None
                messages = self._hidden.messages(example.messages, slots)
                return self._renderer(messages, self._hidden.hide(example.tools, slots), slots)
            before = self.encoder.bos + self._hidden.hide(example.prompt, slots)
            text = self._hidden.hide(example.text, slots) + self.encoder.eos
        except RowFault as fault:
            return str(fault)
        return [Rendered([(before, self.job.data.train_on == "all"), (text, True)], slots)]


def _counted(rows: list[Encoded], shape: Shape, report: Report) -> Iterator[Encoded]:
    for row in rows:
        report.rows_read += 1
        if row.fault is not None:
            report.refuse(row.place, row.fault)
            continue
        report.shapes[shape] = report.shapes.get(shape, 0) + 1
        if row.sample and len(report.samples) < NUM_SAMPLES:
            report.samples.append({"row": row.place, "segments": row.sample})
        yield row


def _key(seed: int, rendered: Rendered) -> int:
    digest = hashlib.blake2b(rendered.text.encode(), digest_size=8, key=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big")


_own: list[Recipe] = []
"""A worker's recipe."""


def _start_worker(*arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _own.append(Recipe(*arguments))


def _end_with_parent() -> None:
    """A parent that is killed can't end its workers, and they would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_worker(shape: Shape, rows: list[Row], num_samples: int) -> list[Encoded]:
    return _own[0].encode(shape, rows, num_samples)
