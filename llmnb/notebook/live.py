"""The live view of a run: an anywidget around uPlot, fed with binary messages.

A ``snapshot`` replaces the curve in the page, an ``append`` adds to it, a ``detail`` answers a zoom; the page says
``ready`` at each render. The widget's state holds the run's id and nothing else, so nothing secret can be saved with
it. When the run ends, the display becomes a still picture. uPlot (MIT) stands in ``static/uplot`` with its licence and
hash.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import DisplayHandle, display

from .. import series
from ..series import Curve, Floats, Picture
from . import still
from .still import title_of
from .words import status

__all__ = ["LiveChart", "LiveView"]

_STATIC = Path(__file__).parent / "static"
_ROOM = 6000  # points in the page before it gets a fresh, smaller snapshot
_KEEP_EVERY = 10.0  # seconds between two pictures for the saved file
_RESEND_EVERY = 2.0  # seconds between snapshots while no page has said that it listens


def _text(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


class LiveChart(anywidget.AnyWidget):
    """The widget. Only its ``send`` is used from threads; its traits never change."""

    _esm = _text("uplot/uPlot.iife.min.js") + "\n" + _text("live.js")
    _css = _text("uplot/uPlot.min.css") + "\n" + _text("live.css")
    run = traitlets.Unicode("").tag(sync=True)


class LiveView:
    """One display of one run. All of its state sits under one lock; ``show`` may be called from any thread."""

    def __init__(self, run: str) -> None:
        self._lock = threading.RLock()
        self.widget = LiveChart(run=run)
        self.widget.on_msg(self._heard)
        self._live: DisplayHandle | None = None
        self._kept: DisplayHandle | None = None
        self._curve, self._trouble = Curve(run=run), ""
        self._record: dict[str, Any] = {"_id": run}
        self._sent: Curve | None = None
        self._sent_words: dict[str, Any] = {}
        self._in_page = 0
        self._heard_ready = False
        self._sent_at = self._kept_at = 0.0
        self._still_seq = -1  # the last event in the still picture, once the run has ended

    def display(self) -> None:
        """Puts the view into the cell's output. Must be called on the thread that runs the cell."""
        with self._lock:
            if self._curve.ended:
                self._still_seq = self._curve.seq
                self._live = display(still.bundle(self._curve, self._title, time.time()), raw=True, display_id=True)
                return
            self._live = display(self.widget, display_id=True)
            self._kept = display(self._keepsake(), raw=True, display_id=True)
            self._snapshot()

    def take_over(self, live: DisplayHandle | None, kept: DisplayHandle | None) -> None:
        """Lives where another view was displayed, which holds this view's widget in itself from now on."""
        with self._lock:
            self._live, self._kept = live, kept
            self._snapshot()
            if self._curve.ended:
                self._end()

    # -- the poller's side -----------------------------------------------------------------------------------

    def show(self, curve: Curve, record: Mapping[str, Any], trouble: str) -> None:
        """Takes the newest curve and sends what the page does not have yet."""
        with self._lock:
            self._curve, self._record, self._trouble = curve, dict(record), trouble
            if self._live is None:
                return
            if curve.ended:
                self._end()
                return
            self._send_news()
            if time.monotonic() - self._kept_at > _KEEP_EVERY and self._kept is not None:
                self._kept.update(self._keepsake(), raw=True)

    def close(self) -> None:
        """Nothing more will come. What is shown stays."""

    def _end(self) -> None:
        """The display becomes a still, so that the saved notebook shows the curve without a kernel.

        A page that was loaded again no longer follows the display, but still holds the widget: it gets the end too.
        """
        if self._curve.seq == self._still_seq or self._live is None:
            return
        self._still_seq = self._curve.seq
        self._snapshot()
        self._live.update(still.bundle(self._curve, self._title, time.time()), raw=True)
        if self._kept is not None:
            self._kept.update({"text/plain": "", "text/html": ""}, raw=True)
            self._kept = None

    def _keepsake(self) -> dict[str, str]:
        self._kept_at = time.monotonic()
        out = still.bundle(self._curve, self._title, time.time())
        out["text/html"] = still.kept(out["text/html"])
        return out

    # -- the page's side -------------------------------------------------------------------------------------

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        kind = message.get("kind") if isinstance(message, dict) else None
        with self._lock:
            if kind == "ready":
                self._heard_ready = True
                self._snapshot()
            elif kind == "range":
                low, high = (float(x) for x in message["range"])
                drawn = series.picture(self._curve, span=(low, high))
                self.widget.send({"kind": "detail", "view": message.get("view")}, _buffers_of(drawn))

    @property
    def _title(self) -> str:
        return title_of(self._record)

    def _words(self) -> dict[str, Any]:
        words = status(self._curve, time.time())
        chosen = series.best_checkpoint(self._curve)
        return {
            "title": self._title,
            "state": words.state,
            "step": words.step,
            "share": words.share,
            "left": words.left,
            "facts": words.facts,
            "alert": self._trouble or words.alert,
            "points": words.points,
            "total": self._curve.total,
            "checkpoints": words.checkpoints[:4],
            "marks": [(c.step, c.step == chosen) for c in self._curve.checkpoints],
        }

    def _snapshot(self) -> None:
        drawn = series.picture(self._curve)
        self._in_page = len(drawn.steps) + len(drawn.evaluated)
        self._post("snapshot", drawn)

    def _send_news(self) -> None:
        before, now = self._sent, self._curve
        words = self._words()
        if before is not None and before.seq == now.seq and words == self._sent_words:
            if not self._heard_ready and time.monotonic() - self._sent_at > _RESEND_EVERY:
                self._snapshot()
            return
        if before is None or not self._heard_ready or self._in_page > _ROOM or not _continues(before, now):
            self._snapshot()
            return
        drawn = _added(before, now)
        self._in_page += len(drawn.steps) + len(drawn.evaluated)
        self._post("append", drawn, words)

    def _post(self, kind: str, drawn: Picture, words: dict[str, Any] | None = None) -> None:
        words = words or self._words()
        base = self._sent.seq if self._sent is not None else -1
        message = {"kind": kind, "seq": self._curve.seq, "base": base, "status": words}
        self.widget.send(message, _buffers_of(drawn))
        self._sent, self._sent_words, self._sent_at = self._curve, words, time.monotonic()


def _continues(before: Curve, now: Curve) -> bool:
    """True when every series only grew at its end."""
    for name in ("loss", "eval_loss"):
        old, new = before[name], now[name]
        last = slice(len(old) - 1, len(old)) if len(old) else slice(0, 0)
        if len(new) < len(old) or not np.array_equal(old.steps[last], new.steps[last]):
            return False
        if not np.array_equal(old.values[last], new.values[last], equal_nan=True):
            return False
    return True


def _added(before: Curve, now: Curve) -> Picture:
    count = len(before["loss"])
    loss = now["loss"]
    smoothed = series.smooth(loss.values)
    return Picture(
        loss.steps[count:], loss.values[count:], smoothed[count:], now["eval_loss"].since(len(before["eval_loss"]))
    )


def _buffers_of(drawn: Picture) -> list[bytes]:
    """Five columns of little-endian float64."""
    columns: tuple[Floats, ...] = (
        drawn.steps,
        drawn.loss,
        drawn.smooth,
        drawn.evaluated.steps,
        drawn.evaluated.values,
    )
    return [np.ascontiguousarray(column, dtype="<f8").tobytes() for column in columns]
