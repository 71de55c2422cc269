"""Files that are whole or not there: write aside, fsync, rename. Their hashes, names, refusals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from job.errors import ExitCode, JobError
from job.retry import TransientError

CHUNK_BYTES = 4 << 20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
"""Ends of names that hold pickles: reading one runs whatever code is inside."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
MISPLACED = {errno.ENOTDIR, errno.EISDIR}
# ENOENT: a folder that another process emptied and removed between our mkdir and our write.
PASSING = {errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOLCK}


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` that becomes ``path``, durably, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes 0600, which another user's pod could not read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fsync_folder(path.parent)


def write_bytes(path: Path, body: bytes) -> None:
    """Replace ``path`` by ``body``, durably and at once."""
    with atomic_writer(path) as handle:
        handle.write(body)


def to_json(value: Any) -> bytes:
    """Return ``value`` as stable, readable JSON: sorted keys, two spaces, a newline at the end."""
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    return text.encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, durably and at once."""
    write_bytes(path, to_json(value))


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: a rename is not until its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file below ``folder``, and every name, durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_folder(Path(parent, name))
        fsync_folder(Path(parent))


def sha256_file(path: Path, *, tick: Callable[[], None] = lambda: None) -> str:
    """Return the hex sha256 of a file; ``tick`` is called every 4 MiB (to stop, or to count)."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            tick()
            digest.update(buffer[:size])
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of JSON-able ``parts``, so that equal meaning has an equal fingerprint."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def safe_relative(name: str, *, where: str) -> PurePosixPath:
    """Return ``name`` as a path that can only lie inside the folder it is joined to.

    Raises:
        JobError: 70, for an absolute, upward, empty, unnormalised or otherwise foreign name.
    """
    path = PurePosixPath(name)
    odd = any(character in name for character in "\\\0\n\r") or str(path) != name
    if odd or path.is_absolute() or not path.parts or ".." in path.parts or name == ".":
        do = "do not use it; publish again from a source that you trust"
        raise JobError(ExitCode.NOT_PROVEN, where, f"names a file outside its folder: {name!r}", do)
    return path


def list_files(folder: Path) -> list[str]:
    """Return the relative POSIX names of all files below ``folder``, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise 71 if there is less room for new files in ``folder`` than they need."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        what = f"{needed_bytes / 1e6:,.1f} MB more are needed, {free / 1e6:,.1f} MB are free"
        do = "free some space there, or use another folder"
        raise JobError(ExitCode.OUT_OF_RESOURCES, str(folder), what, do)


def explained(error: OSError, where: str | None = None) -> JobError | None:
    """Return what the file system's refusal means to a person, or None if it is no refusal."""
    where = where or str(error.filename or "a file")
    if error.errno in FULL:
        do = "free some space there, or use another folder"
        return JobError(ExitCode.OUT_OF_RESOURCES, where, "the disk is full", do)
    if error.errno in MISPLACED:
        what = "has a file where a folder should be"
        return JobError(ExitCode.NOT_FOUND, where, what, "name another path")
    if error.errno in FORBIDDEN:
        what, do = "may not be read or written", "grant it to this user, or use another folder"
        return JobError(ExitCode.NOT_ALLOWED, where, what, do)
    return None


@contextlib.contextmanager
def refusals(where: str) -> Iterator[None]:
    """Explain the file system's refusals within the block; what may pass is a TransientError."""
    try:
        yield
    except OSError as error:
        if refusal := explained(error, where):
            raise refusal from error
        if error.errno in PASSING:
            raise TransientError(str(error.strerror)) from error
        raise
