"""Handing a job to a process that is started elsewhere: the parcel's file, its environment, its command line.

The command line names files only. The parcel (with the database's password) and the environment (with a person's
tokens) are files of mode 0600 in the run's own folder; their one reader removes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..job import TrainJob
from .cluster import MARK
from .tickets import RUNNER

__all__ = ["environment", "import_paths", "pack", "take_environment"]

# What belongs to the process that starts, not to the job: its shell, its notebook, its Ray.
_OWN = frozenset(
    {"PWD", "OLDPWD", "SHLVL", "_", "TERM", "COLUMNS", "LINES", "MPLBACKEND", "CUDA_VISIBLE_DEVICES", "LLMNB_URI"}
    | {MARK, RUNNER}
)
# What makes a process one rank of several: Ray sets it for each.
_OWN |= {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_OWN_PREFIXES = ("RAY_", "JPY_", "JUPYTER_", "KERNEL_", "IPY", "PYDEVD_", "PYTEST_")


def pack(job: TrainJob, folder: Path, home: Path) -> Path:
    """Writes the parcel and the environment, with ``home`` for caches; the parcel's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = job.write(folder / "job.pickle")
    env = environment() | {"LLMNB_HOME": str(home)}
    handle = os.open(_beside(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(env, file)
    return path


def environment() -> dict[str, str]:
    """This process's environment, as far as it belongs to whoever applied."""
    return {k: v for k, v in os.environ.items() if k not in _OWN and not k.startswith(_OWN_PREFIXES)}


def take_environment(path: Path) -> None:
    """In the worker: the environment of whoever applied. What Ray set for the job (devices, address, token) stays."""
    for mark in (MARK, RUNNER):  # what the worker starts (a database) is no part of the cluster or the runner
        os.environ.pop(mark, None)
    file = _beside(path)
    if not file.exists():
        return
    env = json.loads(file.read_text(encoding="utf-8"))
    file.unlink(missing_ok=True)
    # Ray sets it to the number of CPUs of the actor that starts jobs, which says nothing about the run.
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(env)


def _beside(path: Path) -> Path:
    return path.with_suffix(".env")


def import_paths() -> list[str]:
    """PYTHONPATH for a process on this machine that finds what this one finds, and this package."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    return list(dict.fromkeys(paths))
