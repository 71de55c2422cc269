"""The stage between rows and training: read, recognise, normalise, render, encode, pack, write.

One pass, in batches; tokens are made in a second thread while the next batch is read. Memory does
not grow with the rows. The result depends on the inputs and the run's date alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job.artifacts import Dataset, Source, reuse
from job.config import JobConfig
from job.data.pack import Packer, Unpacked
from job.data.report import Report
from job.data.rows import Recipe
from job.data.tokens import IGNORED, TOKENIZER_FILES, Tokens, copy_tokenizer
from job.data.write import Arrow
from job.errors import ExitCode, JobError
from job.files import fingerprint, sha256_file, write_json
from job.progress import Progress
from job.stop import Stop

if TYPE_CHECKING:
    from job.context import Context

log = structlog.get_logger()

FORMAT = 1
"""Raise it where the same rows come out otherwise, so that old artifacts are not reused."""


def prepare(context: Context, model: Source, data: Source, held_out: Source | None) -> Dataset:
    """Turn rows into tokens that training can map into memory.

    Raises:
        JobError: 65 if the data is not good enough, 66 if there is none.
    """
    with context.stage("prepare"):
        started = context.attempt.started
        mark = _fingerprint(context.job, model, data, held_out, started)
        return reuse(
            context.work / "prepare",
            mark,
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
    copy_tokenizer(model.folder, folder / "tokenizer", job.model.chat_template)
    recipe = Recipe.of(job, model, folder / "tokenizer", started)
    work = Preparation(recipe, folder, stop=stop, progress=progress)
    try:
        if held_out is not None:
            work.read_held_out(held_out)
        work.read(data)
    finally:
        work.close(data)
    work.report.judge(job.data.limits)
    _known_to_model(work.report, model.folder)
    dataset = work.dataset()
    log.info(
        "data_prepared", rows=work.report.rows_read, examples=dataset.num_examples,
        dropped=work.report.num_dropped, truncated=work.report.truncated.count,
        num_tokens=dataset.num_tokens, supervised=dataset.num_supervised_tokens,
        packs=dataset.num_rows, held_out=dataset.num_held_out,
    )  # fmt: skip
    return dataset


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


@dataclass(slots=True)
class Preparation:
    """One pass over the data. ``report`` grows with it, and the files in ``folder``."""

    recipe: Recipe
    folder: Path
    stop: Stop
    progress: Progress
    report: Report = field(default_factory=Report)
    _packer: Packer | Unpacked = field(init=False)
    _train: Arrow = field(init=False)
    _held_out: Arrow | None = None
    _held_out_keys: set[int] = field(default_factory=set)
    # The examples with the smallest key so far: held out in the end if a small share took none.
    _nearest: tuple[int, list[tuple[str, Tokens]]] | None = None

    def __post_init__(self) -> None:
        data = self.recipe.job.data
        self._packer = Packer(data.max_length) if data.packing else Unpacked()
        self._train = Arrow(self.folder / "train.arrow")
        if data.held_out is not None:
            self._held_out = Arrow(self.folder / "held_out.arrow")

    def read_held_out(self, source: Source) -> None:
        """Take a data set of its own for measuring; its rows are then kept out of training."""
        assert self._held_out is not None
        own = Report()
        for item, examples in self.recipe.encoded(source, own, self.stop, held_out=True):
            self._held_out_keys.add(item.key)
            for tokens in examples:
                if (cut := self._cut(item.place, tokens, own)) is not None:
                    self.report.hold_out(cut)
                    self._held_out.write([cut])
        own.examples = self.report.held_out_examples
        if own.num_invalid or not own.examples:
            own.with_stop_token = own.examples
            own.judge(self.recipe.job.data.limits)

    def read(self, source: Source) -> None:
        """Take the data set that is trained on."""
        for item, examples in self.recipe.encoded(source, self.report, self.stop):
            kept = [(item.place, cut) for t in examples if (cut := self._cut(item.place, t))]
            if not kept:
                continue
            if item.key in self._held_out_keys:
                self.report.drop(item.place, "is also in the held-out data")
                continue
            self.report.rows_kept += 1
            self._place(item.key, kept)
            self.progress.update(rows=self.report.rows_read)

    def _place(self, key: int, kept: list[tuple[str, Tokens]]) -> None:
        """Send a row to training or to the held-out part. Equal rows have equal keys: one side."""
        share = self.recipe.job.data.held_out
        if not isinstance(share, float):
            self._train_on(kept)
        elif key < share * 2**64:
            self._hold_out(kept)
        elif self.report.held_out_examples:
            self._train_on(kept)
        elif self._nearest is None or key < self._nearest[0]:
            before, self._nearest = self._nearest, (key, kept)
            self._train_on(before[1] if before else [])
        elif key == self._nearest[0]:
            self._nearest[1].extend(kept)
        else:
            self._train_on(kept)

    def _hold_out(self, kept: list[tuple[str, Tokens]]) -> None:
        assert self._held_out is not None
        for _, tokens in kept:
            self.report.hold_out(tokens)
            self._held_out.write([tokens])

    def _train_on(self, kept: list[tuple[str, Tokens]]) -> None:
        stops = set(self.recipe.stop_token_ids)
        for _, tokens in kept:
            self.report.keep(tokens, stop_token_ids=stops)
            for pack in self._packer.add(tokens):
                self._train.write(pack)

    def _cut(self, place: str, tokens: Tokens, report: Report | None = None) -> Tokens | None:
        """Return an example within max_length, or None (and a reason) if it can't be one."""
        report, data = report or self.report, self.recipe.job.data
        if not len(tokens.ids) or not (tokens.labels[1:] != IGNORED).any():
            report.refuse(place, "renders to nothing that is trained on")
            return None
        if len(tokens.ids) <= data.max_length:
            return tokens
        if data.overlong == "error":
            raise JobError(
                ExitCode.DATA, place,
                f"has {len(tokens.ids)} tokens, data.max_length is {data.max_length}",
                "raise data.max_length, or set data.overlong to truncate or drop",
            )  # fmt: skip
        cut = Tokens(tokens.ids[: data.max_length], tokens.labels[: data.max_length])
        if data.overlong == "drop":
            report.drop(place, "is longer than data.max_length")
            return None
        report.tokens_lost += len(tokens.ids) - data.max_length
        if not (cut.labels[1:] != IGNORED).any():
            report.drop(place, "has its answer behind data.max_length")
            return None
        report.truncated.add(place)
        return cut

    def close(self, source: Source) -> None:
        """Settle what waits, and write the report, also of data that will be refused."""
        if self._nearest is not None:
            late = self._nearest[1]
            none_yet = self.report.held_out_examples == 0 and self.report.examples > 0
            (self._hold_out if none_yet else self._train_on)(late)
        for pack in self._packer.rest():
            self._train.write(pack)
        self._train.close()
        if self._held_out is not None:
            self._held_out.close()
        self.report.packs = self._train.num_rows
        write_json(self.folder / "data_report.json", self._as_dict(source))

    def _as_dict(self, source: Source) -> dict[str, Any]:
        recipe, data = self.recipe, self.recipe.job.data
        template = recipe.template
        rows = max(self._train.num_rows, 1)
        return {
            "source": source.uri,
            **self.report.as_dict(),
            "max_length": data.max_length,
            "packing": data.packing,
            "fill": round(self.report.tokens / rows / data.max_length, 4),
            "train_on": data.train_on,
            "thinking": data.thinking,
            "stop_tokens": {str(i): recipe.encoder.token_text(i) for i in recipe.stop_token_ids},
            "template": {"sha256": template.sha256, "date": template.date} if template else None,
            "limits": data.limits.model_dump(),
        }

    def dataset(self) -> Dataset:
        """Return the artifact."""
        files = ["train.arrow", *(["held_out.arrow"] if self._held_out is not None else [])]
        held_out = self._held_out.num_rows if self._held_out is not None else 0
        if not held_out:
            (self.folder / "held_out.arrow").unlink(missing_ok=True)
            files = files[:1]
        tick = self.stop.check
        return Dataset(
            folder=self.folder,
            digest=fingerprint([sha256_file(self.folder / name, tick=tick) for name in files]),
            num_rows=self._train.num_rows,
            num_examples=self.report.examples,
            num_tokens=self.report.tokens,
            num_supervised_tokens=self.report.supervised_tokens,
            num_held_out=held_out,
            stop_token_ids=self.recipe.stop_token_ids,
            pad_token_id=self.recipe.encoder.pad_token_id,
            thinking=self.recipe.job.data.thinking,
        )
