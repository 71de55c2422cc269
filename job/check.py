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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from job import estimate
from job.artifacts import Source
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop

T = TypeVar("T")

STORE_DEADLINE_S = 20.0
"""A check waits no longer for a store that does not answer; a run does."""
FEW_HELD_OUT = 10
"""With fewer examples, the loss on them says little."""
TRAINED, PLAIN, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclass(slots=True)
class Findings:
    """What was tried, in order; the first fault's code is the whole check's."""

    tried: list[dict[str, Any]] = field(default_factory=list)
    code: int = 0

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


def check(job: JobConfig, *, stop: Stop) -> dict[str, Any]:
    """Try a job file on this machine, without a GPU and without the model's weights.

    Returns:
        `code` (0, or the first fault's), `checks`, and as far as they could be had: `data`
        (data_report.json), `steps`, `memory`, `disk`, `model`; `elsewhere`: why it can't run on
        this very machine.
    """
    from job.hub import check_access

    found, progress = Findings(), Progress()
    found.attempt("store", lambda: _store(job, stop))
    found.attempt("hub", lambda: check_access(job.publish.hub, stop=stop, progress=progress))
    with tempfile.TemporaryDirectory(prefix="lora-job-check-") as scratch:
        report = _contents(job, Path(scratch), found, stop, progress)
    head = {"name": job.name, "run": job.run_name, "device": job.device}
    checks = {"code": found.code, "checks": found.tried, "elsewhere": _elsewhere(job)}
    return {**checks, **head, **report}


def _store(job: JobConfig, stop: Stop) -> None:
    from job.store import open_store
    from job.store.probe import require_conditions

    store = open_store(job.store, stop=stop, single_writer=job.single_writer)
    patient = store.hearing(stop, deadline_s=STORE_DEADLINE_S)
    require_conditions(patient, single_writer=job.single_writer)
    if job.single_writer:
        next(iter(patient.list(f"{job.name}/")), None)


def _elsewhere(job: JobConfig) -> str | None:
    """Return why a job for a GPU can't run on this machine: no fault of the job's."""
    try:
        from job.train.model import require_device

        require_device(job.device)
    except ModuleNotFoundError:
        return None  # and the check of the adapter says so
    except JobError as error:
        return f"{error.what}: a run here would end with {int(error.code)}"
    return None


def _contents(
    job: JobConfig, folder: Path, found: Findings, stop: Stop, progress: Progress
) -> dict[str, Any]:
    """Return what model and data say, with what of them would be downloaded in ``folder``."""
    from job.data.prepare import prepare_folder

    downloads: dict[str, int] = {}

    def source(name: str, uri: str, kind: str) -> Source | None:
        return found.attempt(
            name, lambda: _source(job, uri, kind, folder / name, downloads, stop, progress)
        )

    model = source("model", job.model.source, "model")
    data = source("data", job.data.source, "data")
    wanted = job.data.held_out
    held_out = source("held-out", wanted, "data") if isinstance(wanted, str) else None
    if model is None:
        return {}
    report: dict[str, Any] = {}
    shape = found.attempt("adapter", lambda: estimate.measure(job, model))
    if shape is not None:
        report["model"] = {"parameters": shape.parameters, "adapted": shape.adapted}
    if data is None:
        return report
    place = folder / "prepare"
    dataset = found.attempt(
        "rows",
        lambda: prepare_folder(
            job, model, data, held_out, place, stop=stop, progress=progress, started=time.time()
        ),
    )
    with contextlib.suppress(FileNotFoundError):
        report["data"] = json.loads((place / "data_report.json").read_text(encoding="utf-8"))
    if shape is not None and dataset is not None:
        report |= _needs(job, shape, dataset.num_rows, report["data"], downloads)
    return report


def _source(
    job: JobConfig,
    uri: str,
    kind: Any,
    folder: Path,
    downloads: dict[str, int],
    stop: Stop,
    progress: Progress,
) -> Source:
    """Bring what a check needs here: the data, and of the model everything but its weights."""
    from job.pull import base_dtype, pull_one, resolve
    from job.pull.pin import Hashes, Means
    from job.pull.select import check_model

    local = Path(uri).expanduser()
    if kind == "model" and any(local.glob("*.safetensors")):
        # Used in place, its weights unread (and not hashed).
        names = [path.name for path in local.iterdir() if path.is_file()]
        check_model(local, names, where=uri)
        return Source(folder=local, uri=f"file:{local.name}", files=dict.fromkeys(names, ""))
    pin = resolve(uri, kind, Means(Hashes(folder.parent / "hashes.json"), stop, progress))
    if uri.startswith(("hf://", "s3://")):
        downloads[kind] = downloads.get(kind, 0) + pin.size_bytes
    return pull_one(
        uri, folder, kind=kind, stop=stop, progress=progress, pin=pin,
        dtype=base_dtype(job), weights=False,
    )  # fmt: skip


def _needs(
    job: JobConfig,
    shape: estimate.Shape,
    num_rows: int,
    data: dict[str, Any],
    downloads: dict[str, int],
) -> dict[str, Any]:
    memory = estimate.memory(
        job, shape, job.data.max_length if job.data.packing else data["longest"]
    )
    disk = estimate.disk(
        job,
        shape,
        model_bytes=downloads.get("model", 0),
        data_bytes=downloads.get("data", 0),
        tokens=data["tokens"] + data["held_out_tokens"],
    )
    return {
        "steps": estimate.planned_steps(job, num_rows),
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
        lines += [_sizes(name, report[name], report[f"{name}_available"]) for name in ESTIMATED]
    if report["elsewhere"]:
        lines.append(f"device    {report['elsewhere']}")
    where = ", on a node with a GPU" if report["elsewhere"] else ""
    code = report["code"]
    lines.append(f"\nnot ready: exit code {code}" if code else f"\nready to run{where}")
    stream.write("\n".join(lines) + "\n")


ESTIMATED = ("memory", "disk")


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
    lines.append(
        f"stop      {data['stop_coverage']:.1%} of the examples end with one of: {stops}"
    )
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
    parts = ", ".join(f"{term} {size(count)}" for term, count in ranked if count and term != "total")
    there = f" of {size(available)} here" if available is not None else ""
    short = ": NOT ENOUGH" if available is not None and terms["total"] > available else ""
    return f"{name:<9} {size(terms['total'])}{there}{short} ({parts})"
