"""Training with the store's own Attempt: what one pod saved, the next one goes on from."""

from __future__ import annotations

import pytest
import tiny
import trainbed

from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop, preempted
from job.store import open_store
from job.store.runs import take
from job.train.stage import train


def test_a_preempted_run_goes_on_from_the_store(tmp_path):
    """SIGTERM in one attempt, another owner's disk in the next: the bits of an unbroken run."""
    model = tiny.tiny_model(tmp_path / "model", "qwen3_moe")
    dataset = trainbed.make_dataset(tmp_path / "data", "qwen3_moe")
    job = trainbed.make_job(model, tmp_path, lora={"dropout": 0}, train={"epochs": 2})
    source = trainbed.make_source(model)

    def attempt(run, stop):
        progress = Progress()
        store = open_store(str(tmp_path / "store"), stop=stop)
        held = take(store, run, owner="me", job_text=b"{}", stop=stop, progress=progress)
        context = trainbed.make_context(job, tmp_path / f"{run}-{held.epoch}", stop=stop)
        context.attempt, context.progress = held, progress
        return context

    whole = train(attempt("whole", Stop()), source, dataset)
    stop = Stop()
    context = attempt("broken", stop)
    real = context.progress.update

    def update(**figures):
        real(**figures)
        if figures.get("step") == 3:
            stop.request(preempted("SIGTERM"))

    context.progress.update = update
    with pytest.raises(JobError) as caught:
        train(context, source, dataset)
    assert caught.value.code == ExitCode.PREEMPTED
    context.attempt.end({"code": 75})
    adapter = train(attempt("broken", Stop()), source, dataset)
    assert adapter.sha256 == whole.sha256
    assert adapter.steps == whole.steps == 6
