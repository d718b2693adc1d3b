"""What DeepSpeed compiles on first use: only what a run needs, and never waiting for a builder that is dead.

torch's builders take turns by a file that a killed one leaves behind; every later run would wait for it for ever.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil

__all__ = ["prepare"]

_SHARED_MEMORY = "deepspeed_shm_comm"


def prepare(deepspeed: Any, cuda: bool) -> None:
    """Before ``deepspeed.init_distributed``.

    Args:
        deepspeed: the package.
        cuda: False for ranks that compute on CPUs.
    """
    # ninja, which builds, lies beside Python; an environment that was not activated does not name that folder.
    beside = os.path.dirname(sys.executable)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), beside]))
    if not cuda:
        # An exchange of its own among ranks on CPUs: 35 s of compiling, where gloo is there already.
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
    _forget_dead_builders(_folder())


def _folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _forget_dead_builders(folder: Path) -> None:
    """Removes the files of builders that no process holds open any more."""
    left = {str(path.resolve()) for path in folder.glob("**/lock")}
    if not left or sys.platform != "linux":
        return
    for process in psutil.process_iter():
        try:
            left -= {os.path.realpath(fd) for fd in Path(f"/proc/{process.pid}/fd").iterdir()}
        except OSError:  # it ended meanwhile, or is another user's, who builds elsewhere
            continue
    for path in left:
        Path(path).unlink(missing_ok=True)
