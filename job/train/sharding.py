"""FSDP2 for a base that does not fit on one GPU: its layers are shared out, the adapter is not.

Only frozen weights are sharded, so nothing of them is reduced in the backward; the adapter and its
optimiser are small, whole on every rank, and summed like those of unsharded ranks. Checkpoints and
saving therefore need to know nothing of it. Embeddings and head stay whole: the loss multiplies by
the head directly.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from job.errors import ExitCode, JobError
from job.train.model import base_of
from job.train.peers import Peers

log = structlog.get_logger()


def shard_base(model: Any, peers: Peers, device: str) -> None:
    """Share the frozen weights of every layer out among the ranks, and put the rest on ``device``.

    Raises:
        JobError: 78 for one process alone, or a model whose layers can't be told.
    """
    if peers.size == 1:
        raise _refused(
            "needs more than one process", "set train.num_processes, or ask for more GPUs"
        )
    inner = base_of(model).base_model
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _refused(f"knows no layers in {type(inner).__name__}", "set train.sharding: none")
    mesh = init_device_mesh(device, (peers.size,))
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    sharded = {p for p in layers.parameters() if p not in trained}
    whole = {p for p in model.parameters() if p not in sharded}
    # The root holds nothing itself: it lets one layer be fetched while another computes.
    fully_shard(inner, mesh=mesh, ignored_params=whole)
    _place(model, sharded, device)
    local = sum(p.to_local().nbytes for p in sharded)
    log.info(
        "base_sharded",
        ranks=peers.size,
        sharded_gb=round(local / 1e9, 6),
        whole_gb=round(sum(p.nbytes for p in whole) / 1e9, 6),
    )


def _place(model: nn.Module, sharded: set[nn.Parameter], device: str) -> None:
    """Move what is not sharded."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter not in sharded:
                parameter.data = parameter.data.to(device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def _refused(what: str, do: str) -> JobError:
    return JobError(ExitCode.CONFIG, "train.sharding: fsdp2", what, do)
