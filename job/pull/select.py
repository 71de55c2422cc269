"""Which of a source's files are pulled, and what is refused: pickles, code, torn weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from job.errors import ExitCode, JobError
from job.files import PICKLES
from job.pull.pin import SourceKind, not_found, not_proven

MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
DATA_PATTERN = re.compile(r"\.(jsonl|ndjson|json|parquet|csv)(\.(gz|zst))?$", re.IGNORECASE)
CARD, LICENSE = "README.md", "LICENSE"
MAX_HEADER_BYTES = 100 << 20
INDEX = "model.safetensors.index.json"


def selected(names: Iterable[str], kind: SourceKind, *, where: str) -> list[str]:
    """Return the names that a model, or a data set, is made of.

    Raises:
        JobError: 65 if a model has only pickles, 66 if there is nothing to use.
    """
    listed = sorted(names)
    if kind == "model":
        return _model_files(listed, where)
    hidden = re.compile(r"(^|/)\.")
    found = [n for n in listed if DATA_PATTERN.search(n) and not hidden.search(n)]
    if not found:
        what, do = "holds no jsonl, json, parquet or csv", "name a file or folder of rows"
        raise not_found(where, what, do)
    return found


def _model_files(names: list[str], where: str) -> list[str]:
    """Weights lie at the root: what is below it is another format of the same ones."""
    at_root = [n for n in names if "/" not in n or n.startswith("additional_chat_templates/")]
    weights = [n for n in at_root if n.endswith(".safetensors")]
    ggufs = [n for n in at_root if n.endswith(".gguf")]
    if not weights and len(ggufs) == 1:
        return ggufs
    if not weights:
        pickles = [n for n in at_root if n.endswith(PICKLES)]
        if pickles:
            what = f"has its weights in pickles only ({pickles[0]}), which can run code"
            raise JobError(ExitCode.DATA, where, what, "use a model with .safetensors")
        raise not_found(where, "holds no .safetensors", "name a folder or repository of a model")
    # Beside model-*.safetensors some repositories hold the same weights for other programs.
    named = [n for n in weights if n == "model.safetensors" or n.startswith("model-")]
    others = [n for n in at_root if n.endswith(MODEL_SUFFIXES) and n not in weights]
    licences = [n for n in at_root if n.startswith(LICENSE) and not n.endswith(MODEL_SUFFIXES)]
    return sorted({*(named or weights), *others, *licences})


def card_of(folder: Path) -> dict[str, Any]:
    """Return the front matter of a folder's README.md, or nothing."""
    path = folder / CARD
    return front_matter(path.read_text("utf-8", errors="replace")) if path.is_file() else {}


def front_matter(text: str) -> dict[str, Any]:
    """Return the YAML between the first two ``---`` of a card."""
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def check_model(folder: Path, names: Iterable[str], *, where: str, weights: bool = True) -> None:
    """Refuse a model that brings code, or whose weights are torn or missing.

    Raises:
        JobError: 65 for code (``auto_map``), 66 for missing files, 70 for torn ones.
    """
    listed = set(names)
    if "config.json" not in listed:
        raise not_found(where, "holds no config.json", "name a folder or repository of a model")
    for name in ("config.json", "tokenizer_config.json"):
        if name in listed and "auto_map" in _json(folder / name, where):
            what = "wants to run code of its own (auto_map), which is never done here"
            do = "use an architecture that transformers knows, and remove auto_map"
            raise JobError(ExitCode.DATA, f"{where}/{name}", what, do)
    shards = {n for n in listed if n.endswith(".safetensors")}
    if weights:
        for name in sorted(shards):
            check_safetensors(folder / name, where=f"{where}/{name}")
        index = _json(folder / INDEX, where) if INDEX in listed else {}
        missing = sorted(set(index.get("weight_map", {}).values()) - shards)
        if missing:
            what = f"lacks {len(missing)} of the shards in its index, first {missing[0]}"
            raise not_found(where, what, "pull or copy it again, whole")


def _json(path: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = f"is no JSON: {error}"
        raise not_proven(f"{where}/{path.name}", what, "pull or copy it again") from None
    return found if isinstance(found, dict) else {}


def check_safetensors(path: Path, *, where: str) -> None:
    """Refuse a file whose header does not account for exactly its bytes.

    Raises:
        JobError: 70, with what the header says and what there is.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _torn(where, f"is torn: {size} bytes can't hold its header of {length}")
        try:
            entries = json.loads(handle.read(length))
            ends = [e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"]
            promised = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise _torn(where, "has no readable header") from None
    if promised != size:
        raise _torn(where, f"is torn: its header promises {promised} bytes, it has {size}")


def _torn(where: str, what: str) -> JobError:
    return not_proven(where, what, "pull or copy it again from a source that you trust")
