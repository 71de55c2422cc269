"""The merge against PEFT's own: time, and peak memory of all processes together, in one run.

    python tests/bench/bench_merge.py                 # 1.5 billion parameters in bf16, 7 shards
    python tests/bench/bench_merge.py --scale small   # some seconds

Both merge the same adapter (rank 16, all-linear) into the same random checkpoint on this machine's
disk, each as a process of its own from start to end; the time after its imports is told apart, and
so is the flush to disk. Ours includes the tensor proof of every weight, not the logit proof.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SCALES: dict[str, dict[str, Any]] = {
    # Qwen2.5-1.5B's shape.
    "full": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 16000,
    },
}  # fmt: skip
SHARDS = 7


class Run(NamedTuple):
    """One measured run."""

    seconds: float
    inner_s: float
    """After its imports."""
    peak_mb: float
    flush_s: float


OURS = """
import sys, time
from pathlib import Path
from job.merge.plan import make_plan
from job.merge.stream import write_model
from job.stop import Stop
base, adapter, out = map(Path, sys.argv[1:])
began = time.perf_counter()
plan = make_plan(adapter, base, "base")
figures = write_model(plan, out, stop=Stop())
assert sum(one["weights"] for one in figures.values()) == plan.size // 2
print(time.perf_counter() - began)
"""
PEFT = """
import sys, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
base, adapter, out = sys.argv[1:]
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="500MB")
print(time.perf_counter() - began)
"""


def write_inputs(folder: Path, shape: dict[str, Any]) -> None:
    """Write a random bf16 checkpoint in seven shards, and a random adapter, by a child process.

    The child ends before anything is measured.
    """
    subprocess.run(
        [sys.executable, __file__, "--write", str(folder), json.dumps(shape)], check=True
    )


def _write(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**shape, tie_word_embeddings=True, dtype="bfloat16")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    # On the meta device the head is not tied yet; a tied checkpoint stores it once.
    names = [(n, p.shape) for n, p in model.named_parameters() if n != "lm_head.weight"]
    total, sizes, part = sum(s.numel() for _, s in names), 0, 0
    weight_map, tensors = {}, {}
    base = folder / "base"
    base.mkdir()
    config.save_pretrained(base)
    torch.manual_seed(0)
    for index, (name, size) in enumerate(names):
        tensors[name] = torch.randn(size).mul_(0.02).bfloat16()
        weight_map[name] = f"model-{part + 1:05d}-of-{SHARDS:05d}.safetensors"
        sizes += size.numel()
        if sizes >= total * (part + 1) / SHARDS or index == len(names) - 1:
            save_file(tensors, base / weight_map[name], metadata={"format": "pt"})
            part, tensors = part + 1, {}
    index_json = {"metadata": {"total_size": total * 2}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index_json))
    peft_model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), low_cpu_mem_usage=True
    )
    adapter = folder / "adapter"
    adapter.mkdir()
    peft_model.peft_config["default"].save_pretrained(adapter)
    lora = {
        name.replace(".default", ""): torch.randn(p.shape) * 0.01
        for name, p in peft_model.named_parameters()
        if "lora_" in name
    }
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def _children(pid: int) -> list[int]:
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(grand for child in own for grand in _children(int(child)))]


def _private_bytes(pid: int) -> int:
    """Return a process's memory as it counts for a limit: its own share (PSS), page cache apart."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def measure(code: str, arguments: list[str]) -> tuple[float, float, int]:
    """Run ``code`` as a process: its seconds, those after its imports, peak bytes with children."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    peak = 0
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, sum(map(_private_bytes, _children(process.pid))))

    watcher = threading.Thread(target=sample)
    watcher.start()
    words, _ = process.communicate()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"the benchmark's process ended with {process.returncode}")
    return seconds, float(words), peak


def sync() -> float:
    """Flush the disk, so that no run pays for the one before; seconds that it took."""
    began = time.perf_counter()
    os.sync()
    return time.perf_counter() - began


def run(scale: str, repeat: int) -> dict[str, Any]:
    """Measure both ways; turn by turn; the best of ``repeat`` runs each."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, SCALES[scale])
        runs: dict[str, list[Run]] = {"ours": [], "peft": []}
        for turn in range(repeat):
            for name, code in (("ours", OURS), ("peft", PEFT)):
                out = folder / f"{name}{turn}"
                sync()
                arguments = [str(folder / "base"), str(folder / "adapter"), str(out)]
                seconds, inner, peak = measure(code, arguments)
                runs[name].append(Run(seconds, inner, peak / 1e6, sync()))
                shutil.rmtree(out)
    for name, found in runs.items():
        highest = max(one.peak_mb for one in found)
        result[name] = min(found)._replace(peak_mb=highest)._asdict()
    result["speedup"] = result["peft"]["seconds"] / result["ours"]["seconds"]
    return result


def main() -> None:
    """Print a table, and the figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        _write(Path(arguments.write[0]), json.loads(arguments.write[1]))
        return
    result = run(arguments.scale, arguments.repeat)
    columns = ("seconds", "inner_s", "peak_mb", "flush_s")
    print(f"{'':28}" + "".join(f"{column:>10}" for column in columns))
    for name, words in (("ours", "streaming, tensors proven"), ("peft", "PEFT merge_and_unload")):
        print(f"{words:28}" + "".join(f"{result[name][column]:10.1f}" for column in columns))
    print(f"{result['speedup']:.1f} times faster")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
