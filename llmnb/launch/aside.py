"""Processes beside the caller that work for it alone (chat, preview, merging, …): how they are started and ended.

Each is a module of this package that reads from its standard input and writes to its standard output. Nothing secret is
in its arguments, and none of the caller's settings that it has no use for is in its environment.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

__all__ = ["finish", "start"]


def start(module: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts ``python -m llmnb.launch.MODULE``.

    Args:
        module: its name in this package.
        log: takes what it and its libraries write to standard error; a pipe would have to be drained.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {k: v for k, v in os.environ.items() if k not in ("LLMNB_URI", "MPLBACKEND")}
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return subprocess.Popen(
        [sys.executable, "-m", f"llmnb.launch.{module}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=env,
        start_new_session=True,  # an interrupt typed at the caller's terminal is the caller's
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Its input ends, then it does; when it is stuck, it is killed."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5.0)
