"""Folders in the store: files first, verified, then the manifest that makes them count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.errors import ExitCode, JobError
from job.files import PICKLES, list_files, safe_relative, sha256_file
from job.stop import Stop
from job.store.base import Store, require_same
from job.store.transfer import Meter, each

MANIFEST = "manifest.json"


class Content(BaseModel):
    """What a file must be."""

    model_config = ConfigDict(frozen=True)

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Listing(BaseModel):
    """A manifest: every file of a folder in the store, and what it must be."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, Content]
    """Relative name → size and sha256."""

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(content.size for content in self.files.values())


L = TypeVar("L", bound=Listing)


def parse_listing(body: bytes, kind: type[L], *, where: str) -> L:
    """Return a manifest whose names can be trusted to lie inside one folder.

    Raises:
        JobError: 70 if it is no manifest, or names something unsafe or pickled.
    """
    try:
        listing = kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors()[0]
        what = f"is no manifest ({'.'.join(map(str, fault['loc']))}: {fault['msg']})"
        do = "do not use it; publish again"
        raise JobError(ExitCode.NOT_PROVEN, where, what, do) from None
    require_safe(listing.files, where=where)
    return listing


def require_safe(names: dict[str, Content] | dict[str, Path], *, where: str) -> None:
    """Refuse names that leave the folder, collide on some disk, or hold pickles (70)."""
    seen: set[str] = set()
    for name in names:
        path = safe_relative(name, where=where)
        if name.lower().endswith(PICKLES):
            do = "use safetensors and JSON; unpickling runs whatever code is inside"
            raise JobError(ExitCode.NOT_PROVEN, where, f"holds a pickle: {name!r}", do)
        if any(part.startswith(".") for part in path.parts):
            do = "publish it without"
            raise JobError(ExitCode.NOT_PROVEN, where, f"holds a hidden file: {name!r}", do)
        seen.add(name.lower())
    parents = {str(up).lower() for name in names for up in PurePosixPath(name).parents}
    if len(seen) != len(names) or seen & parents:
        what = "has names that are one and the same on some disks"
        raise JobError(ExitCode.NOT_PROVEN, where, what, "rename them and publish again")


def visible_files(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return name → path of a folder's files, without hidden ones (marks, temporary files)."""
    names = [name for name in list_files(folder) if not name.startswith(".") and "/." not in name]
    return {f"{prefix}{name}": folder / name for name in names}


def send(
    store: Store, prefix: str, paths: dict[str, Path], *, stop: Stop, read_back: bool
) -> dict[str, Content]:
    """Write files below ``prefix``, several at once, and return what was sent.

    With ``read_back``, what is there already (of an interrupted call) is kept if its bytes are
    right, and every file is read back and compared. Without, the reader must verify.

    Raises:
        JobError: 70 if the store returns other bytes than it was given.
    """
    require_safe(paths, where=f"{store.uri}/{prefix}")
    there = {entry.key: entry.size for entry in store.list(f"{prefix}/")} if read_back else {}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    passes = 2 if read_back else 1
    meter = Meter(f"to {store.uri}/{prefix}", sum(sizes.values()) * passes)

    def send_one(item: tuple[str, Path], inner: Stop) -> tuple[str, Content]:
        name, path = item
        near, key = store.hearing(inner), f"{prefix}/{name}"
        if there.get(key) == sizes[name]:
            local = sizes[name], sha256_file(path, tick=inner.check)
            if near.sha256(key) == local:
                return name, Content(size=local[0], sha256=local[1])
        sent = near.upload(key, path, tick=meter.tick)
        if read_back:
            require_same(f"{store.uri}/{key}", sent, near.sha256(key, tick=meter.tick))
        return name, Content(size=sent[0], sha256=sent[1])

    largest_first = sorted(paths.items(), key=lambda item: -sizes[item[0]])
    return dict(sorted(each(send_one, largest_first, stop=stop)))


def receive(store: Store, prefix: str, files: dict[str, Content], into: Path, *, stop: Stop) -> int:
    """Fetch and verify ``files`` into a folder; those there already and right are kept.

    Returns:
        How many were kept.
    """
    meter = Meter(f"from {store.uri}/{prefix}", sum(c.size for c in files.values()))

    def receive_one(item: tuple[str, Content], inner: Stop) -> bool:
        name, content = item
        path = into / name
        same_size = path.is_file() and path.stat().st_size == content.size
        if same_size and sha256_file(path, tick=inner.check) == content.sha256:
            return True
        near, key = store.hearing(inner), f"{prefix}/{name}"
        near.download(key, path, size=content.size, sha256=content.sha256, tick=meter.tick)
        return False

    largest_first = sorted(files.items(), key=lambda item: -item[1].size)
    return sum(each(receive_one, largest_first, stop=stop))


def verify_files(store: Store, prefix: str, files: dict[str, Content], *, stop: Stop) -> None:
    """Read files back in whole, and raise 70 or 66 if one is not what its manifest promises."""
    meter = Meter(f"verifying {store.uri}/{prefix}", sum(c.size for c in files.values()))

    def verify_one(item: tuple[str, Content], inner: Stop) -> None:
        name, content = item
        found = store.hearing(inner).sha256(f"{prefix}/{name}", tick=meter.tick)
        require_same(f"{store.uri}/{prefix}/{name}", (content.size, content.sha256), found)

    each(verify_one, list(files.items()), stop=stop)


def delete_folders(store: Store, below: str, doomed: Iterator[str]) -> None:
    """Delete folders below ``below``, each one's manifest first, so that no reader begins."""
    for name in doomed:
        keys = sorted(entry.key for entry in store.list(f"{below}/{name}/"))
        store.delete([key for key in keys if key.endswith(f"/{MANIFEST}")])
        store.delete(keys)
