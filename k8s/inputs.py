"""What a job file names of this machine goes to the store first: a pod cannot see its disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import fingerprint, list_files, sha256_file
from job.stop import Stop

CLAIM = "/cache/"
"""Where a pod has the claim that the cluster file names as its cache."""


def is_local(source: object) -> bool:
    """Return whether a source is of this machine: a file, a folder, or in a package of its Python."""
    return isinstance(source, str) and not re.match(r"^[a-z0-9]+://", source)


def local_inputs(job: JobConfig) -> dict[str, str]:
    """Return the job's fields that name something on this machine."""
    named = {
        "model.source": job.model.source,
        "data.source": job.data.source,
        "data.held_out": job.data.held_out,
    }
    return {key: str(value) for key, value in named.items() if is_local(value)}


@dataclass(frozen=True)
class Input:
    """Files of this machine, and their folder in the store: its name is their content's hash."""

    folder: str
    files: dict[str, Path]
    hashes: dict[str, str]


def place(job: JobConfig, *, stop: Stop) -> tuple[JobConfig, list[Input]]:
    """Return the job with its local inputs replaced by ``<store>/_inputs/<sha256>``, and those.

    Nothing is sent yet. A store that is a folder leaves the job as it is.

    Raises:
        JobError: 66 if an input is not there, 78 if it lies where no pod sees it.
    """
    if not job.store.startswith("s3://"):
        _require_on_claim(job)
        return job, []
    inputs: list[Input] = []
    changes: dict[str, dict[str, str]] = {"model": {}, "data": {}}
    for key, source in local_inputs(job).items():
        path = _path(source)
        files = _files(key, path)
        hashes = {name: sha256_file(it, tick=stop.check) for name, it in files.items()}
        digest = next(iter(hashes.values())) if path.is_file() else fingerprint(hashes)
        folder = f"_inputs/{digest}"
        inputs.append(Input(folder, files, hashes))
        section, field = key.split(".")
        place = f"{folder}/{path.name}" if path.is_file() else folder
        changes[section][field] = f"{job.store.rstrip('/')}/{place}"
    model = job.model.model_copy(update=changes["model"])
    data = job.data.model_copy(update=changes["data"])
    return job.model_copy(update={"model": model, "data": data}), inputs


def _require_on_claim(job: JobConfig) -> None:
    """Refuse inputs of this machine where the store is a claim's folder, which only pods see."""
    for key, source in local_inputs(job).items():
        if job.store.startswith(CLAIM) and not source.startswith(CLAIM):
            do = f"use s3:// or hf://, or put it on the claim and name it as {CLAIM}…"
            raise JobError(ExitCode.CONFIG, f"{key}: {source}", "no pod sees this machine", do)


def send(job: JobConfig, inputs: list[Input], *, stop: Stop, say: Callable[[str], None]) -> None:
    """Upload what the store has not in its full size: a name that is the content never changes.

    Raises:
        JobError: 65 if a file has changed since, 74 or 77 if the store refuses.
    """
    if not inputs:
        return
    from job.store import open_store

    store = open_store(job.store, stop=stop, single_writer=job.single_writer)
    for one in inputs:
        there = {entry.key: entry.size for entry in store.list(f"{one.folder}/")}
        for name, file in one.files.items():
            place = f"{one.folder}/{name}"
            if there.get(place) == file.stat().st_size:
                continue
            say(f"uploading {file} ({file.stat().st_size:,} bytes)")
            _, sent = store.upload(place, file)
            if sent != one.hashes[name]:
                store.delete([place])
                do = "submit again once nobody writes to it"
                raise JobError(ExitCode.DATA, str(file), "has changed since it was looked at", do)


def _path(source: str) -> Path:
    from job.pull.package import locate

    return locate(source) if source.startswith("package:") else Path(source)


def _files(key: str, path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files = {name: path / name for name in list_files(path)} if path.is_dir() else {}
    if not files:
        what = "is empty" if path.is_dir() else "is not there"
        raise JobError(ExitCode.NOT_FOUND, f"{key}: {path}", what, "name a file or a folder")
    return files
