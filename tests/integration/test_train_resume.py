"""A killed training goes on to the very same bits: dropout, accumulation and packing on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import trainbed

from job.errors import JobError
from job.progress import Progress
from job.stop import Stop, preempted
from job.train.meters import read_history
from job.train.stage import train

TRAIN = {"epochs": 3, "checkpoint_every_steps": 2}
KILLS = 25


class Killed(BaseException):
    """A kill from outside: no handler of ours may catch it."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A packed set of 10 rows, 9 steps in 3 epochs with a short last accumulation in each."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny.tiny_model(folder / "model", "llama")
    dataset = trainbed.make_dataset(folder / "data", "llama")
    job = trainbed.make_job(model, folder, train=TRAIN)
    return folder, job, trainbed.make_source(model), dataset


@pytest.fixture(scope="module")
def whole(bed):
    """The adapter of a run that nothing interrupts, its losses, and its number of beats."""
    folder, job, source, dataset = bed
    context = trainbed.make_context(job, folder / "whole")
    context.progress = Beats(None)
    adapter = train(context, source, dataset)
    assert adapter.steps == 9
    return adapter.sha256, losses(adapter), context.progress.count


class Beats(Progress):
    """Dies at the n-th sign of life."""

    def __init__(self, fatal):
        super().__init__()
        self.fatal, self.count = fatal, 0

    def update(self, **figures):
        """Count a beat."""
        super().update(**figures)
        self.count += 1
        if self.count == self.fatal:
            raise Killed


def losses(adapter):
    return [line["loss"] for line in read_history(adapter.folder / "history.jsonl")]


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_anywhere_it_goes_on_to_the_same_bits(bed, whole, tmp_path, kill):
    """At a random point: inside an accumulation, between steps, before the first checkpoint."""
    _, job, source, dataset = bed
    sha256, wanted, beats = whole
    dice = random.Random(kill)
    attempt = trainbed.FolderAttempt(tmp_path / "store")
    context = trainbed.make_context(job, tmp_path / "first", attempt=attempt)
    context.progress = Beats(dice.randint(1, beats))
    with pytest.raises(Killed):
        train(context, source, dataset)
    context = trainbed.make_context(job, tmp_path / "last", attempt=attempt)
    adapter = train(context, source, dataset)
    assert losses(adapter) == wanted
    assert adapter.sha256 == sha256


def test_stopped_at_every_step_it_goes_on_to_the_same_bits(bed, whole, tmp_path):
    """One attempt a step, as a cluster that takes the node away again and again."""
    _, job, source, dataset = bed
    attempt = trainbed.FolderAttempt(tmp_path / "store")
    for life in range(9):
        stop = Stop()
        context = trainbed.make_context(job, tmp_path / str(life), attempt=attempt, stop=stop)
        context.progress = Beats(None)
        real, context.progress.update = context.progress.update, None

        def update(*, real=real, stop=stop, **figures):
            real(**figures)
            if figures.get("step"):
                stop.request(preempted("SIGTERM"))

        context.progress.update = update
        context.stop.check()
        try:
            adapter = train(context, source, dataset)
        except JobError:
            continue
    context = trainbed.make_context(job, tmp_path / "last", attempt=attempt)
    adapter = train(context, source, dataset)
    assert adapter.sha256 == whole[0]
    assert losses(adapter) == whole[1]


def test_a_kill_while_saving_leaves_the_checkpoint_before(bed, whole, tmp_path, monkeypatch):
    """The staged folder is not taken for one."""
    _, job, source, dataset = bed
    attempt = trainbed.FolderAttempt(tmp_path / "store")
    context = trainbed.make_context(job, tmp_path / "first", attempt=attempt)
    from job.train import checkpoints

    real = checkpoints._save_tensors

    def save(path, tensors):
        if path.name == "optimizer.safetensors" and attempt.saved:
            raise Killed
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save_tensors", save)
        with pytest.raises(Killed):
            train(context, source, dataset)
    assert attempt.saved == [2]
    partial = context.work / "train.partial"
    assert any(p.name == "checkpoint-4.partial" for p in partial.iterdir())
    adapter = train(
        trainbed.make_context(job, tmp_path / "first", attempt=attempt), source, dataset
    )
    assert adapter.sha256 == whole[0]
    assert not any("checkpoint" in p.name for p in adapter.folder.iterdir())


def start(folder: Path, job_file: Path) -> subprocess.Popen[str]:
    tests = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "trainbed", str(folder), str(job_file)],
        env=os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(process: subprocess.Popen[str], count: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        count -= "checkpoint_saved" in line
        if count == 0:
            return
    raise AssertionError("it ended before it was killed")


def test_real_kills_of_real_processes(tmp_path):
    """SIGKILL at a random instant, SIGTERM later (75, checkpoint kept): the same bits as ever."""
    folder = tmp_path / "bed"
    model = tiny.tiny_model(folder / "model", "gpt_oss")
    dataset = trainbed.make_dataset(folder / "data", "gpt_oss")
    (folder / "dataset.json").write_text(dataset.model_dump_json())
    job = trainbed.make_job(model, folder, train={"max_steps": 400, "checkpoint_every_steps": 1})
    job_file = folder / "job.json"
    job_file.write_text(job.model_dump_json())
    dice = random.Random(5)
    process = start(folder, job_file)
    wait_for_checkpoint(process, 3)
    time.sleep(dice.random() * 0.4)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.stderr.close()
    process.stdout.close()
    shutil.rmtree(folder / "work")
    process = start(folder, job_file)
    wait_for_checkpoint(process, 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run: stopped by SIGTERM;" in said
    assert "Traceback" not in said
    newest = int(max((folder / "checkpoints").glob("[0-9]*")).name)
    assert newest >= 5
    # The interrupted run up to here, against one that nothing interrupted.
    stop = Stop()

    class Stopping(trainbed.FolderAttempt):
        def save_checkpoint(self, folder, step):
            if step == newest:
                super().save_checkpoint(folder, step)
                stop.request(preempted("SIGTERM"))

    whole = Stopping(tmp_path / "whole")
    context = trainbed.make_context(job, tmp_path / "there", attempt=whole, stop=stop)
    with pytest.raises(JobError):
        train(context, trainbed.make_source(model), dataset)
    here, there = folder / "checkpoints" / f"{newest:08}", tmp_path / "whole" / f"{newest:08}"
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
