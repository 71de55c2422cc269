"""What a job file names of this machine goes to the store first: a pod cannot see its disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.files import fingerprint, list_files, sha256_file
from job.stop import Stop
from job.store.base import Store


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


def upload(job: JobConfig, *, stop: Stop, say: Callable[[str], None]) -> JobConfig:
    """Return the job with its local inputs replaced by ``<store>/_inputs/<sha256>``, uploaded.

    Raises:
        JobError: 66 if an input is not there, 74 or 77 if the store refuses.
    """
    local = local_inputs(job)
    if not local or not job.store.startswith("s3://"):
        return job
    from job.store import open_store

    store = open_store(job.store, stop=stop, single_writer=job.single_writer)
    uris = {key: _upload(store, key, _path(path), stop, say) for key, path in local.items()}
    root = job.store.rstrip("/")
    changes: dict[str, dict[str, str]] = {"model": {}, "data": {}}
    for key, place in uris.items():
        section, field = key.split(".")
        changes[section][field] = f"{root}/{place}"
    model = job.model.model_copy(update=changes["model"])
    data = job.data.model_copy(update=changes["data"])
    return job.model_copy(update={"model": model, "data": data})


def _path(source: str) -> Path:
    from job.pull.package import locate

    return locate(source) if source.startswith("package:") else Path(source)


def _upload(store: Store, key: str, path: Path, stop: Stop, say: Callable[[str], None]) -> str:
    files = _files(key, path)
    hashes = {name: sha256_file(it, tick=stop.check) for name, it in files.items()}
    digest = next(iter(hashes.values())) if path.is_file() else fingerprint(hashes)
    folder = f"_inputs/{digest}"
    there = {entry.key: entry.size for entry in store.list(f"{folder}/")}
    for name, file in files.items():
        place = f"{folder}/{name}"
        # The name is the content: what is there in its full size is there.
        if there.get(place) != file.stat().st_size:
            say(f"uploading {file} ({file.stat().st_size:,} bytes)")
            store.upload(place, file)
    return f"{folder}/{path.name}" if path.is_file() else folder


def _files(key: str, path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files = {name: path / name for name in list_files(path)} if path.is_dir() else {}
    if not files:
        what = "is empty" if path.is_dir() else "is not there"
        raise JobError(ExitCode.NOT_FOUND, f"{key}: {path}", what, "name a file or a folder")
    return files
