"""Packed rows: nothing leaks, nothing is lost, and where that fails nothing is packed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import trainbed
from datasets import Dataset

from job.train import preflight
from job.train.collator import IGNORED, Collator, Order, build_masks, unpack
from job.train.loss import summed_loss
from job.train.model import load_base
from job.train.preflight import packing_fault, pick_documents


def base_model(folder, arch, attention="auto"):
    tiny.tiny_model(folder, arch)
    return load_base(folder, device="cpu", attention=attention)[0]


def some_documents(arch, n=4):
    return [np.asarray(ids) for ids, _ in trainbed.tokens_of(arch, n)]


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_packed_documents_are_computed_as_they_are_alone(tmp_path, arch, attention):
    """Every architecture, windows shorter than the documents included: 1e-5 in fp32."""
    model = base_model(tmp_path, arch, attention)
    documents = some_documents(arch)
    assert min(map(len, documents)) > 8
    row = {
        "input_ids": np.concatenate(documents),
        "labels": np.concatenate(documents),
        "lengths": [len(d) for d in documents],
    }
    short = {"input_ids": documents[0], "labels": documents[0], "lengths": [len(documents[0])]}
    batch = Collator(0, packed=True)([row, short])
    masks = build_masks(batch["documents"], model.config, torch.float32)
    with torch.no_grad():
        packed = model(batch["input_ids"], masks, position_ids=batch["position_ids"]).logits
        start = 0
        for tokens in documents:
            alone = model(torch.tensor(tokens)[None]).logits[0]
            gap = (packed[0, start : start + len(tokens)] - alone).abs().max()
            assert gap < 1e-5
            start += len(tokens)
    assert torch.isfinite(packed).all()


def test_what_transformers_does_alone_leaks_on_gpt_oss(tmp_path):
    """The landmine that our masks are for: position_ids alone let documents see each other."""
    model = base_model(tmp_path, "gpt_oss")
    first, second = some_documents("gpt_oss", 2)
    positions = torch.tensor([*range(len(first)), *range(len(second))])[None]
    ids = torch.tensor(np.concatenate([first, second]))[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits[0, len(first) :]
        alone = model(torch.tensor(second)[None]).logits[0]
    assert (packed - alone).abs().max() > 0.1


@pytest.mark.parametrize("arch", ["gpt_oss", "smollm2", "gemma3"])
def test_packed_and_padded_rows_give_the_same_gradient(tmp_path, arch):
    """Weighted by supervised tokens, it does not matter how examples are laid out."""
    model = base_model(tmp_path, arch)
    examples = trainbed.tokens_of(arch, 5)
    rows = [{"input_ids": i, "labels": y, "lengths": [len(i)]} for i, y in examples]
    pack = {
        "input_ids": [t for i, _ in examples for t in i],
        "labels": [t for _, y in examples for t in y],
        "lengths": [len(i) for i, _ in examples],
    }
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight)

    def gradient(batches, packed):
        weight.grad = None
        supervised = sum(int((b["labels"] != IGNORED).sum()) for b in batches)
        for batch in batches:
            inputs = {"input_ids": batch["input_ids"]}
            if packed:
                inputs["position_ids"] = batch["position_ids"]
                inputs["attention_mask"] = build_masks(
                    batch["documents"], model.config, torch.float32
                )
            loss, _ = summed_loss(model, inputs, batch["labels"], aux=False)
            (loss / supervised).backward()
        return supervised, weight.grad.clone()

    padded = Collator(0, packed=False)
    count, expected = gradient([padded(rows[:2]), padded(rows[2:])], packed=False)
    packed_count, got = gradient([Collator(0, packed=True)([pack])], packed=True)
    assert packed_count == count
    assert (got - expected).abs().max() < 1e-6
    assert expected.abs().max() > 1e-3


def test_a_documents_first_token_is_never_a_target():
    """Position i is predicted from i - 1, which lies in another document."""
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "lengths": [2, 3]}
    batch = Collator(0, packed=True)([row, {**row, "lengths": [5]}])
    assert batch["labels"].tolist() == [
        [IGNORED, 6, IGNORED, 8, 9],
        [IGNORED, 6, 7, 8, 9],
    ]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 2]
    assert batch["documents"][0].tolist() == [1, 1, 2, 2, 2]


def test_padding_is_not_real():
    """Rows are padded to the right, with no loss there."""
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "lengths": [3]},
        {"input_ids": [5], "labels": [5], "lengths": [1]},
    ]
    batch = Collator(9, packed=False)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]
    assert batch["real"].sum() == 4
    assert set(batch) == {"input_ids", "labels", "real"}


def test_the_preflight_passes_where_packing_is_right(tmp_path):
    """Mixed sliding and full layers, sinks and experts: allowed."""
    assert packing_fault(base_model(tmp_path, "gpt_oss"), some_documents("gpt_oss"), 0) is None


def test_the_preflight_refuses_a_model_that_leaks(tmp_path, monkeypatch):
    """If a model's attention does not keep to the mask, packing is refused, with the figures."""
    model = base_model(tmp_path, "llama")

    def causal(documents, config, dtype):
        return build_masks(torch.ones_like(documents), config, dtype)

    monkeypatch.setattr("job.train.preflight.build_masks", causal)
    fault = packing_fault(model, some_documents("llama"), 0)
    assert fault is not None
    assert "packed logits differ by" in fault


@pytest.mark.parametrize("arch", ["gpt_oss", "llama"])
def test_in_bf16_a_leak_is_told_from_rounding(tmp_path, monkeypatch, arch):
    """Rounding may send a token to another expert; what another document says may change nothing."""
    tiny.tiny_model(tmp_path, arch, dtype=torch.bfloat16)
    model = load_base(tmp_path, device="cpu", dtype="bfloat16")[0]
    documents, real = some_documents(arch), preflight._alone
    assert packing_fault(model, documents, 0) is None

    def noisy(model, tokens):
        logits = real(model, tokens)
        return logits + 0.1 * logits.abs().mean() * torch.randn(logits.shape)

    monkeypatch.setattr(preflight, "_alone", noisy)
    assert packing_fault(model, documents, 0) is None

    def causal(documents, config, dtype):
        return build_masks(torch.ones_like(documents), config, dtype)

    monkeypatch.setattr(preflight, "build_masks", causal)
    monkeypatch.setattr(preflight, "LIMIT_BF16", 10)
    assert "another document before them" in packing_fault(model, documents, 0)


def test_the_preflight_refuses_an_unknown_architecture(tmp_path):
    """What no test shows to be right is not packed, and it says so."""
    model = base_model(tmp_path, "llama")
    model.config.model_type = "strange"
    fault = packing_fault(model, some_documents("llama"), 0)
    assert fault == "packing is not proven for the architecture strange"


def test_unpacking_gives_the_documents_back():
    """The fall-back of the preflight: one document a row, nothing lost."""
    rows = Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3, 4, 5], [6, 7]],
            "labels": [[1, 2, -100, 4, 5], [-100, 7]],
            "lengths": [[2, 3], [2]],
        }
    )
    got = unpack(rows)
    assert got["input_ids"][:] == [[1, 2], [3, 4, 5], [6, 7]]
    assert got["labels"][:] == [[1, 2], [-100, 4, 5], [-100, 7]]
    assert got["lengths"][:] == [[2], [3], [2]]
    assert unpack(rows.select([1]))["input_ids"][:] == [[6, 7]]


def test_documents_for_the_preflight_are_few_and_short():
    """The check takes a second whatever the rows are."""
    rows = Dataset.from_dict(
        {"input_ids": [list(range(900)), [1, 2]], "lengths": [[500, 400], [2]]}
    )
    assert [len(d) for d in pick_documents(rows)] == [160, 80, 2]


def test_order_is_a_function_of_seed_and_epoch():
    """Every row once an epoch, like lengths together, another order each epoch."""
    lengths = [5, 900, 6, 7, 950, 8, 910, 5, 6]
    order = Order(lengths, batch_size=2, seed=4)
    first = list(order)
    assert first == list(Order(lengths, batch_size=2, seed=4))
    assert sorted(first) == list(range(9))
    order.set_epoch(1)
    assert list(order) != first
    batches = [sorted(lengths[i] for i in first[j : j + 2]) for j in range(0, 8, 2)]
    assert sum(high - low for low, high in batches) < 60
