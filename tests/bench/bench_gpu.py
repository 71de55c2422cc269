"""Training on one GPU: full-size models with random weights, every lever alone and all together.

    make bench-gpu                    # every part; or ONLY=gpt-oss, llama3-8b, qwen2.5-7b, ...
    make bench-gpu ONLY=gpt-oss PROFILE=1
    python tests/bench/bench_gpu.py --only gpt-oss --out bench/gpu

No network: weights are drawn on the card, and so are rows of lengths like those of
HuggingFaceH4/Multilingual-Thinking (log-normal, median 600 tokens, cut at the row's length). A part
is one process of at most 9 minutes: the most telling first, each result written at once; what there
was no time for is named. The recipe is TRL's SFTTrainer as the cookbook has it: padded, batch 4 x 4,
PEFT's fold, and for gpt-oss eager attention. Random routers spread tokens over experts evenly.
MFU counts 4 FLOP for each active parameter and real token; a real token is one that is not padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# The slowest way takes a minute and a half: one that begins now ends within 9 minutes.
LIMIT_S = 7.5 * 60
NAMED = ("7", "15", "23")
EXAMPLES = 1000


@dataclass(frozen=True)
class Way:
    """One way to train: the recipe, or ours with some levers."""

    name: str
    recipe: bool = False
    packed: bool = False
    attention: str = "plain"
    """plain (the recipe's), or auto: what a run would pick."""
    grouped: bool = False
    recompute: bool = True
    norms: bool = False
    experts: str = "three"
    """Layers whose experts are adapted: three, or all."""
    batch: tuple[int, int] = (4, 4)
    """Rows at once, and how often for a step: sixteen rows in any case."""


@dataclass(frozen=True)
class Part:
    """One model."""

    arch: str
    config: dict[str, Any]
    max_length: int
    attention: str
    """What the recipe takes."""
    rank: int
    ways: tuple[Way, ...]


ALL = Way("all", packed=True, attention="auto", grouped=True, norms=True)
SPARSE = (
    Way("recipe", recipe=True),
    ALL,
    dataclasses.replace(ALL, name="all, no recompute", recompute=False),
    dataclasses.replace(ALL, name="all, experts of all layers", experts="all"),
    Way("ours, no lever"),
    Way("packing alone", packed=True),
    Way("attention alone", attention="auto"),
    Way("grouped experts alone", grouped=True),
    Way("no recompute alone", recompute=False),
    Way("fused norms alone", norms=True),
)
# Four rows of 4,096 that keep their activations are more than 80 GB; two are not.
BEST = Way("all", packed=True, recompute=False, norms=True, batch=(2, 8))
DENSE = (
    Way("recipe", recipe=True),
    BEST,
    dataclasses.replace(BEST, name="all, flex attention", attention="flex_attention"),
    dataclasses.replace(BEST, name="all but no recompute", recompute=True, batch=(4, 4)),
    Way("ours, no lever"),
    Way("packing alone", packed=True),
    Way("no recompute alone", recompute=False, batch=(2, 8)),
    Way("fused norms alone", norms=True),
)
GPT_OSS = {
    "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
    "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
}  # fmt: skip
LLAMA = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
QWEN_7B = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN_1B = {
    "num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
PARTS = {
    "gpt-oss": Part("gpt_oss", GPT_OSS, 2048, "eager", 8, SPARSE),
    "llama3-8b": Part("llama", LLAMA, 4096, "sdpa", 16, DENSE),
    "qwen2.5-7b": Part("qwen2", QWEN_7B, 4096, "sdpa", 16, DENSE),
    "qwen2.5-1.5b": Part("qwen2", QWEN_1B, 4096, "sdpa", 16, DENSE),
}


@dataclass
class Bench:
    """A model on its device, and the rows for it."""

    part: Part
    device: str
    tiny: bool
    base: Any = None
    norms: dict[Any, type] = dataclasses.field(default_factory=dict)
    """The base's norms, as they were."""
    why: str = ""

    def build(self) -> None:
        """Draw the weights on the device."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.tiny:
            import tiny

            config = tiny.tiny_config(self.part.arch)
        else:
            config = AutoConfig.for_model(self.part.arch, **self.part.config)
        torch.manual_seed(0)
        dtype = torch.float32 if self.tiny else torch.bfloat16
        with torch.device(self.device):
            self.base = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=self.part.attention
            )
        named = (m for m in self.base.modules() if type(m).__name__.endswith("RMSNorm"))
        self.norms = {norm: type(norm) for norm in named}

    def draw_anew(self) -> None:
        """Draw the weights again, after what was made of them is gone."""
        self.base, self.norms = None, {}
        _collect()
        self.build()

    @property
    def max_length(self) -> int:
        """Tokens of a row."""
        return 128 if self.tiny else self.part.max_length

    def lengths(self) -> list[int]:
        """Return the lengths of 1,000 examples."""
        import numpy as np

        drawn = np.random.default_rng(0).lognormal(np.log(self.max_length * 0.3), 0.6, EXAMPLES)
        return [int(n) for n in drawn.clip(16, self.max_length)]

    def rows(self, count: int, *, packed: bool) -> Any:
        """Return at least ``count`` rows of random tokens: examples, or packs of them."""
        import datasets
        import numpy as np

        dice = np.random.default_rng(1)
        rows: list[list[int]] = []
        for length in self.lengths() * 9:
            fits = [row for row in rows if packed and sum(row) + length <= self.max_length]
            if fits:
                max(fits, key=sum).append(length)
            elif len(rows) < count:
                rows.append([length])
            elif not packed:
                break
        ids = [dice.integers(10, self.base.config.vocab_size - 10, sum(row)) for row in rows]
        # The question carries no loss: a quarter.
        labels = [np.where(np.arange(len(t)) < len(t) // 4, -100, t) for t in ids]
        columns = {"input_ids": ids, "labels": labels, "lengths": rows}
        kind = datasets.Sequence(datasets.Value("int32"))
        return datasets.Dataset.from_dict(
            columns, features=datasets.Features(dict.fromkeys(columns, kind))
        )

    def job(self, way: Way, steps: int) -> Any:
        """Return the job file of one way."""
        import trainbed

        experts: list[str] = []
        if self.part.arch == "gpt_oss":
            layers = range(self.base.config.num_hidden_layers)
            named = NAMED if way.experts == "three" and not self.tiny else map(str, layers)
            experts = [f"{n}.mlp.experts.{p}_proj" for n in named for p in ("gate_up", "down")]
        return trainbed.make_job(
            Path("m"),
            Path("s"),
            device=self.device,
            data={"max_length": self.max_length, "packing": way.packed},
            lora={
                "rank": self.part.rank, "alpha": 2 * self.part.rank, "dropout": 0,
                "target_parameters": experts,
            },
            train={
                "max_steps": steps, "batch_size": way.batch[0],
                "gradient_accumulation": way.batch[1],
                "gradient_checkpointing": way.recompute, "learning_rate": 2e-4,
                "checkpoint_every_s": 1e6,
            },
        )  # fmt: skip


def measure(bench: Bench, way: Way, *, warm: int, steps: int) -> dict[str, Any]:
    """Train a few steps in one way, and return its figures."""
    import torch

    from job.train.meters import memory_bytes, mfu
    from job.train.model import active_parameters

    active = active_parameters(bench.base)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = _clock(bench.device)
    counts = _train(bench, way, warm + steps, clock)
    taken = sum(clock.seconds[warm:])
    # Micro-batches; the loader may have fetched more than were trained on.
    _, each = way.batch
    tokens = sum(counts[warm * each : (warm + steps) * each])
    rate = tokens / taken
    share = mfu(rate, active, bench.device)
    return {
        "tokens_per_s": round(rate, 1),
        "ms_per_step": round(1000 * taken / steps, 1),
        "tokens_per_step": round(tokens / steps),
        "mfu": None if share is None else round(share, 4),
        "peak_gb": round(memory_bytes(bench.device) / 1e9, 2),
        "first_step_s": round(clock.seconds[0], 1),
        "attention": bench.why,
        "examples_1000_s": round(sum(bench.lengths()) / rate, 1),
    }


def profile(bench: Bench, way: Way) -> str:
    """Return where the time of two warm steps goes, by operation."""
    profiler = _profiler(bench.device)
    _train(bench, way, 3, profiler)
    key = f"self_{'device' if bench.device == 'cuda' else 'cpu'}_time_total"
    return str(profiler.seen.key_averages().table(sort_by=key, row_limit=40))


def _train(bench: Bench, way: Way, steps: int, callback: Any) -> list[int]:
    """Train, and return the real tokens of each micro-batch; the base is as it was, also if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        make = _recipe if way.recipe else _ours
        try:
            trainer, counts = make(bench, way, steps, Path(scratch), callback)
        except Exception:
            bench.draw_anew()  # half wrapped
            raise
        try:
            trainer.train()
        finally:
            bench.base = _bare(trainer)
            for norm, kind in bench.norms.items():
                norm.__class__ = kind
    return counts


def _ours(bench: Bench, way: Way, steps: int, folder: Path, clock: Any) -> tuple[Any, list[int]]:
    """Return our trainer, as the stage makes it."""
    import tiny
    import trainbed

    from job.train.callbacks import Life
    from job.train.collator import Collator
    from job.train.experts import use_grouped_lora
    from job.train.lora import add_lora
    from job.train.meters import Meters
    from job.train.norm import use_fused_norms
    from job.train.trainer import make_trainer

    job = bench.job(way, steps)
    _set_attention(bench, way)
    model = add_lora(bench.base, job.lora, seed=0)
    if way.grouped:
        use_grouped_lora(model)
    if way.norms:
        use_fused_norms(model)
    rows = bench.rows(16 * steps, packed=way.packed)
    trainer = make_trainer(
        model, tiny.tiny_tokenizer(), rows, Collator(0, packed=way.packed), job, folder,
        recompute=way.recompute,
    )  # fmt: skip
    trainer.meters = Meters(folder / "history.jsonl", steps, 0, bench.device)
    # Before Life: the checkpoint at the end is no part of a step.
    trainer.add_callback(clock)
    trainer.add_callback(Life(trainbed.make_context(job, folder), trainer, folder, {}))
    return trainer, _counted(trainer)


def _recipe(bench: Bench, way: Way, steps: int, folder: Path, clock: Any) -> tuple[Any, list[int]]:
    """Return TRL's trainer, as the cookbook makes it."""
    import tiny
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    job = bench.job(way, steps)
    _set_attention(bench, way)
    section, lora = job.train, job.lora
    config = SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation, learning_rate=2e-4,
        gradient_checkpointing=True, max_length=bench.max_length, warmup_steps=0,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=bench.device == "cpu",
        bf16=bench.device == "cuda", router_aux_loss_coef=0.0,
    )  # fmt: skip
    trainer = SFTTrainer(
        bench.base,
        config,
        train_dataset=bench.rows(16 * steps, packed=False).select_columns(["input_ids", "labels"]),
        processing_class=tiny.tiny_tokenizer(),
        peft_config=LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear",
            target_parameters=lora.target_parameters or None, task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )  # fmt: skip
    return trainer, _counted(trainer)


def _counted(trainer: Any) -> list[int]:
    """Let the collator count the real tokens of each micro-batch."""
    counts: list[int] = []
    collate = trainer.data_collator

    def counted(examples: list[dict[str, Any]]) -> Any:
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    return counts


def _set_attention(bench: Bench, way: Way) -> None:
    from job.train.attention import allow_shapes, choose
    from job.train.model import has_sinks

    base = bench.base
    name, bench.why = bench.part.attention, "the recipe's"
    if way.attention == "auto" and has_sinks(base.config):
        name, bench.why = choose(base.config, base.dtype, bench.device)
    elif way.attention not in ("plain", "auto") and bench.device == "cuda":
        name, bench.why = way.attention, "asked for"
    allow_shapes()
    base.set_attn_implementation(name)
    bench.why = f"{name}: {bench.why}"


def _clock(device: str) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Seconds of each step, from the end of the one before."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.last = 0.0

        def _now(self) -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Start."""
            self.last = self._now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Note the step."""
            now = self._now()
            self.seconds.append(now - self.last)
            self.last = now

    return Clock()


def _profiler(device: str) -> Any:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile
    from transformers import TrainerCallback

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])

    class Profiler(TrainerCallback):  # type: ignore[misc]
        """Looks on from the end of the first step to the end of training."""

        def __init__(self) -> None:
            self.seen = torch_profile(activities=kinds)

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            """Begin once it is warm."""
            if state.global_step == 1:
                self.seen.start()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            """End."""
            self.seen.stop()

    return Profiler()


def _bare(trainer: Any) -> Any:
    """Return the base as it was, adapters and checkpointing taken off, and free the rest."""
    base = trainer.model.unload()
    base.gradient_checkpointing_disable()
    base.disable_input_require_grads() if hasattr(base, "_require_grads_hook") else None
    if hasattr(base.config, "num_local_experts"):
        base.config._experts_implementation = "grouped_mm"
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = None
    _collect()
    return base


def _collect() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def profile_part(name: str, out: Path, *, tiny: bool = False) -> None:
    """Profile the way with every lever, on the screen and in a file."""
    bench = Bench(PARTS[name], "cpu" if tiny else "cuda", tiny)
    bench.build()
    [way] = (one for one in bench.part.ways if one.name == "all")
    table = profile(bench, way)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.profile.txt").write_text(table)
    print(table)


def run_part(
    name: str, out: Path, *, tiny: bool = False, limit_s: float = LIMIT_S
) -> dict[str, Any]:
    """Measure one part, writing each result as it comes."""
    import torch

    from job.files import write_json

    part, began = PARTS[name], time.monotonic()
    bench = Bench(part, "cpu" if tiny else "cuda", tiny)
    bench.build()
    found: dict[str, Any] = {
        "part": name,
        "device": "cpu" if tiny else torch.cuda.get_device_name(),
        "versions": {
            n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "peft")
        },
        "max_length": bench.max_length,
        "results": {},
        "not_measured": [],
    }
    for way in part.ways:
        if time.monotonic() - began > limit_s:
            found["not_measured"].append(way.name)
        else:
            found["results"][way.name] = _try(lambda way=way: _measured(bench, way, found))  # type: ignore[misc]
        write_json(out / f"{name}.json", found)
        _say(way.name, found["results"].get(way.name, {"failed": "no time left"}))
    return found


def _measured(bench: Bench, way: Way, found: dict[str, Any]) -> dict[str, Any]:
    warm, steps = (1, 2) if bench.tiny or way.recipe or not way.packed else (2, 4)
    figures = measure(bench, way, warm=warm, steps=steps)
    recipe = found["results"].get("recipe", figures)
    if "tokens_per_s" in recipe:
        figures["ratio"] = round(figures["tokens_per_s"] / recipe["tokens_per_s"], 2)
    return figures


def _try(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the figures, or why there are none: one way that fails leaves the others."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        failed = (str(error).strip().splitlines() or [repr(error)])[0][:300]
    _collect()  # what the traceback held
    return {"failed": failed}


def _say(name: str, figures: dict[str, Any]) -> None:
    if "failed" in figures:
        print(f"| {name} | {figures['failed']} |", flush=True)
        return
    keys = ("tokens_per_s", "ms_per_step", "mfu", "peak_gb", "ratio", "examples_1000_s")
    print(f"| {name} | " + " | ".join(str(figures.get(key)) for key in keys) + " |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one part here, or every part in a process of its own."""
    from job.errors import JobError
    from job.train.devices import require_device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=list(PARTS), default=os.environ.get("ONLY") or None)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "gpu")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, instead")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        require_device("cpu" if arguments.tiny else "cuda")
    except JobError as error:
        print(error, file=sys.stderr)
        return int(error.code)
    if arguments.only and arguments.profile:
        profile_part(arguments.only, arguments.out, tiny=arguments.tiny)
        return 0
    if arguments.only:
        print("| | real tokens/s | ms/step | MFU | peak GB | x recipe | s for 1,000 examples |")
        print("|---|---|---|---|---|---|---|")
        run_part(arguments.only, arguments.out, tiny=arguments.tiny, limit_s=arguments.limit_s)
        return 0
    for name in PARTS:
        print(f"\n{name}", flush=True)
        command = [sys.executable, __file__, "--only", name, "--out", str(arguments.out)]
        subprocess.run(command + ["--profile"] * arguments.profile, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
