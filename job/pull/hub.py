"""``hf://owner/repo[@revision]``: a model, or a data set, of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.files import list_files
from job.hub import api, hub_errors, interruptible, tree
from job.pull.file import pinned
from job.pull.pin import Hashes, Pin, PinnedFile, SourceKind, not_found
from job.pull.select import card_of, selected
from job.pull.transfer import Opener, RestartError
from job.retry import retry

READ_TIMEOUT_S = 30.0
STREAM_BYTES = 1 << 20
TRAIN_PATTERN = re.compile(r"(^|[/_.-])train([/_.-]|$)", re.IGNORECASE)
REPO_TYPE = {"model": "model", "data": "dataset"}


def parse(uri: str) -> tuple[str, str | None]:
    """Return repository and revision of ``hf://owner/repo[@revision]``."""
    repo_id, _, revision = uri.removeprefix("hf://").partition("@")
    return repo_id, revision or None


def resolve(uri: str, kind: SourceKind, hashes: Hashes) -> Pin:
    """Pin a branch, tag or commit to its commit, with the digests of the files we use.

    Raises:
        JobError: 66 no such repository or revision, 77 gated or not allowed, 74 unreachable.
    """
    if offline():
        return _resolve_offline(uri, kind, hashes)

    def ask() -> Pin:
        with hub_errors(uri):
            return _resolve_online(uri, kind)

    return retry(uri, lambda: interruptible(ask, stop=hashes.stop), stop=hashes.stop)


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` (or ``TRANSFORMERS_OFFLINE``) forbids the network."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _resolve_online(uri: str, kind: SourceKind) -> Pin:
    repo_id, revision = parse(uri)
    info = api().repo_info(repo_id, repo_type=REPO_TYPE[kind], revision=revision)
    there = tree(repo_id, info.sha, repo_type=REPO_TYPE[kind])
    card = info.card_data.to_dict() if info.card_data is not None else {}
    licence = card.get("license")
    return Pin(
        uri=f"hf://{repo_id}@{info.sha}",
        revision=info.sha,
        license=str(licence) if licence else None,
        files={name: _pinned(there[name]) for name in _wanted(list(there), kind, card, uri)},
    )


def _pinned(entry: Any) -> PinnedFile:
    if entry.lfs is not None:
        return PinnedFile(size=entry.size, sha256=entry.lfs.sha256)
    return PinnedFile(size=entry.size, git_sha1=entry.blob_id)


def _wanted(names: list[str], kind: SourceKind, card: dict[str, Any], uri: str) -> list[str]:
    files = selected(names, kind, where=uri)
    return files if kind == "model" else _train_split(files, card)


def _train_split(names: list[str], card: dict[str, Any]) -> list[str]:
    """Return the files of the default configuration's training split.

    Source: https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    patterns = _train_patterns(card)
    if patterns:
        found = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
    else:
        found = [n for n in names if TRAIN_PATTERN.search(n)]
    return found or names


def _train_patterns(card: dict[str, Any]) -> list[str]:
    configs = [c for c in card.get("configs") or [] if isinstance(c, dict)]
    default = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
    entries = (default or configs or [{}])[0].get("data_files") or []
    entries = [entries] if isinstance(entries, str | dict) else entries
    paths: list[str] = []
    for entry in entries:
        is_train = isinstance(entry, str) or entry.get("split") == "train"
        path = entry if isinstance(entry, str) else entry.get("path") or []
        if is_train:
            paths += [path] if isinstance(path, str) else path
    return paths


def _resolve_offline(uri: str, kind: SourceKind, hashes: Hashes) -> Pin:
    folder = _snapshot(uri, kind)
    repo_id, _ = parse(uri)
    name = f"hf://{repo_id}@{folder.name}"
    pin = pinned(folder, name, kind, hashes, where=uri, revision=folder.name)
    wanted = set(_wanted(list_files(folder), kind, card_of(folder), uri))
    return pin.only(lambda file: file in wanted)


def _snapshot(uri: str, kind: SourceKind) -> Path:
    """Return the folder that the client's own cache keeps of a repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo_id, revision = parse(uri)
    try:
        found = snapshot_download(
            repo_id, repo_type=REPO_TYPE[kind], revision=revision, local_files_only=True
        )
    except LocalEntryNotFoundError:
        what = "is not in this machine's cache, and HF_HUB_OFFLINE is set"
        do = "download it once with the network, or unset HF_HUB_OFFLINE"
        raise not_found(uri, what, do) from None
    return Path(found)


def place(pin: Pin, kind: SourceKind) -> Path | Opener:
    """Return the cached folder when offline, else how to stream a file of the pinned commit."""
    repo_id, _ = parse(pin.uri)
    if offline():
        return _snapshot(pin.uri, kind)

    @contextlib.contextmanager
    def open_at(name: str, _: PinnedFile, offset: int) -> Iterator[Iterator[bytes]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        endpoint = os.environ.get("HF_ENDPOINT") or None
        url = hf_hub_url(
            repo_id, name, repo_type=REPO_TYPE[kind], revision=pin.revision, endpoint=endpoint
        )
        # Compressed on the way, a range would be one of other bytes.
        headers = {**build_hf_headers(library_name="lora-job"), "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with (
            hub_errors(f"{pin.uri}/{name}"),
            get_session().stream("GET", url, headers=headers, timeout=READ_TIMEOUT_S) as answer,
        ):
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            if offset and answer.status_code != 206:
                raise RestartError
            yield answer.iter_bytes(STREAM_BYTES)

    return open_at
