"""The stage: base and rows in, an adapter that learned out, over as many attempts as it takes."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from job.artifacts import Adapter, Dataset, Source, reuse
from job.files import fingerprint, write_json
from job.train.checkpoints import Restored, fingerprints, read_state

if TYPE_CHECKING:
    from job.context import Context

log = structlog.get_logger()

BAKED = Path(__file__).parents[2] / "compiled"
"""Kernels in the image, compiled when it was made: see docker/compiled."""


def train(context: Context, model: Source, dataset: Dataset) -> Adapter:
    """Train the adapter, from the newest valid checkpoint if there is one.

    Raises:
        JobError: 65 a checkpoint of another run, 69 no GPU, 70 not finite or nothing learned,
            71 out of memory, 75 or 76 when asked to stop, 78 names that the model lacks.
    """
    with context.stage("train"):
        _keep_compiled(context)
        parts = fingerprints(context.job, model, dataset)
        return reuse(
            context.work / "train",
            fingerprint(parts),
            Adapter,
            lambda folder: _train(context, model, dataset, folder, parts),
            stage="train",
        )


def _keep_compiled(context: Context) -> None:
    """Begin with the kernels that the image has, and let new ones outlive the pod where they can."""
    if context.job.device != "cuda":
        return
    for name, kind in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        given = str(context.cache / "compiled" / kind) if context.cache else os.environ.get(name)
        if given is None:
            continue
        folder = Path(given)
        if (BAKED / kind).is_dir() and not folder.exists():
            _copy_whole(BAKED / kind, folder)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[name] = given


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder aside, then rename it: a pod beside this one sees all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        copy = shutil.copytree(source, Path(aside, target.name))
        with contextlib.suppress(OSError):  # the other pod was faster
            copy.rename(target)


def _train(
    context: Context, model: Source, dataset: Dataset, folder: Path, parts: dict[str, str]
) -> Adapter:
    from job.train.devices import num_processes

    restored = _restore(context, folder / "restored", parts)
    count = num_processes(context.job)
    if count > 1:
        from job.train.ranks import train_in_ranks

        adapter = train_in_ranks(context, model, dataset, folder, parts, restored, count)
    else:
        from job.train.fit import fit
        from job.train.peers import ALONE

        adapter = fit(context, model, dataset, folder, parts, restored, ALONE)
        _let_go(context.job.device)
    # A list: the order of the parts tells the story.
    write_json(folder / "startup.json", {"parts": list(context.progress.startup().items())})
    for scratch in ("restored", "trainer"):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    return adapter


def _let_go(device: str) -> None:
    """Free the base: trainer and callbacks hold each other, and the judge loads the next one."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _restore(context: Context, folder: Path, parts: dict[str, str]) -> Restored | None:
    """Fetch the newest valid checkpoint into ``folder``; None if this run has none yet."""
    shutil.rmtree(folder, ignore_errors=True)
    if context.attempt.restore_checkpoint(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    state = read_state(folder, parts)
    log.info("checkpoint_restored", step=state.step, spent_s=round(state.duration_s, 1))
    return Restored(folder, state)
