"""What the command prints: sections, tables, one progress line. Numbers carry units; nothing is coloured but faults.

Where standard output is no terminal the same words come as plain lines, and a progress line becomes a few lines, so
that logs stay readable. This module knows nothing of what it prints.
"""

from __future__ import annotations

import datetime as dt
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any, TextIO

from ..events import Event, Metric, Note

__all__ = ["Follower", "about", "count", "fact", "figure", "local_time", "one_line", "place", "size", "table", "width"]

_LABEL = 13  # columns of the label that a fact begins with
_PLAIN_SHARE = 0.25  # without a terminal a line is printed each time this share of the steps is done


def width() -> int:
    """Columns to write in: the terminal's, at most 110, so that lines stay easy to read."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))


def fact(label: str, text: str) -> None:
    """A line with a label, wrapped under itself."""
    body = textwrap.wrap(text, width() - _LABEL - 1, break_long_words=False, break_on_hyphens=False) or [""]
    print(f"{label:<{_LABEL}}{body[0]}", flush=True)
    for line in body[1:]:
        print(" " * _LABEL + line, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], indent: int = 0) -> None:
    """Aligned columns, numbers on the right. Empty columns are left out, and so is a line of empty headings."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    used = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = [[columns[i] for i in used], *([row[i] for i in used] for row in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    right = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(used))]
    for line in lines if any(lines[0]) else lines[1:]:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        print((" " * indent + "  ".join(parts)).rstrip())


def _is_number(cell: str) -> bool:
    return not cell or (cell[0].isdigit() and len(cell) < 14 and "-" not in cell)


def count(number: float) -> str:
    """``11 722``."""
    return f"{round(number):,}".replace(",", " ")


def figure(value: float | None) -> str:
    """A loss, four significant digits: ``2.041``; "" when there is none."""
    if value is None:
        return ""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def size(number: float) -> str:
    """Bytes: ``18 MB``, ``6.1 GB`` (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.{1 if number < 10 * scale else 0}f} {unit}"
    return f"{number:.0f} B"


def place(store: Any) -> str:
    """Where a database is, in a few words; without its password."""
    if store.embedded:
        return f"MongoDB {store.version} of this machine, in {store.home}"
    return str(store.describe())


def about(seconds: float) -> str:
    """A stretch of time: ``42 s``, ``3 min 10 s``, ``2 h 5 min``."""
    seconds = max(round(seconds), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def local_time(moment: Any) -> str:
    """A UTC datetime, or seconds since the epoch, as local wall time: ``21 Nov 18:04``; "" for none."""
    if not moment:
        return ""
    if isinstance(moment, (int, float)):
        moment = dt.datetime.fromtimestamp(moment, dt.timezone.utc)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.timezone.utc)
    local = moment.astimezone()
    return f"{local.day} {local:%b %H:%M}"


def one_line(text: object, columns: int) -> str:
    """A text on one line of at most ``columns``, line ends as spaces, its end cut with an ellipsis."""
    line = " ".join(str(text).split())
    return line if len(line) <= columns else line[: max(columns - 1, 1)].rstrip() + "…"


class Follower:
    """One progress line from a run's events: steps, loss, tokens per second, time left. A context manager.

    On a terminal the line is drawn in place and gone when it ends, so that what remains on the screen is the result.

    Args:
        label: what is being done.
        out: where to; standard error when not given.

    Attributes:
        first_loss, loss, eval_loss: the first and the newest of each that was said, None before.
        counts: what the run said of itself before its first step.
        warnings: texts that a person should read.
        rates: tokens per second, as said.
    """

    def __init__(self, label: str, out: TextIO | None = None) -> None:
        self.label = label
        self.counts: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.rates: list[float] = []
        self.first_loss: float | None = None
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.step, self.steps = 0, 0
        self.began = time.monotonic()
        self._pace: tuple[int, float] | None = None
        self._out = out or sys.stderr
        self._plain_next = _PLAIN_SHARE
        self._bar: Any = None

    def __enter__(self) -> Follower:
        if self._out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn(f"{self.label:<{_LABEL - 1}}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(file=self._out), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Tokens per second, the median of what was said."""
        return sorted(self.rates)[len(self.rates) // 2] if self.rates else 0.0

    def __call__(self, event: Event) -> None:
        """Takes in an event."""
        if isinstance(event, Note):
            if "steps" in event.data:
                self.counts, self.steps = dict(event.data), int(event.data["steps"])
            if event.level != "info":
                self.warnings.append(event.text)
            return
        if not isinstance(event, Metric):
            return
        self.step = max(self.step, event.step)
        values = event.values
        if "loss" in values:
            self.loss = values["loss"]
            self.first_loss = self.loss if self.first_loss is None else self.first_loss
        self.eval_loss = values.get("eval_loss", self.eval_loss)
        if "tokens_per_second" in values:
            self.rates.append(values["tokens_per_second"])
        if self._pace is None:
            self._pace = (event.step, event.time)
        self._show(event.time)

    def _show(self, now: float) -> None:
        words = self._words(now)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, total=self.steps or None, description=words)
        elif self.steps and self.step >= self._plain_next * self.steps:
            self._plain_next = self.step / self.steps + _PLAIN_SHARE
            print(f"{self.label:<{_LABEL}}{words}", file=self._out, flush=True)

    def _words(self, now: float) -> str:
        parts = [f"step {self.step}" + (f"/{self.steps}" if self.steps else "")]
        if self.loss is not None:
            parts.append(f"loss {figure(self.loss)}")
        if self.rates:
            parts.append(f"{count(self.rates[-1])} tokens/s")
        if self._pace and self.steps and self.step > self._pace[0]:
            each = (now - self._pace[1]) / (self.step - self._pace[0])
            parts.append(f"about {about(each * max(self.steps - self.step, 0))} left")
        return "  ".join(parts)
