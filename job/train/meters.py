"""What training tells: real tokens a second, padding, MFU, memory and when it will be done."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch

from job.train.peers import ALONE, Peers

log = structlog.get_logger()

# Dense bf16 peak in FLOP/s without sparsity, as the makers' data sheets have it. More particular
# names first: an "H100 NVL" is not an SXM one.
PEAK_FLOPS = {
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12,
}  # fmt: skip
TALK_EVERY_S = 10.0


@dataclass(slots=True)
class Meters:
    """Counts tokens of the present step, and writes a line for every step.

    ``active``: parameters that one token meets; a LoRA step costs 4·N FLOP a token, because the
    frozen base needs no gradient of its weights.
    """

    history: Path
    num_steps: int
    active: int
    device: str
    num_tokens: int = 0
    """Real tokens so far, by all attempts."""
    peers: Peers = ALONE
    """Figures are sums over them."""
    _batches: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    _losses: list[torch.Tensor] = field(default_factory=list)
    _step_began: float = 0.0
    _began: float = 0.0
    _tokens_here: int = 0
    _steps_here: int = 0
    _told: float = -TALK_EVERY_S

    def start(self) -> None:
        """Start the clock of this attempt."""
        self._began = self._step_began = time.monotonic()
        self._tokens_here = self._steps_here = 0

    def add(self, real: torch.Tensor, loss: torch.Tensor) -> None:
        """Count one micro-batch: bool [rows, tokens], and its share of the step's loss."""
        self._batches.append((real.sum(), real.numel()))
        self._losses.append(loss.detach())

    def loss(self) -> float:
        """Return the present step's loss, in nats a supervised token."""
        if not self._losses:
            return float("nan")
        return float(self.peers.sum(torch.stack(self._losses).sum()))

    def step(self, step: int, loss: float, **figures: float) -> dict[str, Any]:
        """Close a step, write its line, and return its figures."""
        now = time.monotonic()
        real = int(sum(int(count) for count, _ in self._batches))
        places = sum(size for _, size in self._batches)
        if self.peers.size > 1:
            real, places = self.peers.sum(torch.tensor([real, places])).tolist()
        self._batches, self._losses = [], []
        self.num_tokens += real
        self._tokens_here += real
        self._steps_here += 1
        rate = real / max(now - self._step_began, 1e-9)
        self._step_began = now
        line = {
            "step": step,
            "loss": loss,
            **figures,
            "num_tokens": self.num_tokens,
            "tokens_per_s": round(rate, 1),
            "padding": round(1 - real / max(places, 1), 4),
            "memory_gb": round(memory_bytes(self.device) / 1e9, 2),
            "eta_s": round(self.eta_s(step), 1),
        }
        if (share := mfu(rate / self.peers.size, self.active, self.device)) is not None:
            line["mfu"] = round(share, 4)
        with self.history.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        self._tell(line, now)
        return line

    def rate(self) -> float:
        """Return real tokens a second of this attempt."""
        return self._tokens_here / max(time.monotonic() - self._began, 1e-9)

    def elapsed_s(self) -> float:
        """Return the seconds since this attempt's training began."""
        return time.monotonic() - self._began

    def eta_s(self, step: int) -> float:
        """Return the seconds that the steps after ``step`` will take, at this attempt's pace."""
        return (self.num_steps - step) * self.elapsed_s() / max(self._steps_here, 1)

    def _tell(self, line: dict[str, Any], now: float) -> None:
        if now - self._told < TALK_EVERY_S and line["step"] < self.num_steps:
            return
        self._told = now
        log.info("train_step", num_steps=self.num_steps, **line)


def mfu(tokens_per_s: float, active: int, device: str) -> float | None:
    """Return the model FLOP utilisation by 4·N, or None where the peak is not known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)
    return None if peak is None else 4 * active * tokens_per_s / peak


def memory_bytes(device: str) -> int:
    """Return the most memory taken so far: the GPU's, or this process's."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
