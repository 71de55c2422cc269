"""The other processes of one training: what is summed over them, and what they agree on.

Every rank runs the same Trainer on its own batches, and meets the others only here: for the number
of supervised tokens, the adapter's gradient (once a step: it is small beside the frozen base), the
figures, and whether to stop, save or end. torch's DistributedDataParallel isn't used: its hooks sit
in the module's forward, and the loss goes past that, straight to the supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from job.errors import ExitCode, JobError
from job.stop import Stop


class Peers:
    """The ranks of this training; by itself there is one, and nothing is sent anywhere."""

    rank = 0
    size = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks."""
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Put the sum over all ranks into every trained parameter's gradient."""

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether any rank has it: the same answer everywhere."""
        return flags

    def check(self, stop: Stop) -> None:
        """Raise the stop's reason, on all ranks or on none."""
        stop.check()

    def wait(self) -> None:
        """Wait until every rank is here."""

    def require_same(self, tensors: dict[str, torch.Tensor]) -> None:
        """Check that every rank has the same trained weights.

        Raises:
            JobError: 70 if they have drifted apart.
        """


class Group(Peers):
    """Ranks joined by torch.distributed: its default group must be there."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks; a collective, like everything below."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of each dtype in one piece."""
        groups: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                groups.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in groups.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether any rank has it."""
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())

    def check(self, stop: Stop) -> None:
        """Raise the stop's reason once any rank has heard of it."""
        if self.any(stop.requested)[0]:
            stop.check()

    def wait(self) -> None:
        """Wait for all, on the CPU: a GPU's collective would spin for as long as an upload takes."""
        self.any(False)

    def require_same(self, tensors: dict[str, Any]) -> None:
        """Compare a checksum of the trained weights."""
        # As fp64 a sum of equal numbers in an equal order is equal to the last bit.
        check = sum((t.detach().double().sum().cpu() for t in tensors.values()), torch.zeros(()))
        low, high = check.double().clone(), check.double().clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise JobError(
                ExitCode.NOT_PROVEN,
                "train",
                f"the {self.size} ranks hold different adapters",
                "report it; train.num_processes: 1 does without them",
            )


ALONE = Peers()
