"""Whole runs in processes of their own: to the end, interrupted everywhere, and refused."""

import json
import signal
from pathlib import Path
from typing import Any

import pipelines
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from job.cli import main
from job.errors import ExitCode


def message(job: Path) -> dict[str, Any]:
    return json.loads((job.parent / "termination-log").read_bytes())


def published(job: Path) -> list[Path]:
    return sorted((job.parent / "store").glob("*/versions/*/manifest.json"))


def test_a_run_ends_with_a_version_that_can_be_fetched_and_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0, a Receipt, a version; fetch verifies it, transformers loads it, generate asks it."""
    job = pipelines.write_job(tmp_path)
    code, out, process = pipelines.run_job(job)
    assert code == 0, process.other
    receipt = json.loads(out)
    assert message(job)["receipt"] == receipt
    assert [event["stage"] for event in process.named("stage_finished")] == [
        "pull", "prepare", "train", "merge", "judge", "publish"
    ]  # fmt: skip
    attempt = tmp_path / "store" / "_runs" / receipt["run"] / "attempts" / "1"
    assert json.loads((attempt / "exit.json").read_bytes())["code"] == 0
    assert "<svg" in (attempt / "report.html").read_text()
    assert list(attempt.glob("log-*.jsonl"))

    spec = f"{tmp_path}/store/tiny@nightly"
    assert main(["fetch", spec, str(tmp_path / "got"), "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == receipt["version"]
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "got" / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    words = ["--max-new-tokens", "3", "--reasoning-language", "Hindi", "--output", "json"]
    assert main(["generate", str(tmp_path / "got" / "merged"), "Hello", *words]) == 0
    assert "analysis" in json.loads(capsys.readouterr().out)[0]

    got, other = tmp_path / "got", tiny.tiny_model(tmp_path / "other", "llama", seed=1)
    out = str(tmp_path / "out")
    assert main(["merge", str(got / "adapter"), str(other), out]) == int(ExitCode.NOT_PROVEN)
    assert "is not the base that this adapter was trained on" in capsys.readouterr().err
    assert main(["merge", str(got / "adapter"), str(got / "merged"), out]) == int(
        ExitCode.NOT_PROVEN
    )
    assert "was merged already" in capsys.readouterr().err
    assert main(["merge", str(got / "adapter"), str(tmp_path / "base"), out]) == 0
    twice = ["generate", str(got), "Hello", "--adapter", str(got / "adapter")]
    assert main(twice) == int(ExitCode.USAGE)

    code, again, process = pipelines.run_job(job)
    assert (code, json.loads(again)) == (0, receipt)
    assert "nothing was trained" in message(job)["what"]
    assert process.named("run_reused")
    assert not process.named("stage_finished")[1:]

    for path in (tmp_path / "store" / "tiny" / "versions").glob("*/manifest.json"):
        path.unlink()
    code, _, process = pipelines.run_job(job)
    assert code == int(ExitCode.NOT_FOUND)
    assert "--run-id" in process.named("run_finished")[0]["said"]


def test_sigterm_in_any_stage_ends_with_75_and_the_run_goes_on(tmp_path: Path) -> None:
    """Interrupted once in every stage: 75 each time, nothing published, then the whole result."""
    job = pipelines.write_job(tmp_path)
    for stage in ("pull", "prepare", "train", "merge", "judge", "publish"):
        with pipelines.started(job) as process:
            assert process.read_until("stage_started", stage=stage), process.other
            process.popen.send_signal(signal.SIGTERM)
            code, out = process.finish()
        assert (stage, code, out) == (stage, int(ExitCode.PREEMPTED), "")
        assert message(job)["name"] == "preempted"
        assert published(job) == []
    code, _, process = pipelines.run_job(job)
    assert code == 0, process.other
    assert len(published(job)) == 1
    assert {event["stage"] for event in process.named("artifact_reused")} >= {"prepare", "train"}


def test_a_killed_run_ends_with_the_same_adapter(tmp_path: Path) -> None:
    """Kill -9 in mid-training: the next attempt resumes, and the adapter is bit for bit the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny.tiny_model(tmp_path / "base", "llama")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.tiny_rows(24))
    digests = []
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "base").symlink_to(tmp_path / "base")
        (folder / "rows.jsonl").symlink_to(tmp_path / "rows.jsonl")
        job = pipelines.write_job(folder)
        if folder is killed:
            with pipelines.started(job) as process:
                assert process.read_until("checkpoint_saved"), process.other
                process.popen.kill()
        code, out, process = pipelines.run_job(job)
        assert code == 0, process.other
        digests.append(json.loads(out)["adapter_sha256"])
    assert process.named("checkpoint_restored")
    assert digests[0] == digests[1]


def test_two_processes_never_work_on_one_run(tmp_path: Path) -> None:
    """The second process on the same machine is told that the run is taken: 73."""
    job = pipelines.write_job(tmp_path)
    with pipelines.started(job) as first:
        assert first.read_until("stage_started", stage="pull")
        code, _, second = pipelines.run_job(job)
        assert code == int(ExitCode.TAKEN)
        assert "another process works on this run" in message(job)["what"]
        assert second.named("run_finished")[0]["code"] == int(ExitCode.TAKEN)


BAD: list[tuple[str, dict[str, Any], ExitCode, str]] = [
    ("no GPU", {"device": "cuda"}, ExitCode.HARDWARE, "GPU"),
    ("model missing", {"model": {"source": "nowhere"}}, ExitCode.NOT_FOUND, "nowhere"),
    ("data missing", {"data": {"source": "nowhere.jsonl"}}, ExitCode.NOT_FOUND, "nowhere.jsonl"),
    (
        "a parameter that the model lacks",
        {"lora": {"target_parameters": ["mlp.experts.gate_up_prj"]}},
        ExitCode.CONFIG,
        "gate_up_prj",
    ),
    (
        "a module that the model lacks",
        {"lora": {"target_modules": ["q_prj"]}},
        ExitCode.CONFIG,
        "did you mean q_proj",
    ),
]


@pytest.mark.parametrize(("name", "changes", "code", "words"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_one_line_and_its_code(
    tmp_path: Path, name: str, changes: dict[str, Any], code: ExitCode, words: str
) -> None:
    """Each gets its code and one line, no traceback, and nothing is published."""
    job = pipelines.write_job(tmp_path, **changes)
    got, out, process = pipelines.run_job(job)
    said = process.named("run_finished")[-1]["said"]
    assert (got, out) == (int(code), ""), said
    assert words in said
    assert "Traceback" not in "".join(process.other)
    assert not any("exception" in event for event in process.events)
    assert published(job) == []
