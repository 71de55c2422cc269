"""The merge's parts without a model: numbers, headers, layout, and what the workers import."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from job.errors import ExitCode, JobError
from job.merge import mxfp4, stream
from job.merge.adapter import AdapterFiles
from job.merge.checkpoint import Slot, Tensor, as_matrices, pair_mxfp4, read_header
from job.merge.numbers import narrow, widen
from job.merge.plan import Output, Plan
from job.merge.proof import _neighbours
from job.merge.task import cut


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_bf16_is_rounded_as_torch_does(values: list[float]) -> None:
    """Nearest, ties to even, infinities kept."""
    ties = np.array(values, np.float32)
    ties = np.concatenate([ties, (ties.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)])
    ties = ties[~np.isnan(ties)]
    expected = torch.from_numpy(ties.copy()).bfloat16().view(torch.int16).numpy()
    found = narrow(ties[None].copy(), "BF16")[0]
    assert (found.view(np.int16) == expected).all()


def test_bf16_comes_back_exactly() -> None:
    """Every bf16 that is a number widens and narrows to itself."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    bits = bits[(bits & 0x7F80 != 0x7F80) | (bits & 0x7F == 0)]
    wide = widen(bits[None], "BF16")
    assert (narrow(wide, "BF16")[0] == bits).all()


def test_neighbours_of_a_bf16_enclose_it() -> None:
    """The proof's idea of the next values is right around zero and over signs."""
    bits = torch.tensor([0.0, 1.0, -1.0, 3e-39, 6e4]).bfloat16().view(torch.int16).numpy()
    below, found, above = _neighbours(bits.view(np.uint16), "BF16")
    assert (below < found).all()
    assert (found < above).all()


def test_mxfp4_is_dequantised_as_transformers_does(tmp_path: Path) -> None:
    """All 256 bytes under many scales, expert by expert, blocks and scales in two files."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 140, (3, 10, 2), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales).view(torch.int16).numpy()
    save_file({"a_blocks": blocks}, tmp_path / "1")
    save_file({"a_scales": scales}, tmp_path / "2")
    slots = read_header(tmp_path / "1") | read_header(tmp_path / "2")
    tensor = pair_mxfp4(slots)["a"]
    assert tensor.shape == (3, 64, 10)
    for expert in range(3):
        found = mxfp4.read_expert(tensor, expert)
        assert (found.view(np.int16) == expected[expert]).all()


def test_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    """Such a checkpoint would load its experts at random."""
    slot = Slot("x", "U8", (2, 4, 1, 16), 0)
    with pytest.raises(JobError, match="no scales"):
        pair_mxfp4({"experts.up_blocks": slot})


@pytest.mark.parametrize("size", [0, 7, 30, 300])
def test_cut_off_file_is_refused_wherever_it_ends(size: int, tmp_path: Path) -> None:
    """In the length, in the header, in the tensors: 70, with the file's name."""
    save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:size])
    with pytest.raises(JobError, match=r"x\.safetensors") as refused:
        read_header(tmp_path / "x.safetensors")
    assert refused.value.code is ExitCode.NOT_PROVEN


def output(name: str, shape: tuple[int, ...], dtype: str = "BF16", stored: str = "BF16") -> Output:
    source = Tensor(name, stored, shape, (Slot("/b/one.safetensors", "BF16", shape, 0),))
    return Output(name, dtype, shape, source, "one.safetensors")


@pytest.mark.parametrize("shape", [(5,), (7, 3), (4, 6, 2), (2, 3, 4, 5)])
@pytest.mark.parametrize("most", [4, 12, 1000])
def test_tasks_cover_every_row_once(
    shape: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a tensor is cut up, no row is left out and none is done twice."""
    monkeypatch.setattr("job.merge.task.TASK_ELEMENTS", most)
    matrices, rows, _ = as_matrices(shape)
    spans = itertools.chain.from_iterable(cut(output("a", shape)))
    done = [(matrix, row) for matrix, low, high in spans for row in range(low, high)]
    assert done == [(matrix, row) for matrix in range(matrices) for row in range(rows)]


def test_shards_that_would_be_too_large_are_cut_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantised experts are four times as large: no shard goes over the limit."""
    monkeypatch.setattr(stream, "SHARD_BYTES", 100)
    adapter = AdapterFiles(Path("/a"), {}, {}, [], {})
    outputs = [output(name, (20,)) for name in "abcde"]
    shards = stream.lay_out(Plan(Path("/b"), adapter, "bf16", outputs, {}))
    assert [shard.name for shard in shards] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert [o.name for shard in shards for o in shard.outputs] == list("abcde")


def test_tensors_are_aligned_to_their_items() -> None:
    """An odd bf16 tensor before an fp32 one would put that on a half item."""
    shard = stream.Shard("x", [output("a", (3,)), output("b", (5,), "F32")])
    assert [o.name for o in shard.outputs] == ["b", "a"]
    assert all(offset % 8 == 0 for offset in shard.offsets[:1])


def test_workers_and_their_parent_need_no_torch() -> None:
    """Two of them fit where one torch does."""
    code = "import sys, job.merge.worker, job.merge.stream; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
