"""llmnb: fine-tune a language model on the data in your database without leaving the notebook.

The names below are the public API. Each is loaded on first use, so that ``import llmnb`` and ``%load_ext llmnb``
cost nothing and never load torch, transformers, Ray, pymongo or plotly into the kernel.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "Collection": "query",
    "Datalayer": "db",
    "Document": "query",
    "LLM": "llm",
    "LLMTrainer": "trainer",
    "LLMTrainingConfiguration": "trainer",
    "Pipeline": "pipelines",
    "TextClassification": "pipelines",
    "connect": "db",
    "evaluate": "measuring",
    "errors": "errors",
    "inspect": "db",
    "plot": "notebook.plots",
}

__all__ = [*sorted(_HOMES), "load_ipython_extension", "unload_ipython_extension"]

if TYPE_CHECKING:
    from . import errors as errors
    from .checkpoint import Checkpoint as Checkpoint
    from .db import Datalayer as Datalayer
    from .db import connect as connect
    from .db import inspect as inspect
    from .llm import LLM as LLM
    from .measuring import evaluate as evaluate
    from .pipelines import Pipeline as Pipeline
    from .pipelines import TextClassification as TextClassification
    from .query import Collection as Collection
    from .query import Document as Document
    from .trainer import LLMTrainer as LLMTrainer
    from .trainer import LLMTrainingConfiguration as LLMTrainingConfiguration

    plot: Any  # of notebook.plots, which the rooms below do not import: run.plot() finds it here, by name (D21)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'llmnb' has no attribute {name!r}")
    module = importlib.import_module(f"llmnb.{home}")
    value = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext llmnb``: adds the magics."""
    importlib.import_module("llmnb.notebook").load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext llmnb``: takes everything back; running jobs go on."""
    importlib.import_module("llmnb.notebook").unload(ipython)
