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
from job.artifacts import Dataset, Source
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop

T = TypeVar("T")

STORE_DEADLINE_S = 20.0
"""A check waits no longer for a store that does not answer; a run does."""
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
        (data_report.json), `steps`, `memory`, `disk`, `model`.
    """
    findings, progress = Findings(), Progress()
    report: dict[str, Any] = {"name": job.name, "run": job.run_name, "device": job.device}
    findings.attempt("store", lambda: _store(job, stop))
    findings.attempt("hub", lambda: _hub(job, stop))
    with tempfile.TemporaryDirectory(prefix="lora-job-check-") as scratch:
        folder = Path(scratch)
        sources = _Sources(job, folder, stop, progress)
        model = findings.attempt("model", lambda: sources.one("model", job.model.source, "model"))
        data = findings.attempt("data", lambda: sources.one("data", job.data.source, "data"))
        held_out, wanted = None, job.data.held_out
        if isinstance(wanted, str):
            held_out = findings.attempt("held-out", lambda: sources.one("held_out", wanted, "data"))
        if model is None:
            return {"code": findings.code, "checks": findings.tried, **report}
        shape = findings.attempt("adapter", lambda: estimate.measure(job, model))
        dataset = None
        if data is not None:
            dataset = findings.attempt(
                "rows", lambda: _prepare(job, model, data, held_out, folder, stop, progress)
            )
            with contextlib.suppress(FileNotFoundError):
                report["data"] = json.loads((folder / "prepare" / "data_report.json").read_text())
        if shape is not None:
            report["model"] = {"parameters": shape.parameters, "adapted": shape.adapted}
        if shape is not None and dataset is not None:
            report |= _needs(job, shape, dataset, report["data"], sources.downloads)
    return {"code": findings.code, "checks": findings.tried, **report}


def _store(job: JobConfig, stop: Stop) -> None:
    from job.store import open_store
    from job.store.probe import require_conditions

    store = open_store(job.store, stop=stop, single_writer=job.single_writer)
    patient = store.hearing(stop, deadline_s=STORE_DEADLINE_S)
    require_conditions(patient, single_writer=job.single_writer)
    if job.single_writer:
        next(iter(patient.list(f"{job.name}/")), None)


def _hub(job: JobConfig, stop: Stop) -> None:
    from job.hub import check_access

    check_access(job.publish.hub, stop=stop)


@dataclass(slots=True)
class _Sources:
    """Pull what a check needs: the data, and of the model everything but its weights."""

    job: JobConfig
    folder: Path
    stop: Stop
    progress: Progress
    downloads: dict[str, int] = field(default_factory=dict)
    """Name of a source → bytes that a run would download."""

    def one(self, name: str, uri: str, kind: Any) -> Source:
        """Bring one source here."""
        from job.pull import base_dtype, pull_one, resolve
        from job.pull.pin import Hashes

        place = self.folder / name
        local = _in_place(uri) if kind == "model" else None
        if local is not None:
            return local
        pin = resolve(uri, kind, Hashes(self.folder / "hashes.json", self.stop))
        if uri.startswith(("hf://", "s3://")):
            self.downloads[name] = pin.size_bytes
        return pull_one(
            uri, place, kind=kind, stop=self.stop, progress=self.progress, pin=pin,
            dtype=base_dtype(self.job), weights=False,
        )  # fmt: skip


def _in_place(uri: str) -> Source | None:
    """Return a local folder of safetensors without reading (and hashing) its weights."""
    from job.pull.select import check_model

    folder = Path(uri).expanduser()
    if "://" in uri or uri.startswith("package:") or not any(folder.glob("*.safetensors")):
        return None
    names = [path.name for path in folder.iterdir() if path.is_file()]
    check_model(folder, names, where=uri)
    return Source(folder=folder, uri=f"file:{folder.name}", files=dict.fromkeys(names, ""))


def _prepare(
    job: JobConfig,
    model: Source,
    data: Source,
    held_out: Source | None,
    folder: Path,
    stop: Stop,
    progress: Progress,
) -> Dataset:
    from job.data.prepare import prepare_folder

    place = folder / "prepare"
    place.mkdir()
    return prepare_folder(
        job, model, data, held_out, place, stop=stop, progress=progress, started=time.time()
    )


def _needs(
    job: JobConfig,
    shape: estimate.Shape,
    dataset: Dataset,
    data: dict[str, Any],
    downloads: dict[str, int],
) -> dict[str, Any]:
    longest = job.data.max_length if job.data.packing else data["longest"]
    memory = estimate.memory(job, shape, longest)
    disk = estimate.disk(
        job,
        shape,
        model_bytes=downloads.get("model", 0),
        data_bytes=downloads.get("data", 0) + downloads.get("held_out", 0),
        tokens=data["tokens"] + data["held_out_tokens"],
    )
    steps = estimate.planned_steps(job, dataset.num_rows)
    return {
        "steps": steps,
        "memory": {**memory, "total": sum(memory.values())},
        "memory_available": estimate.available_bytes(job.device),
        "disk": {**disk, "total": sum(disk.values())},
        "disk_available": shutil.disk_usage(Path.cwd()).free,
    }


def print_report(report: dict[str, Any], stream: TextIO) -> None:
    """Write a check as a person wants to read it; masks in colour on a terminal."""
    say = _Writer(stream)
    for tried in report["checks"]:
        line = "ok" if tried["ok"] else f"{tried['where']}: {tried['what']}; {tried['do']}"
        say.line(f"{tried['check']:<9} {line}")
    if "data" in report:
        _print_data(report["data"], say)
    if "model" in report:
        sizes = report["model"]
        share = sizes["adapted"] / max(sizes["parameters"], 1)
        say.line(
            f"\nmodel     {sizes['parameters']:,} parameters, {sizes['adapted']:,} trained ({share:.2%})"
        )
    if "steps" in report:
        say.line(f"steps     {report['steps']:,}")
        say.sizes("memory", report["memory"], report["memory_available"])
        say.sizes("disk", report["disk"], report["disk_available"])
    code = report["code"]
    say.line(f"\n{'ready to run' if not code else f'not ready: exit code {code}'}")


def _print_data(data: dict[str, Any], say: _Writer) -> None:
    shapes = ", ".join(f"{count:,} {name}" for name, count in data["shapes"].items())
    say.line(f"\nrows      {data['rows_read']:,} read, {data['rows_kept']:,} kept ({shapes})")
    for entry in data["dropped"]:
        places = ", ".join(entry["rows"][:5]) + (", …" if entry["count"] > 5 else "")
        say.line(f"          {entry['count']:,} dropped: a row {entry['reason']} ({places})")
    if data["truncated"]["count"]:
        cut = data["truncated"]
        places = ", ".join(cut["rows"][:5]) + (", …" if cut["count"] > 5 else "")
        say.line(f"          {cut['count']:,} cut, {data['tokens_lost']:,} tokens lost ({places})")
    trained = data["supervised_tokens"] / max(data["tokens"], 1)
    say.line(f"examples  {data['examples']:,}, held out {data['held_out_examples']:,}")
    say.line(
        f"tokens    {data['tokens']:,}, trained on {data['supervised_tokens']:,} ({trained:.0%})"
    )
    if data["packing"]:
        say.line(f"packs     {data['packs']:,} of {data['max_length']:,}, {data['fill']:.1%} full")
    stops = ", ".join(data["stop_tokens"].values()) or "none"
    say.line(f"stop      {data['stop_coverage']:.1%} of the examples end with one of: {stops}")
    most = max((bar["count"] for bar in data["length_histogram"]), default=1)
    for bar in data["length_histogram"]:
        bound = f"≤ {bar['up_to']:,}" if bar["up_to"] else "longer"
        say.line(f"  {bound:>9} {'█' * max(1, round(40 * bar['count'] / most))} {bar['count']:,}")
    for sample in data["samples"][:1]:
        say.line(f"\n{sample['row']}, trained on what is {say.mark}:")
        say.line("".join(say.masked(part) for part in sample["segments"]))


class _Writer:
    """Lines to a stream, and the two ways to show a mask."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = stream.isatty()
        self.mark = f"{TRAINED}green{RESET}" if self._colour else "in ⟦ ⟧"

    def line(self, text: str) -> None:
        self._stream.write(text + "\n")

    def masked(self, part: dict[str, Any]) -> str:
        if self._colour:
            # A row's own escape sequences must not reach the terminal.
            text = part["text"].replace("\x1b", "␛")
            return f"{TRAINED if part['trained'] else PLAIN}{text}{RESET}"
        return f"⟦{part['text']}⟧" if part["trained"] else str(part["text"])

    def sizes(self, name: str, terms: dict[str, int], available: int | None) -> None:
        ranked = sorted(terms.items(), key=lambda term: -term[1])
        parts = [f"{term} {_size(b)}" for term, b in ranked if b and term != "total"]
        there = f" of {_size(available)} here" if available is not None else ""
        short = available is not None and terms["total"] > available
        self.line(
            f"{name:<9} {_size(terms['total'])}{there}{': NOT ENOUGH' if short else ''}"
            f" ({', '.join(parts)})"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
