"""What this machine has, found out without loading torch."""

from __future__ import annotations

import functools
import glob
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

import psutil

__all__ = ["cpus", "devices", "found", "gone", "gpus_visible", "memory_free", "this_process"]


@functools.cache
def gpus_visible() -> int:
    """CUDA devices that a process started now would see; 0 without a driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([part for part in named.split(",") if part.strip() not in ("", "-1")])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0 if not os.path.exists("/proc/driver/nvidia/gpus") else len(glob.glob("/proc/driver/nvidia/gpus/*"))
    try:
        found = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines())


def cpus() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_free() -> int:
    """Bytes that can be used without swapping."""
    return int(psutil.virtual_memory().available)


def devices() -> list[str]:
    """Names of the CUDA devices that a process started now would see, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip() not in ("", "-1")]
    return [str(number) for number in range(gpus_visible())]


def this_process() -> dict[str, Any]:
    """Names this process for a record: ``host``, ``pid``, and when it was ``born``, because numbers are used again."""
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "born": me.create_time()}


def found(process: Mapping[str, Any]) -> psutil.Process | None:
    """The process that ``this_process`` named, when it is on this machine and alive."""
    if process.get("host") != socket.gethostname() or not process.get("pid"):
        return None
    try:
        there = psutil.Process(int(process["pid"]))
        same = abs(there.create_time() - float(process.get("born", 0))) < 2.0
        return there if same and there.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def gone(process: Mapping[str, Any]) -> bool:
    """True when it was on this machine and is no more. Of another machine's nothing is known."""
    return bool(process.get("pid")) and process.get("host") == socket.gethostname() and found(process) is None
