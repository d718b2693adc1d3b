"""A real data set and a small model, made on this machine with no network.

The data set is the documentation of Python's standard library, as questions and answers; the model is a small Llama
that was pre-trained on the same documentation as plain text. ``llmnb quickstart`` and the tutorials run on them. This
room knows the engine and a database that it is given; ``extract`` is run in a process of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import documents as documents
    from .library import passages as passages
    from .loading import load_documents as load_documents
    from .loading import questions as questions
    from .newborn import base_model as base_model

_HOMES = {
    "base_model": "newborn",
    "documents": "library",
    "load_documents": "loading",
    "passages": "library",
    "questions": "loading",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
