"""Versions and channels: what is published, immutable, and which pointer names which of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog

from job.config import NAME_PATTERN
from job.errors import ExitCode, JobError
from job.files import to_json
from job.stop import Stop
from job.store.base import ConflictError, ExistsError, Store
from job.store.manifest import (
    MANIFEST,
    Listing,
    delete_folders,
    parse_listing,
    send,
    verify_files,
    visible_files,
)

if TYPE_CHECKING:
    from job.store.runs import Attempt

log = structlog.get_logger()

VERSION_PATTERN = re.compile(r"^(\d{8}T\d{6}Z)-e(\d+)-[0-9a-f]{8}$")
MOVES_KEPT = 100
UNFINISHED_S = 24 * 3600.0
"""A version without a manifest may still be on its way for so long."""


class Manifest(Listing):
    """A version's manifest: its files, and where it comes from."""

    name: str
    version: str
    run: str
    epoch: int
    lineage: dict[str, Any]
    """Base, data, config, image, seed: what made this version."""

    @property
    def sha256(self) -> str:
        """Hex sha256 of manifest.json."""
        return hashlib.sha256(self.body()).hexdigest()

    def body(self) -> bytes:
        """Return manifest.json as it is written."""
        return to_json(self.model_dump(mode="json"))


def version_name(started: float, epoch: int, adapter_sha256: str) -> str:
    """Return ``<UTC of the run's start>-e<epoch>-<8 hex of the adapter's sha256>``."""
    when = datetime.fromtimestamp(started, UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{when}-e{epoch}-{adapter_sha256[:8]}"


def version_folder(name: str, version: str) -> str:
    """Return the store's folder of a version."""
    return f"{name}/versions/{version}"


def write_version(
    attempt: Attempt,
    name: str,
    version: str,
    folders: dict[str, Path],
    lineage: dict[str, Any],
    *,
    stop: Stop,
) -> Manifest:
    """Write ``folders`` (``adapter``, ``merged``), read all back, then create the manifest.

    Called again with the same version it goes on where it stopped. Hidden files are left out.

    Raises:
        JobError: 70 if the store returns other bytes, or holds another version of this name.
    """
    place = version_folder(name, version)
    store = attempt.store.hearing(stop)
    paths = {
        key: path
        for part, folder in sorted(folders.items())
        for key, path in visible_files(folder, f"{part}/").items()
    }
    files = send(store, place, paths, stop=stop, read_back=True)
    made_by = {"run": attempt.run_id, "epoch": attempt.epoch, "lineage": lineage}
    manifest = Manifest.model_validate(
        {"files": files, "name": name, "version": version, **made_by}
    )
    try:
        store.create(f"{place}/{MANIFEST}", manifest.body())
    except ExistsError:
        present = read_manifest(store, name, version)
        if present.files != files:
            where, what = f"{store.uri}/{place}", "is there already, with other files"
            raise JobError(ExitCode.NOT_PROVEN, where, what, "start again") from None
        return present
    return manifest


def read_manifest(store: Store, name: str, version: str) -> Manifest:
    """Return a version's manifest.

    Raises:
        JobError: 66 if there is none, 70 if it is not to be trusted.
    """
    key = f"{version_folder(name, version)}/{MANIFEST}"
    found = store.get(key)
    if found is None:
        what = f"{name} has no version {version}"
        do = f"see `lora-job versions {store.uri}/{name}`"
        raise JobError(ExitCode.NOT_FOUND, f"{store.uri}/{name}", what, do)
    return parse_listing(found.body, Manifest, where=f"{store.uri}/{key}")


def verify(store: Store, name: str, version: str, *, stop: Stop) -> Manifest:
    """Read a version back in whole, and return its manifest.

    Raises:
        JobError: 66 or 70 if a file is missing, or is not what the manifest promises.
    """
    manifest = read_manifest(store, name, version)
    verify_files(store, version_folder(name, version), manifest.files, stop=stop)
    return manifest


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Return store, name and channel or version of ``STORE/NAME[@channel|@version]``."""
    root, _, last = spec.rstrip("/").rpartition("/")
    name, _, reference = last.partition("@")
    if not root or root.endswith(":/") or not re.match(NAME_PATTERN, name):
        do = "write STORE/NAME, STORE/NAME@channel or STORE/NAME@version"
        raise JobError(ExitCode.USAGE, spec, "names no version of a store", do)
    return root, name, reference or None


def resolve(store: Store, name: str, reference: str | None) -> str:
    """Return the version that a channel, a version, or None (the newest) means.

    Raises:
        JobError: 66 if there is no such channel or version.
    """
    if reference and VERSION_PATTERN.match(reference):
        return reference
    if reference and re.match(NAME_PATTERN, reference):
        pointer = _read_pointer(store, name, reference)
        if pointer is not None:
            return str(pointer["version"])
    elif not reference:
        present, _ = _listed(store, name)
        if present:
            return present[-1]
    what = f"has no channel or version {reference}" if reference else "has no version"
    do = f"see `lora-job versions {store.uri}/{name}`"
    raise JobError(ExitCode.NOT_FOUND, f"{store.uri}/{name}", what, do)


def list_versions(store: Store, name: str) -> list[dict[str, Any]]:
    """Return what is published under a name, oldest first, with the channels that point to it."""
    pointers = channels(store, name)
    rows = []
    for version in _listed(store, name)[0]:
        manifest = read_manifest(store, name, version)
        row = {"version": version, "size_bytes": manifest.size_bytes, "run": manifest.run}
        pointing = sorted(c for c, p in pointers.items() if p["version"] == version)
        parts = sorted({key.split("/")[0] for key in manifest.files})
        uri = f"{store.uri}/{version_folder(name, version)}"
        rows.append(row | {"uri": uri, "parts": parts, "channels": pointing})
    return rows


def channels(store: Store, name: str) -> dict[str, dict[str, Any]]:
    """Return each channel's pointer: seq, version, order, moves."""
    keys = [entry.key for entry in store.list(f"{name}/channels/")]
    names = [Path(key).stem for key in keys if key.endswith(".json")]
    found = {channel: _read_pointer(store, name, channel) for channel in names}
    return {channel: pointer for channel, pointer in found.items() if pointer}


def move_channel(
    store: Store, name: str, channel: str, version: str, order: tuple[int, int]
) -> Literal["moved", "superseded"]:
    """Let ``channel`` point to ``version``, unless it points to one of a later ``order``.

    An order is (scheduled minutes, epoch). At a tie the later version name wins, so that all
    writers agree, whichever comes last.
    """
    read_manifest(store, name, version)
    key = f"{name}/channels/{channel}.json"
    while True:
        found = store.get(key)
        present: dict[str, Any] = json.loads(found.body) if found else {"seq": 0, "moves": []}
        if found and present["version"] == version:
            return "moved"
        if found and (present["order"], present["version"]) > (list(order), version):
            return "superseded"
        move = {"version": version, "order": list(order)}
        moves = [*present["moves"], {**move, "at": round(time.time())}][-MOVES_KEPT:]
        body = to_json({**move, "seq": present["seq"] + 1, "moves": moves})
        try:
            store.swap(key, body, found.tag) if found else store.create(key, body)
        except (ConflictError, ExistsError):
            log.info("channel_raced", channel=channel, reason="it moved meanwhile; looking again")
        else:
            return "moved"


def prune(store: Store, name: str, keep: int) -> list[str]:
    """Delete all but the newest ``keep`` versions and those that a channel names.

    What an upload left unfinished goes too, once it is a day old.
    """
    if keep < 1:
        raise JobError(ExitCode.USAGE, "--prune", "would leave nothing", "keep at least 1")
    below = f"{name}/versions"
    finished, unfinished = _listed(store, name)
    named = {pointer["version"] for pointer in channels(store, name).values()}
    doomed = [version for version in finished[:-keep] if version not in named]
    long_ago = time.time() - UNFINISHED_S
    doomed += sorted(version for version, when in unfinished.items() if when < long_ago)
    delete_folders(store, below, iter(doomed))
    store.sweep(f"{below}/", older_than_s=UNFINISHED_S)
    return doomed


def _listed(store: Store, name: str) -> tuple[list[str], dict[str, float]]:
    """Return the versions that have a manifest, oldest first, and the others' times of change."""
    finished: dict[str, tuple[str, int, str]] = {}
    changed: dict[str, float] = {}
    for entry in store.list(f"{name}/versions/"):
        version, _, file = entry.key.removeprefix(f"{name}/versions/").partition("/")
        changed[version] = max(entry.modified_s, changed.get(version, 0.0))
        match = VERSION_PATTERN.match(version)
        if match and file == MANIFEST:
            finished[version] = match[1], int(match[2]), version
    unfinished = {v: when for v, when in changed.items() if v not in finished}
    return sorted(finished, key=lambda version: finished[version]), unfinished


def _read_pointer(store: Store, name: str, channel: str) -> dict[str, Any] | None:
    key = f"{name}/channels/{channel}.json"
    found = store.get(key)
    if found is None:
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        pointer: dict[str, Any] = json.loads(found.body)
        if VERSION_PATTERN.match(pointer["version"]):
            return pointer
    what, do = "is no channel", "see who wrote it; publish again to move it"
    raise JobError(ExitCode.NOT_PROVEN, f"{store.uri}/{key}", what, do)
