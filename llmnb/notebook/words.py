"""A run in words and figures: state, progress, time left, loss, speed, checkpoints.

What a view shows beside its curve, as text, so that every view says the same. This module knows neither database nor
display.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .. import series
from ..errors import LlmnbError
from ..events import CheckpointSaved
from ..series import Curve

__all__ = ["Status", "about", "error_words", "figure", "number", "size", "status"]


@dataclass(frozen=True)
class Status:
    """The words beside a chart, ready to be shown as text.

    Attributes:
        state: a word.
        step: "step 420 / 1 482".
        share: progress from 0 to 1, None while the end is unknown.
        left: "about 27 min left", or "".
        facts: label and figure: loss, eval, tokens/s, memory.
        alert: what went wrong, or "".
        points: training losses so far.
        checkpoints: one line for each kept in sight, newest first.
    """

    state: str
    step: str
    share: float | None
    left: str
    facts: tuple[tuple[str, str], ...]
    alert: str
    points: int
    checkpoints: tuple[str, ...]


def status(curve: Curve, now: float) -> Status:
    """The words for a curve. ``now``: seconds since the epoch, for the time left."""
    total, step = curve.total, curve.step
    seconds = None if curve.ended else series.seconds_left(curve, now)
    bad = series.broke(curve)
    alert = curve.reason if curve.state in ("failed", "lost") else ""
    if bad is not None:
        alert = series.joined(
            f"the loss is not a number since step {bad}: often a learning rate that is too high", alert
        )
    words = f"step {number(step)}" + (f" / {number(total)}" if total else "")
    return Status(
        state=curve.state or "queued",
        step=words,
        share=min(1.0, step / total) if total else None,
        left=f"{about(seconds)} left" if seconds is not None else "",
        facts=tuple(_facts(curve)),
        alert=alert,
        points=curve.points,
        checkpoints=tuple(_checkpoint_words(c, curve) for c in reversed(curve.checkpoints)),
    )


def _facts(curve: Curve) -> Iterable[tuple[str, str]]:
    if curve.points:
        yield "loss", figure(curve["loss"].last)
    evaluated, lowest = curve["eval_loss"], series.best(curve)
    if len(evaluated):
        at = f" (best {figure(lowest[1])} at {number(lowest[0])})" if lowest else ""
        yield "eval", figure(evaluated.last) + at
    speed = series.rate(curve)
    if speed is not None:
        yield "", f"{number(speed)} tokens/s"
    memory = curve["memory"].last
    if memory:
        yield "", size(memory)


def _checkpoint_words(checkpoint: CheckpointSaved, curve: Curve) -> str:
    parts = [f"step {number(checkpoint.step)}"]
    if "eval_loss" in checkpoint.metrics:
        parts.append(f"eval {figure(checkpoint.metrics['eval_loss'])}")
    if checkpoint.size:
        parts.append(size(checkpoint.size))
    if checkpoint.step == series.best_checkpoint(curve):
        parts.append("best")
    return "  ".join(parts)


def error_words(error: LlmnbError) -> str:
    """An error in one or two sentences."""
    seen = " ".join(str(error.seen).split())[:120] if error.seen else ""
    what = error.what.rstrip(".") + (f" ({seen})" if seen else "") + "."
    return f"{what} To do: {error.todo}." if error.todo else what


def about(seconds: float) -> str:
    """A stretch of time as one says it: "about 3 min", "about 2 h 10 min", "a few seconds"."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 55:
        return f"about {round(seconds / 10) * 10} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {max(1, minutes)} min"
    if minutes < 60 * 24:
        minutes = round(minutes / 10) * 10
        return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    hours = round(seconds / 3600)
    return f"about {hours // 24} d" + (f" {hours % 24} h" if hours % 24 else "")


def number(value: float) -> str:
    """A count with narrow gaps between thousands: ``1 482``."""
    return f"{round(value):,}".replace(",", "\u202f")


def figure(value: float | None) -> str:
    """A loss: four significant digits, and never a false zero."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Inf" if value > 0 else "-Inf")
    if value and not 0.001 <= abs(value) < 1e6:
        return f"{value:.4g}"
    return number(value) if abs(value) >= 1000 else f"{value:.3f}"


def size(count: float) -> str:
    """Bytes: ``18 MB``, ``6.1 GB`` (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"
