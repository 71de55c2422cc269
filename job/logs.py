"""Logging by structlog: a console for people on a TTY, JSON lines everywhere else."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog


def configure(*, copy_to: Path | None = None, least: int = logging.INFO) -> None:
    """Send events from level ``least`` on to stderr, and as JSON lines to ``copy_to`` as well."""
    copy = copy_to.open("a", encoding="utf-8", buffering=1) if copy_to else None
    # Libraries' own bars and notices would tear the lines apart; what matters is an event.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("httpx", "botocore", "urllib3", "transformers", "trl", "datasets", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    as_json = structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    as_text = structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else as_json

    def write(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        if copy is not None:
            copy.write(str(as_json(logger, method, dict(event))) + "\n")
        return str(as_text(logger, method, event))

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            write,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
