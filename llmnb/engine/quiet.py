"""Other libraries' remarks, kept away from a person who asked for something else. Their errors still come through.

Loading a model imports half a dozen libraries that warn about each other's deprecations and about what is not
installed. In a notebook such a line stands between a question and its answer. Knows nothing of the house.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hushed"]

_LOUD = ("transformers", "torch", "peft", "accelerate", "datasets", "bitsandbytes", "DeepSpeed")


@contextmanager
def hushed() -> Iterator[None]:
    """While it lasts: no FutureWarning, no DeprecationWarning, and only errors of those libraries' loggers."""
    before = {logging.getLogger(name): logging.getLogger(name).level for name in _LOUD}
    for logger in before:
        logger.setLevel(logging.ERROR)  # for the loggers below it
        logger.addFilter(_is_error)  # for those that set their level when they are imported
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        for logger, level in before.items():
            logger.removeFilter(_is_error)
            if logger.level == logging.ERROR:
                logger.setLevel(level)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
