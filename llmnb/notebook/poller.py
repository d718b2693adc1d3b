"""One thread per kernel that reads what the watched runs say, and shows it to their views.

The thread reads ``seq > last`` from the database, folds it into a curve, and hands the curve to every view of that run,
at most four times a second. It never prints, and it outlives a database that is away for a while. It knows no widget: a
view is anything with ``show`` and ``close``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .. import series
from ..errors import LlmnbError
from ..events import Event
from ..series import Curve

__all__ = ["EVERY", "Poller", "View", "read"]

EVERY = 0.25  # seconds between two looks; a person sees no difference below, and a database feels none above
PATIENCE = 8.0  # seconds between looks while the database is away
LOST_EVERY = 10.0  # seconds between two searches for runs without a sign of life
log = logging.getLogger(__name__)


class View(Protocol):
    """What shows a curve."""

    def show(self, curve: Curve, record: Mapping[str, Any], trouble: str) -> None:
        """Called from the poller's thread with the newest curve; ``trouble``: why it may be old, or ""."""

    def close(self) -> None:
        """Nothing more will come."""


class Readable(Protocol):
    """What can be watched; ``launch.Run`` is."""

    id: str

    @property
    def record(self) -> dict[str, Any]:
        """The run's record."""

    def events(self, after: int = 0) -> list[Event]:
        """Its events above ``after``."""


def read(run: Readable, curve: Curve | None = None) -> tuple[Curve, dict[str, Any]]:
    """The newest curve of a run and its record.

    The record is read first: when it says that the run has ended, its events are on their way or there already.
    """
    record = run.record
    curve = curve or Curve(run=run.id)
    return series.told(series.fold(curve, run.events(curve.seq)), record), record


class _Watched:
    def __init__(self, run: Readable, find_lost: Callable[[], Any]) -> None:
        self.run, self.find_lost = run, find_lost
        self.curve, self.record = Curve(run=run.id), {"_id": run.id}
        self.views: list[View] = []
        self.looked_for_lost = time.monotonic()
        self.rest_until, self.rest = 0.0, EVERY
        self.quiet = 0  # looks since an ended run last said something

    @property
    def over(self) -> bool:
        # the last events of a run may arrive just after its final state
        return self.curve.ended and self.quiet >= 8


class Poller:
    """Watches runs until they end. Threads start with the first run and end with the last."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._watched: dict[str, _Watched] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(self, run: Readable, view: View, find_lost: Callable[[], Any]) -> None:
        """Shows a run's curve to a view: at once what there is, then everything new until the run ends.

        Args:
            run: the run's handle.
            view: what shows it.
            find_lost: marks runs without a sign of life; called now and then while the run goes on.

        Raises:
            NotFound: there is no such run.
        """
        curve, record = read(run)
        with self._lock:
            watched = self._watched.get(run.id) or _Watched(run, find_lost)
            if curve.seq >= watched.curve.seq:
                watched.curve, watched.record = curve, record
            watched.views.append(view)
            view.show(watched.curve, watched.record, "")
            watched.quiet = 0
            self._watched[run.id] = watched
            if self._thread is None or not self._thread.is_alive():
                self._stop.clear()
                self._thread = threading.Thread(target=self._work, name="llmnb-watch", daemon=True)
                self._thread.start()

    @property
    def runs(self) -> list[str]:
        """The runs that are watched."""
        with self._lock:
            return list(self._watched)

    def stop(self) -> None:
        """Ends the thread. The views keep what they show; the runs go on."""
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
        with self._lock:
            for watched in self._watched.values():
                for view in watched.views:
                    view.close()
            self._watched.clear()

    def _work(self) -> None:
        while not self._stop.wait(EVERY):
            with self._lock:
                for key, watched in list(self._watched.items()):
                    if watched.over:
                        del self._watched[key]
                current = list(self._watched.values())
                if not current:
                    self._thread = None
                    return
            for watched in current:
                if time.monotonic() >= watched.rest_until:
                    self._look(watched)

    def _look(self, watched: _Watched) -> None:
        trouble = ""
        try:
            curve, record = read(watched.run, watched.curve)
            self._look_for_lost(watched, record)
            watched.rest = EVERY
        except LlmnbError as error:
            trouble = f"the database does not answer; trying again ({error.what})"
            curve, record = watched.curve, watched.record
            watched.rest = min(PATIENCE, watched.rest * 2)
            watched.rest_until = time.monotonic() + watched.rest
        except Exception as error:  # the border of a thread: one bad look must not end the watch
            log.debug("a look at run %s failed", watched.run.id, exc_info=True)
            trouble = f"the run cannot be read just now; trying again ({type(error).__name__})"
            curve, record = watched.curve, watched.record
            watched.rest = min(PATIENCE, watched.rest * 2)
            watched.rest_until = time.monotonic() + watched.rest
        with self._lock:
            watched.quiet = watched.quiet + 1 if curve.seq == watched.curve.seq else 0
            watched.curve, watched.record = curve, record
            views = list(watched.views)
        for view in views:
            try:
                view.show(curve, record, trouble)
            except Exception:  # a page that went away must not end the watch of the others
                log.debug("a view of run %s failed", watched.run.id, exc_info=True)

    def _look_for_lost(self, watched: _Watched, record: Mapping[str, Any]) -> None:
        """A worker that was killed cannot say so; whoever notices writes it down."""
        now = time.monotonic()
        if record.get("state") in series.ENDED or now - watched.looked_for_lost < LOST_EVERY:
            return
        watched.looked_for_lost = now
        watched.find_lost()
