"""What the store remembers of a run: it outlives the pods, and the Job."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from job.errors import ExitCode, JobError
from job.stop import Stop

if TYPE_CHECKING:
    from job.config import JobConfig

T = TypeVar("T")

PATIENCE_S = 8.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A run's objects in the store; empty if it never got so far."""

    head: dict[str, Any] = field(default_factory=dict)
    exits: tuple[dict[str, Any], ...] = ()
    """exit.json of the attempts that ended with a word, oldest first."""
    receipt: dict[str, Any] | None = None

    @property
    def last_end(self) -> dict[str, Any] | None:
        """How the last attempt that ended did: its exit.json, or that it left none."""
        ends = self.head.get("ends") or []
        if not ends:
            return None
        last = ends[-1]
        told = next((it for it in self.exits if it.get("epoch") == last["epoch"]), None)
        place = f"in stage {last.get('stage')}, step {last.get('step')}"
        if told is None and last.get("stopping"):
            what = f"was asked to end {place}, and killed before its checkpoint was saved"
            do = "raise grace_period_s, or lower train.checkpoint_every_s: less is lost then"
            return {**last, "name": "killed", "what": what, "do": do}
        return told or {**last, "name": "vanished", "what": f"vanished without a word {place}"}


def impatient(
    call: Callable[[Stop], T], *, seconds: float = PATIENCE_S, late: JobError | None = None
) -> T:
    """Return ``call(stop)``; after ``seconds`` the stop ends its retries, with ``late``.

    A person who asks for a status does not wait the 20 minutes that a run would.
    """
    stop = Stop()
    do = "see the store's address and whether it can be reached from here"
    late = late or JobError(ExitCode.STORE, "store", f"no answer within {seconds:.0f} s", do)
    timer = threading.Timer(seconds, stop.request, [late])
    timer.daemon = True
    timer.start()
    try:
        return call(stop)
    finally:
        timer.cancel()


def read_run(uri: str, run: str, *, single_writer: bool = False) -> Stored:
    """Return what the store at ``uri`` knows of ``run``.

    Raises:
        JobError: 74 or 77 if the store can't be read from here.
    """
    from job.store import open_store

    def read(stop: Stop) -> Stored:
        store = open_store(uri, stop=stop, single_writer=single_writer)
        head = _json(store, f"_runs/{run}/head.json")
        if head is None:
            return Stored()
        # Attempts of which the head knows no code vanished without a word.
        epochs = [end["epoch"] for end in head.get("ends", []) if end["code"] is not None]
        found = (_json(store, f"_runs/{run}/attempts/{epoch}/exit.json") for epoch in epochs)
        return Stored(head, tuple(it for it in found if it), head.get("receipt"))

    return impatient(read)


def measured_save_s(job: JobConfig, run: str) -> float | None:
    """Return what the slowest save of ``run`` took, or of its name's newest version.

    Raises:
        JobError: the store can't be read from here.
    """
    from job.store import open_store
    from job.store.versions import read_manifest, resolve

    def read(stop: Stop) -> float | None:
        store = open_store(job.store, stop=stop, single_writer=job.single_writer)
        head = _json(store, f"_runs/{run}/head.json") or {}
        if head.get("save_s"):
            return float(head["save_s"])
        try:
            version = resolve(store, job.name, job.publish.channel)
            return read_manifest(store, job.name, version).lineage.get("save_s")
        except JobError as error:
            if error.code is not ExitCode.NOT_FOUND:
                raise
            return None

    return impatient(read)


def read_logs(uri: str, run: str, single_writer: bool, before: int | None) -> list[bytes]:
    """Return the log lines of ``run`` that reached the store, in order: of attempts ``before``."""
    from job.store import open_store

    def read(stop: Stop) -> list[bytes]:
        store = open_store(uri, stop=stop, single_writer=single_writer)
        prefix = f"_runs/{run}/attempts/"
        keys = [entry.key for entry in store.list(prefix) if entry.key.endswith(".jsonl")]
        pieces = sorted((int(key.removeprefix(prefix).split("/")[0]), key) for key in keys)
        bodies = (store.get(key) for epoch, key in pieces if before is None or epoch < before)
        return [line for body in bodies if body for line in body.body.splitlines(keepends=True)]

    return impatient(read, seconds=120)


def _json(store: Any, key: str) -> dict[str, Any] | None:
    small = store.get(key)
    with contextlib.suppress(ValueError):  # torn by a server that was cut off in a write
        return json.loads(small.body) if small else None
    return None
