"""Whole runs as a user starts them: a process of its own, a tiny model, a job file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import yaml

ROOT = Path(__file__).parents[1]


def write_job(folder: Path, *, arch: str = "llama", rows: int = 24, **changes: Any) -> Path:
    """Make a tiny base, rows and a job file in ``folder``; ``changes`` replace whole sections."""
    if not (folder / "base").exists():
        tiny.tiny_model(folder / "base", arch)
        tiny.write_rows(folder / "rows.jsonl", tiny.tiny_rows(rows))
    settings: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "store": str(folder / "store"),
        "model": {"source": str(folder / "base")},
        "data": {
            "source": str(folder / "rows.jsonl"),
            "max_length": 256,
            "packing": True,
            "thinking": "tags",
            "held_out": 0.2,
        },
        "lora": {"rank": 4, "alpha": 8},
        "train": {
            "epochs": 2,
            "batch_size": 1,
            "gradient_accumulation": 2,
            "learning_rate": 0.01,
            "gradient_checkpointing": False,
            "checkpoint_every_steps": 2,
        },
        "judge": {
            "prompts": [{"user": "What is 2 plus 3?", "reasoning_language": "German"}],
            "max_new_tokens": 4,
            "temperature": 0,
        },
        "publish": {"channel": "nightly"},
    }
    settings.update(changes)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@dataclass
class Process:
    """A running ``python -m job``; its log is JSON lines on stderr."""

    popen: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def read_until(self, event: str, **fields: Any) -> bool:
        """Read the log until an event with these fields; False if the process ended first."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            try:
                said = json.loads(line)
            except json.JSONDecodeError:
                self.other.append(line)
                continue
            self.events.append(said)
            if said.get("event") == event and fields.items() <= said.items():
                return True
        return False

    def finish(self) -> tuple[int, str]:
        """Wait for the end, and return the exit code and what stood on stdout."""
        self.read_until("")
        assert self.popen.stdout is not None
        out = self.popen.stdout.read()
        return self.popen.wait(), out

    def named(self, event: str) -> list[dict[str, Any]]:
        """Return the events of that name so far."""
        return [said for said in self.events if said["event"] == event]


@contextmanager
def started(job: Path, *words: str, **environment: str) -> Iterator[Process]:
    """Start a run of ``job`` with its work folder beside it; it is gone when the block ends."""
    command = [sys.executable, "-m", "job", "run", str(job), "--work", str(job.parent / "work")]
    # LORA_JOB_TERMINATION_MESSAGE: the file a pod would have, if the test made one.
    message = job.parent / "termination-log"
    message.touch()
    popen = subprocess.Popen(
        [*command, "--output", "json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LORA_JOB_TERMINATION_MESSAGE": str(message),
            **environment,
        },
    )
    try:
        yield Process(popen)
    finally:
        if popen.poll() is None:
            popen.send_signal(signal.SIGKILL)
        popen.wait()
        for stream in (popen.stdout, popen.stderr):
            assert stream is not None
            stream.close()


def run_job(job: Path, *words: str, **environment: str) -> tuple[int, str, Process]:
    """Run ``job`` to its end."""
    with started(job, *words, **environment) as process:
        code, out = process.finish()
    return code, out, process
