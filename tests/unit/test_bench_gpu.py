"""The GPU benchmark's own path, at tiny size: a rented card finds no dead code."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench import bench_gpu


@pytest.mark.parametrize("part", ["gpt-oss", "qwen2.5-1.5b"])
def test_every_way_is_measured_and_written(tmp_path, capsys, part):
    """The recipe and each lever, on one base that is as it was after each."""
    assert bench_gpu.main(["--tiny", "--only", part, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{part}.json").read_text())
    ways = [way.name for way in bench_gpu.PARTS[part].ways]
    assert sorted(found["results"]) == sorted(ways)
    assert found["not_measured"] == []
    for name, figures in found["results"].items():
        assert "failed" not in figures, name
        assert figures["tokens_per_s"] > 0
        assert figures["ratio"] > 0
    assert found["results"]["recipe"]["ratio"] == 1
    assert all(f"| {way} |" in capsys.readouterr().out for way in ways[:1])


def test_a_way_that_runs_out_of_memory_leaves_the_base_to_the_next(tmp_path, monkeypatch):
    """It is named with its reason, and the others train what they would have trained."""
    from job.train import trainer

    ways = tuple(w for w in bench_gpu.PARTS["qwen2.5-1.5b"].ways if w.name in ("all", "recipe"))
    part = dataclasses.replace(bench_gpu.PARTS["qwen2.5-1.5b"], ways=(ways[1], ways[0], ways[1]))
    monkeypatch.setitem(bench_gpu.PARTS, "qwen2.5-1.5b", part)
    whole, calls = trainer.summed_loss, []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return whole(*arguments)

    monkeypatch.setattr(trainer, "summed_loss", fails_once)
    seen = []
    monkeypatch.setattr(bench_gpu, "_say", lambda name, figures: seen.append((name, figures)))
    bench_gpu.run_part("qwen2.5-1.5b", tmp_path, tiny=True)
    assert [name for name, _ in seen] == ["all", "recipe", "all"]
    assert seen[0][1] == {"failed": "CUDA out of memory. Tried"}
    assert all(figures["tokens_per_s"] > 0 for _, figures in seen[1:])


def test_a_profile_names_the_operations(tmp_path, capsys):
    """Of the way with every lever, in a file too."""
    flags = ["--tiny", "--only", "qwen2.5-1.5b", "--profile", "--out", str(tmp_path)]
    assert bench_gpu.main(flags) == 0
    table = (tmp_path / "qwen2.5-1.5b.profile.txt").read_text()
    assert "aten::mm" in table
    assert table in capsys.readouterr().out


def test_what_there_is_no_time_for_is_named(tmp_path):
    """A part that runs out of its minutes says what is missing."""
    found = bench_gpu.run_part("gpt-oss", tmp_path, tiny=True, limit_s=-1)
    assert found["results"] == {}
    assert found["not_measured"][0] == "recipe"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    """Code 69, and nothing is built."""
    assert bench_gpu.main(["--only", "gpt-oss"]) == 69
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
