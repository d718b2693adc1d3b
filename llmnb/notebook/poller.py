"""One thread per kernel that reads what the watched runs say, and shows it to their views.

The thread reads ``seq > last`` from the database, folds it into a curve, and hands the curve to every view of that run,
at most four times a second, a long run's once. It never prints, and it outlives a database that is away for a while.
It knows no widget: a view is anything with ``show`` and ``close``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from .. import series
from ..errors import LlmnbError, NotFound
from ..events import Event
from ..series import Columns, Curve

__all__ = ["EVERY", "GONE", "Poller", "View", "read"]

EVERY = 0.25  # seconds between two looks; a person sees no difference below, and a database feels none above
LONG_EVERY = 0.95  # the same for a long run, whose picture moves by less than a pixel and costs the page 8 ms
UNSEEN = 2.0  # seconds between looks at a run that no page shows
PATIENCE = 8.0  # seconds between looks while the database is away
LOST_EVERY = 10.0  # seconds between two searches for runs without a sign of life
GONE = "the run was removed from the database: nothing more will come"
_MANY = 2000  # from so many new events on they are asked for as columns
_LATELY = 200  # the newest ones are read whole: speed and memory are told from them
_LONG = 10_000  # a run of so many events is shown at a glance before it is read
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

    def glance(self, until: int, count: int = 2000) -> list[Event]:
        """About ``count`` of its events up to ``until``."""

    def columns(self, names: Sequence[str], after: int, until: int) -> tuple[Columns, list[Event]] | None:
        """Its metrics as columns and its other events, or None."""


def read(
    run: Readable, curve: Curve | None = None, record: dict[str, Any] | None = None
) -> tuple[Curve, dict[str, Any]]:
    """The newest curve of a run and its record, which is the given one, or read now.

    The record is read first: when it says that the run has ended, its events are on their way or there already.
    """
    record = run.record if record is None else record
    curve = curve or Curve(run=run.id)
    until = int(record.get("last_seq") or 0) - _LATELY
    if until - curve.seq > _MANY:
        found = run.columns(series.DRAWN, curve.seq, until)
        if found is not None:
            columns, others = found
            curve = series.taken(series.fold(curve, others), columns)
    return series.told(series.fold(curve, run.events(curve.seq)), record), record


def _glance(run: Readable, record: dict[str, Any]) -> Curve | None:
    """A part of a long run's curve, from its beginning to its end, in a fraction of the time; None of a short one."""
    until = int(record.get("last_seq") or 0)
    if until < _LONG:
        return None
    curve = series.fold(Curve(run=run.id), run.glance(until))
    return replace(series.told(curve, record), seq=0)  # nothing can be folded onto it


class _Watched:
    def __init__(self, run: Readable, find_lost: Callable[[], Any]) -> None:
        self.run, self.find_lost = run, find_lost
        self.curve, self.record = Curve(run=run.id), {"_id": run.id}
        self.views: list[View] = []
        self.looked_for_lost = time.monotonic()
        self.rest_until, self.rest = 0.0, EVERY
        self.quiet = 0  # looks since an ended run last said something
        self.gone = False  # removed from the database
        self.seen = threading.Event()  # set after the first look

    @property
    def over(self) -> bool:
        # the last events of a run may arrive just after its final state
        return self.gone or (self.curve.ended and self.quiet >= 8)


class Poller:
    """Watches runs until they end. Its thread starts with the first run and ends with the last.

    The views of a run that is over are kept: when it is watched again, because it was resumed, they go on.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._watched: dict[str, _Watched] = {}
        self._thread: threading.Thread | None = None
        self._stop, self._go = threading.Event(), threading.Event()

    def watch(self, run: Readable, view: View | None, find_lost: Callable[[], Any], wait: float = 0.0) -> None:
        """Shows a run's curve to a view: what there is as soon as it was read, then everything new until the run ends.

        Args:
            run: the run's handle.
            view: what shows it; None looks again for the views that the run has.
            find_lost: marks runs without a sign of life; called now and then while the run goes on.
            wait: seconds to wait for the first look, for a view that is to show something at once.
        """
        with self._lock:
            watched = self._watched.get(run.id)
            if watched is None or watched.gone:
                watched = self._watched[run.id] = _Watched(run, find_lost)
            watched.run, watched.find_lost = run, find_lost
            if view is not None and view not in watched.views:
                watched.views.append(view)
                if watched.seen.is_set():
                    view.show(watched.curve, watched.record, "")
            watched.quiet, watched.rest_until = 0, 0.0
            self._go.set()
            if self._thread is None or not self._thread.is_alive():
                self._stop.clear()
                self._thread = threading.Thread(target=self._work, name="llmnb-watch", daemon=True)
                self._thread.start()
        if wait:
            watched.seen.wait(wait)

    def leave(self, run: str, view: View) -> None:
        """A view wants no more of a run."""
        with self._lock:
            watched = self._watched.get(run)
            if watched is not None and view in watched.views:
                watched.views.remove(view)
                if not watched.views:
                    del self._watched[run]

    @property
    def runs(self) -> list[str]:
        """The runs that are watched and not over."""
        with self._lock:
            return [key for key, watched in self._watched.items() if not watched.over]

    def stop(self) -> None:
        """Ends the thread. The views keep what they show; the runs go on."""
        self._stop.set()
        self._go.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)
        with self._lock:
            for watched in self._watched.values():
                for view in watched.views:
                    view.close()
            self._watched.clear()

    def _work(self) -> None:
        while not self._stop.is_set():
            self._go.clear()
            with self._lock:
                current = [watched for watched in self._watched.values() if not watched.over]
                if not current:
                    self._thread = None
                    return
            for watched in current:
                if time.monotonic() >= watched.rest_until:
                    self._look(watched)
            self._go.wait(EVERY)

    def _look(self, watched: _Watched) -> None:
        trouble, curve, record = "", watched.curve, watched.record
        try:
            record = watched.run.record
            first = _glance(watched.run, record) if not watched.seen.is_set() else None
            if first is not None:
                self._tell(watched, first, record, "")
            curve, record = read(watched.run, watched.curve, record)
            self._look_for_lost(watched, record)
            watched.rest = EVERY
            if curve.seq > _LONG:
                watched.rest_until = time.monotonic() + LONG_EVERY
            if all(getattr(view, "asleep", False) for view in watched.views):
                watched.rest_until = time.monotonic() + UNSEEN
        except NotFound:
            trouble, watched.gone = GONE, True
        except LlmnbError as error:
            trouble = f"the database does not answer; trying again ({error.what})"
            self._pause(watched)
        except Exception as error:  # the border of a thread: one bad look must not end the watch
            log.debug("a look at run %s failed", watched.run.id, exc_info=True)
            trouble = f"the run cannot be read just now; trying again ({type(error).__name__})"
            self._pause(watched)
        with self._lock:
            watched.quiet = watched.quiet + 1 if curve.seq == watched.curve.seq else 0
            watched.curve, watched.record = curve, record
        self._tell(watched, curve, record, trouble)
        watched.seen.set()

    def _tell(self, watched: _Watched, curve: Curve, record: Mapping[str, Any], trouble: str) -> None:
        with self._lock:
            views = list(watched.views)
        for view in views:
            try:
                view.show(curve, record, trouble)
            except Exception:  # a page that went away must not end the watch of the others
                log.debug("a view of run %s failed", watched.run.id, exc_info=True)

    @staticmethod
    def _pause(watched: _Watched) -> None:
        watched.rest = min(PATIENCE, watched.rest * 2)
        watched.rest_until = time.monotonic() + watched.rest

    def _look_for_lost(self, watched: _Watched, record: Mapping[str, Any]) -> None:
        """A worker that was killed cannot say so; whoever notices writes it down."""
        now = time.monotonic()
        if record.get("state") in series.ENDED or now - watched.looked_for_lost < LOST_EVERY:
            return
        watched.looked_for_lost = now
        watched.find_lost()
