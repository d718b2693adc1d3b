"""The live view of a run: an anywidget around uPlot, fed with binary messages.

A ``snapshot`` replaces the curves in the page, an ``append`` adds to them, a ``detail`` answers a zoom, ``others`` are
the runs that it is compared with, ``log`` is the end of what its process printed. The page says ``ready`` at each
render, ``gone`` when nothing shows the view any more, ``choose`` and ``press``. What a person chose is kept here and
sent with each snapshot, so that a page that is loaded again shows what it showed. The widget's state holds the run's id
and nothing else, so nothing secret can be saved with it. uPlot (MIT) stands in ``static/uplot`` with licence and hash.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import numpy as np
import traitlets
from IPython.display import DisplayHandle

from .. import series
from ..series import Average, Curve, Picture, Points
from . import still
from .beside import Beside
from .page import script, style
from .poller import GONE
from .steering import DOING, Steering, loses, reasons
from .still import title_of
from .tables import local_time
from .words import status

__all__ = ["CHOICES", "LiveChart", "LiveView", "buffers_of"]

_ROOM = 6000  # points in the page before it gets a fresh, smaller snapshot
_KEEP_EVERY, _KEEP_SELDOM = 10.0, 60.0  # seconds between two pictures for the saved file, at first and in the end
_RESEND_EVERY = 2.0  # seconds between snapshots while no page has said that it listens
_DETAIL_EVERY = 1.0  # seconds between two details of a range that still grows
_LOG_EVERY = 2.0  # seconds between two looks at an open log
_LINES = 200  # of the log
_SERIES = ("loss", "eval_loss", "learning_rate", "grad_norm")
CHOICES: Mapping[str, Any] = {"smooth": 0.6, "log": False, "zoom": None, "printed": False, "compare": []}


class LiveChart(anywidget.AnyWidget):
    """The widget. Only its ``send`` is used from threads; its traits never change."""

    _esm = script("uplot/uPlot.iife.min.js", "live_charts.js", "live_parts.js", "live.js")
    _css = style("uplot/uPlot.min.css")
    run = traitlets.Unicode("").tag(sync=True)


class LiveView:
    """One display of one run. All of its state sits under one lock; ``show`` may be called from any thread.

    Args:
        run: the handle.
        session: the shell's, for runs to compare with and to watch a resumed run again; None without.
        saved: called on the poller's thread when a checkpoint was saved; who gives it lists them, so the view does not.
        below: what a saved notebook shows under the curve, as text and HTML; {} while there is nothing.
    """

    def __init__(
        self,
        run: Any,
        session: Any = None,
        saved: Callable[[], None] | None = None,
        below: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._lock = threading.RLock()
        self._run, self._saved, self._below = run, saved, below
        self.widget = LiveChart(run=run.id)
        self.widget.on_msg(self._heard)
        self._kept: DisplayHandle | None = None
        self._curve, self._trouble, self._ended_seq = Curve(run=run.id), "", -1
        self._record: dict[str, Any] = {"_id": run.id}
        self._sent: Curve | None = None
        self._sent_words: dict[str, Any] = {}
        self._in_page = 0
        self._heard_ready = self._asleep = False
        self._sent_at = self._kept_at = self._detail_at = 0.0
        self._began = time.monotonic()
        self._average = Average()
        self._choices = dict(CHOICES)
        self._printing: threading.Thread | None = None
        self._closed = threading.Event()
        self._steering = Steering(run, self._send_news, self._watch_again)
        self._session = session
        self._beside = Beside(session, self)

    def keep(self, kept: DisplayHandle) -> None:
        """From now on the display ``kept`` holds a still picture, for the saved file."""
        with self._lock:
            self._kept = kept
            self._update_keepsake()

    def keep_again(self) -> None:
        """What stands below the curve has changed."""
        with self._lock:
            self._update_keepsake()

    @property
    def keepsake(self) -> dict[str, str]:
        """What a saved notebook shows in place of the widget."""
        with self._lock:
            out = still.bundle(self._curve, title_of(self._record), time.time(), small=not self._curve.ended)
            more = self._below()
            if more:
                out["text/plain"] += f"\n\n{more['text/plain']}"
            out["text/html"] = still.kept(out["text/html"] + more.get("text/html", ""))
            return out

    @property
    def asleep(self) -> bool:
        """True while no page shows the view."""
        return self._asleep

    @property
    def choices(self) -> dict[str, Any]:
        """What the person chose."""
        return dict(self._choices)

    @property
    def now(self) -> tuple[Curve, dict[str, Any]]:
        """The curve and the record that are shown."""
        return self._curve, self._record

    def compare(self, runs: list[str]) -> None:
        """Draws other runs over this one."""
        self._choose({"compare": runs})

    # -- the poller's side -----------------------------------------------------------------------------------

    def show(self, curve: Curve, record: Mapping[str, Any], trouble: str) -> None:
        """Takes the newest curve and sends what the page does not have yet."""
        with self._lock:
            more = len(curve.checkpoints) != len(self._curve.checkpoints)
            self._curve, self._record, self._trouble = curve, dict(record), trouble
            self._steering.saw(curve.state)
            self._send_news()
            ended = curve.ended and curve.seq != self._ended_seq
            now = time.monotonic()
            seldom = min(_KEEP_SELDOM, max(_KEEP_EVERY, (now - self._began) / 10))
            if ended or (not curve.ended and now - self._kept_at > seldom):
                self._update_keepsake()
        if more and self._saved is not None:
            self._saved()

    def close(self) -> None:
        """Nothing more will come. What is shown stays."""
        self._closed.set()

    def _update_keepsake(self) -> None:
        if self._kept is not None:
            self._kept_at = time.monotonic()
            self._ended_seq = self._curve.seq if self._curve.ended else -1
            self._kept.update(self.keepsake, raw=True)

    def _watch_again(self) -> None:
        if self._session is not None and self._trouble != GONE:
            self._session.poller().watch(self._run, self, self._session.database().store.runs.find_lost)

    # -- the page's side -------------------------------------------------------------------------------------

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        kind = message.get("kind") if isinstance(message, dict) else None
        with self._lock:
            if kind == "ready":
                self._heard_ready, self._asleep = True, False
                self._snapshot()
                self._beside.send()
                if self._choices["zoom"]:
                    self._detail()
                self._print()
            elif kind == "gone":  # another page may still be there: it answers
                self._heard_ready, self._asleep = False, True
                self.widget.send({"kind": "anyone"})
            elif kind == "choose" and isinstance(message.get("choices"), dict):
                self._choose(message["choices"])
            elif kind == "press" and message.get("what") in DOING:
                self._steering.press(message["what"])
            elif kind == "runs":
                self._beside.offer()

    def _choose(self, choices: Mapping[str, Any]) -> None:
        with self._lock:
            new = {name: _checked(name, value) for name, value in choices.items() if name in CHOICES}
            changed = {name for name, value in new.items() if value != self._choices[name]}
            self._choices.update(new)
            if changed & {"smooth", "log"}:
                self._snapshot()
                self._beside.send()
            if self._choices["zoom"] and changed & {"zoom", "smooth"}:
                self._detail()
            if "compare" in changed:
                self._beside.choose()
                self._send_news()
            if "printed" in changed:
                self._print()

    def _words(self) -> dict[str, Any]:
        words = status(self._curve, time.time())
        chosen = series.best_checkpoint(self._curve)
        return {
            "title": title_of(self._record),
            "state": words.state,
            "step": words.step,
            "share": words.share,
            "left": words.left,
            "facts": words.facts,
            "alert": self._trouble or words.alert,
            "points": words.points,
            "total": self._curve.total,
            "checkpoints": () if self._saved is not None else words.checkpoints[:4],
            "marks": [(c.step, c.step == chosen) for c in self._curve.checkpoints],
            "reasons": reasons(self._curve, self._record, gone=self._trouble == GONE),
            "doing": self._steering.doing,
            "said": self._steering.said,
            "loses": loses(self._curve),
            "choices": self._choices,
        }

    def _snapshot(self) -> None:
        drawn = series.picture(self._curve, weight=self._choices["smooth"])
        self._in_page = len(drawn.steps) + len(drawn.evaluated)
        self._sent_words = {}
        self._post("snapshot", drawn)

    def _detail(self) -> None:
        drawn = series.picture(self._curve, weight=self._choices["smooth"], span=tuple(self._choices["zoom"]))
        self._detail_at = time.monotonic()
        self.widget.send({"kind": "detail", "zoom": self._choices["zoom"]}, buffers_of(drawn))

    def _send_news(self) -> None:
        with self._lock:
            if self._asleep:
                return
            before, now = self._sent, self._curve
            if before is not None and before.seq == now.seq and self._words() == self._sent_words:
                if not self._heard_ready and time.monotonic() - self._sent_at > _RESEND_EVERY:
                    self._snapshot()
                return
            if before is None or not self._heard_ready or self._in_page > _ROOM or not _continues(before, now):
                self._snapshot()
            else:
                drawn = self._added(before, now)
                self._in_page += len(drawn.steps) + len(drawn.evaluated)
                self._post("append", drawn)
            zoom = self._choices["zoom"]
            grew = before is not None and before.seq != now.seq and zoom and before.step < zoom[1]
            if grew and time.monotonic() - self._detail_at > _DETAIL_EVERY:
                self._detail()

    def _added(self, before: Curve, now: Curve) -> Picture:
        loss, evaluated, rates, norms = (now[name].since(len(before[name])) for name in _SERIES)
        smoothed, average = self._average.over(loss.values)
        return Picture(loss.steps, loss.values, smoothed, evaluated, rates, norms, average)

    def _post(self, kind: str, drawn: Picture) -> None:
        words = self._words()
        base = self._sent.seq if self._sent is not None else -1
        news = {name: value for name, value in words.items() if self._sent_words.get(name) != value}
        self.widget.send({"kind": kind, "seq": self._curve.seq, "base": base, "status": news}, buffers_of(drawn))
        self._average = drawn.average
        self._sent, self._sent_at = self._curve, time.monotonic()
        self._sent_words = {**words, "choices": dict(self._choices)}

    # -- what the run's process printed ------------------------------------------------------------------------

    def _print(self) -> None:
        if self._choices["printed"] and (self._printing is None or not self._printing.is_alive()):
            self._printing = threading.Thread(target=self._follow_log, name="llmnb-log", daemon=True)
            self._printing.start()

    def _follow_log(self) -> None:
        """The border of a thread: refreshed while the log is open and somebody sees it."""
        shown = None
        while self._choices["printed"] and not self._asleep and not self._closed.is_set():
            try:
                text = self._run.logs(_LINES)
            except Exception as error:  # noqa: BLE001 - said in its place
                text = f"(the log cannot be read just now: {type(error).__name__})"
            notes = [f"{local_time(note.time)}  {note.level}: {note.text}" for note in self._curve.notes[-20:]]
            said = {"kind": "log", "text": text, "notes": notes}
            if said != shown:
                self.widget.send(said)
                shown = said
            if self._curve.ended and shown is not None:
                return
            self._closed.wait(_LOG_EVERY)


def _checked(name: str, value: Any) -> Any:
    """A choice as it came from a page, or the default when it makes no sense."""
    default = CHOICES[name]
    if name == "smooth":
        return float(value) if isinstance(value, (int, float)) and 0 <= value < 1 else default
    if name == "zoom":
        whole = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)
        return [float(x) for x in value] if whole and all(map(math.isfinite, value)) else None
    if name == "compare":
        return [str(run) for run in value][:5] if isinstance(value, (list, tuple)) else []
    return bool(value)


def _continues(before: Curve, now: Curve) -> bool:
    """True when every series only grew at its end."""
    for name in _SERIES:
        old, new = before[name], now[name]
        last = slice(len(old) - 1, len(old)) if len(old) else slice(0, 0)
        if len(new) < len(old) or not np.array_equal(old.steps[last], new.steps[last]):
            return False
        if not np.array_equal(old.values[last], new.values[last], equal_nan=True):
            return False
    return True


def buffers_of(drawn: Picture) -> list[bytes]:
    """Nine columns of little-endian float64: steps, loss, smoothed, then steps and values of three series."""
    pairs: tuple[Points, ...] = (drawn.evaluated, drawn.rates, drawn.norms)
    columns = [drawn.steps, drawn.loss, drawn.smooth, *(column for p in pairs for column in (p.steps, p.values))]
    return [np.ascontiguousarray(column, dtype="<f8").tobytes() for column in columns]
