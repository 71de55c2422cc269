"""One process's training: the base, the adapter on it, the trainer, and what came of it."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import datasets
import structlog
import torch

from job.artifacts import Adapter, Dataset, Source
from job.config import JobConfig
from job.context import Context
from job.estimate import Shape, measure
from job.files import write_json
from job.track import make_trackers
from job.train.callbacks import Life
from job.train.checkpoints import Restored, load_weights, trainable
from job.train.collator import Collator, unpack
from job.train.devices import require_device
from job.train.experts import use_grouped_lora
from job.train.lora import add_lora, delta_norms, require_learned, save_adapter
from job.train.memory import memory_explained
from job.train.meters import Meters, read_history
from job.train.model import active_parameters, load_base, load_tokenizer
from job.train.norm import use_fused_norms
from job.train.peers import Peers
from job.train.preflight import packing_fault, pick_documents
from job.train.recompute import pick_recompute
from job.train.sharding import shard_base
from job.train.trainer import LoraTrainer, make_trainer

log = structlog.get_logger()


def fit(
    context: Context,
    model: Source,
    dataset: Dataset,
    folder: Path,
    parts: dict[str, str],
    restored: Restored | None,
    peers: Peers,
) -> Adapter:
    """Train in this process, alone or as one of several; ``folder`` is for this one's files."""
    # Names and combinations that can't be are told before the GPU is touched.
    shape = measure(context.job, model)
    base = _load(context, model, peers)
    context.progress.end("load")
    with memory_explained(base, context.job):
        adapted = _adapt(base, context.job, model, peers)
        trainer = _make_trainer(context, adapted, shape, dataset, folder, peers)
    _begin(trainer, folder, restored)
    tracked = (context.job, context.attempt.run_id, folder)
    trackers = make_trackers(*tracked) if peers.rank == 0 else []
    life = Life(context, trainer, folder, parts, trackers)
    life.spent_s = restored.state.duration_s if restored else 0.0
    trainer.add_callback(life)
    context.progress.end("adapt")
    peers.check(context.stop)
    try:
        with memory_explained(base, context.job):
            _run(trainer, restored)
        adapter = _finish(trainer, life, folder, restored)
    finally:
        for tracker in life.trackers:
            tracker.end()
    return adapter


def _adapt(base: Any, job: JobConfig, source: Source, peers: Peers) -> Any:
    model = add_lora(base, job.lora, seed=job.seed, source=source)
    if job.lora.expert_forward == "grouped":
        use_grouped_lora(model)
    use_fused_norms(model)
    if job.train.sharding == "fsdp2":
        shard_base(model, peers, job.device)
    return model


def _make_trainer(
    context: Context, model: Any, shape: Shape, dataset: Dataset, folder: Path, peers: Peers
) -> LoraTrainer:
    job = context.job
    rows = datasets.Dataset.from_file(str(dataset.folder / "train.arrow"))
    rows, packed = _pack_or_not(model, rows, dataset, job, peers)
    context.progress.update()
    collate = Collator(dataset.pad_token_id, packed=packed)
    recompute = pick_recompute(model, rows, collate, job, shape, peers)
    context.progress.update()
    tokenizer = load_tokenizer(dataset.folder / "tokenizer")
    return make_trainer(
        model, tokenizer, rows, collate, job, folder / "trainer", recompute=recompute, peers=peers
    )


def _begin(trainer: LoraTrainer, folder: Path, restored: Restored | None) -> None:
    """Give the trainer its meters and history, from where the checkpoint left them."""
    history = folder / "history.jsonl"
    history.unlink(missing_ok=True)
    if restored is not None:
        shutil.copyfile(restored.folder / "history.jsonl", history)
        trainer.resumed = restored.state
    trainer.meters = Meters(
        history=history,
        num_steps=trainer.args.max_steps,
        active=active_parameters(trainer.model),
        device=trainer.args.device.type,
        num_tokens=restored.state.num_tokens if restored else 0,
        peers=trainer.peers,
    )


def _load(context: Context, source: Source, peers: Peers) -> Any:
    job = context.job
    require_device(job.device)
    if job.train.expandable_segments and job.device == "cuda":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # noqa: SLF001
    base, attention = load_base(
        source.folder,
        dtype=job.model.dtype,
        device=job.device,
        attention=job.model.attention,
        training=True,
        on_host=job.train.sharding != "none",
    )
    context.progress.update()
    peers.check(context.stop)
    text_config = base.config.get_text_config()
    routed = {
        "experts": getattr(base.config, "_experts_implementation", None),
        "router_aux_loss_coef": job.train.router_aux_loss_coef,
    }
    log.info(
        "base_loaded",
        architecture=text_config.model_type,
        attention=attention,
        dtype=str(base.dtype).removeprefix("torch."),
        **(routed if hasattr(text_config, "num_experts_per_tok") else {}),
    )
    return base


def _pack_or_not(
    model: Any, rows: Any, dataset: Dataset, job: JobConfig, peers: Peers
) -> tuple[Any, bool]:
    """Return the rows as they are if packing is right for this model, else unpacked."""
    if not job.data.packing:
        return rows, False
    fault = packing_fault(model, pick_documents(rows), dataset.pad_token_id)
    if not peers.any(fault is not None)[0]:
        log.info("packing_checked", rows=len(rows), examples=dataset.num_examples)
        return rows, True
    log.warning(
        "packing_refused",
        reason=fault or "another rank's check",
        instead="one example a row, padded",
    )
    return unpack(rows), False


def _run(trainer: LoraTrainer, restored: Restored | None) -> None:
    """Train the steps that are left; an ended training only gets its weights back."""
    done = restored.state if restored else None
    if restored and done and (done.ended or done.step >= trainer.args.max_steps):
        load_weights(restored.folder, trainer.model)
        trainer.state.global_step = done.step
        return
    # What is here stays to the end: the garbage collector need not walk it at every step.
    gc.collect()
    gc.freeze()
    try:
        trainer.train(resume_from_checkpoint=str(restored.folder) if restored else None)
    finally:
        gc.unfreeze()


def _finish(trainer: LoraTrainer, life: Life, folder: Path, restored: Restored | None) -> Adapter:
    trainer.peers.require_same(trainable(trainer.model))
    norms = delta_norms(trainer.model)
    require_learned(norms)
    write_json(folder / "delta_norms.json", norms)
    sha256 = save_adapter(trainer.model, folder)
    ran = restored is None or trainer.state.global_step > restored.state.step
    duration_s = life.duration_s() if ran else life.spent_s
    last = [line["loss"] for line in read_history(trainer.meters.history)[-10:]]
    num_tokens = trainer.meters.num_tokens
    adapter = Adapter(
        folder=folder,
        sha256=sha256,
        steps=trainer.state.global_step,
        planned_steps=trainer.args.max_steps,
        num_tokens=num_tokens,
        final_loss=sum(last) / len(last),
        tokens_per_s=num_tokens / max(duration_s, 1e-9),
        duration_s=duration_s,
    )
    log.info(
        "trained",
        steps=adapter.steps,
        planned_steps=adapter.planned_steps,
        loss=round(adapter.final_loss, 4),
        tokens_per_s=round(adapter.tokens_per_s, 1),
        num_tokens=num_tokens,
        duration_s=round(duration_s, 1),
    )
    return adapter
