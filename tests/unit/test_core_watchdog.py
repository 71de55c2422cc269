"""A training that hangs is ended from outside its thread, with its last words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, threading, time
from types import SimpleNamespace
from job.ending import Ending
from job.progress import Progress
from job.watchdog import watched

progress = Progress()
progress.enter(sys.argv[1])
progress.update(step=7)
context = SimpleNamespace(
    job=SimpleNamespace(train=SimpleNamespace(step_timeout_s=0.05)), progress=progress
)
with watched(context, Ending(run_id="r", began=time.time())):
    threading.Event().wait()
"""


@pytest.mark.parametrize("stage", ["train", "judge"])
def test_a_stage_on_the_gpu_that_does_not_get_on_ends_with_69(tmp_path: Path, stage: str) -> None:
    """The process ends itself, and says at which step and what to look at."""
    message = tmp_path / "termination-log"
    message.touch()
    done = subprocess.run(
        [sys.executable, "-c", CODE, stage],
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LORA_JOB_TERMINATION_MESSAGE": str(message)},
    )
    said = json.loads(message.read_bytes())
    assert (done.returncode, said["code"], said["name"]) == (69, 69, "hardware")
    assert (said["stage"], said["step"]) == (stage, 7)
    assert "no step for" in said["what"]
