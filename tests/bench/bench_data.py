"""Rows to packed tokens: this project against TRL's own map and pack, on the same cores.

    .venv/bin/python tests/bench/bench_data.py [--rows 100000] [--only ours|trl|trl-procs]

Rows are generated (multilingual-reasoning-shaped chats, about 1 kB each) with a BPE tokenizer of
32,000 tokens trained on them. Each contender runs in a process of its own and reports its time
and its peak memory (its own, and its largest child's times the number of cores). Both write Arrow
files that training reads. A tenth of the rows comes first: memory should not grow with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MAX_LENGTH = 2048


def make_rows(path: Path, count: int) -> None:
    """Write ``count`` chats of log-normal length, in pseudo-words of several scripts."""
    dice = random.Random(0)
    alphabets = [
        "abcdefghijklmnopqrstuvwxyz",
        "abcdeéèimnoprstuàç",
        "अआइकखगतनपमरलस",
        "абвгдежиклмнопрст",
    ]
    words = [
        "".join(dice.choices(dice.choice(alphabets), k=dice.randint(2, 9))) for _ in range(20_000)
    ]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    pool = dice.choices(words, weights, k=400_000)

    def text(mean: int) -> str:
        size = int(dice.lognormvariate(0, 0.6) * mean) + 1
        start = dice.randrange(len(pool) - size)
        return " ".join(pool[start : start + size]) + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [("system", text(8)), ("user", text(18)), ("assistant", text(45))]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_model(folder: Path, rows: Path) -> None:
    """Write a tokenizer trained on the rows, and a model too small to matter."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=32_000, initial_alphabet=alphabet, show_progress=False)
    with rows.open(encoding="utf-8") as file:
        lines = [next(file) for _ in range(min(5000, sum(1 for _ in rows.open("rb"))))]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **size, **heads)).save_pretrained(folder)


def ours(folder: Path) -> dict[str, Any]:
    """Prepare the rows as a run does, from file to Arrow."""
    from job.artifacts import Source
    from job.config import JobConfig
    from job.data.prepare import prepare_folder
    from job.progress import Progress
    from job.stop import Stop

    data = {"source": "rows", "max_length": MAX_LENGTH, "packing": True}
    job = JobConfig.model_validate(
        {"name": "bench", "device": "cpu", "store": "s", "model": {"source": "m"}, "data": data}
    )
    model = Source(folder=folder / "model", uri="file:m", files={})
    rows = Source(folder=folder, uri="file:rows", files={"rows.jsonl": ""})
    out = Path(tempfile.mkdtemp(dir=folder))
    began, began_cpu_s = time.perf_counter(), cpu_s()
    dataset = prepare_folder(
        job, model, rows, None, out, stop=Stop(), progress=Progress(), started=0
    )
    seconds, processor = time.perf_counter() - began, cpu_s() - began_cpu_s
    report = json.loads((out / "data_report.json").read_text())
    return {
        "seconds": seconds, "cpu_s": processor, "tokens": dataset.num_tokens, "fill": report["fill"]
    }  # fmt: skip


def trl(folder: Path, num_proc: int | None) -> dict[str, Any]:
    """Let SFTTrainer tokenise and pack the rows, with nothing cached."""
    os.environ["HF_HOME"] = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(dir=folder)
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = SFTConfig(
        output_dir=str(folder / "trl"), packing=True, max_length=MAX_LENGTH, use_cpu=True,
        assistant_only_loss=False, dataset_num_proc=num_proc, report_to=[], bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    began, began_cpu_s = time.perf_counter(), cpu_s()
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    seconds, processor = time.perf_counter() - began, cpu_s() - began_cpu_s
    table = trainer.train_dataset.with_format("arrow")
    tokens = sum(len(batch["input_ids"].combine_chunks().flatten()) for batch in table.iter(1000))
    return {
        "seconds": seconds, "cpu_s": processor, "tokens": tokens,
        "fill": tokens / len(table) / MAX_LENGTH,
    }  # fmt: skip


def peak_mb() -> float:
    """Return the peak resident memory of this process and of a child for each core, in MB."""
    # Not ru_maxrss of ourselves: that begins with the peak of the process that started us.
    status = Path("/proc/self/status").read_text()
    own = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + (os.cpu_count() or 1) * child) / 1024


def cpu_s() -> float:
    """Return the processor time of this process and its children, in seconds."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def contend(name: str, folder: Path) -> None:
    """Run one contender and print its figures as JSON."""
    calls = {
        "ours": lambda: ours(folder),
        "trl": lambda: trl(folder, None),
        "trl-procs": lambda: trl(folder, os.cpu_count()),
    }
    print(json.dumps({**calls[name](), "peak_mb": peak_mb()}))


def main() -> None:
    """Make the rows, run the contenders one after the other, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--rows", type=int, default=1_000_000 if os.environ.get("FULL") else 100_000
    )
    parser.add_argument("--only", choices=["ours", "trl", "trl-procs"])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        contend(arguments.only, arguments.folder)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    head = ["", "rows", "MB", "s", "CPU s", "rows/s", "tokens/s", "fill", "peak MB"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for count in (arguments.rows // 10, arguments.rows):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            make_rows(folder / "rows.jsonl", count)
            make_model(folder / "model", folder / "rows.jsonl")
            for name in [arguments.only] if arguments.only else ["ours", "trl", "trl-procs"]:
                _print_row(name, count, folder)


def _print_row(name: str, count: int, folder: Path) -> None:
    again = [sys.executable, __file__, "--only", name, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(again, env=environment, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    size, seconds = (folder / "rows.jsonl").stat().st_size / 1e6, found["seconds"]
    print(
        f"| {name} | {count:,} | {size:.0f} | {seconds:.1f} | {found['cpu_s']:.1f}"
        f" | {count / seconds:,.0f} | {found['tokens'] / seconds:,.0f} | {found['fill']:.3f}"
        f" | {found['peak_mb']:.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
