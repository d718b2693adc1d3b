"""Other libraries' remarks, kept off the screen. Their errors still come through."""

from __future__ import annotations

import logging
import warnings

__all__ = ["hush"]


def hush() -> None:
    """To be called before anything heavy is imported."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in ("transformers", "torch", "peft", "accelerate", "datasets", "bitsandbytes", "DeepSpeed"):
        # A filter, too: some set their logger's level again when they are imported.
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
