"""Runs and their attempts: who may write, from which checkpoint, and how the ones before ended.

``head.json`` is changed by compare-and-swap only. An attempt that loses a swap to a higher epoch is
fenced: it writes nothing more that counts, and ends with 76.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from job.artifacts import Receipt
from job.errors import ExitCode, JobError
from job.files import to_json
from job.progress import Progress
from job.stop import Stop
from job.store import checkpoints
from job.store.base import ConflictError, ExistsError, Small, Store
from job.store.heads import (
    Head,
    add_end,
    figures_of,
    next_head,
    run_folder,
    silence_s,
    taken,
)

log = structlog.get_logger()

Clock = Callable[[], float]

HEARTBEAT_S = 60.0
LOOK_S = 2.0
"""How soon a new stage reaches the head: a death soon after its start is told from one before."""
LAST_WORDS_S = 60.0
SIGN_S = 5.0
"""How often a head of another owner is looked at for a sign of life: it beats once a minute."""


class Attempt:
    """One attempt of a run, which holds the head as long as nobody takes a higher epoch."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        held: Small,
        *,
        stop: Stop,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.store, self.run_id = store, run_id
        self._head: Head = json.loads(held.body)
        self._tag = held.tag
        self.epoch: int = self._head["epoch"]
        self.owner: str = self._head["owner"]
        self.started: float = self._head["started"]
        self._root = run_folder(run_id)
        self._progress, self._clock, self._stop = progress, clock, stop
        self._lock = threading.RLock()
        # A signal must not keep a checkpoint or the last words from being written; a fence must.
        self._fence, self._ending = Stop(), Stop()
        self._lasting = store.hearing(self._fence)
        self._last = store.hearing(Stop(patience_s=LAST_WORDS_S))
        self._beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beats.start()

    @property
    def scheduled(self) -> int:
        """Minutes since 1970 that the run was meant for: a CronJob's suffix, else its start."""
        started = int(self.started // 60)
        suffix = re.search(r"-(\d{8})$", self.run_id)
        minutes = int(suffix[1]) if suffix else started
        # Eight digits may also be a digest; a CronJob's are at most a few days before the start.
        return minutes if 0 <= started - minutes <= 7 * 24 * 60 else started

    @property
    def checkpoint_step(self) -> int | None:
        """Step of the last durable checkpoint."""
        named = self._head["checkpoint"]
        return named["step"] if named else None

    @property
    def save_s(self) -> float:
        """Seconds of the run's slowest save, with the step before it; 0 where none was measured."""
        known = self._head.get("save_s"), self._progress.snapshot().get("save_s")
        return float(max(seconds or 0.0 for seconds in known))

    def inputs(self, resolve: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what the run's moving inputs were pinned to, by whichever attempt came first."""
        key = f"{self._root}/inputs.json"
        found = self.store.get(key)
        if found is None:
            with contextlib.suppress(ExistsError):  # another attempt was first
                self.store.create(key, to_json(resolve()))
            found = self.store.get(key)
        assert found is not None
        pinned: dict[str, Any] = json.loads(found.body)
        return pinned

    def save_checkpoint(self, folder: Path, step: int) -> None:
        """Make ``folder`` the run's checkpoint of ``step``; it is durable when this returns.

        A signal does not interrupt it. It is not read back: the attempt that restores it verifies
        it, and has the one before. Two are kept.

        Raises:
            JobError: 76 if a newer attempt holds the run.
        """
        named: checkpoints.Named = {"step": step, "epoch": self.epoch}
        if self._head["checkpoint"] == named:
            return
        store = self._lasting
        checkpoints.write(store, self._root, named, folder, stop=self._fence)

        def name_it(head: Head) -> None:
            if head["checkpoint"] != named:
                head.update(checkpoint=named, previous=head["checkpoint"])

        self._swap(store, name_it)
        self._forget_checkpoints()

    def _forget_checkpoints(self) -> None:
        kept = [self._head["checkpoint"], self._head["previous"]]
        try:
            checkpoints.forget(self._lasting, self._root, kept, epoch=self.epoch)
        except JobError as error:
            if error.code is ExitCode.FENCED:
                raise
            log.warning("old_checkpoints_kept", reason=str(error))

    def restore_checkpoint(self, into: Path) -> int | None:
        """Fetch the newest valid checkpoint into the folder ``into``, and return its step."""
        for named in (self._head["checkpoint"], self._head["previous"]):
            if named is None:
                continue
            try:
                checkpoints.read(self.store, self._root, named, into, stop=self._stop)
            except JobError as error:
                if error.code not in (ExitCode.NOT_PROVEN, ExitCode.NOT_FOUND):
                    raise
                log.warning("checkpoint_invalid", step=named["step"], reason=str(error))
            else:
                log.info("checkpoint_restored", step=named["step"], epoch=named["epoch"])
                return int(named["step"])
        return None

    def publishing(self, version: str) -> None:
        """Say in the head that ``version`` is being written."""

        def begin(head: Head) -> None:
            begun = sorted({*head.get("begun", []), version})
            head.update(state=f"publishing:{version}", begun=begun)

        self._swap(self.store, begin)

    @property
    def begun(self) -> list[str]:
        """Versions that attempts of this run began to write; one of them at most is published."""
        return list(self._head.get("begun", []))

    def published(self, receipt: Receipt) -> None:
        """Make ``receipt`` the run's result: in the head, which fences, then in receipt.json."""
        body, key = receipt.model_dump(mode="json"), f"{self._root}/receipt.json"
        state = f"published:{receipt.version}"
        self._swap(self._lasting, lambda head: head.update(state=state, receipt=body))
        # Written again once the channel has moved: only the head's holder comes here.
        self._lasting.put(key, to_json(body))

    def receipt(self) -> Receipt | None:
        """Return the Receipt of a run that is published already, by whichever attempt."""
        body = self._head.get("receipt")
        return Receipt.model_validate(body) if body else None

    def put(self, name: str, body: bytes) -> None:
        """Write a file of this attempt (a log, a report); signals and fences don't stop it."""
        self._last.put(f"{self._root}/attempts/{self.epoch}/{name}", body)

    def end(self, record: dict[str, Any]) -> None:
        """Write the last words: exit.json, then the head's state, if it is still ours."""
        self._ending.request(JobError(ExitCode.PREEMPTED, "heartbeat", "over", "nothing"))
        self._beats.join(timeout=LAST_WORDS_S)
        self.put("exit.json", to_json(record))
        figures = {key: record.get(key) for key in ("code", "stage", "step")}

        def close(head: Head) -> None:
            add_end(head, **figures)
            if not head["state"].startswith("published:"):
                head["state"] = "ended"

        try:
            self._swap(self._last, close)
        except JobError as error:
            if error.code is not ExitCode.FENCED:
                raise

    def _beat(self) -> None:
        last, place = self._clock(), self._place()
        store = self.store.hearing(self._ending)
        while True:
            try:
                self._ending.wait(LOOK_S)
                now, present = self._clock(), self._place()
                if now - last >= HEARTBEAT_S or present != place:
                    self._swap(store, lambda _: None)
                    last, place = now, present
            except JobError as error:
                if self._ending.requested or error.code is ExitCode.FENCED:
                    return
                log.warning("heartbeat_failed", reason=str(error))

    def _place(self) -> tuple[Any, bool]:
        """Return the stage, and whether an end was asked for: what the head is told soon."""
        return self._progress.snapshot().get("stage"), self._stop.requested

    def _swap(self, store: Store, change: Callable[[Head], None]) -> None:
        """Change the head as long as it is ours; each try starts from what is there."""
        with self._lock:
            while True:
                head = copy.deepcopy(self._head)
                change(head)
                head["seq"] += 1
                head.update(heartbeat=self._clock(), progress=figures_of(self._progress))
                head.update(save_s=self.save_s, stopping=self._stop.requested)
                try:
                    self._tag = store.swap(f"{self._root}/head.json", to_json(head), self._tag)
                except ConflictError:
                    self._look_again(store)
                else:
                    self._head = head
                    return

    def _look_again(self, store: Store) -> None:
        """Take up a head that is ours after all (a write that arrived late), else be fenced."""
        found = store.get(f"{self._root}/head.json")
        head = _parsed(found)
        if found is not None and not head:
            # A server that was cut off in a write may keep what it had of it. What we know goes there.
            log.warning("head_torn", size_bytes=len(found.body))
            self._tag = found.tag
            return
        if found is None or head.get("nonce") != self._head["nonce"]:
            epoch = head.get("epoch", "?")
            what = f"attempt {epoch} took over from attempt {self.epoch}"
            error = JobError(ExitCode.FENCED, self.run_id, what, "nothing: it goes on there")
            self._fence.request(error)
            self._stop.request(error)
            raise error
        self._head, self._tag = head, found.tag


def take(
    store: Store,
    run_id: str,
    *,
    owner: str,
    job_text: bytes,
    stop: Stop,
    progress: Progress,
    clock: Clock = time.time,
) -> Attempt:
    """Begin the run's next attempt, and its heartbeat.

    Raises:
        JobError: 72 if attempts come and go without progress, 73 if another owner's is alive.
    """
    key = f"{run_folder(run_id)}/head.json"
    while True:
        found = _silent(store, key, run_id, owner, stop, clock)
        head = next_head(json.loads(found.body) if found else None, run_id, owner, clock())
        head["progress"] = figures_of(progress)
        body = to_json(head)
        try:
            tag = store.swap(key, body, found.tag) if found else store.create(key, body)
            break
        except (ConflictError, ExistsError):
            log.info("attempt_raced", reason="another attempt changed the head; looking again")
    log.info("attempt_taken", epoch=head["epoch"], checkpoint=head["checkpoint"])
    _tidy(store, run_id, job_text)
    held = Small(body, tag)
    return Attempt(store, run_id, held, stop=stop, progress=progress, clock=clock)


def _parsed(found: Small | None) -> Head:
    """Return a head; empty if there is none, or none that is whole."""
    try:
        head: Head = json.loads(found.body) if found else {}
    except ValueError:
        return {}
    return head


def _silent(
    store: Store, key: str, run_id: str, owner: str, stop: Stop, clock: Clock
) -> Small | None:
    """Return the head once it may be taken: another owner's has ended, or moves no more.

    Clocks of two machines may differ, so that a head is old proves little: it is looked at. An
    owner who says that it is ending is given the time to.
    """
    seq, since, needed_s = None, 0.0, 0.0
    while True:
        found = store.get(key)
        head = _parsed(found)
        if found is not None and not head:
            what = "is torn: a write was cut off"
            do = "start again in a minute: an attempt that lives mends it; else delete it"
            raise JobError(ExitCode.STORE, key, what, do)
        wanted_s = silence_s(head, owner, clock()) if head else 0.0
        if wanted_s == 0.0:
            return found
        if seq is not None and seq != head["seq"] and not head.get("stopping"):
            raise taken(head, run_id, clock())
        if seq != head["seq"]:
            seq, since, needed_s = head["seq"], time.monotonic(), wanted_s
            log.info("owner_awaited", owner=head["owner"], at_most_s=round(needed_s))
        elif time.monotonic() - since >= needed_s:
            return found
        stop.wait(SIGN_S)


def _tidy(store: Store, run_id: str, job_text: bytes) -> None:
    try:
        with contextlib.suppress(ExistsError):  # the first attempt's stays
            store.create(f"{run_folder(run_id)}/job.yaml", job_text)
        store.sweep(f"{run_folder(run_id)}/checkpoints/")
    except JobError as error:
        log.warning("not_tidied", reason=str(error))
