"""What training tests stand on: a tiny job, its tokens, and an Attempt that is a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import tiny

from job.artifacts import Dataset, Source
from job.config import JobConfig
from job.errors import JobError
from job.files import sha256_file
from job.progress import Progress
from job.stop import Stop


class FolderAttempt:
    """Keeps a run's checkpoints in a folder: durable when ``save_checkpoint`` returns."""

    run_id = "tiny-00000000"
    epoch = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[int] = []

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """Copy ``folder`` aside, and rename it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{step}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder, partial)
        target = self.folder / f"{step:08}"
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        self.saved.append(step)

    def restore_checkpoint(self, into: Path) -> int | None:
        """Copy the newest into ``into``."""
        found = sorted(p for p in self.folder.glob("[0-9]*") if p.is_dir())
        if not found:
            return None
        shutil.copytree(found[-1], into)
        return int(found[-1].name)


def make_job(model: Path, store: Path, **sections: Any) -> JobConfig:
    """Return a CPU job on ``model``; a section given replaces single keys of the tiny default."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "store": str(store),
        "seed": 3,
        "model": {"source": str(model)},
        "data": {"source": str(model), "max_length": 128, "packing": True},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            "epochs": 1,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
        },
    }
    for key, value in sections.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return JobConfig.model_validate(settings)


def tokens_of(arch: str, n: int, *, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of ``n`` rows: loss on the last half, of many lengths."""
    tokenizer = tiny.tiny_tokenizer(arch)
    found = []
    for row in tiny.tiny_rows(n, seed=seed):
        ids = tokenizer(f"{row['user']}\n{row['analysis']}")["input_ids"]
        half = len(ids) // 2
        found.append((ids, [-100] * half + ids[half:]))
    return found


def make_dataset(
    folder: Path, arch: str, n: int = 24, *, packed: bool = True, max_length: int = 128
) -> Dataset:
    """Write a Dataset as the data stage does."""
    folder.mkdir(parents=True, exist_ok=True)
    packs: list[list[tuple[list[int], list[int]]]] = []
    for example in tokens_of(arch, n):
        fits = packs and sum(len(i) for i, _ in packs[-1]) + len(example[0]) <= max_length
        if packed and fits:
            packs[-1].append(example)
        else:
            packs.append([example])
    columns = {
        "input_ids": [[t for ids, _ in pack for t in ids] for pack in packs],
        "labels": [[t for _, labels in pack for t in labels] for pack in packs],
        "lengths": [[len(ids) for ids, _ in pack] for pack in packs],
    }
    kind = pa.list_(pa.int32())
    table = pa.table({name: pa.array(rows, type=kind) for name, rows in columns.items()})
    with (
        pa.OSFile(str(folder / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    tokenizer = tiny.tiny_tokenizer(arch)
    tokenizer.save_pretrained(folder / "tokenizer")
    num_tokens = sum(map(len, columns["input_ids"]))
    return Dataset(
        folder=folder,
        digest=sha256_file(folder / "train.arrow"),
        num_rows=len(packs),
        num_examples=n,
        num_tokens=num_tokens,
        num_supervised_tokens=num_tokens // 2,
        num_held_out=0,
        stop_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        thinking="keep",
    )


def make_source(folder: Path) -> Source:
    """Return a model folder as the pull stage does."""
    files = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    return Source(folder=folder, uri="hf://org/tiny@abc123", revision="abc123", files=files)


def make_context(job: JobConfig, folder: Path, *, attempt: Any = None, stop: Any = None) -> Any:
    """Return what the stage takes from a Context, around a FolderAttempt."""
    from contextlib import nullcontext

    return SimpleNamespace(
        job=job,
        work=folder / "work",
        cache=None,
        attempt=attempt or FolderAttempt(folder / "checkpoints"),
        stop=stop or Stop(),
        progress=Progress(),
        stage=lambda _: nullcontext(),
    )


def main() -> None:
    """Train as a process: ``python -m trainbed FOLDER JOB.json``; the exit code is the stage's."""
    import sys

    import structlog

    from job.stop import install_signals
    from job.train.stage import train

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    folder, raw = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    job = JobConfig.model_validate(raw)
    stop = Stop()
    install_signals(stop)
    context = make_context(job, folder, stop=stop)
    dataset = Dataset.model_validate_json((folder / "dataset.json").read_text())
    try:
        adapter = train(context, make_source(Path(job.model.source)), dataset)
    except JobError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))
    print(adapter.sha256)


if __name__ == "__main__":
    main()
