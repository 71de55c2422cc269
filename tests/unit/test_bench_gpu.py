"""The GPU benchmark's own path, at tiny size: a rented card finds no dead code."""

from __future__ import annotations

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
