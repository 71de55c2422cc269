"""A folder as a store: the same promises by fsync, rename, link and ``lockf``. Local disk or NFSv4."""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self, TypeVar

from job.errors import ExitCode, JobError
from job.files import CHUNK_BYTES, atomic_writer, fsync_folder, safe_relative, write_bytes
from job.retry import DEADLINE_S, TransientError, retry
from job.stop import Stop
from job.store.base import (
    MAX_SMALL_BYTES,
    ConflictError,
    Entry,
    ExistsError,
    Small,
    Tick,
    missing,
    no_tick,
    require_same,
)

T = TypeVar("T")

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# ENOENT: a folder that another process emptied and removed between our mkdir and our write.
PASSING = {errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOLCK}

LOCK_S, LOCK_POLL_S = 5.0, 0.01

# POSIX locks belong to the process: its own threads need a lock of their own besides.
_threads = threading.RLock()


class FolderStore:
    """See :class:`job.store.base.Store`. Names that begin with a dot are the store's own."""

    single_writer = False

    def __init__(self, root: Path, *, stop: Stop) -> None:
        self.root = root
        self.uri = str(root)
        self.stop, self.deadline_s = stop, DEADLINE_S

    def hearing(self, stop: Stop, *, deadline_s: float = DEADLINE_S) -> Self:
        """Return the same store with another stop and deadline."""
        other = copy.copy(self)
        other.stop, other.deadline_s = stop, deadline_s
        return other

    def get(self, key: str) -> Small | None:
        """Return a small object, or None if it is not there."""
        path = self._path(key)

        def read() -> Small | None:
            with self._refusals(key):
                try:
                    with open(path, "rb") as handle:
                        body = handle.read(MAX_SMALL_BYTES + 1)
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    return None
            if len(body) > MAX_SMALL_BYTES:
                raise too_large(f"{self.uri}/{key}")
            return Small(body, hashlib.sha256(body).hexdigest())

        return self._retry(key, read)

    def create(self, key: str, body: bytes) -> str:
        """Write ``body`` if ``key`` is absent: link() fails where a name exists already."""
        # Ours for certain, whoever swaps it the next moment; only a doubt is read back.
        if self._retry(key, lambda: self._link(key, body)):
            return hashlib.sha256(body).hexdigest()
        found = self.get(key)
        if found is None or found.body != body:
            raise ExistsError(key)
        return found.tag

    def _link(self, key: str, body: bytes) -> bool:
        """Return whether the name was made here and now."""
        path = self._path(key)
        with self._refusals(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(descriptor, "wb") as handle:
                    handle.write(body)
                    handle.flush()
                    os.fsync(handle.fileno())
                os.chmod(name, 0o644)
                linked = False
                with contextlib.suppress(FileExistsError):
                    os.link(name, path)
                    linked = True
            finally:
                os.unlink(name)
            fsync_folder(path.parent)
        return linked

    def swap(self, key: str, body: bytes, tag: str) -> str:
        """Replace the object whose tag is ``tag``, under a lock that dies with its process."""

        def locked_swap() -> str:
            with self._refusals(key), self._locked(key):
                found = self.get(key)
                if found is None or found.tag != tag:
                    raise ConflictError(key)
                write_bytes(self._path(key), body)
                return hashlib.sha256(body).hexdigest()

        return self._retry(key, locked_swap)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self._path(key)
        if not path.exists():
            raise ConflictError(key)
        with _threads, open(path.with_name(f".{path.name}.lock"), "ab") as handle:
            self._lock(handle.fileno())
            yield

    def _lock(self, descriptor: int) -> None:
        give_up = time.monotonic() + LOCK_S
        while True:
            try:
                return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as busy:
                if time.monotonic() > give_up:
                    raise TransientError("another process holds its lock") from busy
                self.stop.wait(LOCK_POLL_S)

    def put(self, key: str, body: bytes) -> None:
        """Write a small object without a condition."""

        def write() -> None:
            with self._refusals(key):
                write_bytes(self._path(key), body)

        self._retry(key, write)

    def upload(self, key: str, path: Path, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Copy a file in, and return the size and sha256 of what was written."""
        target, where = self._path(key), f"{self.uri}/{key}"
        return self._retry(key, lambda: self._copy(path, target, where, tick))

    def download(
        self, key: str, path: Path, *, size: int, sha256: str, tick: Tick = no_tick
    ) -> None:
        """Copy a file out, verified."""
        source, promised = self._path(key), (size, sha256)
        if not source.is_file():
            raise missing(self.uri, key)
        self._retry(key, lambda: self._copy(source, path, str(path), tick, promised))

    def _copy(
        self,
        source: Path,
        target: Path,
        where: str,
        tick: Tick,
        promised: tuple[int, str] | None = None,
    ) -> tuple[int, str]:
        with refusals(where), atomic_writer(target) as writer:
            size, digest = 0, hashlib.sha256()
            for chunk in self._chunks(source, tick):
                digest.update(chunk)
                size += writer.write(chunk)
            found = size, digest.hexdigest()
            require_same(str(source), promised or found, found)
        return found

    def sha256(self, key: str, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Read a file back in whole and return its size and sha256."""

        def read() -> tuple[int, str]:
            path, size, digest = self._path(key), 0, hashlib.sha256()
            with self._refusals(key):
                if not path.is_file():
                    raise missing(self.uri, key)
                for chunk in self._chunks(path, tick):
                    digest.update(chunk)
                    size += len(chunk)
            return size, digest.hexdigest()

        return self._retry(key, read)

    def _chunks(self, path: Path, tick: Tick) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with open(path, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                self.stop.check()
                tick(count)
                yield buffer[:count]

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every file below ``prefix`` (which ends where a name ends, or with a slash)."""
        if not self.root.is_dir():
            what, do = "there is no such store", "mend its name, or publish something first"
            raise JobError(ExitCode.NOT_FOUND, self.uri, what, do)
        start = self._path(prefix.rstrip("/")) if prefix.rstrip("/") else self.root
        for parent, folders, names in os.walk(start):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    if not name.startswith("."):
                        state = path.stat()
                        key = path.relative_to(self.root).as_posix()
                        yield Entry(key, state.st_size, state.st_mtime)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files, and the folders that are empty then."""
        for key in keys:
            path = self._path(key)
            with self._refusals(key):
                path.unlink(missing_ok=True)
                path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
                _remove_empty(path.parent, self.root)

    def sweep(self, prefix: str, *, older_than_s: float = 0.0) -> None:
        """Delete the temporary files that killed writers left below ``prefix``."""
        start = self._path(prefix.rstrip("/")) if prefix.rstrip("/") else self.root
        for path in start.rglob(".*"):
            left = path.is_file() and path.suffix != ".lock"
            with contextlib.suppress(FileNotFoundError), self._refusals(prefix):
                if left and path.stat().st_mtime < time.time() - older_than_s:
                    path.unlink()

    def _path(self, key: str) -> Path:
        return self.root / safe_relative(key, where=self.uri)

    def _retry(self, key: str, call: Callable[[], T]) -> T:
        return retry(f"{self.uri}/{key}", call, stop=self.stop, deadline_s=self.deadline_s)

    def _refusals(self, key: str) -> contextlib.AbstractContextManager[None]:
        return refusals(f"{self.uri}/{key}")


@contextlib.contextmanager
def refusals(where: str) -> Iterator[None]:
    """Turn the file system's refusals within the block into what they mean to a person."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            do = "free some space there, or prune old versions"
            raise JobError(ExitCode.OUT_OF_RESOURCES, where, "the disk is full", do) from error
        if error.errno in FORBIDDEN:
            what = f"may not be read or written ({error.strerror})"
            do = "grant it to this user, or use another folder"
            raise JobError(ExitCode.NOT_ALLOWED, where, what, do) from error
        if error.errno in PASSING:
            raise TransientError(str(error.strerror)) from error
        raise


def too_large(where: str) -> JobError:
    """Return the error of a head or manifest that nobody of us wrote."""
    what = f"is larger than {MAX_SMALL_BYTES >> 20} MiB, which no manifest is"
    return JobError(ExitCode.NOT_PROVEN, where, what, "do not use it; see who wrote it")


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
