"""Where runs and versions live: a folder or S3, behind one protocol."""

from __future__ import annotations

from pathlib import Path

from job.errors import ExitCode, JobError
from job.stop import Stop
from job.store.base import Store
from job.store.folder import FolderStore


def open_store(uri: str, *, stop: Stop, single_writer: bool = False) -> Store:
    """Return the store at ``s3://bucket/prefix`` or in a folder. Nothing is asked of it yet.

    Raises:
        JobError: 78 if ``uri`` is of another kind.
    """
    if uri.startswith("s3://") and uri.removeprefix("s3://").split("/")[0]:
        from job.store.s3 import S3Store

        return S3Store(uri, stop=stop, single_writer=single_writer)
    if "://" in uri or not uri:
        what = "is neither s3://bucket/prefix nor a folder"
        raise JobError(ExitCode.CONFIG, uri or "store", what, "mend the store's name")
    return FolderStore(Path(uri), stop=stop)
