"""What a process imports and looks up before it forks one that trains, and what the fork must set right.

Knows neither who forks nor why.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["EXTRAS", "MODULES", "reseed", "touched_gpu", "warm"]

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
    "llmnb.engine.rowcache",
    "llmnb.engine.loop",
    "llmnb.engine.callbacks",
)
# What accelerate and peft import for every run where it is installed.
EXTRAS = ("deepspeed", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion")


def warm(names: Iterable[str] = MODULES) -> None:
    """Imports what is there of ``names``, and makes the tables that a process makes once."""
    with _no_cuda_context():
        for name in names:
            with contextlib.suppress(Exception):  # a run says itself what it misses
                importlib.import_module(name)
    with contextlib.suppress(Exception):  # not our function; a run makes the table when it is not there
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


@contextlib.contextmanager
def _no_cuda_context() -> Iterator[None]:
    """What GPUs can do is asked of the driver's tool meanwhile.

    bitsandbytes asks torch for it when it is imported, and torch makes a CUDA context to answer.
    """
    try:
        import torch
    except ImportError:
        yield
        return
    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = _capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = asked


def _capability(device: Any = None) -> tuple[int, int]:
    """(major, minor) of a GPU, as ``torch.cuda.get_device_capability`` has it."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    major, _, minor = said[getattr(device, "idx", device) or 0].partition(".")
    return int(major), int(minor)


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
