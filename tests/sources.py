"""Models and data as bytes, for the tests of pull: whole, torn, pickled, and with code."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode()
ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def safetensors(num_bytes: int = 64, *, seed: int = 0) -> bytes:
    """Return a whole .safetensors file with one tensor of ``num_bytes``."""
    entry = {"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    header = json.dumps(entry).encode()
    body = bytes((seed + i * 7) % 256 for i in range(256)) * (num_bytes // 256 + 1)
    return len(header).to_bytes(8, "little") + header + body[:num_bytes]


def model_files(**more: bytes) -> dict[str, bytes]:
    """Return the files of a small model; ``__`` in a name stands for a dot."""
    files = {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors(3 << 20),
        "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    }
    return files | {name.replace("__", "."): body for name, body in more.items()}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Write ``files`` below ``folder`` and return it."""
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return folder
