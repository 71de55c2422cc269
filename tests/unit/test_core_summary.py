"""What a run prints at its end."""

import io
from pathlib import Path

from job.artifacts import Adapter, Receipt
from job.files import write_json
from job.summary import print_summary

RECEIPT = Receipt(
    run="night-1",
    name="night",
    version="v",
    uri="store/night/versions/v",
    published="2026-11-22T10:00:00+00:00",
    adapter_sha256="a",
    manifest_sha256="m",
    size_bytes=1,
)


def summary(folder: Path, *, reused: bool) -> str:
    adapter = Adapter(
        folder=folder,
        sha256="a",
        steps=3,
        planned_steps=3,
        num_tokens=1000,
        final_loss=1.0,
        tokens_per_s=10.0,
        duration_s=100.0,
    )
    write_json(folder / "night-1" / "train" / "artifact.json", adapter.model_dump(mode="json"))
    out = io.StringIO()
    print_summary(RECEIPT, folder, out, reused=reused)
    return " ".join(out.getvalue().split())


def test_a_run_tells_its_figures_and_what_to_try_next(tmp_path: Path) -> None:
    """Figures, where the version is, and the command that fetches it."""
    said = summary(tmp_path, reused=False)
    assert "Trained 1,000 tokens in 3 steps" in said
    assert "fetch store/night@v my-adapter" in said


def test_a_rerun_of_a_published_run_does_not_pass_for_a_new_one(tmp_path: Path) -> None:
    """No old figures: when it was published, that nothing was trained, and how to have another."""
    said = summary(tmp_path, reused=True)
    assert "Trained" not in said
    assert "Published at 2026-11-22T10:00:00+00:00, verified again now; nothing was trained" in said
    assert "--run-id" in said
    assert "fetch store/night@v my-adapter" in said


def test_it_tells_what_the_start_was_spent_on(tmp_path: Path) -> None:
    """Seconds from the process's start to the first step, part by part."""
    folder = tmp_path / "night-1" / "train"
    parts = [("start_s", 1.0), ("pull_s", 20.5), ("total_s", 21.5)]
    write_json(folder / "startup.json", {"parts": parts})
    said = summary(tmp_path, reused=False)
    assert "the first step was done after 22 s: start 1, pull 20.5" in said
