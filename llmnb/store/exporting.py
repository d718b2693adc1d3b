"""A checkpoint as a plain folder: its files, each proved by its sha256, for any tool that loads them.

The folder appears whole or not at all. What only resuming needs is not in it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import ArtifactError
from ..folders import new_folder, place, room
from .artifacts import digest_of
from .checkpoints import Checkpoints

__all__ = ["export"]


def export(checkpoints: Checkpoints, checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> Path:
    """Copies a checkpoint's files into a new folder and proves the copies.

    Args:
        checkpoints: holds it.
        checkpoint: which one.
        folder: not there yet, or empty.

    Returns:
        The folder, absolute.

    Raises:
        NotFound: it was removed.
        ArtifactError: the folder is in use or cannot be written; no space left; stored bytes are damaged.
    """
    path = place(folder)
    source = checkpoints.fetch(checkpoint)
    files = checkpoints.record(checkpoint.experiment, checkpoint.step)["files"]
    with new_folder(path) as part:
        room(part, sum(file["size"] for file in files))
        for file in files:
            target = part / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file["path"], target)
            found = digest_of(target)
            if found != file["sha256"]:
                seen = f"sha256 {found[:16]}…, recorded {file['sha256'][:16]}…"
                raise ArtifactError(f"The file {file['path']} was damaged on its way.", seen=seen, todo="try again")
    return path
