"""Prepare rows the way a run does, and look at what came out: for tests of the data stage."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import tiny

from job.artifacts import Dataset, Source
from job.config import JobConfig
from job.data.prepare import prepare_folder
from job.data.render import Rendered, Renderer
from job.data.template import Template
from job.data.tokens import Encoder
from job.files import list_files
from job.progress import Progress
from job.stop import Stop

STARTED = 1_700_000_000.0  # 2023-11-14


@functools.cache
def tokenizer_folder(arch: str, template: str | None) -> Path:
    """Return a folder with a tokenizer (and that template), made once a process."""
    folder = Path(tempfile.mkdtemp(prefix=f"tokenizer-{arch}-"))
    tiny.tiny_tokenizer(arch, template=template).save_pretrained(folder)
    return folder


def job_with(**data: Any) -> JobConfig:
    """Return a job whose data section has these settings."""
    return JobConfig.model_validate(
        {
            "name": "rows",
            "device": "cpu",
            "store": "store",
            "model": {"source": "model", "chat_template": data.pop("chat_template", None)},
            "data": {"source": "data", **data},
        }
    )


def source(folder: Path) -> Source:
    """Return a folder as a pulled source."""
    return Source(folder=folder, uri="file:data", files=dict.fromkeys(list_files(folder), ""))


@dataclass(frozen=True)
class Prepared:
    """What prepare_folder left."""

    folder: Path
    dataset: Dataset
    encoder: Encoder

    @property
    def report(self) -> dict[str, Any]:
        """data_report.json."""
        found: dict[str, Any] = json.loads((self.folder / "data_report.json").read_text())
        return found

    def rows(self, name: str = "train") -> list[dict[str, Any]]:
        """Return the rows of one Arrow stream."""
        with pa.memory_map(str(self.folder / f"{name}.arrow")) as stream:
            return list(pa.ipc.open_stream(stream).read_all().to_pylist())

    def texts(self, name: str = "train") -> list[tuple[str, str]]:
        """Return each row as (everything, what is trained on), control tokens shown."""
        tokenizer = self.encoder.tokenizer
        rows = self.rows(name)
        return [
            (
                tokenizer.decode(row["input_ids"], skip_special_tokens=False),
                tokenizer.decode(
                    [i for i in row["labels"] if i != -100], skip_special_tokens=False
                ),
            )
            for row in rows
        ]


def prepare(
    tmp_path: Path,
    rows: list[Any] | Path,
    *,
    arch: str = "llama",
    template: str | None = "auto",
    held_out: Path | float | None = None,
    **data: Any,
) -> Prepared:
    """Prepare ``rows`` (or a folder of files) and return what came out."""
    model = tokenizer_folder(arch, template)
    folder = rows if isinstance(rows, Path) else tmp_path / "data"
    if not isinstance(rows, Path):
        tiny.write_rows(folder / "rows.jsonl", rows)
    out = tmp_path / "prepared"
    out.mkdir(exist_ok=True, parents=True)
    dataset = prepare_folder(
        job_with(held_out=str(held_out) if isinstance(held_out, Path) else held_out, **data),
        Source(folder=model, uri="file:model", files=dict.fromkeys(list_files(model), "")),
        source(folder),
        source(held_out) if isinstance(held_out, Path) else None,
        out,
        stop=Stop(),
        progress=Progress(),
        started=STARTED,
    )
    return Prepared(out, dataset, Encoder(out / "tokenizer"))


def renderer(text: str, special_tokens: list[str] | None = None, **how: Any) -> Renderer:
    """Return a Renderer of one template, without a tokenizer."""
    template = Template(text, started=STARTED, variables={"bos_token": "<s>", "eos_token": "</s>"})
    known = special_tokens or ["<s>", "</s>", *tiny.CHATML_TOKENS, *tiny.HARMONY_TOKENS]
    return Renderer(template=template, special_tokens=known, **how)


def parts(rendered: Rendered) -> tuple[str, str]:
    """Return (everything, what is trained on) of one example."""
    trained = "".join(text for text, on in rendered.segments if on)
    return rendered.text, rendered.shown(trained)
