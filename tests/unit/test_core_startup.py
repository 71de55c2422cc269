"""The start-up: timed part by part, and its heavy imports brought in while the network is slow."""

from __future__ import annotations

import sys
import threading

import pytest
import structlog

from job.pipeline import imported_meanwhile
from job.progress import FIRST_STEP, Progress, process_age_s


def test_parts_add_up_to_the_first_step_and_are_told_once():
    """One event; what ends later, or twice, changes nothing."""
    progress = Progress()
    assert progress.startup() == {}
    with structlog.testing.capture_logs() as logs:
        for part in ("start", "pull", "pull", FIRST_STEP, FIRST_STEP, "merge"):
            progress.end(part)
    (event,) = logs
    assert event["event"] == "startup"
    parts = progress.startup()
    assert list(parts) == ["start_s", "pull_s", "first_step_s", "total_s"]
    assert sum(list(parts.values())[:-1]) == pytest.approx(parts["total_s"], abs=0.3)
    assert 0 < parts["total_s"] <= process_age_s() + 0.1


def test_modules_are_imported_while_the_block_waits(tmp_path, monkeypatch):
    """One that is broken is left to whoever needs it; the block's own error ends the rest."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_one.py").write_text("raise ImportError('torn')")
    (tmp_path / "heavy_one.py").write_text("import threading; where = threading.current_thread()")
    with imported_meanwhile("broken_one", "heavy_one"):
        pass
    assert sys.modules.pop("heavy_one").where is not threading.main_thread()
    with pytest.raises(ImportError, match="torn"):
        __import__("broken_one")
    (tmp_path / "slow_one.py").write_text("import gate_one; gate_one.opened.wait(60)")
    (tmp_path / "gate_one.py").write_text("import threading; opened = threading.Event()")
    gate = __import__("gate_one")

    def fail():
        with imported_meanwhile("slow_one", "heavy_one"):
            threading.Timer(0.2, gate.opened.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "heavy_one" not in sys.modules
