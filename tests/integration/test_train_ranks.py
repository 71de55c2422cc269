"""Several processes train as one would: the same steps, one end for all, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranking
import tiny
import trainbed
from safetensors.torch import load_file
from structlog.testing import capture_logs

from job.errors import ExitCode, JobError
from job.train import ranks
from job.train.meters import read_history
from job.train.stage import train


class Bed:
    """11 rows: the last batch is short, and the last step has a rank without rows."""

    def __init__(self, folder: Path, arch: str = "llama") -> None:
        self.folder = folder
        self.model = tiny.tiny_model(folder / "model", arch)
        self.dataset = trainbed.make_dataset(folder / "data", arch, 11, packed=False)
        self.source = trainbed.make_source(self.model)

    def train(self, name, processes, *, stop=None, attempt=None, lora=None, **section):
        """Train with as many processes, and the same global batch."""
        lora = {"dropout": 0, **(lora or {})}
        settings = {"epochs": 2, "gradient_accumulation": 2 // processes, **section}
        job = trainbed.make_job(
            self.model,
            self.folder,
            data={"packing": False},
            lora=lora,
            train={"num_processes": processes, **settings},
        )
        self.context = trainbed.make_context(job, self.folder / name, attempt=attempt, stop=stop)
        return train(self.context, self.source, self.dataset)


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return Bed(tmp_path_factory.mktemp("ranks"))


def check_same(one, two, rel=1e-4):
    ours, theirs = (read_history(a.folder / "history.jsonl") for a in (two, one))
    assert len(ours) == len(theirs) == one.steps == two.steps
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=rel)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * rel)
        for exact in ("step", "num_tokens", "learning_rate"):
            assert mine[exact] == other[exact]
    weights = [load_file(a.folder / "adapter_model.safetensors") for a in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        scale = float(tensor.abs().max())
        assert float((weights[1][name] - tensor).abs().max()) < 0.02 * scale, name


def test_two_ranks_train_what_one_process_does(tmp_path):
    """The same global batch, experts and router's loss included: the same losses and adapter."""
    bed = Bed(tmp_path, "gpt_oss")
    lora = {"target_parameters": ["1.mlp.experts.gate_up_proj"]}
    alone = bed.train("one", 1, lora=lora)
    with capture_logs() as logs:
        both = bed.train("two", 2, lora=lora)
    assert alone.planned_steps == both.planned_steps == 6
    check_same(alone, both)
    events = [e["event"] for e in logs]
    assert events.count("ranks_started") == events.count("trained") == 1
    assert {"base_loaded", "checkpoint_saved", "train_step"} <= set(events)
    figures = bed.context.progress.snapshot()
    assert (figures["step"], figures["num_steps"]) == (6, 6)
    assert not [p.name for p in both.folder.iterdir() if p.is_dir()]


def test_sharded_layers_train_what_whole_ones_do(tmp_path):
    """FSDP2 shares the frozen layers out; with recomputation and experts."""
    bed = Bed(tmp_path, "gpt_oss")
    lora = {"target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]}
    section = {"gradient_checkpointing": True, "epochs": 1}
    alone = bed.train("one", 1, lora=lora, **section)
    with capture_logs() as logs:
        both = bed.train("two", 2, lora=lora, sharding="fsdp2", **section)
    check_same(alone, both)
    (told,) = [e for e in logs if e["event"] == "base_sharded"]
    assert told["ranks"] == 2
    layers = sum(
        t.nbytes
        for n, t in load_file(bed.model / "model.safetensors").items()
        if n.startswith("model.layers.")
    )
    assert told["sharded_gb"] == pytest.approx(layers / 2 / 1e9, rel=0.05)


def start(folder: Path, job_file: Path) -> subprocess.Popen[str]:
    tests = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "trainbed", str(folder), str(job_file)],
        env=os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_sigterm_ends_all_at_one_step_and_it_goes_on(bed, tmp_path):
    """Sent to the whole process group: one checkpoint, 75, and then as if nothing had been."""
    slowly = {"epochs": 20, "learning_rate": 1e-4}
    job = trainbed.make_job(
        bed.model,
        bed.folder,
        data={"packing": False},
        lora={"dropout": 0},
        train={"num_processes": 2, "gradient_accumulation": 1, **slowly},
    )
    (tmp_path / "dataset.json").write_text(bed.dataset.model_dump_json())
    job_file = tmp_path / "job.json"
    job_file.write_text(job.model_dump_json())
    process = start(tmp_path, job_file)
    assert process.stderr is not None
    for line in process.stderr:
        if "train_step" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run: stopped by SIGTERM;" in said
    assert "Traceback" not in said
    attempt = trainbed.FolderAttempt(tmp_path / "checkpoints")
    (saved,) = attempt.folder.glob("[0-9]*")
    assert 1 <= json.loads((saved / "checkpoint.json").read_text())["step"] < 60
    both = bed.train("on", 2, attempt=attempt, **slowly)
    check_same(bed.train("whole", 1, **slowly), both)


@pytest.mark.parametrize(
    ("entry", "code", "says"),
    [
        (ranking.out_of_memory, ExitCode.OUT_OF_RESOURCES, "out of memory"),
        (ranking.killed, ExitCode.HARDWARE, "rank 1 ended without a word"),
    ],
)
def test_one_ranks_failure_ends_all_with_its_code(bed, monkeypatch, entry, code, says):
    """Also where the others only notice that it has gone."""
    monkeypatch.setattr(ranks, "rank_main", entry)
    with pytest.raises(JobError, match=says) as caught:
        bed.train(f"failed-{code}", 2)
    assert caught.value.code == code


def test_a_bug_in_a_rank_stays_a_bug(bed, monkeypatch):
    """With the rank's own traceback, also where another rank is seen to leave first."""
    monkeypatch.setattr(ranks, "rank_main", ranking.broken)
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*ZeroDivisionError: a bug of rank 1"):
        bed.train("bug", 2)


def test_a_store_that_refuses_the_checkpoint_ends_it(bed):
    """The reason is the store's own, and it is not taken for a rank's."""

    class Full(trainbed.FolderAttempt):
        def save_checkpoint(self, *_):
            raise JobError(ExitCode.STORE, "s3://store", "no success within 1200 s", "look")

    with pytest.raises(JobError, match="no success") as caught:
        bed.train("full", 2, attempt=Full(bed.folder / "full-store"))
    assert caught.value.code == ExitCode.STORE


def test_a_checkpoint_of_another_number_of_ranks_is_refused(bed):
    """The global batch would be another one."""
    bed.train("first", 1, max_steps=1)
    attempt = trainbed.FolderAttempt(bed.context.attempt.folder)
    with pytest.raises(JobError, match="processes") as caught:
        bed.train("then", 2, attempt=attempt, max_steps=1, gradient_accumulation=2)
    assert caught.value.code == ExitCode.DATA
