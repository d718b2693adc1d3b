"""A run as one line on a terminal: step, loss, tokens per second, time left.

A pure follower of events: it knows neither the database nor the process that trains. Where standard error is no
terminal it prints a plain line now and then, so that logs stay readable.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from ..events import CheckpointSaved, Event, Metric, Note, StateChanged

__all__ = ["Progress"]

_PLAIN_EVERY_S = 10.0


class Progress:
    """Shows the events that it is given. Use as a context manager, or call ``close``.

    Args:
        title: the run's id.
        steps: optimizer steps of the whole run, once known.
        out: where to; standard error when not given.
    """

    def __init__(self, title: str, steps: int | None = None, out: TextIO | None = None) -> None:
        self.title, self.steps = title, steps
        self._out = out or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._step = 0
        self._shown = 0.0
        self._first: tuple[int, float] | None = None
        self._numbers: dict[str, float] = {}
        if self._out.isatty():
            self._open_bar()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=Console(file=self._out),
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.steps, numbers="starting")

    def __call__(self, event: Event) -> None:
        """Takes in an event."""
        if isinstance(event, Metric):
            self._metric(event)
        elif isinstance(event, StateChanged):
            self._line(f"{self.title}: {event.state}" + (f" ({event.reason})" if event.reason else ""))
        elif isinstance(event, CheckpointSaved):
            extra = "".join(f", {k} {v:.4g}" for k, v in event.metrics.items() if k in ("eval_loss", "loss"))
            self._line(f"checkpoint {event.step} saved, {event.size / 1e6:.1f} MB{extra}" + (" (best)" * event.best))
        elif isinstance(event, Note):
            if "steps" in event.data:
                self.steps = int(event.data["steps"])
            self._line(event.text if event.level == "info" else f"{event.level}: {event.text}")

    def _metric(self, event: Metric) -> None:
        self._step = max(self._step, event.step)
        for name in ("loss", "eval_loss", "tokens_per_second"):
            if name in event.values:
                self._numbers[name] = float(event.values[name])
        if self._first is None:
            self._first = (event.step, event.time)
        text = self._text(event.time)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, total=self.steps, numbers=text)
        elif time.monotonic() - self._shown >= _PLAIN_EVERY_S:
            self._shown = time.monotonic()
            self._line(f"step {self._step}{f'/{self.steps}' if self.steps else ''}  {text}")

    def _text(self, now: float) -> str:
        parts = []
        if "loss" in self._numbers:
            parts.append(f"loss {self._numbers['loss']:.4f}")
        if "eval_loss" in self._numbers:
            parts.append(f"eval {self._numbers['eval_loss']:.4f}")
        if "tokens_per_second" in self._numbers:
            parts.append(f"{self._numbers['tokens_per_second']:,.0f} tokens/s")
        left = self.seconds_left(now)
        if left is not None:
            parts.append(f"ETA {left // 60:.0f}:{left % 60:02.0f}")
        return "  ".join(parts)

    def seconds_left(self, now: float) -> float | None:
        """By the pace since the first step that was seen; None while it cannot be known."""
        if not self.steps or self._first is None or self._step <= self._first[0]:
            return None
        pace = (now - self._first[1]) / (self._step - self._first[0])
        return max(self.steps - self._step, 0) * pace

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._bar is not None:
            if self._numbers:
                self._bar.update(self._task, numbers=self._text(time.time()))
            self._bar.stop()
            self._bar = None
