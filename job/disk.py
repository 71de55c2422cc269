"""A pod's share of its node's disk: who passes it is evicted, with a second to end in.

The kubelet measures about once a minute, and nobody would try the run again with more. So a run
looks for itself, saves, and ends with 71 and the figures.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from job.errors import ExitCode, JobError
from job.stop import Stop

LIMIT = "LORA_JOB_DISK_LIMIT"
"""The container's limit of ephemeral-storage in bytes (by the downward API); none elsewhere."""
PERIOD_S = 5.0
BLOCK_BYTES = 512
"""Of st_blocks, whatever the file system's own are (stat(2))."""


@contextlib.contextmanager
def within_share(work: Path, stop: Stop) -> Iterator[None]:
    """Ask for the end with 71 as soon as the block's files are more than the pod may have."""
    limit = os.environ.get(LIMIT)
    if not limit:
        yield
        return
    folders, over = (work, Path.home(), Path(tempfile.gettempdir())), threading.Event()

    def look() -> None:
        used = used_bytes(folders)
        if used > int(limit):
            what = f"{used / 1e6:,.1f} MB are written, and the pod may have {int(limit) / 1e6:,.1f}"
            do = "raise ephemeral_storage in the cluster file (`lora-job check` estimates it)"
            stop.request(JobError(ExitCode.OUT_OF_RESOURCES, "disk", what, do))

    def watch() -> None:
        while not over.wait(PERIOD_S):
            look()

    thread = threading.Thread(target=watch, name="disk", daemon=True)
    thread.start()
    try:
        yield
    except JobError as error:
        if error.code is ExitCode.PREEMPTED:
            # The kubelet may have looked first: its SIGTERM is like any other.
            look()
            stop.check()
        raise
    finally:
        over.set()
        thread.join()


def used_bytes(folders: Iterable[Path]) -> int:
    """Return the bytes that what is below ``folders`` takes on the disk, each file once."""
    taken: dict[tuple[int, int], int] = {}
    for folder in folders:
        for parent, folders_in, names in os.walk(folder):
            for name in (*names, *folders_in):
                with contextlib.suppress(OSError):  # gone since, or not ours to see
                    found = os.lstat(os.path.join(parent, name))
                    taken[found.st_dev, found.st_ino] = found.st_blocks * BLOCK_BYTES
    return sum(taken.values())
