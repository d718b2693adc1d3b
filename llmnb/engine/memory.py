"""Memory: how much is in use, and giving it back.

After a run, a chat or an exception nothing of a model may stay behind. An exception is what holds on longest: its
traceback has the local variables of every frame it passed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Iterator
from typing import Any

__all__ = ["forget", "give_back", "kept_pages", "memory_in_use", "memory_of"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3), malloc.h
_GLIBC_MOST = 1 << 25  # what glibc's own threshold grows to; it trims at twice that


def memory_in_use(device: Any) -> int:
    """Bytes: on a GPU the most that tensors took so far; on the CPU what the process has resident now."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def memory_of(device: Any) -> int | None:
    """Bytes that a GPU has; None for anything else."""
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def forget(error: BaseException) -> None:
    """Drops the local variables of the frames an error passed; what it says, and where, stays."""
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        this = rest.pop()
        if this is None or id(this) in seen:
            continue
        seen.add(id(this))
        traceback.clear_frames(this.__traceback__)
        rest += [this.__context__, this.__cause__]


def give_back() -> None:
    """Collects what nothing names any more, on the host and on the GPU."""
    gc.collect()
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        with contextlib.suppress(RuntimeError):
            torch.cuda.ipc_collect()
    _trim()


def _libc() -> Any:
    import ctypes
    import ctypes.util

    return ctypes.CDLL(ctypes.util.find_library("c"))


def _trim() -> None:
    """Freed heap goes back to the system; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        _libc().malloc_trim(0)


@contextlib.contextmanager
def kept_pages(device: Any) -> Iterator[None]:
    """On the CPU, memory that is freed meanwhile stays with the process; ``give_back`` returns it.

    Each step asks for the tensors of the last one again, and glibc would have the kernel clear every page of them anew.
    Other C libraries are left as they are.
    """
    if device.type != "cpu":
        yield
        return
    _set_thresholds(1 << 30, 1 << 30)
    try:
        yield
    finally:
        _set_thresholds(_GLIBC_MOST, 2 * _GLIBC_MOST)


def _set_thresholds(mmap: int, trim: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = _libc()
        libc.mallopt(_MMAP_THRESHOLD, mmap)
        libc.mallopt(_TRIM_THRESHOLD, trim)
