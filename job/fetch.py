"""A version from the store into a folder: resumed by file, verified, renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import structlog

from job.errors import ExitCode, JobError
from job.files import fsync_folder, list_files, refusals, require_space, write_bytes
from job.stop import Stop
from job.store import open_store
from job.store.manifest import MANIFEST, receive
from job.store.versions import Manifest, parse_spec, read_manifest, resolve, version_folder

log = structlog.get_logger()


def fetch(spec: str, folder: Path, *, stop: Stop) -> dict[str, Any]:
    """Fetch ``STORE/NAME[@channel|@version]`` into ``folder``.

    ``folder`` changes at once, when every byte is verified: it holds ``adapter/``, ``merged/`` and
    ``manifest.json``, or what it held before. A folder that an earlier fetch made is replaced; an
    interrupted fetch goes on from ``<folder>.partial``.

    Raises:
        JobError: 66 if there is no such version, 70 if its bytes or names are not to be trusted,
            71 if it does not fit, 64 if ``folder`` holds something else.
    """
    root, name, reference = parse_spec(spec)
    store = open_store(root, stop=stop)
    version = resolve(store, name, reference)
    manifest = read_manifest(store, name, version)
    _require_replaceable(folder)
    partial = folder if _holds(folder, manifest) else folder.with_name(f"{folder.name}.partial")
    with refusals(str(partial)):
        partial.mkdir(parents=True, exist_ok=True)
        _drop_strangers(partial, manifest)
        there = sum((partial / name).stat().st_size for name in list_files(partial))
        require_space(partial, manifest.size_bytes - there)
        place = version_folder(name, version)
        kept = receive(store, place, manifest.files, partial, stop=stop)
        _require_plain_adapter(partial)
        write_bytes(partial / MANIFEST, manifest.body())
        if partial != folder:
            _replace(folder, partial)
    log.info("fetched", version=version, files=len(manifest.files), already_there=kept)
    return {
        "name": name,
        "version": version,
        "uri": f"{store.uri}/{place}",
        "folder": str(folder),
        "files": len(manifest.files),
        "already_there": kept,
        "size_bytes": manifest.size_bytes,
    }


def _require_replaceable(folder: Path) -> None:
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST).is_file()):
        return
    if folder.exists():
        what = "holds something that no fetch put there"
        raise JobError(ExitCode.USAGE, str(folder), what, "name a new folder, or empty this one")


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Whether an earlier fetch left this very version: it is verified, and mended, in place."""
    path = folder / MANIFEST
    return path.is_file() and path.read_bytes() == manifest.body()


def _drop_strangers(partial: Path, manifest: Manifest) -> None:
    """Delete what another version's interrupted fetch left; never follow a link out of here."""
    for name in list_files(partial):
        if name not in manifest.files and name != MANIFEST:
            (partial / name).unlink()
    for path in [partial, *partial.rglob("*")]:
        if path.is_symlink():
            path.unlink()


def _require_plain_adapter(partial: Path) -> None:
    """Refuse an adapter_config.json that makes PEFT import a library of its choice."""
    path = partial / "adapter" / "adapter_config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings.get("auto_mapping"):
        what = "is no adapter's config, or names code to import (auto_mapping)"
        do = "do not use it; publish again from a source that you trust"
        raise JobError(ExitCode.NOT_PROVEN, str(path), what, do)


def _replace(folder: Path, partial: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
