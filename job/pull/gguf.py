"""A GGUF file becomes a folder that transformers loads: dense safetensors and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import structlog

from job.errors import ExitCode, JobError
from job.stop import Stop

log = structlog.get_logger()

Dtype = Literal["float32", "bfloat16"]
SHARD_SIZE = "5GB"


def convert(gguf: Path, folder: Path, *, dtype: Dtype, stop: Stop) -> None:
    """Write ``gguf``'s model and tokenizer, its chat template included, into ``folder``.

    Raises:
        JobError: 65 for an architecture or a quantisation that transformers can't read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("gguf_converted_once", file=gguf.name, dtype=dtype, size_bytes=gguf.stat().st_size)
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
        )
        stop.check()
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        what = f"is no GGUF that transformers can read: {error}"
        do = "use the model's safetensors"
        raise JobError(ExitCode.DATA, gguf.name, what, do) from error
    stop.check()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
