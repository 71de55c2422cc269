"""The stage between rows and training: read, recognise, normalise, render, encode, pack, write.

One pass, in batches. Memory does not grow with the rows. The result depends on the inputs and the
run's date alone.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job.artifacts import Dataset, Source, reuse
from job.config import JobConfig
from job.data.pack import Arrow, Packer
from job.data.report import Report
from job.data.rows import Encoded, Recipe
from job.data.tokens import TOKENIZER_FILES, Tokens, copy_tokenizer
from job.errors import ExitCode, JobError
from job.files import fingerprint, sha256_file, write_json
from job.progress import Progress
from job.stop import Stop

if TYPE_CHECKING:
    from job.context import Context

log = structlog.get_logger()

FORMAT = 2
"""Raise it where the same rows come out otherwise, so that old artifacts are not reused."""
FEW_HELD_OUT = 10
"""With fewer examples, the loss on them says little."""


def prepare(context: Context, model: Source, data: Source, held_out: Source | None) -> Dataset:
    """Turn rows into tokens that training can map into memory.

    Raises:
        JobError: 65 if the data is not good enough, 66 if there is none.
    """
    with context.stage("prepare"):
        started = context.attempt.started
        return reuse(
            context.work / "prepare",
            _fingerprint(context.job, model, data, held_out, started),
            Dataset,
            lambda folder: prepare_folder(
                context.job, model, data, held_out, folder,
                stop=context.stop, progress=context.progress, started=started,
            ),
            stage="prepare",
        )  # fmt: skip


def _fingerprint(
    job: JobConfig, model: Source, data: Source, held_out: Source | None, started: float
) -> str:
    names = (*TOKENIZER_FILES, "config.json", "generation_config.json")
    tokenizer = {name: model.files[name] for name in names if name in model.files}
    day = int(started // 86400)
    versions = [FORMAT, *(version(name) for name in ("tokenizers", "jinja2", "pyarrow"))]
    sources = [tokenizer or model.files, data.files, held_out.files if held_out else None]
    settings = [job.data.model_dump(mode="json"), job.model.chat_template, job.seed]
    return fingerprint(sources, settings, day, versions)


def prepare_folder(
    job: JobConfig,
    model: Source,
    data: Source,
    held_out: Source | None,
    folder: Path,
    *,
    stop: Stop,
    progress: Progress,
    started: float,
) -> Dataset:
    """Write a Dataset's files into ``folder``: the tokenizer, Arrow streams and the report.

    The report is written whether or not the data is good enough.

    Raises:
        JobError: 65 if the data is not good enough, 66 if there is none.
    """
    tokenizer = folder / "tokenizer"
    copy_tokenizer(model.folder, tokenizer, job.model.chat_template)
    work = Preparation(Recipe(job, model.folder, tokenizer, started), folder, stop, progress)
    try:
        if held_out is not None:
            work.read_held_out(held_out)
        work.read(data)
    finally:
        work.close(data)
    report = work.report
    report.judge(job.data.limits)
    _known_to_model(report, model.folder)
    log.info(
        "data_prepared", rows=report.rows_read, examples=report.examples,
        dropped=report.num_dropped, truncated=report.truncated.count, num_tokens=report.tokens,
        supervised=report.supervised_tokens, packs=report.packs,
        held_out=report.held_out_examples,
    )  # fmt: skip
    if job.data.held_out is not None and report.held_out_examples < FEW_HELD_OUT:
        log.warning("few_examples_held_out", held_out=report.held_out_examples)
    return work.dataset()


def _known_to_model(report: Report, model: Path) -> None:
    """Refuse ids that the model has no embedding for: on a GPU they end in an illegal access."""
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if size is not None and report.largest_id >= size:
        raise JobError(
            ExitCode.DATA,
            "model.source",
            f"its tokenizer makes token {report.largest_id}, and the model knows {size} tokens",
            "use the tokenizer that belongs to this model",
        )


class Preparation:
    """One pass over the data. ``report`` grows with it, and the files in ``folder``."""

    def __init__(self, recipe: Recipe, folder: Path, stop: Stop, progress: Progress) -> None:
        self.report = Report()
        self._recipe, self._data, self._folder = recipe, recipe.job.data, folder
        self._stop, self._progress = stop, progress
        self._stops = set(recipe.stop_token_ids)
        self._packer = Packer(self._data.max_length) if self._data.packing else None
        self._train = Arrow(folder / "train.arrow")
        self._held_out = Arrow(folder / "held_out.arrow")
        self._held_out_keys: set[int] = set()
        # The examples with the smallest key so far: held out in the end if a small share took none.
        self._nearest: tuple[int, list[Tokens]] | None = None

    def read_held_out(self, source: Source) -> None:
        """Take a data set of its own for measuring; its rows are then kept out of training."""
        own = Report()
        for row in self._recipe.rows(source, own, self._stop, held_out=True):
            self._held_out_keys.add(row.key)
            examples = self._cut(row, own)
            own.examples += len(examples)
            self._hold_out(examples)
        own.judge_rows(self._data.limits)

    def read(self, source: Source) -> None:
        """Take the data set that is trained on."""
        for row in self._recipe.rows(source, self.report, self._stop):
            self._progress.update(rows=self.report.rows_read)
            examples = self._cut(row, self.report)
            if not examples:
                continue
            if row.key in self._held_out_keys:
                self.report.drop(row.place, "is also in the held-out data")
                continue
            self.report.rows_kept += 1
            self._place(row.key, examples)

    def _place(self, key: int, examples: list[Tokens]) -> None:
        """Send a row to training or to the held-out part. Equal rows have equal keys: one side."""
        share = self._data.held_out
        if isinstance(share, float) and key < share * 2**64:
            self._hold_out(examples)
        elif not isinstance(share, float) or self.report.held_out_examples:
            self._train_on(examples)
        elif self._nearest is None or key < self._nearest[0]:
            before, self._nearest = self._nearest, (key, examples)
            self._train_on(before[1] if before else [])
        elif key == self._nearest[0]:
            self._nearest[1].extend(examples)
        else:
            self._train_on(examples)

    def _hold_out(self, examples: list[Tokens]) -> None:
        for tokens in examples:
            self.report.held_out_examples += 1
            self.report.held_out_tokens += len(tokens.ids)
            self._held_out.write([tokens])

    def _train_on(self, examples: list[Tokens]) -> None:
        for tokens in examples:
            self.report.keep(tokens, self._stops)
            packs: Any = self._packer.add(tokens) if self._packer else [[tokens]]
            self._write(packs)

    def _write(self, packs: Any) -> None:
        for pack in packs:
            self._train.write(pack)

    def _cut(self, row: Encoded, report: Report) -> list[Tokens]:
        """Return a row's examples within max_length; those that can't be are counted."""
        cut = (self._cut_one(row.place, tokens, report) for tokens in row.examples)
        return [tokens for tokens in cut if tokens is not None]

    def _cut_one(self, place: str, tokens: Tokens, report: Report) -> Tokens | None:
        size, most, overlong = len(tokens.ids), self._data.max_length, self._data.overlong
        if not tokens.num_supervised:
            report.refuse(place, "renders to nothing that is trained on")
            return None
        if size <= most:
            return tokens
        if overlong == "error":
            raise JobError(
                ExitCode.DATA, place, f"has {size} tokens, data.max_length is {most}",
                "raise data.max_length, or set data.overlong to truncate or drop",
            )  # fmt: skip
        if overlong == "drop":
            report.drop(place, "is longer than data.max_length")
            return None
        report.tokens_lost += size - most
        cut = Tokens(tokens.ids[:most], tokens.labels[:most])
        if not cut.num_supervised:
            report.drop(place, "has its answer behind data.max_length")
            return None
        report.truncated.add(place)
        return cut

    def close(self, source: Source) -> None:
        """Settle what waits, and write the report, also of data that will be refused."""
        if self._nearest is not None:
            late = self.report.held_out_examples == 0 and self.report.examples > 0
            (self._hold_out if late else self._train_on)(self._nearest[1])
        self._write(self._packer.rest() if self._packer else [])
        self._train.close()
        self._held_out.close()
        self.report.packs = self._train.num_rows
        write_json(self._folder / "data_report.json", self._as_dict(source))

    def _as_dict(self, source: Source) -> dict[str, Any]:
        data, template = self._data, self._recipe.template
        name_of = self._recipe.encoder.tokenizer.id_to_token
        return {
            "source": source.uri,
            **self.report.as_dict(),
            "max_length": data.max_length,
            "packing": data.packing,
            "fill": round(self.report.tokens / max(self.report.packs, 1) / data.max_length, 4),
            "train_on": data.train_on,
            "thinking": data.thinking,
            "stop_tokens": {str(i): name_of(i) or str(i) for i in self._recipe.stop_token_ids},
            "template": {"sha256": template.sha256, "date": template.date} if template else None,
            "limits": data.limits.model_dump(),
        }

    def dataset(self) -> Dataset:
        """Return the artifact."""
        paths = [self._folder / "train.arrow", self._folder / "held_out.arrow"]
        if not self._held_out.num_rows:
            paths.pop().unlink()
        return Dataset(
            folder=self._folder,
            digest=fingerprint([sha256_file(path, tick=self._stop.check) for path in paths]),
            num_rows=self._train.num_rows,
            num_examples=self.report.examples,
            num_tokens=self.report.tokens,
            num_supervised_tokens=self.report.supervised_tokens,
            num_held_out=self._held_out.num_rows,
            stop_token_ids=self._recipe.stop_token_ids,
            pad_token_id=self._recipe.encoder.pad_token_id,
            thinking=self._data.thinking,
        )
