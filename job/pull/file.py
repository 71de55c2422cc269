"""A file or a folder of this machine: used where it lies, hashed once."""

from __future__ import annotations

from pathlib import Path

from job.files import list_files
from job.pull.pin import Hashes, Pin, PinnedFile, SourceKind, not_found
from job.pull.select import card_of, selected


def resolve(uri: str, kind: SourceKind, hashes: Hashes) -> Pin:
    """Pin a path by the sha256 of its files.

    The pin carries no path of this machine: it goes into the store, and into the model card.

    Raises:
        JobError: 66 if there is nothing, 65 if a model there has only pickles.
    """
    path = locate(uri)
    return pinned(path, f"file:{path.resolve().name}", kind, hashes, where=uri)


def locate(uri: str) -> Path:
    """Return where the source lies."""
    path = Path(uri).expanduser()
    if not path.exists():
        do = "name a source that is: hf://, s3://, package: or a path"
        raise not_found(uri, "is not there", do)
    return path


def pinned(
    path: Path,
    uri: str,
    kind: SourceKind,
    hashes: Hashes,
    *,
    where: str,
    revision: str | None = None,
) -> Pin:
    """Return the pin of a file, or of what is used of a folder."""
    folder = path if path.is_dir() else path.parent
    names = list_files(path) if path.is_dir() else [path.name]
    files = {
        name: PinnedFile(size=path.stat().st_size, sha256=hashes.sha256(path))
        for name, path in ((name, folder / name) for name in selected(names, kind, where=where))
    }
    licence = card_of(folder).get("license")
    return Pin(uri=uri, revision=revision, license=licence and str(licence), files=files)
