"""Checkpoints in the store: ``checkpoints/<step>-e<epoch>/``, files first, then their manifest."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from job.errors import ExitCode, JobError
from job.files import to_json
from job.stop import Stop
from job.store.base import Store
from job.store.manifest import (
    MANIFEST,
    Listing,
    delete_folders,
    parse_listing,
    receive,
    send,
    visible_files,
)


class Named(TypedDict):
    """How a head names a checkpoint."""

    step: int
    epoch: int


def place_of(root: str, named: Named) -> str:
    """Return the folder of a checkpoint of the run in ``root``."""
    return f"{root}/checkpoints/{named['step']}-e{named['epoch']}"


def write(store: Store, root: str, named: Named, folder: Path, *, stop: Stop) -> None:
    """Write a folder as a checkpoint that nothing names yet. Its reader verifies it."""
    place = place_of(root, named)
    files = send(store, place, visible_files(folder), stop=stop, read_back=False)
    store.put(f"{place}/{MANIFEST}", to_json(Listing(files=files).model_dump()))


def read(store: Store, root: str, named: Named, into: Path, *, stop: Stop) -> None:
    """Fetch a checkpoint into the folder ``into``, which changes only when all is verified.

    Raises:
        JobError: 66 or 70 if it is not whole.
    """
    place = place_of(root, named)
    where = f"{store.uri}/{place}/{MANIFEST}"
    found = store.get(f"{place}/{MANIFEST}")
    if found is None:
        raise JobError(ExitCode.NOT_FOUND, where, "is not there", "go on from the one before")
    listing = parse_listing(found.body, Listing, where=where)
    partial = into.with_name(f"{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    receive(store, place, listing.files, partial, stop=stop)
    shutil.rmtree(into, ignore_errors=True)
    os.replace(partial, into)


def forget(store: Store, root: str, kept: Sequence[Named | None], *, epoch: int) -> None:
    """Delete all but ``kept``, and nothing that an attempt newer than ``epoch`` may have written."""
    below = f"{root}/checkpoints"
    names = {place_of(root, named).split("/")[-1] for named in kept if named}
    found = {entry.key.removeprefix(f"{below}/").split("/")[0] for entry in store.list(f"{below}/")}
    doomed = (
        name
        for name in sorted(found - names)
        if (match := re.fullmatch(r"\d+-e(\d+)", name)) and int(match[1]) <= epoch
    )
    delete_folders(store, below, doomed)
