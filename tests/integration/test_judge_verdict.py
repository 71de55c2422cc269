"""The verdict: held-out loss against a plain computation, answers, reuse, stops."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import tiny
import torch
from structlog.testing import capture_logs

from job.artifacts import Adapter, Dataset, Source
from job.config import JobConfig, LoraSection
from job.context import Context
from job.errors import ExitCode, JobError
from job.files import sha256_file
from job.judge import IGNORED, held_out_loss, judge, read_documents
from job.progress import Progress
from job.speak import load_adapter
from job.stop import Stop, preempted
from job.train.lora import add_lora, save_adapter
from job.train.model import load_base

EXPERTS = ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]


def _rows(vocabulary: int) -> list[dict[str, Any]]:
    """Return rows of random tokens, some of them supervised."""
    dice = random.Random(0)
    rows = []
    for length in (5, 30, 12, 40, 9, 3, 3, 17, 8):
        ids = [dice.randrange(vocabulary) for _ in range(length)]
        labels = [token if dice.random() < 0.6 else IGNORED for token in ids]
        rows.append({"input_ids": ids, "labels": labels, "lengths": [length]})
    return rows


def _setting(folder: Path, arch: str, **lora: Any) -> tuple[Context, Source, Dataset, Adapter]:
    base = tiny.tiny_model(folder / "base", arch)
    model, _ = load_base(base, device="cpu")
    adapted = add_lora(model, LoraSection.model_validate({"rank": 4, **lora}), seed=1)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (folder / "train").mkdir()
    sha256 = save_adapter(adapted, folder / "train")
    (folder / "prepare").mkdir()
    rows = _rows(300)
    table = pyarrow.Table.from_pylist(rows)
    path = folder / "prepare" / "held_out.arrow"
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    tiny.tiny_tokenizer(arch).save_pretrained(folder / "prepare" / "tokenizer")
    job = JobConfig.model_validate(
        {
            "name": "judged",
            "device": "cpu",
            "store": "store",
            "model": {"source": "base"},
            "data": {"source": "data"},
            "judge": {
                "prompts": [{"user": "What is 3 plus 4?", "reasoning_language": "German"}],
                "max_new_tokens": 4,
                "temperature": 0,
            },
        }
    )
    context = Context(
        job=job,
        work=folder,
        cache=None,
        attempt=SimpleNamespace(started=0.0),  # type: ignore[arg-type]
        stop=Stop(),
        progress=Progress(),
    )
    files = {"model.safetensors": sha256_file(base / "model.safetensors")}
    dataset = Dataset(
        folder=folder / "prepare",
        digest="d",
        num_rows=1,
        num_examples=1,
        num_tokens=1,
        num_supervised_tokens=1,
        num_held_out=len(rows),
        stop_token_ids=[1],
        pad_token_id=0,
        thinking="keep",
    )
    adapter = Adapter(
        folder=folder / "train",
        sha256=sha256,
        steps=1,
        planned_steps=1,
        num_tokens=1,
        final_loss=1.0,
        tokens_per_s=1.0,
        duration_s=1.0,
    )
    return context, Source(folder=base, uri="file:base", files=files), dataset, adapter


def _plain_loss(model: Any, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Return the mean loss, one document at a time, from all logits."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        picked = labels != IGNORED
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        total += float(losses[picked].sum()) if picked.any() else 0.0
        count += int(picked.sum())
    return total / count, count


@pytest.mark.parametrize("arch", ["llama", "gpt_oss"])
def test_losses_are_those_of_each_document_alone(arch: str, tmp_path: Path) -> None:
    """Before is the base's, after is the adapter's (experts too), to 1e-5, each document alone."""
    lora: dict[str, Any] = {"target_parameters": EXPERTS} if arch == "gpt_oss" else {}
    context, model, dataset, adapter = _setting(tmp_path, arch, **lora)
    verdict = judge(context, model, dataset, adapter)

    base, _ = load_base(model.folder, device="cpu")
    rows = _rows(300)
    before, count = _plain_loss(base, rows)
    after, _ = _plain_loss(load_adapter(base, adapter.folder), rows)
    assert verdict.num_held_out_tokens == count
    assert verdict.held_out_loss_before == pytest.approx(before, abs=1e-5)
    assert verdict.held_out_loss_after == pytest.approx(after, abs=1e-5)
    assert abs(before - after) > 1e-2
    (answer,) = verdict.answers
    assert (answer.user, answer.reasoning_language) == ("What is 3 plus 4?", "German")
    assert answer.analysis_before + answer.before != answer.analysis_after + answer.after


def test_a_verdict_is_reused_for_the_same_adapter_only(tmp_path: Path) -> None:
    """The same inputs are not judged twice; another adapter is judged anew."""
    context, model, dataset, adapter = _setting(tmp_path, "llama")
    first = judge(context, model, dataset, adapter)
    with capture_logs() as said:
        assert judge(context, model, dataset, adapter) == first
    assert "artifact_reused" in [event["event"] for event in said]
    with capture_logs() as said:
        judge(context, model, dataset, adapter.model_copy(update={"sha256": "other"}))
    assert "held_out_loss_measured" in [event["event"] for event in said]


def test_a_stop_between_batches_leaves_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while judging is 75, and nothing is taken for a finished verdict later."""
    context, model, dataset, adapter = _setting(tmp_path, "llama")
    monkeypatch.setattr("job.judge.TOKENS_AT_ONCE", {"cpu": 8})
    beats = []

    def beat(**_: object) -> None:
        beats.append(1)
        if len(beats) == 2:
            context.stop.request(preempted("SIGTERM"))

    context.progress.update = beat  # type: ignore[method-assign]
    with pytest.raises(JobError) as caught:
        judge(context, model, dataset, adapter)
    assert caught.value.code is ExitCode.PREEMPTED
    assert len(beats) == 2
    assert not (tmp_path / "judge").exists()


def test_a_loss_that_is_not_finite_is_not_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter whose held-out loss is not a number is never published."""
    context, model, dataset, adapter = _setting(tmp_path, "llama")
    monkeypatch.setattr("job.judge.held_out_loss", lambda *_, **__: (float("nan"), 1))
    with pytest.raises(JobError, match="nan") as caught:
        judge(context, model, dataset, adapter)
    assert caught.value.code is ExitCode.NOT_PROVEN


def test_nothing_held_out_and_nothing_asked_loads_no_model(tmp_path: Path) -> None:
    """Without held-out rows and prompts the verdict is empty, and the stage takes no time."""
    context, model, dataset, adapter = _setting(tmp_path, "llama")
    quiet = context.job.judge.model_copy(update={"prompts": []})
    job = context.job.model_copy(update={"judge": quiet})
    context = Context(
        job=job,
        work=tmp_path,
        cache=None,
        attempt=context.attempt,
        stop=Stop(),
        progress=Progress(),
    )
    nowhere = model.model_copy(update={"folder": tmp_path / "absent"})
    verdict = judge(context, nowhere, dataset.model_copy(update={"num_held_out": 0}), adapter)
    assert verdict.held_out_loss_before is None
    assert verdict.answers == []


def test_batches_hold_no_more_than_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the same in small batches and in large ones; every document is told of once."""
    _, model, dataset, _ = _setting(tmp_path, "llama")
    base, _ = load_base(model.folder, device="cpu")
    documents = read_documents(dataset.folder / "held_out.arrow")
    losses = []
    for at_once in (1, 64, 10_000):
        told: list[int] = []
        monkeypatch.setattr("job.judge.TOKENS_AT_ONCE", {"cpu": at_once})
        losses.append(held_out_loss(base, documents, device="cpu", tick=told.append)[0])
        assert sum(told) == len(documents)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)
