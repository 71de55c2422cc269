"""Can this store hold our promises? Not asked, but tried: the conditions, at once and in turn."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from job.errors import ExitCode, JobError
from job.store.base import ConflictError, ExistsError, Store

WRITERS, ROUNDS = 8, 4
LARGE_BYTES = 17 << 20
"""Above one part, so that S3 has to put parts together."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried. ``needed`` says for what."""

    check: str
    ok: bool
    needed: str
    detail: str = ""


def probe(store: Store) -> list[Finding]:
    """Try everything that the protocol builds on, below ``_probe/``, and clean up.

    Raises:
        JobError: 66, 74 or 77 if the store can't be used at all.
    """
    place = f"_probe/{secrets.token_hex(6)}"
    checks: list[tuple[str, str, Callable[[Store, str], str]]] = [
        ("write, read back", "everything", _round_trip),
        ("a large file, read back", "checkpoints and models", _large_file),
        ("list shows what was written", "versions, prune", _listed),
        ("create refuses a key that is there", "manifests, receipts", _create_twice),
        ("swap refuses a stale tag", "heads, channels: fencing", _stale_swap),
        ("swap refuses a key that is gone", "heads, channels", _swap_of_nothing),
        (f"{WRITERS} creates at once, one wins", "two attempts at once", _race_to_create),
        (f"{WRITERS} swaps at once, one wins", "two attempts at once", _race_to_swap),
        ("delete", "prune, checkpoints", _deleted),
    ]
    findings = []
    for number, (check, needed, try_it) in enumerate(checks):
        detail = try_it(store, f"{place}/{number}")
        findings.append(Finding(check, not detail, needed, detail))
    store.delete([entry.key for entry in store.list(f"{place}/")])
    return findings


def require_conditions(store: Store, *, single_writer: bool = False) -> None:
    """Refuse a store that ignores conditions (78), unless there is one writer only."""
    if single_writer:
        return
    place = f"_probe/{secrets.token_hex(6)}"
    try:
        for number, try_it in enumerate((_create_twice, _stale_swap)):
            detail = try_it(store, f"{place}/{number}")
            if detail:
                do = "use a store that has conditional writes, or set single_writer: true"
                raise JobError(ExitCode.CONFIG, store.uri, detail, do)
    finally:
        store.delete([f"{place}/{number}/a" for number in range(2)])


def _round_trip(store: Store, place: str) -> str:
    store.put(f"{place}/a", b"one")
    store.put(f"{place}/a", b"two")
    found = store.get(f"{place}/a")
    return "" if found and found.body == b"two" else "does not return what was written last"


def _large_file(store: Store, place: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large")
        path.write_bytes(secrets.token_bytes(1 << 20) * (LARGE_BYTES >> 20))
        sent = store.upload(f"{place}/large", path)
    return "" if store.sha256(f"{place}/large") == sent else "returns other bytes"


def _listed(store: Store, place: str) -> str:
    store.put(f"{place}/a", b"one")
    found = [entry.key for entry in store.list(f"{place}/")]
    return "" if found == [f"{place}/a"] else f"lists {found}"


def _create_twice(store: Store, place: str) -> str:
    store.create(f"{place}/a", b"one")
    try:
        store.create(f"{place}/a", b"two")
    except ExistsError:
        return ""
    return "ignores If-None-Match: two writers would both win"


def _stale_swap(store: Store, place: str) -> str:
    stale = store.create(f"{place}/a", b"one")
    tag = store.swap(f"{place}/a", b"two", stale)
    for attempt in (stale, tag):
        try:
            store.swap(f"{place}/a", b"three", attempt)
        except ConflictError:
            if attempt == tag:
                return "refuses If-Match with the tag that it gave"
        else:
            if attempt == stale:
                return "ignores If-Match: a newer attempt's head would be overwritten"
    return ""


def _swap_of_nothing(store: Store, place: str) -> str:
    tag = store.create(f"{place}/a", b"one")
    store.delete([f"{place}/a"])
    try:
        store.swap(f"{place}/a", b"two", tag)
    except ConflictError:
        return ""
    return "creates by If-Match what is not there"


def _race_to_create(store: Store, place: str) -> str:
    def writer(key: str, number: int) -> bool:
        try:
            store.create(key, f"writer {number}".encode())
        except ExistsError:
            return False
        return True

    return _race(lambda round_number: f"{place}/{round_number}", writer)


def _race_to_swap(store: Store, place: str) -> str:
    tags: dict[str, str] = {}

    def prepare(round_number: int) -> str:
        key = f"{place}/{round_number}"
        tags[key] = store.create(key, b"before")
        return key

    def writer(key: str, number: int) -> bool:
        try:
            store.swap(key, f"writer {number}".encode(), tags[key])
        except ConflictError:
            return False
        return True

    return _race(prepare, writer)


def _race(prepare: Callable[[int], str], writer: Callable[[str, int], bool]) -> str:
    with ThreadPoolExecutor(WRITERS) as pool:
        for round_number in range(ROUNDS):
            key = prepare(round_number)
            won = sum(pool.map(writer, [key] * WRITERS, range(WRITERS)))
            if won != 1:
                return f"{won} of {WRITERS} writers won"
    return ""


def _deleted(store: Store, place: str) -> str:
    store.put(f"{place}/a", b"one")
    store.delete([f"{place}/a", f"{place}/never-there"])
    return "" if store.get(f"{place}/a") is None else "still there"
