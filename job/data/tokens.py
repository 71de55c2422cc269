"""The base's tokenizer, as files and as a function from text to ids.

Needs neither torch nor transformers.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.data.render import SLOT, Rendered
from job.data.template import Template
from job.data.words import Words, splits_at_spaces
from job.errors import ExitCode, JobError

IGNORED = -100
"""The label of a token without loss."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example: int32 arrays of one length, labels -100 where there is no loss."""

    ids: Any
    labels: Any

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss: the first has nothing before it to be told from."""
        return int((self.labels[1:] != IGNORED).sum())


def copy_tokenizer(model: Path, folder: Path, chat_template: str | None) -> None:
    """Copy the base's tokenizer, byte for byte but for a chat template that replaces its own.

    Raises:
        JobError: 66 if the model has no tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        do = "choose a model with a tokenizer.json"
        raise JobError(ExitCode.NOT_FOUND, "model.source", "has no tokenizer.json", do)
    if chat_template is None:
        return
    (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    settings = _read_json(folder / "tokenizer_config.json")
    if settings.pop("chat_template", None) is not None:
        text = json.dumps(settings, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_template(folder: Path, *, started: float) -> Template | None:
    """Return the chat template of a tokenizer's folder, or None for a base model without one."""
    settings = _settings(folder)
    text: Any = settings.get("chat_template")
    if (folder / TEMPLATE_FILE).exists():
        text = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    elif text is None:
        text = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(text, list):
        named = {entry["name"]: entry["template"] for entry in text}
        text = named.get("default")
    if not text:
        return None
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    variables = {name: _token(settings[name]) for name in names if settings.get(name)}
    return Template(text, started=started, variables=variables)


def _settings(folder: Path) -> dict[str, Any]:
    older = _read_json(folder / "special_tokens_map.json")
    return {**older, **_read_json(folder / "tokenizer_config.json")}


def _token(value: Any) -> str:
    return str(value["content"] if isinstance(value, dict) else value or "")


class Encoder:
    """From text to ids.

    A segment is encoded by itself, as a prompt is when the model is asked: no token reaches over
    the place where the answer begins. Tokenizers that put a space before a text (SentencePiece's
    kind) encode the whole instead, and a token that reaches over belongs to the answer.

    Raises:
        JobError: 65 if tokenizer.json can't be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise JobError(
                ExitCode.DATA, "tokenizer.json", f"can't be read: {error}", "fetch the model again"
            ) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_tokens = sorted(token.content for token in added.values() if token.special)
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        words = splits_at_spaces(_read_json(path))
        self._words = Words(self.tokenizer) if words else None
        settings = _settings(folder)
        self.eos, pad = _token(settings.get("eos_token")), _token(settings.get("pad_token"))
        found = (self.tokenizer.token_to_id(token) for token in (pad, self.eos) if token)
        self.pad_token_id: int = next((number for number in found if number is not None), 0)
        """What rows are filled up with; labels are -100 there, whatever it is."""
        first = self.tokenizer.encode("a", add_special_tokens=True).tokens[0]
        self.bos = first if first in self.special_tokens else ""
        """The token that this tokenizer puts before a text, or ''."""
        first = self.tokenizer.encode("ab", add_special_tokens=False).tokens[0]
        self._by_segment = not first.startswith(("\u2581", "\u0120"))

    @functools.cached_property
    def _literal(self) -> Any:
        """The same tokenizer, to which control tokens are text: most data never asks for it."""
        copy = type(self.tokenizer).from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def stop_token_ids(self, model: Path, template: Template | None) -> list[int]:
        """Return what ends an answer: the tokenizer's and the model's ends, and the template's."""
        names = {self.eos} if self.eos else set()
        for kind, ending in (template.endings if template else {}).items():
            special = [found[0] for found in self._special.finditer(ending)]
            # An answer ends with the first (more may follow it); a call has marks of its own first.
            names |= set(special[:1] if kind == "answer" else special[-1:])
        ids = {found for name in names if (found := self.tokenizer.token_to_id(name)) is not None}
        for file in ("generation_config.json", "config.json"):
            value = _read_json(model / file).get("eos_token_id")
            ids |= set(value if isinstance(value, list) else [value]) - {None}
        return sorted(ids)

    def encode(self, batch: list[Rendered]) -> list[Tokens]:
        """Return the tokens of every example of a batch."""
        if not self._by_segment:
            return [self._whole(rendered) for rendered in batch]
        pieces: list[tuple[str, bool]] = []
        counts = [[self._cut(text, r, pieces) for text, _ in r.segments] for r in batch]
        ids = iter(self._ids(pieces))
        return [
            _tokens([[next(ids) for _ in range(count)] for count in row], rendered)
            for row, rendered in zip(counts, batch, strict=True)
        ]

    def _cut(self, text: str, rendered: Rendered, pieces: list[tuple[str, bool]]) -> int:
        """Add the pieces of a segment, with whether control tokens are plain text in them."""
        if not rendered.slots or not SLOT.search(text):
            pieces.append((text, False))
            return 1
        found = [piece for piece in re.split(f"({self._special.pattern})", text) if piece]
        pieces += [(rendered.shown(piece), SLOT.search(piece) is not None) for piece in found]
        return len(found)

    def _ids(self, pieces: list[tuple[str, bool]]) -> list[Any]:
        """Return an int32 array for each piece."""
        import numpy as np

        ids = self._plain_ids([text if not literal else "" for text, literal in pieces])
        for at, (text, literal) in enumerate(pieces):
            if literal:
                found = self._literal.encode(text, add_special_tokens=False)
                ids[at] = np.array(found.ids, np.int32)
        return ids

    def _plain_ids(self, texts: list[str]) -> list[Any]:
        import numpy as np

        if self._words is not None:
            return [np.frombuffer(ids, np.int32) for ids in self._words.encode(texts)]
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def _whole(self, rendered: Rendered) -> Tokens:
        import numpy as np

        def ids_of(text: str) -> Any:
            pieces: list[tuple[str, bool]] = []
            self._cut(text, rendered, pieces)
            return np.concatenate([np.empty(0, np.int32), *self._ids(pieces)])

        full = ids_of("".join(text for text, _ in rendered.segments))
        parts: list[list[Any]] = []
        done, before = 0, ""
        for text, _ in rendered.segments:
            before += text
            end = max(done, _common(ids_of(before), full))
            parts.append([full[done:end]])
            done = end
        return _tokens(parts, rendered)


def _tokens(parts: list[list[Any]], rendered: Rendered) -> Tokens:
    """Return ids and labels; ``parts``: for each segment, the ids of its pieces."""
    import numpy as np

    ids = [piece for pieces in parts for piece in pieces]
    trained = [on for pieces, (_, on) in zip(parts, rendered.segments, strict=True) for _ in pieces]
    labels = [
        piece if on else np.full(len(piece), IGNORED, np.int32)
        for piece, on in zip(ids, trained, strict=True)
    ]
    return Tokens(np.concatenate(ids), np.concatenate(labels))


def _common(first: Any, second: Any) -> int:
    """Return how many ids two arrays begin with in common."""
    size = min(len(first), len(second))
    differ = (first[:size] != second[:size]).nonzero()[0]
    return int(differ[0]) if len(differ) else size
