"""Errors that torch and the system raise in their own words, in words that say what to do. Knows the settings only."""

from __future__ import annotations

from ..config import TrainConfig
from ..errors import RunError

__all__ = ["explained"]

# What a full disk is to the system, and to torch.save, which has no errno.
_DISK_FULL = ("no space left on device", "iostream error", "pytorchstreamwriter failed")


def explained(error: BaseException, config: TrainConfig) -> BaseException:
    """The same error as a ``RunError`` with advice when memory or the disk ran out; every other error as it is."""
    import torch

    text = str(error).lower()
    if any(words in text for words in _DISK_FULL):
        todo = "make room there, then run.resume(); or output_dir on another disk, or save_total_limit"
        return RunError("The disk of the run's folder is full.", seen=str(error).splitlines()[0], todo=todo)
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not full and not (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return error
    ideas = [
        "per_device_train_batch_size=1 with gradient_accumulation_steps to match",
        f"max_seq_length below {config.max_seq_length}",
        "activation_checkpointing=True",
    ]
    if config.bits is None:
        ideas.append("bits=4" if config.use_lora else "use_lora=True")
    return RunError("The run ran out of memory.", seen=str(error).splitlines()[0], todo="try " + ", ".join(ideas))
