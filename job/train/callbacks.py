"""What happens around each step: seeds, checks, figures, checkpoints, and hearing the stop."""

# ruff: noqa: ARG002 - the Trainer calls by name

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from transformers import TrainerCallback, set_seed

from job.errors import ExitCode, JobError
from job.progress import FIRST_STEP
from job.train.checkpoints import CheckpointState, plain_groups, save_checkpoint
from job.train.lora import require_gradients

if TYPE_CHECKING:
    from job.context import Context
    from job.train.trainer import LoraTrainer

log = structlog.get_logger()


@dataclass
class Life(TrainerCallback):
    """The life of one training, step by step."""

    context: Context
    trainer: LoraTrainer
    folder: Path
    """Where checkpoints are staged."""
    fingerprint: dict[str, str]
    trackers: list[Any] = field(default_factory=list)
    spent_s: float = 0.0
    """Seconds that attempts before this one spent in training."""
    _loss: float = float("nan")
    _rate: float = 0.0
    _saved: float = 0.0
    _step_began: float = 0.0
    _checked: set[str] = field(default_factory=set)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks."""
        self.trainer.meters.start()
        self._saved = time.monotonic()
        self.context.progress.update(step=state.global_step, num_steps=state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed every generator from (seed, step), so that no state of theirs need be kept."""
        self._step_began = time.monotonic()
        # Each rank draws its own dropout; rank 0 what a single process draws.
        rank = [self.trainer.peers.rank] if self.trainer.peers.rank else []
        mixed = np.random.SeedSequence([args.seed, state.global_step, *rank]).generate_state(1)
        set_seed(int(mixed[0]))

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beat, so that a long accumulation is not taken for a hang."""
        self.context.progress.update()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop before a step that would spoil the weights, or that leaves adapters out."""
        self._loss = self.trainer.meters.loss()
        for what, value in (("loss", self._loss), ("gradient's norm", self.trainer.grad_norm)):
            if not math.isfinite(value):
                raise JobError(
                    ExitCode.NOT_PROVEN,
                    f"train step {state.global_step + 1}",
                    f"the {what} is {value}",
                    "lower train.learning_rate, or look at the rows of this step",
                )
        self._check_gradients()
        self._rate = float(self.trainer.optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the figures; save when it is time; end when somebody asks, or time is up."""
        step = state.global_step
        self.context.progress.end(FIRST_STEP)
        line = self.trainer.meters.step(
            step, self._loss, learning_rate=self._rate, grad_norm=self.trainer.grad_norm
        )
        shown = ("loss", "tokens_per_s", "eta_s")
        figures = {key: line[key] for key in shown}
        self.context.progress.update(step=step, num_steps=state.max_steps, **figures)
        for tracker in self.trackers:
            tracker.log(step, line)
        peers = self.trainer.peers
        stopped, late, due = peers.any(
            self.context.stop.requested, self._out_of_time(state), self._due(step)
        )
        ended = step >= state.max_steps or late
        if ended:
            control.should_training_stop = True
        if ended or stopped or due:
            if not self._fenced():
                self.save(state, ended=ended)
            # Only here: a stop that came after the vote above ends the next step, saved.
            peers.check(self.context.stop)

    def save(self, state: Any, *, ended: bool) -> None:
        """Make a checkpoint durable, here and in the store; rank 0 does, and the others wait."""
        if self.trainer.peers.rank == 0:
            self._save(state, ended=ended)
        self.trainer.peers.wait()
        self._saved = time.monotonic()

    def _save(self, state: Any, *, ended: bool) -> None:
        began, step = time.monotonic(), state.global_step
        folder = self.folder / f"checkpoint-{step}"
        save_checkpoint(
            folder,
            trainer=self.trainer,
            history=self.trainer.meters.history,
            state=CheckpointState(
                step=step,
                num_tokens=self.trainer.meters.num_tokens,
                duration_s=self.duration_s(),
                ended=ended,
                fingerprint=self.fingerprint,
                param_groups=plain_groups(self.trainer.optimizer),
                scheduler=self.trainer.lr_scheduler.state_dict(),
            ),
        )
        self.context.attempt.save_checkpoint(folder, step)
        shutil.rmtree(folder)
        now = time.monotonic()
        log.info("checkpoint_saved", step=step, duration_s=round(now - began, 2))
        # SIGTERM is heard when the step in flight is over: this is what a grace period has to hold.
        self.context.progress.update(save_s=round(now - self._step_began, 2))

    def duration_s(self) -> float:
        """Return the seconds spent in training, over all attempts."""
        return self.spent_s + self.trainer.meters.elapsed_s()

    def _check_gradients(self) -> None:
        """Check lora_B at the first step, and lora_A once an update has moved lora_B off zero."""
        if "lora_B" not in self._checked:
            require_gradients(self.trainer.model, "lora_B")
            self._checked.add("lora_B")
        elif "lora_A" not in self._checked and self._rate > 0:
            require_gradients(self.trainer.model, "lora_A")
            self._checked.add("lora_A")

    def _out_of_time(self, state: Any) -> bool:
        limit_s = self.context.job.train.max_duration_s
        if limit_s is None or state.global_step >= state.max_steps or self.duration_s() < limit_s:
            return False
        log.warning(
            "training_ended_early",
            reason=f"train.max_duration_s: {limit_s:g}",
            step=state.global_step,
            num_steps=state.max_steps,
        )
        return True

    def _due(self, step: int) -> bool:
        section = self.context.job.train
        if section.checkpoint_every_steps is not None:
            return step % section.checkpoint_every_steps == 0
        return time.monotonic() - self._saved >= section.checkpoint_every_s

    def _fenced(self) -> bool:
        """Whether a newer attempt owns the run: then there is nothing left to write."""
        try:
            self.context.stop.check()
        except JobError as error:
            return error.code is ExitCode.FENCED
        return False
