"""What would run: everything that can be known before a GPU is paid for.

Each part is tried, and each says ok or what is wrong; one fault does not hide the next.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from job import estimate
from job.artifacts import Dataset, Source
from job.config import JobConfig
from job.data.prepare import FEW_HELD_OUT, prepare_folder
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop

T = TypeVar("T")

"""A check waits no longer for a store that does not answer; a run does."""
TRAINED, PLAIN, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def check(job: JobConfig, *, stop: Stop) -> dict[str, Any]:
    """Try a job file on this machine, without a GPU and without the model's weights.

    Returns:
        `code` (0, or the first fault's), `checks`, and as far as they could be had: `data`
        (data_report.json), `steps`, `memory`, `disk`, `model`; `elsewhere`: why it can't run on
        this very machine.
    """
    with tempfile.TemporaryDirectory(prefix="lora-job-check-") as scratch:
        found = _Check(job, Path(scratch), stop)
        found.attempt("store", found.store)
        found.attempt("hub", found.hub)
        report = found.contents()
    head = {"name": job.name, "run": job.run_name, "device": job.device}
    return {
        "code": found.code, "checks": found.tried, "elsewhere": _elsewhere(job), **head, **report
    }  # fmt: skip


def _elsewhere(job: JobConfig) -> str | None:
    """Return why a job for a GPU can't run on this machine: no fault of the job's."""
    try:
        from job.train.devices import require_device

        require_device(job.device)
    except ModuleNotFoundError:
        return None  # and the check of the adapter says so
    except JobError as error:
        return f"{error.what}: a run here would end with {int(error.code)}"
    return None


class _Check:
    """What was tried, in order; the first fault's code is the whole check's."""

    def __init__(self, job: JobConfig, folder: Path, stop: Stop) -> None:
        self.tried: list[dict[str, Any]] = []
        self.code = 0
        self._job, self._folder, self._stop, self._progress = job, folder, stop, Progress()
        # Bytes that a run would download.
        self._downloads = {"model": 0, "data": 0}

    def attempt(self, name: str, call: Callable[[], T]) -> T | None:
        """Return ``call()``; note that it went well, or the JobError that it ended with."""
        try:
            result = call()
        except JobError as error:
            if error.code is ExitCode.PREEMPTED:
                raise
            self.code = self.code or int(error.code)
            fault = {"code": int(error.code), "where": error.where, "what": error.what}
            self.tried.append({"check": name, "ok": False, **fault, "do": error.do})
            return None
        self.tried.append({"check": name, "ok": True})
        return result

    def store(self) -> None:
        from job.store import open_store
        from job.store.probe import require_conditions

        single_writer = self._job.single_writer
        store = open_store(self._job.store, stop=self._stop, single_writer=single_writer)
        require_conditions(store)
        if single_writer:
            next(iter(store.list(f"{self._job.name}/")), None)

    def hub(self) -> None:
        from job.hub import check_access

        check_access(self._job.publish.hub, stop=self._stop)

    def contents(self) -> dict[str, Any]:
        """Return what model and data say, and what it takes to train on them."""
        job, wanted = self._job, self._job.data.held_out
        model = self._source("model", job.model.source, "model")
        data = self._source("data", job.data.source, "data")
        held_out = self._source("held-out", wanted, "data") if isinstance(wanted, str) else None
        if model is None:
            return {}
        report: dict[str, Any] = {}
        shape = self.attempt("adapter", lambda: estimate.measure(job, model))
        if shape is not None:
            report["model"] = {"parameters": shape.parameters, "adapted": shape.adapted}
        dataset = None
        if data is not None:
            dataset = self.attempt("rows", lambda: self._prepare(model, data, held_out))
            with contextlib.suppress(FileNotFoundError):
                path = self._folder / "prepare" / "data_report.json"
                report["data"] = json.loads(path.read_text(encoding="utf-8"))
        if shape is not None and dataset is not None:
            report |= self._needs(shape, dataset, report["data"])
        return report

    def _source(self, name: str, uri: str, kind: Literal["model", "data"]) -> Source | None:
        return self.attempt(name, lambda: self._pulled(uri, kind, self._folder / name))

    def _pulled(self, uri: str, kind: Literal["model", "data"], folder: Path) -> Source:
        """Bring what a check needs here: the data, and of the model everything but its weights."""
        from job.pull import base_dtype, pull_one, resolve
        from job.pull.pin import Hashes
        from job.pull.select import check_model

        local = Path(uri).expanduser()
        if kind == "model" and any(local.glob("*.safetensors")):
            # Used in place, its weights unread (and not hashed).
            names = [path.name for path in local.iterdir() if path.is_file()]
            check_model(local, names, where=uri)
            return Source(folder=local, uri=f"file:{local.name}", files=dict.fromkeys(names, ""))
        pin = resolve(uri, kind, Hashes(self._folder / "hashes.json", self._stop))
        if uri.startswith(("hf://", "s3://")):
            self._downloads[kind] += pin.size_bytes
        return pull_one(
            uri, folder, kind=kind, stop=self._stop, progress=self._progress, pin=pin,
            dtype=base_dtype(self._job), weights=False,
        )  # fmt: skip

    def _prepare(self, model: Source, data: Source, held_out: Source | None) -> Dataset:
        return prepare_folder(
            self._job, model, data, held_out, self._folder / "prepare",
            stop=self._stop, progress=self._progress, started=time.time(),
        )  # fmt: skip

    def _needs(
        self, shape: estimate.Shape, dataset: Dataset, data: dict[str, Any]
    ) -> dict[str, Any]:
        job = self._job
        longest = job.data.max_length if job.data.packing else data["longest"]
        memory = estimate.memory(job, shape, longest)
        disk = estimate.disk(
            job,
            shape,
            model_bytes=self._downloads["model"],
            data_bytes=self._downloads["data"],
            tokens=data["tokens"] + data["held_out_tokens"],
        )
        return {
            "steps": estimate.planned_steps(
                job.train, dataset.num_rows, job.train.num_processes or 1
            ),
            "memory": {**memory, "total": sum(memory.values())},
            "memory_available": estimate.available_bytes(job.device),
            "disk": {**disk, "total": sum(disk.values())},
            "disk_available": shutil.disk_usage(Path.cwd()).free,
        }


def print_report(report: dict[str, Any], stream: TextIO) -> None:
    """Write a check as a person wants to read it; masks in colour on a terminal."""
    lines = []
    for tried in report["checks"]:
        line = "ok" if tried["ok"] else f"{tried['where']}: {tried['what']}; {tried['do']}"
        lines.append(f"{tried['check']:<9} {line}")
    if "data" in report:
        lines += _about_data(report["data"])
        lines += _about_sample(report["data"], colour=stream.isatty())
    if "model" in report:
        total, adapted = report["model"]["parameters"], report["model"]["adapted"]
        share = f"{adapted / max(total, 1):.2%}"
        lines.append(f"\nmodel     {total:,} parameters, {adapted:,} trained ({share})")
    if "steps" in report:
        lines.append(f"steps     {report['steps']:,}")
        lines += [
            _sizes(name, report[name], report[f"{name}_available"]) for name in ("memory", "disk")
        ]
    if report["elsewhere"]:
        lines.append(f"device    {report['elsewhere']}")
    where = ", on a node with a GPU" if report["elsewhere"] else ""
    code = report["code"]
    lines.append(f"\nnot ready: exit code {code}" if code else f"\nready to run{where}")
    stream.write("\n".join(lines) + "\n")


def _about_data(data: dict[str, Any]) -> list[str]:
    def rows(tally: dict[str, Any]) -> str:
        return ", ".join(tally["rows"][:5]) + (", …" if tally["count"] > 5 else "")

    shapes = ", ".join(f"{count:,} {name}" for name, count in data["shapes"].items())
    lines = [f"\nrows      {data['rows_read']:,} read, {data['rows_kept']:,} kept ({shapes})"]
    for entry in data["dropped"]:
        lines.append(
            f"          {entry['count']:,} dropped: a row {entry['reason']} ({rows(entry)})"
        )
    if data["truncated"]["count"]:
        cut, lost = data["truncated"], data["tokens_lost"]
        lines.append(f"          {cut['count']:,} cut, {lost:,} tokens lost ({rows(cut)})")
    held_out, trained = data["held_out_examples"], data["supervised_tokens"]
    few = ": too few to judge by" if 0 < held_out < FEW_HELD_OUT else ""
    lines.append(f"examples  {data['examples']:,}, held out {held_out:,}{few}")
    share = f"{trained / max(data['tokens'], 1):.0%}"
    lines.append(f"tokens    {data['tokens']:,}, trained on {trained:,} ({share})")
    if data["packing"]:
        full = f"{data['fill']:.1%} full"
        lines.append(f"packs     {data['packs']:,} of {data['max_length']:,}, {full}")
    stops = ", ".join(data["stop_tokens"].values()) or "none"
    lines.append(f"stop      {data['stop_coverage']:.1%} of the examples end with one of: {stops}")
    bars = data["length_histogram"]
    most = max((bar["count"] for bar in bars), default=1)
    for bar in bars:
        bound = f"≤ {bar['up_to']:,}" if bar["up_to"] else "longer"
        lines.append(
            f"  {bound:>9} {'█' * max(1, round(40 * bar['count'] / most))} {bar['count']:,}"
        )
    return lines


def _about_sample(data: dict[str, Any], *, colour: bool) -> list[str]:
    """Return the first example, and how what is trained on is marked."""

    def shown(part: dict[str, Any]) -> str:
        if colour:
            # A row's own escape sequences must not reach the terminal.
            text = part["text"].replace("\x1b", "␛")
            return f"{TRAINED if part['trained'] else PLAIN}{text}{RESET}"
        return f"⟦{part['text']}⟧" if part["trained"] else str(part["text"])

    mark = f"{TRAINED}green{RESET}" if colour else "in ⟦ ⟧"
    return [
        f"\n{sample['row']}, trained on what is {mark}:\n{''.join(map(shown, sample['segments']))}"
        for sample in data["samples"][:1]
    ]


def _sizes(name: str, terms: dict[str, int], available: int | None) -> str:
    def size(count: int) -> str:
        return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

    ranked = sorted(terms.items(), key=lambda term: -term[1])
    parts = ", ".join(
        f"{term} {size(count)}" for term, count in ranked if count and term != "total"
    )
    there = f" of {size(available)} here" if available is not None else ""
    short = ": NOT ENOUGH" if available is not None and terms["total"] > available else ""
    return f"{name:<9} {size(terms['total'])}{there}{short} ({parts})"
