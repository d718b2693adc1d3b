"""A folder that appears whole under its name, or not at all.

What is made is written beside it under a hidden name and moved when it is complete, so that nobody finds half a model
where a model should be. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import ArtifactError, LlmnbError

__all__ = ["discard", "new_folder", "place", "room"]

_LEFT_OVER_S = 24 * 3600.0
_FULL = "no space left on device"


def place(folder: str | os.PathLike[str]) -> Path:
    """Where a new folder would be, absolute.

    Raises:
        ArtifactError: something is there already: a file, or a folder that is not empty.
    """
    try:
        path = Path(folder).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{folder} is a file.", todo="give a new folder")
        if path.is_dir() and any(path.iterdir()):
            seen = ", ".join(sorted(p.name for p in path.iterdir())[:6])
            raise ArtifactError(f"The folder {folder} is not empty.", seen=seen, todo="give a new folder")
    except (OSError, RuntimeError) as error:  # a link to itself, a folder that may not be read
        raise _unwritable(folder, error) from error
    return path


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder to write into; it takes its name when the block ends, and is gone when the block raises.

    Args:
        folder: the name: not there yet, or an empty folder.

    Raises:
        ArtifactError: something is there already; it cannot be written; no space left.
    """
    path = place(folder)
    part = path.parent / f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(3)}"
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        _sweep(path)
        yield part
        if path.is_dir():
            path.rmdir()
        part.rename(path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    except Exception as error:
        # Rust's writers raise errors of their own, which have no errno.
        if not isinstance(error, LlmnbError) and _FULL in str(error).lower():
            raise _unwritable(folder, error) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def room(folder: Path, size: int) -> None:
    """Raises when what is about to be written will not fit.

    Raises:
        ArtifactError: there is less room than ``size`` bytes where ``folder`` is.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        seen = f"it takes about {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise ArtifactError(f"There is not enough room in {folder.parent}.", seen=seen, todo="choose another disk")


def discard(folder: str | os.PathLike[str], pid: int) -> None:
    """Removes what a process that was killed left of a folder that it had begun."""
    path = Path(folder).expanduser().resolve()
    for left in path.parent.glob(f"{_prefix(path)}{pid}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.part-"


def _sweep(path: Path) -> None:
    """What processes of long ago left of the same folder; another one may be at it just now."""
    for left in path.parent.glob(f"{_prefix(path)}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_OVER_S:
                shutil.rmtree(left, ignore_errors=True)


def _unwritable(folder: object, error: BaseException) -> ArtifactError:
    words = getattr(error, "strerror", None) or str(error)
    if _FULL in str(error).lower() or "disk quota exceeded" in str(error).lower():
        return ArtifactError(f"No space left for {folder}.", seen=words, todo="make room, or choose another disk")
    return ArtifactError(f"The folder {folder} cannot be written.", seen=words, todo="choose another folder")
