"""From the rows of a source to tokens: read, recognise, normalise, render, encode."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.artifacts import Source
from job.config import JobConfig
from job.data.normalise import normaliser
from job.data.read import Row, RowFault, data_files, read_rows
from job.data.recognise import SAMPLE_ROWS, recognise
from job.data.render import Rendered, Renderer
from job.data.report import Report
from job.data.template import Template
from job.data.tokens import Encoder, Tokens, read_template
from job.errors import ExitCode, JobError
from job.stop import Stop

BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Item:
    """A row as text: what it makes, and the key that says whether two rows are the same."""

    place: str
    rendered: list[Rendered]
    key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is the same for every row."""

    job: JobConfig
    encoder: Encoder
    template: Template | None
    stop_token_ids: list[int]
    render: Callable[[Any], list[Rendered]]

    @classmethod
    def of(cls, job: JobConfig, model: Source, tokenizer: Path, started: float) -> Recipe:
        """Read the tokenizer and its template."""
        encoder = Encoder(tokenizer)
        template = read_template(tokenizer, started=started)
        renderer = Renderer(
            template=template,
            special_tokens=encoder.special_tokens,
            train_on=job.data.train_on,
            thinking=job.data.thinking,
            bos=encoder.bos,
            eos=encoder.eos,
        )
        stops = encoder.stop_token_ids(model.folder, template)
        return cls(
            job=job, encoder=encoder, template=template, stop_token_ids=stops,
            render=renderer.compiled(),
        )  # fmt: skip

    def encoded(
        self, source: Source, report: Report, stop: Stop, *, held_out: bool = False
    ) -> Iterator[tuple[Item, list[Tokens]]]:
        """Yield rows with their tokens, in order; encoding runs beside reading, two batches ahead."""
        items = self._items(source, report, held_out)
        waiting: deque[tuple[list[Item], Future[list[Tokens]]]] = deque()
        with ThreadPoolExecutor(1, "encode") as pool:
            for batch in itertools.chain(_batched(items, BATCH_ROWS), [None]):
                stop.check()
                if batch is not None:
                    texts = [rendered for item in batch for rendered in item.rendered]
                    waiting.append((batch, pool.submit(self.encoder.encode, texts)))
                while waiting and (batch is None or len(waiting) > 2):
                    done, future = waiting.popleft()
                    tokens = iter(future.result())
                    yield from ((i, [next(tokens) for _ in i.rendered]) for i in done)

    def _items(self, source: Source, report: Report, held_out: bool) -> Iterator[Item]:
        for name in data_files(source, held_out=held_out):
            yield from self._file(source.folder / name, name, report)

    def _file(self, path: Path, name: str, report: Report) -> Iterator[Item]:
        """Yield the rows of a file as text; count those that can't become any."""
        rows = read_rows(path, name)
        sample = list(itertools.islice(rows, SAMPLE_ROWS))
        values = [row.value for row in sample if row.fault is None]
        mapping = self.job.data.mapping
        if not values and mapping is None:
            shape: Any = "text"
        else:
            shape = "mapping" if mapping is not None else recognise(values, name)
        if self.template is None and _needs_template(shape, mapping, values):
            raise JobError(
                ExitCode.DATA, name, "holds conversations, and the model has no chat template",
                "give one in model.chat_template",
            )  # fmt: skip
        normalise = normaliser(shape, mapping, as_chat=self.template is not None)
        for row in itertools.chain(sample, rows):
            item = self._item(row, lambda value: self.render(normalise(value)), report)
            if item is not None:
                report.shapes[shape] += 1
                yield item

    def _item(
        self, row: Row, render: Callable[[Any], list[Rendered]], report: Report
    ) -> Item | None:
        report.rows_read += 1
        if row.fault is not None:
            report.refuse(row.place, row.fault)
            return None
        try:
            rendered = render(row.value)
        except RowFault as fault:
            report.refuse(row.place, str(fault))
            return None
        report.sample(row.place, rendered[0])
        return Item(row.place, rendered, _key(self.job.seed, rendered[-1]))


def _needs_template(shape: str, mapping: Any, values: list[Any]) -> bool:
    if shape == "mapping":
        return mapping.messages is not None
    typed = any(isinstance(v.get(n), list) for v in values[:100] for n in ("prompt", "completion"))
    return shape == "messages" or (shape == "prompt+completion" and typed)


def _key(seed: int, rendered: Rendered) -> int:
    """Return 64 bits that are the same for the same text, and random between texts and seeds."""
    digest = hashlib.blake2b(rendered.text.encode(), digest_size=8, key=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big")


def _batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
