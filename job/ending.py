"""The last words of an attempt: one JSON object, first to the store, then to the pod's message."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job.artifacts import Receipt
from job.errors import ExitCode, JobError, name_of
from job.files import explained
from job.progress import Progress
from job.retry import TransientError

if TYPE_CHECKING:
    from job.store.runs import Attempt

log = structlog.get_logger()

MODULES = {
    "store": "boto3 botocore huggingface_hub",
    "check": "transformers pyarrow jinja2",
    "train": "torch trl peft datasets accelerate safetensors gguf",
    "k8s": "kubernetes rich cronsim",
}
EXTRAS = {module: extra for extra, modules in MODULES.items() for module in modules.split()}
"""Module → the extra that brings it."""

MESSAGE_BYTES = 2048
BUG = 1


@dataclass(slots=True)
class Ending:
    """What is known of how an attempt ends, gathered as it goes."""

    run_id: str
    began: float
    attempt: Attempt | None = None
    receipt: Receipt | None = None
    reused: bool = False
    """The run was published before, and this attempt only verified it again."""
    code: int = BUG
    record: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def recorded(self, progress: Progress) -> Iterator[None]:
        """Turn whatever ends the block into :attr:`code` and :attr:`record`, and store it."""
        error: JobError | None = None
        try:
            yield
            self.code = int(ExitCode.VERIFIED)
        except BaseException as raised:  # noqa: BLE001 - a code for whatever it is
            error = explain(raised, where="run")
            self.code = int(error.code) if error else BUG
            tell_bug(raised)
            if error is None:
                error = JobError(ExitCode.USAGE, "lora-job", repr(raised), "report it: see the log")
        self.close(error, progress)

    def close(self, error: JobError | None, progress: Progress) -> None:
        """Write the record to the store, if the run was ever taken."""
        figures = progress.snapshot()
        self.record = {
            "run": self.run_id,
            "epoch": self.attempt.epoch if self.attempt else None,
            "code": self.code,
            "name": name_of(self.code),
            "where": error.where if error else "run",
            "what": error.what if error else self._well(),
            "do": error.do if error else "",
            "stage": figures.get("stage"),
            "step": figures.get("step"),
            "checkpoint": self.attempt.checkpoint_step if self.attempt else None,
            "started": _utc(self.began),
            "ended": _utc(time.time()),
            "receipt": self.receipt.model_dump(mode="json") if self.receipt else None,
        }
        if self.attempt is None:
            return
        try:
            self.attempt.end(self.record)
        except JobError as lost:
            log.warning("ending_not_stored", reason=str(lost))

    def _well(self) -> str:
        if self.receipt is not None and self.reused:
            return f"published at {self.receipt.published}, verified again; nothing was trained"
        return "published, read back and proven"

    def summary(self) -> dict[str, Any]:
        """Return the canonical last log line's fields."""
        record = self.record
        kept = {key: record[key] for key in ("code", "name", "stage", "step", "checkpoint")}
        said = "" if self.code == 0 else f"{record['where']}: {record['what']}; {record['do']}"
        duration_s = round(time.time() - self.began, 1)
        return {**kept, "duration_s": duration_s, **({"said": said} if said else {})}


def tell_bug(error: BaseException) -> None:
    """Log the traceback of what no user can mend, once."""
    if explain(error, where="run") is None and not getattr(error, "told", False):
        log.exception("bug", what=str(error))
        error.told = True  # type: ignore[attr-defined]


def explain(error: BaseException, *, where: str) -> JobError | None:
    """Return what an exception means to a user, or None if it is a bug.

    An extra that is not installed, and the file system's own refusals, are a user's to mend
    wherever they come from.
    """
    if isinstance(error, JobError):
        return error
    if isinstance(error, TransientError):
        return JobError(ExitCode.STORE, where, str(error), "see that, then start again")
    if isinstance(error, MemoryError):
        do = "give it more memory, or batch_size less"
        return JobError(ExitCode.OUT_OF_RESOURCES, where, "out of memory", do)
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get((error.name or "").split(".")[0])
        do = f"install it: pip install 'lora-job[{extra}]'"
        return JobError(ExitCode.USAGE, where, f"needs {error.name}", do) if extra else None
    return explained(error) if isinstance(error, OSError) else None


def write_termination_message(record: dict[str, Any]) -> None:
    """Leave ``record`` where Kubernetes looks for a container's last message, if that exists."""
    path = Path(os.environ.get("LORA_JOB_TERMINATION_MESSAGE", "/dev/termination-log"))
    if not path.exists():
        return
    try:
        path.write_bytes(fit(record))
    except OSError as error:
        log.warning("termination_message_lost", reason=str(error))


def fit(record: dict[str, Any]) -> bytes:
    """Return ``record`` as JSON of at most 2,048 bytes: its longest words are cut, never its JSON."""
    record = dict(record)
    for limit in (1200, 600, 300, 120):
        body = json.dumps(record, ensure_ascii=False).encode()
        if len(body) <= MESSAGE_BYTES:
            return body
        for key in ("what", "do", "where"):
            record[key] = str(record.get(key))[:limit]
    record["receipt"] = None
    return json.dumps(record, ensure_ascii=True).encode()[:MESSAGE_BYTES]


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
