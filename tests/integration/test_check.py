"""`check`: what would run, said before anything is paid for."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from job import estimate
from job.artifacts import Source
from job.check import check, print_report
from job.config import JobConfig
from job.errors import ExitCode, JobError
from job.stop import Stop


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with MXFP4 blocks and scales."""
    return tiny.tiny_model(tmp_path_factory.mktemp("base"), "gpt_oss", mxfp4=True)


def job_file(tmp_path: Path, base: Path, **sections: Any) -> JobConfig:
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        tiny.write_rows(rows, tiny.tiny_rows(40))
    settings: dict[str, Any] = {
        "name": "checked", "device": "cpu", "store": str(tmp_path / "store"),
        "model": {"source": str(base)},
        "data": {"source": str(rows), "max_length": 512, "held_out": 0.1},
        "lora": {"rank": 4, "target_parameters": ["1.mlp.experts.gate_up_proj"]},
    }  # fmt: skip
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section} if section else section
    return JobConfig.model_validate(settings)


def test_all_is_well(tmp_path: Path, base: Path) -> None:
    """A good job file: every part ok, with data, steps, memory and disk, as JSON and for people."""
    report = check(job_file(tmp_path, base), stop=Stop())
    assert report["code"] == 0
    assert [tried["check"] for tried in report["checks"] if tried["ok"]] == [
        "store", "hub", "model", "data", "adapter", "rows",
    ]  # fmt: skip
    assert report["data"]["rows_kept"] == 40
    assert report["steps"] == 3
    assert report["memory"]["total"] == sum(
        size for term, size in report["memory"].items() if term != "total"
    )
    json.dumps(report, allow_nan=False)
    plain, coloured = io.StringIO(), Terminal()
    print_report(report, plain)
    print_report(report, coloured)
    assert "⟦<|channel|>analysis<|message|>" in plain.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert "\x1b[32m<|channel|>analysis<|message|>" in coloured.getvalue()
    assert "ready to run" in plain.getvalue()


def test_a_job_for_a_gpu_is_ready_elsewhere(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU here the job is no worse, and one line says what a run here would end with."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    job = job_file(tmp_path, base).model_copy(update={"device": "cuda"})
    report = check(job, stop=Stop())
    assert report["code"] == 0
    text = io.StringIO()
    print_report(report, text)
    assert "sees no GPU here: a run here would end with 69" in text.getvalue()
    assert "ready to run, on a node with a GPU" in text.getvalue()
    assert "too few to judge by" in text.getvalue()


def test_every_fault_is_told_at_once(tmp_path: Path, base: Path) -> None:
    """A wrong name in the adapter does not hide the bad row, and both have near words and places."""
    rows = tiny.tiny_rows(3)
    rows[1]["messages"][1]["role"] = "narrator"
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    lora = {"target_parameters": ["1.mlp.experts.gate_up_porj"]}
    report = check(job_file(tmp_path, base, lora=lora), stop=Stop())
    adapter, faulty = (tried for tried in report["checks"] if not tried["ok"])
    assert (adapter["check"], adapter["code"]) == ("adapter", ExitCode.CONFIG)
    assert "1.mlp.experts.gate_up_proj" in adapter["do"]
    assert (faulty["check"], faulty["code"]) == ("rows", ExitCode.DATA)
    assert faulty["where"] == "rows.jsonl:2"
    assert report["code"] == ExitCode.CONFIG
    assert report["data"]["rows_invalid"] == 1
    text = io.StringIO()
    print_report(report, text)
    assert "not ready: exit code 78" in text.getvalue()


@pytest.mark.parametrize(
    ("lora", "near"),
    [
        ({"target_modules": ["q_porj"], "target_parameters": []}, "q_proj"),
        ({"modules_to_save": ["lm_haed"]}, "lm_head"),
    ],
)
def test_names_have_near_misses(tmp_path: Path, base: Path, lora: Any, near: str) -> None:
    """Wrong modules are refused with the names that come near."""
    report = check(job_file(tmp_path, base, lora=lora), stop=Stop())
    fault = next(tried for tried in report["checks"] if not tried["ok"])
    assert fault["code"] == ExitCode.CONFIG
    assert near in fault["do"]


def test_missing_sources(tmp_path: Path, base: Path) -> None:
    """A model or data that is not there is 66, and the rest is still tried."""
    report = check(job_file(tmp_path, base, data={"source": "no/rows"}), stop=Stop())
    assert report["code"] == ExitCode.NOT_FOUND
    report = check(job_file(tmp_path, base, model={"source": "no/model"}), stop=Stop())
    assert report["code"] == ExitCode.NOT_FOUND


def test_sharded_ranks_hold_a_share_each(tmp_path: Path, base: Path) -> None:
    """FSDP2 on eight GPUs: embeddings and head, an eighth of the layers, and two of them whole."""
    source = Source(folder=base, uri="file:x", files={})
    shape = estimate.measure(job_file(tmp_path, base), source)
    layers = shape.parameters - shape.whole
    assert 0 < shape.whole < shape.parameters

    def weights(**train: object) -> int:
        job = job_file(tmp_path, base, train=train)
        on_gpu = job.model_copy(update={"device": "cuda"})
        return estimate.memory(on_gpu, shape, 64)["weights"] // shape.bytes_each

    assert weights(num_processes=8) == shape.parameters
    share = layers / 8 + 2 * layers / shape.layers
    assert weights(num_processes=8, sharding="fsdp2") == shape.whole + math.ceil(share)


def test_ranks_on_a_cpu_share_its_memory(tmp_path: Path, base: Path) -> None:
    """Each rank has a base of its own there."""
    source = Source(folder=base, uri="file:x", files={})
    shape = estimate.measure(job_file(tmp_path, base), source)
    one, two = (
        sum(estimate.memory(job_file(tmp_path, base, train=train), shape, 64).values())
        for train in ({}, {"num_processes": 2})
    )
    assert two == 2 * one


def test_a_20b_model_is_measured_without_weights(tmp_path: Path) -> None:
    """gpt-oss-20b's recipe, from its config alone: 20.9 billion parameters, one 80 GB card."""
    from transformers import GptOssConfig

    GptOssConfig(num_hidden_layers=24, num_local_experts=32, dtype="bfloat16").save_pretrained(
        tmp_path / "20b"
    )
    layers = [f"{n}.mlp.experts.{p}" for n in (7, 15, 23) for p in ("gate_up_proj", "down_proj")]
    lora = {"rank": 8, "target_parameters": layers}
    job = job_file(tmp_path, tmp_path / "20b", lora=lora).model_copy(update={"device": "cuda"})
    source = Source(folder=tmp_path / "20b", uri="hf://openai/gpt-oss-20b", files={})
    shape = estimate.measure(job, source)
    assert shape.parameters == 20_914_757_184
    assert shape.adapted == 15_040_512
    memory = estimate.memory(job, shape, 2048)
    assert 40e9 < memory["weights"] < 43e9
    assert 45e9 < sum(memory.values()) < 80e9


def test_unknown_architecture(tmp_path: Path) -> None:
    """A config that transformers does not know is refused by name."""
    (tmp_path / "config.json").write_text('{"model_type": "from-the-future"}')
    source = Source(folder=tmp_path, uri="file:x", files={})
    with pytest.raises(JobError, match="from-the-future") as caught:
        estimate.measure(job_file(tmp_path, tmp_path), source)
    assert caught.value.code is ExitCode.NOT_FOUND
