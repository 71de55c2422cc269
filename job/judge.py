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
from job.files import fingerprint, write_json
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
    num_held_out = dataset.num_held_out
    if not num_held_out and not context.job.judge.prompts:
        log.info("judge_skipped", reason="nothing is held out, and no prompts are given")
        return _written(Verdict(folder=folder))
    documents = list(read_documents(dataset.folder / "held_out.arrow")) if num_held_out else []
    adapted = _load(context, model, adapter)
    before = after = None
    if documents:
        tell = _teller(context, documents)
        with adapted.disable_adapter():
            before = held_out_loss(adapted, documents, device=context.job.device, tick=tell)
        after = held_out_loss(adapted, documents, device=context.job.device, tick=tell)
        log.info("held_out_loss_measured", before=before, after=after, documents=len(documents))
        if not math.isfinite(after):
            raise JobError(
                ExitCode.NOT_PROVEN,
                "judge",
                f"the held-out loss with the adapter is {after}",
                "lower train.learning_rate and train again",
            )
    verdict = Verdict(
        folder=folder,
        held_out_loss_before=before,
        held_out_loss_after=after,
        num_held_out_tokens=sum(document.num_supervised for document in documents),
        answers=_answers(context, model, dataset, adapted),
    )
    return _written(verdict)


def _written(verdict: Verdict) -> Verdict:
    write_json(verdict.folder / "verdict.json", verdict.model_dump(mode="json", exclude={"folder"}))
    return verdict


def _load(context: Context, model: Source, adapter: Adapter) -> Any:
    from job.train.model import load_base

    section = context.job.model
    base, reason = load_base(
        model.folder, dtype=section.dtype, device=context.job.device, attention=section.attention
    )
    log.info("model_loaded", folder=str(model.folder), attention=reason)
    context.stop.check()
    return load_adapter(base, adapter.folder)


def _teller(context: Context, documents: Sequence[Document]) -> Callable[[int], None]:
    """Return what is called after each batch with its number of documents."""
    done, total = 0, 2 * len(documents)

    def tell(count: int) -> None:
        nonlocal done
        done += count
        context.stop.check()
        context.progress.update(judged=done, to_judge=total)

    return tell


def _answers(context: Context, model: Source, dataset: Dataset, adapted: Any) -> list[Answer]:
    section = context.job.judge
    if not section.prompts:
        return []
    speaker = Speaker.of(
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

    @property
    def num_supervised(self) -> int:
        """Tokens that count: the first has nothing before it to be told from."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the examples of an Arrow file; packed rows are taken apart again."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
        for batch in reader:
            for row in batch.to_pylist():
                start = 0
                for length in row["lengths"]:
                    piece = slice(start, start + length)
                    yield Document(row["input_ids"][piece], row["labels"][piece])
                    start += length


def held_out_loss(
    model: Any, documents: Sequence[Document], *, device: str, tick: Callable[[int], None]
) -> float:
    """Return the mean loss in nats over all supervised tokens of all documents.

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
    return total / max(count, 1)


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
