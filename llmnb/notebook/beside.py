"""The runs that a view draws over its own: which there are, their curves, and how they differ.

They are read by the same poller as every run. One that still goes on is drawn anew every few seconds only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import series
from ..errors import LlmnbError
from ..series import Curve
from . import comparison
from .still import title_of
from .words import error_words

if TYPE_CHECKING:
    from .live import LiveView

__all__ = ["Beside"]

_EVERY = 5.0  # seconds between two drawings of the other runs
_BUCKETS = 300
_OFFERED = 40


class _Other:
    """What the poller shows another run to."""

    def __init__(self, beside: Beside) -> None:
        self.curve, self.record = Curve(), dict[str, Any]()
        self.drawn, self._beside = -1, beside

    def show(self, curve: Curve, record: Mapping[str, Any], trouble: str) -> None:
        """The newest curve."""
        first, new = not self.record, curve.seq != self.drawn
        self.curve, self.record = curve, dict(record)
        if (first or new) and self._beside.drawn_anew(at_once=first or curve.ended):
            self.drawn = curve.seq

    @property
    def asleep(self) -> bool:
        """True while no page shows it."""
        return self._beside.asleep

    def close(self) -> None:
        """Nothing more will come."""


class Beside:
    """The other runs of one view.

    Args:
        session: the shell's; None when no run can be chosen.
        view: the view that they are drawn in.
    """

    def __init__(self, session: Any, view: LiveView) -> None:
        self._session, self._view = session, view
        self._lock = threading.RLock()
        self._others: dict[str, _Other] = {}
        self._trouble = ""
        self._sent_at = 0.0

    @property
    def asleep(self) -> bool:
        """True while no page shows the view."""
        return self._view.asleep

    def offer(self) -> None:
        """Sends which runs there are to choose from."""
        self._later(self._offer)

    def choose(self) -> None:
        """From now on those are drawn that the view has among its choices."""
        self._later(self._choose)

    def _later(self, step: Any) -> None:
        if self._session is not None:
            threading.Thread(target=self._carry_out, args=(step,), name="llmnb-compare", daemon=True).start()

    def _carry_out(self, step: Any) -> None:
        """The border of a thread: what goes wrong is shown."""
        try:
            step()
        except LlmnbError as error:
            self._trouble = error_words(error)
            self.send()
        except Exception as error:  # noqa: BLE001 - the view shows it, and can be used on
            self._trouble = f"{type(error).__name__}: {error}"
            self.send()

    def _offer(self) -> None:
        own = self._view.now[0].run
        records = self._session.database().store.runs.list(limit=_OFFERED)
        found = [[r["_id"], f"{title_of(r)} · {r['state']}"] for r in records if r["_id"] != own]
        self._view.widget.send({"kind": "runs", "runs": found})

    def _choose(self) -> None:
        database, poller = self._session.database(), self._session.poller()
        with self._lock:
            runs = self._view.choices["compare"]  # the newest: threads need not keep the order of clicks
            wanted = [run for run in dict.fromkeys(runs) if run != self._view.now[0].run][: comparison.MOST]
            for run in set(self._others) - set(wanted):
                poller.leave(run, self._others.pop(run))
            new = {run: _Other(self) for run in wanted if run not in self._others}
            self._others = {run: self._others.get(run) or new[run] for run in wanted}
            self._trouble = ""
        self.send()
        for run, other in new.items():
            poller.watch(database.run(run), other, database.store.runs.find_lost)

    def drawn_anew(self, at_once: bool) -> bool:
        """A curve has grown; called by the poller. False: it is drawn later, with what follows."""
        if not at_once and time.monotonic() - self._sent_at < _EVERY:
            return False
        self.send()
        return True

    def send(self) -> None:
        """Sends the curves and the table."""
        with self._lock:
            self._sent_at = time.monotonic()
            here = {run: other for run, other in self._others.items() if other.record}
            curve, record = self._view.now
            weight = self._view.choices["smooth"]
            runs, buffers = [], []
            for run, other in here.items():
                drawn = series.picture(other.curve, weight=weight, buckets=_BUCKETS)
                runs.append({"id": run, "title": title_of(other.record), "state": other.curve.state})
                buffers += [np.ascontiguousarray(c, dtype="<f8").tobytes() for c in (drawn.steps, drawn.smooth)]
            records, curves = [record, *(o.record for o in here.values())], [curve, *(o.curve for o in here.values())]
            table = comparison.table(records, curves) if here else None
            message = {"kind": "others", "runs": runs, "table": table, "trouble": self._trouble}
            if here or self._others or self._trouble or self._sent_before:
                self._view.widget.send(message, buffers)
            self._sent_before = bool(here or self._trouble)

    _sent_before = False
