"""Can this store hold our promises? Not asked, but tried: the conditions, at once and in turn."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from job.errors import ExitCode, JobError
from job.store.base import ConflictError, ExistsError, Store

WRITERS, ROUNDS = 8, 4
LARGE_BYTES = 17 << 20
"""Above one part, so that S3 has to put parts together."""

Check = Callable[[Store, str], str]
"""Tries one thing below a folder of the store; returns what is wrong, or nothing."""


def probe(store: Store) -> list[dict[str, Any]]:
    """Try everything that the protocol builds on, below ``_probe/``, and clean up.

    Returns:
        For each thing: check (what was tried), ok, needed (for what), detail (what is wrong).

    Raises:
        JobError: 66, 74 or 77 if the store can't be used at all.
    """
    place = f"_probe/{secrets.token_hex(6)}"
    checks: list[tuple[str, str, Check]] = [
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
        findings.append({"check": check, "ok": not detail, "needed": needed, "detail": detail})
    store.delete([entry.key for entry in store.list(f"{place}/")])
    return findings


def require_conditions(store: Store) -> None:
    """Refuse a store that ignores conditions (78), unless there is one writer only."""
    if store.single_writer:
        return
    place = f"_probe/{secrets.token_hex(6)}"
    try:
        for number, try_it in enumerate((_create_twice, _stale_swap)):
            if detail := try_it(store, f"{place}/{number}"):
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


def _wins(write: Callable[[], object]) -> bool:
    try:
        write()
    except (ExistsError, ConflictError):
        return False
    return True


def _create_twice(store: Store, place: str) -> str:
    store.create(f"{place}/a", b"one")
    wins = _wins(lambda: store.create(f"{place}/a", b"two"))
    return "ignores If-None-Match: two writers would both win" if wins else ""


def _stale_swap(store: Store, place: str) -> str:
    stale = store.create(f"{place}/a", b"one")
    tag = store.swap(f"{place}/a", b"two", stale)
    if _wins(lambda: store.swap(f"{place}/a", b"three", stale)):
        return "ignores If-Match: a newer attempt's head would be overwritten"
    if not _wins(lambda: store.swap(f"{place}/a", b"three", tag)):
        return "refuses If-Match with the tag that it gave"
    return ""


def _swap_of_nothing(store: Store, place: str) -> str:
    tag = store.create(f"{place}/a", b"one")
    store.delete([f"{place}/a"])
    wins = _wins(lambda: store.swap(f"{place}/a", b"two", tag))
    return "creates by If-Match what is not there" if wins else ""


def _race_to_create(store: Store, place: str) -> str:
    return _race(lambda number: lambda body: store.create(f"{place}/{number}", body))


def _race_to_swap(store: Store, place: str) -> str:
    def prepare(number: int) -> Callable[[bytes], object]:
        key = f"{place}/{number}"
        tag = store.create(key, b"before")
        return lambda body: store.swap(key, body, tag)

    return _race(prepare)


def _race(prepare: Callable[[int], Callable[[bytes], object]]) -> str:
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(ROUNDS):
            write = prepare(number)
            bodies = [b"writer %d" % writer for writer in range(WRITERS)]
            won = sum(pool.map(lambda body, write=write: _wins(lambda: write(body)), bodies))
            if won != 1:
                return f"{won} of {WRITERS} writers won"
    return ""


def _deleted(store: Store, place: str) -> str:
    store.put(f"{place}/a", b"one")
    store.delete([f"{place}/a", f"{place}/never-there"])
    return "" if store.get(f"{place}/a") is None else "still there"
