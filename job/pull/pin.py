"""What a source is exactly: resolved once per run, written to inputs.json, pulled ever after."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from job.errors import ExitCode, JobError
from job.files import fingerprint, sha256_file, write_json
from job.stop import Stop

SourceKind = Literal["model", "data"]


class PinnedFile(BaseModel):
    """One file of a source, and every digest of it that the source itself gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    """Git's blob id: how the Hub names a file that is not in LFS."""
    md5: str | None = None
    etag: str | None = None
    version_id: str | None = None
    """S3 only: the object's version, where the bucket keeps them."""


class Pin(BaseModel):
    """A source, resolved: the same bytes for every attempt of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    revision: str | None = None
    license: str | None = None
    files: dict[str, PinnedFile]

    @property
    def size_bytes(self) -> int:
        """How much there is to pull."""
        return sum(file.size for file in self.files.values())

    @property
    def fingerprint(self) -> str:
        """A name for exactly these bytes."""
        return fingerprint(self.model_dump(mode="json"))

    def only(self, wanted: Callable[[str], bool]) -> Pin:
        """Return the pin of those files whose names are ``wanted``."""
        files = {name: file for name, file in self.files.items() if wanted(name)}
        return self.model_copy(update={"files": files})


class Hashes:
    """sha256 of files that lie still, remembered by size and time of change.

    A folder of base weights that is used in place is hashed once, not by every attempt.
    """

    def __init__(self, path: Path, stop: Stop) -> None:
        self._path, self.stop = path, stop
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(path.read_bytes())

    def sha256(self, path: Path) -> str:
        """Return the file's sha256, read again only if the file has changed."""
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        if key not in self._known:
            self._known[key] = sha256_file(path, tick=self.stop.check)
            write_json(self._path, self._known)
        return self._known[key]


def not_found(where: str, what: str, do: str) -> JobError:
    """Return the error of a source that is not there."""
    return JobError(ExitCode.NOT_FOUND, where, what, do)


def not_proven(where: str, what: str, do: str) -> JobError:
    """Return the error of bytes that are not what was promised."""
    return JobError(ExitCode.NOT_PROVEN, where, what, do)
