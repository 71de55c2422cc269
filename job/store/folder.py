"""A folder as a store: the same promises by fsync, rename, link and ``lockf``. Local disk or NFSv4."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from job.errors import ExitCode, JobError
from job.files import CHUNK_BYTES, atomic_writer, fsync_folder, refusals, safe_relative, write_bytes
from job.retry import TransientError
from job.stop import Stop
from job.store.base import MAX_SMALL_BYTES, Entry, Small, Store, Tick, missing, no_tick, too_large

LOCK_S, LOCK_POLL_S = 5.0, 0.01

# POSIX locks belong to the process: its own threads need a lock of their own besides.
_threads = threading.RLock()


class FolderStore(Store):
    """A tag is the body's sha256. Names that begin with a dot are the store's own."""

    def __init__(self, root: Path, *, stop: Stop) -> None:
        super().__init__(str(root), stop=stop)
        self.root = root

    def get(self, key: str) -> Small | None:
        """Return a small object, or None if it is not there."""
        path = self._path(key)

        def read() -> Small | None:
            try:
                with open(path, "rb") as handle:
                    body = handle.read(MAX_SMALL_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
            if len(body) > MAX_SMALL_BYTES:
                raise too_large(f"{self.uri}/{key}")
            return Small(body, hashlib.sha256(body).hexdigest())

        return self.ask(key, read)

    def put(self, key: str, body: bytes) -> str:
        """Write a small object without a condition, and return its tag."""
        self.ask(key, lambda: write_bytes(self._path(key), body))
        return hashlib.sha256(body).hexdigest()

    def _create(self, key: str, body: bytes) -> str | None:
        linked = self.ask(key, lambda: _link(self._path(key), body))
        return hashlib.sha256(body).hexdigest() if linked else None

    def _swap(self, key: str, body: bytes, tag: str) -> str | None:
        path = self._path(key)

        def locked_swap() -> bool:
            if not path.exists():
                return False
            with _threads, open(path.with_name(f".{path.name}.lock"), "ab") as lock:
                self._lock(lock.fileno())
                found = self.get(key)
                if found is None or found.tag != tag:
                    return False
                write_bytes(path, body)
                return True

        return hashlib.sha256(body).hexdigest() if self.ask(key, locked_swap) else None

    def _lock(self, descriptor: int) -> None:
        """Take a lock that dies with its process."""
        give_up = time.monotonic() + LOCK_S
        while True:
            try:
                return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as busy:
                if time.monotonic() > give_up:
                    raise TransientError("another process holds its lock") from busy
                self.stop.wait(LOCK_POLL_S)

    def upload(self, key: str, path: Path, *, tick: Tick = no_tick) -> tuple[int, str]:
        """Copy a file in, and return the size and sha256 of what was written."""
        return self.ask(key, lambda: self._copy(path, self._path(key), tick))

    def _copy(self, source: Path, target: Path, tick: Tick) -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with atomic_writer(target) as writer, open(source, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                self.stop.check()
                digest.update(buffer[:count])
                size += writer.write(buffer[:count])
                tick(count)
        return size, digest.hexdigest()

    def _state(self, key: str) -> tuple[int, str]:
        path = self._path(key)
        if not path.is_file():
            raise missing(self.uri, key)
        return path.stat().st_size, ""

    def _range(self, key: str, tag: str, offset: int, size: int) -> bytes:  # noqa: ARG002 - S3's
        try:
            with open(self._path(key), "rb", buffering=0) as handle:
                return os.pread(handle.fileno(), size, offset)
        except FileNotFoundError:
            raise missing(self.uri, key) from None

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every file below ``prefix`` (which ends where a name ends, or with a slash)."""
        if not self.root.is_dir():
            what, do = "there is no such store", "mend its name, or publish something first"
            raise JobError(ExitCode.NOT_FOUND, self.uri, what, do)
        for parent, folders, names in os.walk(self._below(prefix)):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    key = path.relative_to(self.root).as_posix()
                    yield Entry(key, state.st_size, state.st_mtime)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files, and the folders that are empty then."""
        for key in keys:
            path = self._path(key)
            with self._explained(f"{self.uri}/{key}"):
                path.unlink(missing_ok=True)
                path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
                _remove_empty(path.parent, self.root)

    def sweep(self, prefix: str, *, older_than_s: float = 0.0) -> None:
        """Delete the temporary files that killed writers left below ``prefix``."""
        for path in self._below(prefix).rglob(".*"):
            left = path.is_file() and path.suffix != ".lock"
            with contextlib.suppress(FileNotFoundError), self._explained(str(path)):
                if left and path.stat().st_mtime < time.time() - older_than_s:
                    path.unlink()

    def _explained(self, where: str) -> AbstractContextManager[None]:
        return refusals(where)

    def _path(self, key: str) -> Path:
        return self.root / safe_relative(key, where=self.uri)

    def _below(self, prefix: str) -> Path:
        return self._path(prefix.rstrip("/")) if prefix.rstrip("/") else self.root


def _link(path: Path, body: bytes) -> bool:
    """Make ``path`` by link(), which fails where the name exists already; return whether it did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(body)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.link(name, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(name)
    fsync_folder(path.parent)
    return True


def _remove_empty(folder: Path, root: Path) -> None:
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
