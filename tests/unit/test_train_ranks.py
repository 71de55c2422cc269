"""Ranks without starting any: who gets which rows, what they end with, how many there are."""

from __future__ import annotations

import json

import pytest
import torch
import trainbed

from job.errors import ExitCode, JobError
from job.estimate import planned_steps
from job.train import ranks
from job.train.collator import Collator, Order, with_blank
from job.train.devices import num_processes


def steps_of(orders, batch_size, accumulation):
    """Return the rows of each optimiser step, over all ranks, without blank ones."""
    batches = []
    for order in orders:
        rows = list(order)
        assert len(order) == len(rows)
        batches.append([rows[i : i + batch_size] for i in range(0, len(rows), batch_size)])
    assert len({len(mine) for mine in batches}) == 1
    found = []
    for start in range(0, len(batches[0]), accumulation):
        step = [row for mine in batches for b in mine[start : start + accumulation] for row in b]
        found.append(sorted(row for row in step if row < len(orders[0].lengths)))
    return found


@pytest.mark.parametrize("num_rows", [8, 9, 11, 13, 1])
def test_ranks_share_the_rows_of_one_processs_steps(num_rows):
    """Also at an epoch's end, where some rank finds no batch."""
    lengths = [5 + 7 * i % 11 for i in range(num_rows)]
    one = steps_of([Order(lengths, 2, 4)], 2, 6)
    three = steps_of([Order(lengths, 2, 4, rank=r, size=3) for r in range(3)], 2, 2)
    assert three == one
    section = trainbed.make_job("m", "s").train.model_copy(update={"gradient_accumulation": 2})
    assert planned_steps(section, num_rows, 3) == len(one)


def test_a_blank_row_is_padding_alone():
    """No real token, no target: nothing to learn from, and nothing counted."""
    import datasets

    columns = {"input_ids": [[5, 6]], "labels": [[5, 6]], "lengths": [[2]]}
    rows = with_blank(datasets.Dataset.from_dict(columns)).with_format("numpy")
    for packed in (True, False):
        batch = Collator(9, packed=packed)([rows[1]])
        assert batch["input_ids"].tolist() == [[9]]
        assert batch["labels"].tolist() == [[-100]]
        assert not batch["real"].any()


def test_as_many_ranks_as_asked_or_as_there_are_gpus(monkeypatch):
    """More than there are is told before anything is loaded."""
    job = trainbed.make_job("m", "s")
    assert num_processes(job) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    on_cuda = job.model_copy(update={"device": "cuda"})
    assert num_processes(on_cuda) == 8
    wanting = on_cuda.train.model_copy(update={"num_processes": 9})
    with pytest.raises(JobError, match="only 8 GPU") as caught:
        num_processes(on_cuda.model_copy(update={"train": wanting}))
    assert caught.value.code == ExitCode.HARDWARE


def record(folder, rank, code, time):
    words = {"code": int(code), "where": f"rank {rank}", "what": "w", "do": "d"}
    (folder / f"error-{rank}.json").write_text(json.dumps({**words, "rank": rank, "time": time}))


def test_the_first_real_reason_wins(tmp_path):
    """Ranks that only lost the others are heard last, and a silent one is named."""
    failed = RuntimeError("the agent's words")
    assert ranks._explain(failed, tmp_path, 3) is failed
    record(tmp_path, 0, ExitCode.HARDWARE, 1.0)
    record(tmp_path, 2, ExitCode.HARDWARE, 1.5)
    error = ranks._explain(failed, tmp_path, 3)
    assert error.code == ExitCode.HARDWARE
    assert "rank 1 ended without a word" in str(error)
    record(tmp_path, 2, ExitCode.NOT_PROVEN, 3.0)
    record(tmp_path, 1, ExitCode.OUT_OF_RESOURCES, 2.0)
    error = ranks._explain(failed, tmp_path, 3)
    assert (error.code, error.where) == (ExitCode.OUT_OF_RESOURCES, "rank 1")
    record(tmp_path, 0, 1, 0.5)
    assert str(ranks._explain(failed, tmp_path, 3)) == "rank 0:\nw"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"sharding": "fsdp2"}, "lora": {"expert_forward": "fold"}}, "needs lora.expert"),
        ({"train": {"sharding": "fsdp2", "num_processes": 1}}, "more than one"),
    ],
)
def test_sharding_that_cannot_be_is_refused_before_anything_runs(sections, says):
    """By the job file alone."""
    with pytest.raises(ValueError, match=says):
        trainbed.make_job("m", "s", **sections)


def test_sharding_alone_is_refused():
    """One GPU is there, and the job file leaves the number open."""
    from job.train.peers import ALONE
    from job.train.sharding import shard_base

    with pytest.raises(JobError, match="more than one process") as caught:
        shard_base(None, ALONE, "cpu")
    assert caught.value.code == ExitCode.CONFIG
