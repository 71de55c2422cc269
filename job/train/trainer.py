"""TRL's SFTTrainer with our rows, our loss, our order and our checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from job.config import JobConfig
from job.estimate import planned_steps
from job.train.checkpoints import CheckpointState, load_optimizer, load_weights
from job.train.collator import Collator, Order, build_masks, with_blank
from job.train.loss import balance_loss, summed_loss
from job.train.meters import Meters
from job.train.model import base_of
from job.train.peers import ALONE, Peers


class LoraTrainer(SFTTrainer):
    """SFTTrainer on rows that are tokens already.

    Differences to TRL's own, each for a reason:

    - the loss is summed over supervised positions and divided by their number in the whole
      accumulation, so packed and padded rows give the same gradient;
    - masks of packed rows are ours (see :mod:`job.train.collator`);
    - state goes to and comes from our checkpoints: nothing is pickled.
    """

    meters: Meters
    peers: Peers = ALONE
    resumed: CheckpointState | None = None
    grad_norm: float = float("nan")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's mean loss over supervised tokens."""
        assert not return_outputs
        labels, real = inputs.pop("labels"), inputs.pop("real")
        base = base_of(self.accelerator.unwrap_model(model))
        documents = inputs.pop("documents", None)
        if documents is not None:
            config, dtype = base.config.get_text_config(), base.get_input_embeddings().weight.dtype
            inputs["attention_mask"] = build_masks(documents, config, dtype)
        with self.accelerator.autocast():
            total, router_logits = summed_loss(base, inputs, labels, self.aux_loss_enabled)
        assert num_items_in_batch is not None
        loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        if self.aux_loss_enabled and (self.peers.size == 1 or bool(real.any())):
            balance = balance_loss(base, router_logits, real)
            batches = self.current_gradient_accumulation_steps * self.peers.size
            loss += self.router_aux_loss_coef * balance / batches
        self.meters.add(real, loss)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002
        """Count nothing: the meters do, and by what LoRA really costs."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = super()._get_num_items_in_batch(batch_samples, device)
        return self.peers.sum(torch.as_tensor(count)) if self.peers.size > 1 else count

    def _clip_grad_norm(self, model: Any) -> Any:
        self.peers.sum_gradients(model.parameters())
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.grad_norm = float(norm)
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:  # noqa: ARG002
        lengths = [sum(counts) for counts in self.train_dataset.with_format(None)["lengths"]]
        rank, size = self.peers.rank, self.peers.size
        if size > 1:
            lengths = lengths[:-1]  # the blank row
        batch_size = self.args.per_device_train_batch_size
        return Order(lengths, batch_size, self.args.seed, rank=rank, size=size)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.resumed is not None
            load_optimizer(Path(checkpoint), self.resumed, self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: each step seeds the generators itself."""


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: Any,
    collate: Collator,
    job: JobConfig,
    folder: Path,
    *,
    recompute: bool,
    peers: Peers = ALONE,
) -> LoraTrainer:
    """Return the trainer of one run."""
    num_steps = planned_steps(job.train, len(rows), peers.size)
    args = _arguments(job, num_steps, model, folder, recompute=recompute)
    if args.n_gpu > 1:
        args._n_gpu = 1  # noqa: SLF001  This process has one; it would split each batch over all.
    with warnings.catch_warnings():
        # TRL still says gradient_checkpointing, and transformers wants another word for it.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = LoraTrainer(
            model=model,
            args=args,
            train_dataset=(rows if peers.size == 1 else with_blank(rows)).with_format("numpy"),
            data_collator=collate,
            processing_class=tokenizer,
        )
    # It prints to stdout, which is for data.
    trainer.remove_callback(PrinterCallback)
    trainer.peers = peers
    # The loss is divided by the accumulation's tokens, not by its micro-batches.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def _arguments(
    job: JobConfig, num_steps: int, model: Any, folder: Path, *, recompute: bool
) -> SFTConfig:
    """Return the settings: everything that matters is said, nothing is left to a default."""
    section = job.train
    cosine = section.scheduler == "cosine_with_min_lr"
    return SFTConfig(
        output_dir=str(folder),
        seed=job.seed,
        use_cpu=job.device == "cpu",
        bf16=base_of(model).dtype is torch.bfloat16 and job.device == "cuda",
        fp16=False,
        max_steps=num_steps,
        per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        gradient_checkpointing=recompute,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.scheduler,
        lr_scheduler_kwargs={"min_lr_rate": section.min_lr_rate} if cosine else {},
        # Rounded down: a run of a few steps has no step at a learning rate of zero.
        warmup_steps=int(num_steps * section.warmup_ratio),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch_fused",
        router_aux_loss_coef=section.router_aux_loss_coef,
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=job.device == "cuda",
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_liger_kernel=False,
        push_to_hub=False,
    )
