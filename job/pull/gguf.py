"""A GGUF file becomes a folder that transformers loads: dense safetensors and a tokenizer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog

from job.errors import ExitCode, JobError
from job.stop import Stop

log = structlog.get_logger()

Dtype = Literal["float32", "bfloat16"]
SHARD_SIZE = "5GB"


def convert(
    gguf_file: Path, folder: Path, *, dtype: Dtype, stop: Stop, weights: bool = True
) -> None:
    """Write a GGUF's model and tokenizer, its chat template included, into ``folder``.

    Without ``weights``, only the model's config.

    Raises:
        JobError: 65 for an architecture or a quantisation that transformers can't read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    log.info("gguf_unpacked", file=gguf_file.name, dtype=dtype, size_bytes=gguf_file.stat().st_size)
    with _read_once():
        try:
            model = (
                AutoModelForCausalLM.from_pretrained(
                    **where,
                    dtype=getattr(torch, dtype),
                    quantization_config=GgufConfig(dequantize=True),
                )
                if weights
                else AutoConfig.from_pretrained(**where)
            )
            stop.check()
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (ValueError, LookupError, NotImplementedError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            what, do = f"can't be read by transformers: {said}", "use the model's safetensors"
            raise JobError(ExitCode.DATA, gguf_file.name, what, do) from error
    stop.check()
    model.save_pretrained(folder, **({"max_shard_size": SHARD_SIZE} if weights else {}))
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Let the file's header be read once, not three times, and its names be mapped once a layer.

    transformers 5.23 opens the file for the config, the weights and the tokenizer, and builds the
    whole table of names for every module of the model: two thirds of the time on a small model.
    Remove when loading SmolLM2-135M takes as long without this.
    """
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in kept.items():
        setattr(gguf, name, functools.lru_cache(maxsize=64)(original))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(gguf, name, original)
