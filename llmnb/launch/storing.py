"""Checkpoints on their way to the database, beside the training: the thread that trains only hands a folder over.

A folder is linked into a place of its own (the trainer may rotate the original away) and put by one thread, in order.
While the database is away the thread waits and the training goes on; only a long queue makes the training wait, so
that the disk does not fill up. What went wrong is raised where the training is: at the next checkpoint, or at the end.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RunError

__all__ = ["Storer"]

# Folders that may wait. A checkpoint of a whole model may be tens of GB.
_MOST_WAITING = 4


class Storer:
    """One thread that puts checkpoints.

    Args:
        put: stores one: ``put(folder, **facts)``; may take long.
        place: an empty folder on the same disk as the checkpoints.
        hopeless: True when nobody wants to wait any more (the run was told to end at once).
    """

    def __init__(self, put: Callable[..., Any], place: Path, hopeless: Callable[[], bool] = lambda: False) -> None:
        self._put, self._place, self._hopeless = put, place, hopeless
        self._waiting: queue.Queue[tuple[Path, dict[str, Any]] | None] = queue.Queue(_MOST_WAITING)
        self._error: BaseException | None = None
        shutil.rmtree(place, ignore_errors=True)  # of a process that was killed: these were never said
        self._thread = threading.Thread(target=self._work, name="llmnb-storer", daemon=True)
        self._thread.start()

    def take(self, folder: Path, **facts: Any) -> None:
        """Hands a complete folder over; it may be removed once this returned.

        Raises:
            BaseException: what storing an earlier one raised.
            OSError: the disk is full.
        """
        self._raise()
        kept = self._place / folder.name
        while kept.exists():  # the same step, saved again before it was stored
            kept = kept.with_name(f"{kept.name}-again")
        _link(folder, kept)
        while not self._hopeless():
            try:
                self._waiting.put((kept, facts), timeout=0.5)
                return
            except queue.Full:
                self._raise()

    def finish(self, patience: float) -> None:
        """Waits until everything is stored.

        Args:
            patience: seconds.

        Raises:
            BaseException: what storing raised.
            RunError: the time was not enough.
        """
        end = time.monotonic() + patience
        while self._waiting.unfinished_tasks and self._error is None and not self._hopeless():
            if time.monotonic() > end:
                left = sorted(path.name for path in self._place.iterdir())
                todo = f"run.resume() when the database is back; they lie in {self._place}"
                raise RunError("The database took no checkpoints.", seen=", ".join(left), todo=todo)
            time.sleep(0.01)
        self._raise()
        if self._waiting.unfinished_tasks:  # hopeless: the thread goes with the process
            return
        self._waiting.put(None)
        self._thread.join(5.0)
        shutil.rmtree(self._place, ignore_errors=True)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            folder, facts = item
            try:
                if self._error is None:
                    self._put(folder, **facts)
            except BaseException as error:  # noqa: BLE001 - the border of the thread: the training raises it
                self._error = error
            else:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                self._waiting.task_done()


def _link(folder: Path, kept: Path) -> None:
    """The same files under another name, without a copy where the disk can do that."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # FAT, some network disks; a full disk raises again
            shutil.copy2(source, target)

    shutil.copytree(folder, kept, copy_function=link)
