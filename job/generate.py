"""Ask a model: a merged one, a base, or base + adapter. Analysis and answer are told apart."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import structlog
from pydantic import ValidationError

from job.config import Prompt
from job.errors import ExitCode, JobError
from job.files import fingerprint
from job.progress import Progress
from job.speak import Said, Speaker, load_adapter
from job.stop import Stop

log = structlog.get_logger()

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def generate(
    model: str,
    *,
    adapter: Path | None = None,
    prompts: Sequence[Prompt],
    reasoning_language: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.6,
    seed: int = 0,
    device: str = "cpu",
    stop: Stop | None = None,
) -> list[Said]:
    """Answer prompts.

    Args:
        model: A model's folder, a fetched version's folder (its merged model, else its adapter on
            the base that it names), an adapter's folder, or a source such as ``hf://…``.
        adapter: A folder with adapter_config.json, on top of ``model``.
        prompts: Questions; what they say of language and system beats the two below.
        reasoning_language: The language to think in, also one that no training row had.
        system: The system (developer) text.
        max_new_tokens: Where an answer is cut.
        temperature: 0 takes the likeliest token, else it is drawn.
        seed: The same seed draws the same tokens.
        device: ``cpu`` or ``cuda``.
        stop: Heard between tokens.

    Raises:
        JobError: 66 no such model, 65 no chat template, 69 no GPU, 70 damaged weights.
    """
    speaker = _speaker(model, adapter, device, stop or Stop())
    general = {"system": system, "reasoning_language": reasoning_language}
    asked = [Prompt(**general | prompt.model_dump(exclude_none=True)) for prompt in prompts]
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    return list(speaker.ask(asked, **how))


def _speaker(model: str, adapter: Path | None, device: str, stop: Stop) -> Speaker:
    from job.train.model import load_base

    base, adapter = locate(model, adapter, stop=stop)
    loaded, reason = load_base(base, device=device)
    log.info("model_loaded", folder=str(base), adapter=str(adapter or ""), attention=reason)
    tokenizer = base
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
        # It may have a template of its own.
        tokenizer = adapter if (adapter / "tokenizer_config.json").exists() else base
    return Speaker(
        loaded, tokenizer, base=base, started=time.time(), stop=stop, progress=Progress()
    )


def read_prompts(prompt: str | None, path: Path | None) -> list[Prompt]:
    """Return the one question, and those of a file: a line each, or jsonl with `user` or `prompt`.

    Raises:
        JobError: 64 nothing asked, 65 a bad line, 66 no such file.
    """
    prompts = [Prompt(user=prompt)] if prompt else []
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"can't be read ({error})"
            raise JobError(ExitCode.NOT_FOUND, str(path), what, "name a UTF-8 file") from error
        is_jsonl = path.suffix in (".jsonl", ".json")
        prompts += [
            _from_json(line, f"{path}:{at}") if is_jsonl else Prompt(user=line.strip())
            for at, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    if not prompts:
        raise JobError(
            ExitCode.USAGE,
            str(path or "generate"),
            "nothing is asked",
            "give a question, or a --prompts FILE with some",
        )
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    """Return a jsonl line as a prompt; columns of the training data have their meaning here too."""
    try:
        row = json.loads(line)
        if isinstance(row, str):
            return Prompt(user=row)
        asked = [turn["content"] for turn in row.get("messages", []) if turn["role"] == "user"]
        return Prompt(
            user=row.get("user") or row.get("prompt") or (asked or [""])[-1],
            system=row.get("system") or row.get("developer"),
            reasoning_language=row.get("reasoning_language"),
        )
    except (ValueError, AttributeError, LookupError, TypeError, ValidationError) as error:
        do = 'write {"user": "…"}, with "reasoning_language" and "system" if you like'
        raise JobError(ExitCode.DATA, where, "is no question", do) from error


def print_answers(answers: Sequence[Said], out: TextIO) -> None:
    """Print answers for a person, the analysis apart from them."""
    dim, plain = ("\033[2m", "\033[0m") if out.isatty() else ("", "")
    for index, said in enumerate(answers):
        language = f"  [reason in {said.reasoning_language}]" if said.reasoning_language else ""
        print("\n" * bool(index) + f"Q: {said.user}{language}", file=out)
        if said.analysis:
            print(f"{dim}Analysis: {said.analysis}{plain}", file=out)
        print(f"Answer: {said.answer or '(nothing)'}{'' if said.whole else ' … (cut)'}", file=out)


def locate(model: str, adapter: Path | None, *, stop: Stop) -> tuple[Path, Path | None]:
    """Return the base's folder and the adapter's, pulling what is not on this machine.

    Raises:
        JobError: 66 if there is no model, or its base can't be found by its name.
    """
    folder = Path(model)
    places = (folder / "merged", folder)
    if adapter is not None:
        if any((place / "merge_report.json").exists() for place in places):
            what, do = "is merged with its adapter already", "leave out --adapter, or name the base"
            raise JobError(ExitCode.USAGE, model, what, do)
        adapter = _adapter_in(adapter)
    if not folder.is_dir():
        return _pulled(model, stop=stop), adapter
    for place in places:
        if (place / "config.json").exists():
            return place, adapter
    own = _adapter_in(folder)
    return locate(_base_name(own), adapter or own, stop=stop)


def _adapter_in(folder: Path) -> Path:
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").exists():
            return place
    raise JobError(
        ExitCode.NOT_FOUND,
        str(folder),
        "holds neither a model (config.json) nor an adapter (adapter_config.json)",
        "name the folder of a model or adapter, or what `lora-job fetch` left",
    )


def _base_name(adapter: Path) -> str:
    """Return the base that an adapter names, as a folder or as a source with its revision."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    name, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    if name.startswith("file:"):
        raise JobError(
            ExitCode.NOT_FOUND,
            str(adapter),
            f"its base was a folder of the machine that trained it ({name})",
            f"name that base: lora-job generate BASE --adapter {adapter}",
        )
    if Path(name).is_dir() or not HUB_ID.match(name):
        return name
    return f"hf://{name}@{revision}" if revision else f"hf://{name}"


def _pulled(uri: str, *, stop: Stop) -> Path:
    """Return where a source lies on this machine; it is pulled once and kept."""
    from job.pull import pull_one

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-job"
    folder = cache / fingerprint(uri)[:16]
    source = pull_one(uri, folder, kind="model", stop=stop, progress=Progress())
    return source.folder
