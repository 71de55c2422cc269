"""Layers are computed anew in the backward pass only where a step does not fit in memory without."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import trainbed
from datasets import Dataset
from structlog.testing import capture_logs

from job import estimate
from job.train import recompute
from job.train.collator import Collator
from job.train.lora import add_lora
from job.train.model import load_base
from job.train.peers import ALONE


@pytest.fixture
def bed(tmp_path):
    """A model with an adapter, and rows of 3 to 40 tokens."""
    tiny.tiny_model(tmp_path, "llama")
    job = trainbed.make_job(tmp_path, tmp_path, train={"gradient_checkpointing": "auto"})
    model = add_lora(load_base(tmp_path, device="cpu")[0], job.lora, seed=0)
    ids = [list(range(4, 4 + count)) for count in (3, 40, 7, 12)]
    lengths = [[len(it)] for it in ids]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "lengths": lengths})
    return job, model, rows, Collator(0, packed=True)


def picked(bed, **changes):
    """What is picked for the job with changes in its train section, and the reason told for it."""
    job, model, rows, collate = bed
    train = job.train.model_copy(update=changes.pop("train", {}))
    job = job.model_copy(update={"train": train, **changes})
    shape = estimate.Shape(
        parameters=10**8, whole=10**6, adapted=10**6, layers=30, hidden=576, intermediate=1536,
        heads=9, head_dim=64, kv_heads=3, vocabulary=49152, bytes_each=4, fused_attention=True,
    )  # fmt: skip
    with capture_logs() as logs:
        found = recompute.pick_recompute(model, rows, collate, job, shape, ALONE)
    return found, next((event["reason"] for event in logs), None)


@pytest.mark.parametrize("wish", [True, False])
def test_a_wish_is_done(bed, wish):
    """Nothing is tried, and nothing needs explaining."""
    assert picked(bed, train={"gradient_checkpointing": wish}) == (wish, None)


@pytest.mark.parametrize(("here", "found"), [(64e9, False), (1e9, True)])
def test_a_cpu_is_estimated(bed, monkeypatch, here, found):
    """Half of the machine's memory has to hold everything: a kernel kills without a word."""
    monkeypatch.setattr(estimate, "available_bytes", lambda _: int(here))
    assert picked(bed) == (found, "by estimate")


def test_a_gpu_is_tried_with_the_largest_batch(bed, monkeypatch):
    """Forward and backward without recomputation; out of memory is an answer, and no end."""
    tried = []

    def lack(_model, batch, _device):
        tried.append(batch["input_ids"].shape)
        return "CUDA out of memory. Tried to allocate 3 GB"

    monkeypatch.setattr(recompute, "memory_lack", lack)
    assert picked(bed, device="cuda") == (True, "CUDA out of memory. Tried to allocate 3 GB")
    assert tried == [(2, 40)]
    monkeypatch.setattr(recompute, "memory_lack", lambda *_: None)
    assert picked(bed, device="cuda") == (False, "the largest batch was tried")


def test_ranks_that_share_the_base_recompute(bed):
    """A trial that failed in one of them would leave the others waiting."""
    assert picked(bed, device="cuda", train={"sharding": "fsdp2"}) == (True, "by estimate")


@pytest.mark.parametrize("packed", [True, False])
def test_a_trial_leaves_nothing_behind(bed, packed):
    """No gradient, no other mode; the loss and its gradients were real."""
    _, model, rows, _ = bed
    batch, seen = recompute.largest_batch(rows, Collator(0, packed=packed), 2), []
    trained = [it for it in model.parameters() if it.requires_grad]
    trained[0].register_hook(lambda gradient: seen.append(float(gradient.abs().sum())))
    model.eval()
    assert recompute.memory_lack(model, batch, "cpu") is None
    assert len(seen) == 1
    assert np.isfinite(seen[0])
    assert all(it.grad is None for it in trained)
    assert not model.training


def test_a_trial_that_fails_says_why_and_frees_what_it_took(bed, monkeypatch):
    """The first line of torch's own words."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")

    _, model, rows, collate = bed
    monkeypatch.setattr(recompute, "summed_loss", fail)
    batch = recompute.largest_batch(rows, collate, 2)
    lack = recompute.memory_lack(model, batch, "cpu")
    assert lack == "CUDA out of memory. Tried to allocate 2 GiB."
