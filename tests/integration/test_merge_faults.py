"""The merge under bad input, full disks, kills and stops: one clear line, and it goes on later."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import merging
import pyarrow
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from job.artifacts import Adapter, Dataset, Source
from job.config import MergeSection
from job.context import Context
from job.errors import ExitCode, JobError
from job.files import sha256_file
from job.merge import pool, stream
from job.merge.plan import make_plan
from job.merge.stage import merge, merge_folders
from job.progress import Progress
from job.stop import Stop, preempted

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in several shards and an adapter for it."""
    folder = tmp_path_factory.mktemp("merge")
    tiny.tiny_model(folder / "base", "llama", max_shard_size="150KB")
    merging.write_adapter(folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def folders(originals: Path, tmp_path: Path) -> Path:
    """A copy of them that the test may break."""
    for name in ("base", "adapter"):
        shutil.copytree(originals / name, tmp_path / name)
    return tmp_path


def run(folder: Path, merge_format: Any = "base") -> Any:
    return merge_folders(folder / "adapter", folder / "base", folder / "out", merge_format, Stop())


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_adapter(folder: Path, change: Any) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file(change(tensors), path)


def rename_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("layers.1.self_attn.q_proj", "layers.7.self_attn.q_proj"): value
            for key, value in tensors.items()}  # fmt: skip


FAULTS: dict[str, tuple[Any, ExitCode, str]] = {
    "base shard cut off": (
        lambda f: os.truncate(next((f / "base").glob("*-00002-*.safetensors")), 5000),
        ExitCode.NOT_PROVEN, "cut off",
    ),
    "base shard not there": (
        lambda f: next((f / "base").glob("*-00002-*.safetensors")).unlink(),
        ExitCode.NOT_FOUND, "is not there",
    ),
    "no config": (
        lambda f: (f / "base/config.json").unlink(), ExitCode.NOT_FOUND, "config.json",
    ),
    "no adapter": (
        lambda f: (f / "adapter/adapter_model.safetensors").unlink(),
        ExitCode.NOT_FOUND, "adapter_model.safetensors",
    ),
    "adapter cut off": (
        lambda f: os.truncate(f / "adapter/adapter_model.safetensors", 9000),
        ExitCode.NOT_PROVEN, "cut off",
    ),
    "unknown key": (
        lambda f: edit_adapter(f, lambda t: t | {"base_model.model.x.lora_C": torch.ones(2)}),
        ExitCode.NOT_PROVEN, "not known here",
    ),
    "half a pair": (
        lambda f: edit_adapter(f, lambda t: dict(list(t.items())[1:])),
        ExitCode.NOT_PROVEN, "not known here",
    ),
    "a layer that the base lacks": (
        lambda f: edit_adapter(f, rename_one), ExitCode.NOT_PROVEN, "layers.7",
    ),
    "other shapes": (
        lambda f: edit_adapter(f, lambda t: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in t.items()}),
        ExitCode.NOT_PROVEN, "fit",
    ),
    "another rank than its settings": (
        lambda f: edit_config(f, r=8), ExitCode.NOT_PROVEN, "rank 4, its settings say 8",
    ),
    "not finite": (
        lambda f: edit_adapter(f, lambda t: {k: v * float("nan") for k, v in t.items()}),
        ExitCode.NOT_PROVEN, "not finite",
    ),
    "pissa": (
        lambda f: edit_config(f, init_lora_weights="pissa_niter_4"),
        ExitCode.CONFIG,
        "init_lora_weights: pissa",
    ),
    "dora": (lambda f: edit_config(f, use_dora=True), ExitCode.CONFIG, "use_dora"),
    "another kind": (lambda f: edit_config(f, peft_type="IA3"), ExitCode.CONFIG, "IA3"),
    "old expert layout": (
        lambda f: edit_config(f, target_parameters=["a.b"], peft_version="0.18.1"),
        ExitCode.CONFIG, "0.18.1",
    ),
    "something else in the way": (
        lambda f: (f / "out").mkdir() or (f / "out/mine.txt").write_text("x"),
        ExitCode.USAGE, "not empty",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_with_its_code(folders: Path, fault: str) -> None:
    """Where, what, and what to do; and no model is left that looks finished."""
    spoil, code, words = FAULTS[fault]
    spoil(folders)
    with pytest.raises(JobError, match=words) as refused:
        run(folders)
    assert refused.value.code is code
    assert "\n" not in str(refused.value)
    assert not list((folders / "out").glob("*.safetensors"))


def test_too_little_disk_is_told_before_anything_is_written(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """71, with what is needed and what there is."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(JobError, match=r"needs 0\.00 GB, 0\.00 GB are free") as refused:
        run(folders)
    assert refused.value.code is ExitCode.OUT_OF_RESOURCES
    assert not list((folders / "out.partial").glob("*.safetensors"))


def test_disk_that_fills_while_writing_is_71(folders: Path) -> None:
    """The system's own refusal of a write, in a worker, becomes the same line."""
    code = (
        "import sys; from pathlib import Path; from job.merge.plan import make_plan\n"
        "from job.merge.stream import write_model; from job.stop import Stop\n"
        "f = Path(sys.argv[1])\n"
        "write_model(make_plan(f / 'adapter', f / 'base', 'base'), f / 'out', stop=Stop())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders)], cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert "JobError" in done.stderr
    assert "the disk is full" in done.stderr
    assert not list((folders / "out").glob("*.safetensors"))
    assert not list((folders / "out").glob(".*.partial"))


class Interrupted:
    """Stops the merge once so many bytes are done."""

    def __init__(self, share: float) -> None:
        self.stop, self.share = Stop(), share

    def __call__(self, done: int, total: int) -> None:
        """Be a progress callback."""
        if done > self.share * total:
            self.stop.request(preempted("SIGTERM"))


def test_interrupted_merge_goes_on(folders: Path) -> None:
    """Whole shards stay, the half one goes, and the second try writes only what is missing."""
    plan, out = make_plan(folders / "adapter", folders / "base", "base"), folders / "out"
    interrupt = Interrupted(0.5)
    with pytest.raises(JobError) as ended:
        stream.write_model(plan, out, stop=interrupt.stop, progress=interrupt)
    assert ended.value.code is ExitCode.PREEMPTED
    before = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert 0 < len(before) < len(stream.lay_out(plan))
    assert not list(out.glob(".*"))
    figures = stream.write_model(plan, out, stop=Stop())
    assert before.items() <= {p.name: p.stat().st_ino for p in out.glob("*.safetensors")}.items()
    assert figures.keys() == {output.name for output in plan.outputs}


def test_shard_that_rotted_in_between_is_written_again(folders: Path) -> None:
    """A shard of the first try is proven again, not believed."""
    plan, out = make_plan(folders / "adapter", folders / "base", "base"), folders / "out"
    stream.write_model(plan, out, stop=Stop())
    shard = next(out.glob("*-00001-*.safetensors"))
    good = sha256_file(shard)
    with open(shard, "r+b") as handle:
        handle.seek(-3, os.SEEK_END)
        handle.write(b"\x11")
    stream.write_model(plan, out, stop=Stop())
    assert sha256_file(shard) == good


def test_killed_worker_is_told_as_memory(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's out-of-memory kill of a worker is 71, not a hang and not a bug."""
    start = pool.Workers._start

    def doomed() -> Any:
        process = start()
        process.kill()
        process.wait()
        return process

    monkeypatch.setattr(pool.Workers, "_start", staticmethod(doomed))
    with pytest.raises(JobError, match="worker process was killed") as refused:
        run(folders)
    assert refused.value.code is ExitCode.OUT_OF_RESOURCES


MEASURE = """
import resource, sys
from pathlib import Path
from job.merge.plan import make_plan
from job.merge.stream import write_model
from job.stop import Stop
folder = Path(sys.argv[1])
write_model(make_plan(folder / "adapter", folder / "base", "base"), folder / "out", stop=Stop())
assert "torch" not in sys.modules
status = Path("/proc/self/status").read_text()
# ru_maxrss of a process counts what it was forked from, too.
own = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Six times the layers: the parent and its largest worker need the same few megabytes."""
    peaks = []
    for layers in (4, 24):
        folder = tmp_path / str(layers)
        shape = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 1024}
        tiny.tiny_model(folder / "base", "llama", dtype=torch.bfloat16, **shape)
        merging.write_adapter(folder / "base", folder / "adapter")
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder)], cwd=ROOT, capture_output=True, check=True
        )
        peaks.append([int(word) / 1024 for word in done.stdout.split()])
    size = (folder / "base/model.safetensors").stat().st_size / 2**20
    assert size > 30
    assert all(large - small < 6 for small, large in zip(*peaks, strict=True))
    assert max(peaks[1]) < 90


def stage_inputs(folder: Path, merge_format: str) -> tuple[Any, Source, Dataset, Adapter]:
    """The artifacts and the surroundings that a run would have."""
    data = folder / "data"
    shutil.copytree(
        folder / "base",
        data / "tokenizer",
        ignore=lambda _, names: [n for n in names if "token" not in n],
    )
    (data / "tokenizer/chat_template.jinja").write_text("{{ messages }}")
    table = pyarrow.table({"input_ids": [list(range(5, 60)), [7, 8, 9]]})
    with (
        pyarrow.OSFile(str(data / "train.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    dataset = Dataset(
        folder=data, digest="d", num_rows=2, num_examples=2, num_tokens=58,
        num_supervised_tokens=58, num_held_out=0, stop_token_ids=[11], pad_token_id=0,
        thinking="keep",
    )  # fmt: skip
    adapter = Adapter(
        folder=folder / "adapter", sha256=sha256_file(folder / "adapter/adapter_model.safetensors"),
        steps=1, planned_steps=1, num_tokens=1, final_loss=1, tokens_per_s=1, duration_s=1,
    )  # fmt: skip
    files = {p.name: sha256_file(p) for p in (folder / "base").iterdir()}
    model = Source(folder=folder / "base", uri=f"file:{folder}/base", files=files)
    job: Any = SimpleNamespace(merge=MergeSection(format=merge_format))
    context: Any = Context(
        job=job, work=folder / "work", cache=None, attempt=SimpleNamespace(),  # type: ignore[arg-type]
        stop=Stop(), progress=Progress(),
    )  # fmt: skip
    return context, model, dataset, adapter


def test_stage_merges_once_and_gives_the_data_sets_tokenizer(folders: Path) -> None:
    """A second attempt reuses the artifact; the template trained with goes along, stops included."""
    inputs = stage_inputs(folders, "base")
    merged = merge(*inputs)
    assert merged is not None
    assert merged.report["logits"]["positions"] == 48 + 3
    out = merged.folder
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    generation = json.loads((out / "generation_config.json").read_text())
    assert 11 in generation["eos_token_id"]
    assert inputs[0].progress.snapshot()["bytes_done"] >= merged.size_bytes
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert merge(*inputs) == merged
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    merging.load(out)


def test_a_base_without_a_generation_config_gets_one_that_stops(folders: Path) -> None:
    """A base model that was given a chat template would never end its turn."""
    (folders / "base/generation_config.json").unlink(missing_ok=True)
    merged = merge(*stage_inputs(folders, "base"))
    assert merged is not None
    said = json.loads((merged.folder / "generation_config.json").read_text())
    own = json.loads((folders / "base/config.json").read_text()).get("eos_token_id")
    assert set(said["eos_token_id"]) == {11, *([own] if isinstance(own, int) else own or [])}


def test_format_none_merges_nothing(folders: Path) -> None:
    """An adapter alone is a result too."""
    assert merge(*stage_inputs(folders, "none")) is None
