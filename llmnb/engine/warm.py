"""What a process imports before it forks one that trains, and what the fork must set right.

Knows neither who forks nor why.
"""

from __future__ import annotations

import sys

__all__ = ["MODULES", "reseed", "touched_gpu"]

# Everything a usual run of one process needs. Importing these starts no thread and touches no GPU.
MODULES = (
    "numpy",
    "torch",
    "transformers",
    "transformers.trainer",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "safetensors.torch",
    "llmnb.engine.training",
    "llmnb.engine.rows",
    "llmnb.engine.loop",
    "llmnb.engine.callbacks",
)


def touched_gpu() -> bool:
    """True when this process has a CUDA context, which a fork could not use."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def reseed() -> None:
    """Random numbers of this process's own; those of the process it was forked from are drawn by others too."""
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed()
    if "torch" in sys.modules:
        import torch

        torch.seed()
