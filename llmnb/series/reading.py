"""What a curve says in figures: the best step, the pace, what is left, whether the loss broke."""

from __future__ import annotations

import math

import numpy as np

from .curve import Curve

__all__ = ["best", "best_checkpoint", "broke", "rate", "seconds_left"]


def best(curve: Curve) -> tuple[int, float] | None:
    """The step with the lowest evaluation loss and that loss; None before the first finite one."""
    evaluated = curve["eval_loss"]
    finite = np.flatnonzero(np.isfinite(evaluated.values))
    if not len(finite):
        return None
    place = finite[evaluated.values[finite].argmin()]
    return int(evaluated.steps[place]), float(evaluated.values[place])


def best_checkpoint(curve: Curve) -> int | None:
    """The step of the best checkpoint: the one the run chose, else the one at the lowest evaluation loss."""
    chosen = [c.step for c in curve.checkpoints if c.best]
    if chosen:
        return chosen[-1]
    lowest = best(curve)
    return lowest[0] if lowest and any(c.step == lowest[0] for c in curve.checkpoints) else None


def broke(curve: Curve) -> int | None:
    """The first step of the newest stretch whose training loss is not a finite number; None when the newest is."""
    values = curve["loss"].values
    if not len(values) or np.isfinite(values[-1]):
        return None
    finite = np.flatnonzero(np.isfinite(values))
    return int(curve["loss"].steps[finite[-1] + 1 if len(finite) else 0])


def rate(curve: Curve) -> float | None:
    """Trained tokens per second lately, or None when the run does not say."""
    said = curve["tokens_per_second"]
    if len(said) and math.isfinite(said.values[-1]):
        return float(said.values[-1])
    tokens = curve["tokens"].since(max(0, len(curve["tokens"]) - 10))
    if len(tokens) < 2 or tokens.times[-1] <= tokens.times[0]:
        return None
    return float((tokens.values[-1] - tokens.values[0]) / (tokens.times[-1] - tokens.times[0]))


def seconds_left(curve: Curve, now: float) -> float | None:
    """Seconds until the last step at the pace of the newest 50 losses; None while that cannot be known."""
    lately = curve["loss"].since(max(0, curve.points - 50))
    if curve.total <= 0 or curve.step >= curve.total or len(lately) < 2:
        return None
    steps, seconds = lately.steps[-1] - lately.steps[0], lately.times[-1] - lately.times[0]
    if seconds <= 0:
        return None
    left = float((curve.total - lately.steps[-1]) * seconds / steps)
    # The clock goes on until the next loss is due, then it waits: an evaluation is no progress.
    due = float(seconds / (len(lately) - 1))
    return max(0.0, left - min(due, max(0.0, now - float(lately.times[-1]))))
