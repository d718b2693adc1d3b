"""Other libraries' remarks, kept off the screen. Their errors still come through."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["hush"]


def hush() -> None:
    """To be called before anything heavy is imported."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for name in ("transformers", "torch", "peft", "accelerate", "datasets", "bitsandbytes", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed reports the accelerator it found on standard output, at import.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
