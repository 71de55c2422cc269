"""How the adapter compares with its base: held-out loss, and answers, before and after.

The base is loaded once; "before" is the same model with its adapter switched off.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from job.artifacts import Adapter, Answer, Dataset, Source, Verdict, reuse
from job.context import Context
from job.errors import ExitCode, JobError
from job.files import fingerprint
from job.speak import Speaker, load_adapter

log = structlog.get_logger()

# Tokens, padding included, in one forward pass.
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192}
IGNORED = -100


def judge(context: Context, model: Source, dataset: Dataset, adapter: Adapter) -> Verdict:
    """Measure held-out loss and ask the job's prompts, without the adapter and with it.

    Raises:
        JobError: 70 if the adapter's loss is not finite, or the stop's own reason.
    """
    with context.stage("judge"):
        return reuse(
            context.work / "judge",
            _fingerprint(context, model, dataset, adapter),
            Verdict,
            lambda folder: _judge(context, model, dataset, adapter, folder),
            stage="judge",
        )


def _fingerprint(context: Context, model: Source, dataset: Dataset, adapter: Adapter) -> str:
    import torch
    import transformers

    job = context.job
    versions = [str(torch.__version__), str(transformers.__version__)]
    sections = [job.judge.model_dump(mode="json"), job.model.dtype, job.model.attention]
    return fingerprint(
        sections, job.seed, job.device, model.files, dataset.digest, adapter.sha256, versions
    )


def _judge(
    context: Context, model: Source, dataset: Dataset, adapter: Adapter, folder: Path
) -> Verdict:
    num_held_out, job = dataset.num_held_out, context.job
    if not num_held_out and not job.judge.prompts:
        log.info("judge_skipped", reason="nothing is held out, and no prompts are given")
        return Verdict(folder=folder)
    from job.train.model import load_base

    base, reason = load_base(
        model.folder, dtype=job.model.dtype, device=job.device, attention=job.model.attention
    )
    log.info("model_loaded", folder=str(model.folder), attention=reason)
    context.stop.check()
    adapted = load_adapter(base, adapter.folder)
    losses = _losses(context, dataset, adapted) if num_held_out else {}
    return Verdict(folder=folder, **losses, answers=_answers(context, model, dataset, adapted))


def _losses(context: Context, dataset: Dataset, adapted: Any) -> dict[str, Any]:
    """Return the verdict's figures of the held-out rows."""
    documents = read_documents(dataset.folder / "held_out.arrow")
    done, total = 0, 2 * len(documents)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        context.stop.check()
        context.progress.update(judged=done, to_judge=total)

    with adapted.disable_adapter():
        before, count = held_out_loss(adapted, documents, device=context.job.device, tick=tick)
    after, _ = held_out_loss(adapted, documents, device=context.job.device, tick=tick)
    log.info("held_out_loss_measured", before=before, after=after, documents=len(documents))
    if not math.isfinite(after):
        raise JobError(
            ExitCode.NOT_PROVEN,
            "judge",
            f"the held-out loss with the adapter is {after}",
            "lower train.learning_rate and train again",
        )
    return {
        "held_out_loss_before": before, "held_out_loss_after": after, "num_held_out_tokens": count
    }  # fmt: skip


def _answers(context: Context, model: Source, dataset: Dataset, adapted: Any) -> list[Answer]:
    section = context.job.judge
    if not section.prompts:
        return []
    speaker = Speaker(
        adapted,
        dataset.folder / "tokenizer",
        base=model.folder,
        started=context.attempt.started,
        stop=context.stop,
        progress=context.progress,
        thinking=dataset.thinking,
    )
    said = []
    for switched_off in (True, False):
        with adapted.disable_adapter() if switched_off else contextlib.nullcontext():
            asked = speaker.ask(
                section.prompts,
                max_new_tokens=section.max_new_tokens,
                temperature=section.temperature,
                seed=context.job.seed,
            )
            said.append(list(asked))
    return [
        Answer(
            user=first.user,
            reasoning_language=first.reasoning_language,
            analysis_before=first.analysis,
            before=first.answer,
            analysis_after=second.analysis,
            after=second.answer,
        )
        for first, second in zip(*said, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Document:
    """One held-out example: T tokens, and their labels (-100 where there is no loss)."""

    input_ids: list[int]
    labels: list[int]


def read_documents(path: Path) -> list[Document]:
    """Return the rows of held_out.arrow, which are never packed."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        rows = reader.read_all().select(["input_ids", "labels"]).to_pylist()
    return [Document(**row) for row in rows]


def held_out_loss(
    model: Any, documents: Sequence[Document], *, device: str, tick: Callable[[int], None]
) -> tuple[float, int]:
    """Return the mean loss in nats over all supervised tokens of all documents, and their number.

    Documents of like length share a forward pass, padded at their right: what comes later can't
    be seen, so that padding needs no mask.
    """
    import torch

    total, count = 0.0, 0
    for batch in _batches(documents, TOKENS_AT_ONCE[device]):
        with torch.inference_mode():
            loss, supervised = _summed_loss(model, batch)
        total += loss
        count += supervised
        tick(len(batch))
    return total / max(count, 1), count


def _batches(documents: Sequence[Document], at_once: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    # The longest first: what does not fit into memory fails at once.
    for document in sorted(documents, key=lambda d: len(d.input_ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].input_ids) > at_once:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _summed_loss(model: Any, batch: list[Document]) -> tuple[float, int]:
    """Return the sum of losses of (B, T) tokens, and how many there are.

    Only places that some document is supervised at are projected onto the vocabulary.
    """
    import torch

    width = len(batch[0].input_ids)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        full = [row + [fill] * (width - len(row)) for row in rows]
        return torch.tensor(full, device=model.device)

    ids = padded([document.input_ids for document in batch], 0)
    # Place t tells token t + 1.
    labels = padded([[*document.labels[1:], IGNORED] for document in batch], IGNORED)
    places = (labels != IGNORED).any(dim=0).nonzero().flatten()
    if not len(places):
        return 0.0, 0
    logits = model(input_ids=ids, logits_to_keep=places, use_cache=False).logits
    wanted = labels[:, places]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return float(loss), int((wanted != IGNORED).sum())
