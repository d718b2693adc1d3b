"""Events of a run, folded into series that can be drawn.

``fold(curve, events)`` is a pure function: the same events give the same ``Curve``, in one go or piece by piece,
whether the run is live or long over. Around it: smoothing, downsampling that keeps spikes and gaps, the best
step, the pace. This room knows no database, no notebook and no chart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .events import CheckpointSaved, Event, Metric, Note, StateChanged

__all__ = [
    "ENDED",
    "Curve",
    "Picture",
    "Points",
    "best",
    "best_checkpoint",
    "broke",
    "downsample",
    "fold",
    "joined",
    "kept",
    "marks",
    "picture",
    "rate",
    "seconds_left",
    "smooth",
    "told",
]

ENDED = frozenset({"done", "failed", "stopped", "lost"})
Floats = NDArray[np.float64]
_NONE: Floats = np.empty(0, dtype=np.float64)
_NONE.flags.writeable = False


@dataclass(frozen=True, eq=False)
class Points:
    """One series.

    Attributes:
        steps: optimizer steps, strictly ascending, shape ``(n,)``.
        values: shape ``(n,)``; NaN and infinities are kept as they were said.
        times: seconds since the epoch when each was said, shape ``(n,)``.
    """

    steps: Floats = field(default_factory=lambda: _NONE)
    values: Floats = field(default_factory=lambda: _NONE)
    times: Floats = field(default_factory=lambda: _NONE)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        """The newest value, or None."""
        return float(self.values[-1]) if len(self) else None

    def extended(self, steps: Sequence[float], values: Sequence[float], times: Sequence[float]) -> Points:
        """With newer points behind.

        A step that is not above the last one takes the place of what stood from there on: a resumed run says its
        steps again, and the newer word counts.
        """
        new = [np.asarray(part, dtype=np.float64) for part in (steps, values, times)]
        keep = _newest_word(new[0])
        new = [part[keep] for part in new]
        old = len(self) if not len(new[0]) else int(np.searchsorted(self.steps, new[0][0]))
        parts = zip((self.steps, self.values, self.times), new, strict=True)
        return Points(*(np.concatenate([before[:old], after]) for before, after in parts))

    def since(self, count: int) -> Points:
        """Without the first ``count`` points."""
        return Points(self.steps[count:], self.values[count:], self.times[count:])

    def before(self, step: float) -> Points:
        """The points below ``step``."""
        end = int(np.searchsorted(self.steps, step))
        return Points(self.steps[:end], self.values[:end], self.times[:end])

    def between(self, low: float, high: float) -> Points:
        """The points with ``low <= step <= high`` and one neighbour on either side, so that lines reach the edge."""
        start = max(0, int(np.searchsorted(self.steps, low)) - 1)
        stop = int(np.searchsorted(self.steps, high, side="right")) + 1
        return Points(self.steps[start:stop], self.values[start:stop], self.times[start:stop])


def _newest_word(steps: Floats) -> NDArray[np.bool_]:
    """Marks the points that no later point takes back (those below every step that follows)."""
    if len(steps) < 2:
        return np.ones(len(steps), dtype=bool)
    after = np.minimum.accumulate(steps[::-1])[::-1]
    keep = np.ones(len(steps), dtype=bool)
    keep[:-1] = steps[:-1] < after[1:]
    return keep


@dataclass(frozen=True, eq=False)
class Curve:
    """Everything a view of a run shows, as of ``seq``.

    Attributes:
        run: the run's id.
        seq: the last event folded in; older ones are passed over.
        series: name → points, by the names of ``events.Metric.values``.
        state: the newest state that was said, "" before any.
        reason: why it went there.
        checkpoints: as they were saved, by step.
        notes: everything a person was told.
        step: optimizer steps done.
        epoch: epochs done, or None.
        total: optimizer steps the run will take, 0 while unknown.
        times: when the first metric and the newest event were said, seconds since the epoch.
        points: how many events carried a training loss and still count.
    """

    run: str = ""
    seq: int = 0
    series: Mapping[str, Points] = field(default_factory=dict)
    state: str = ""
    reason: str = ""
    checkpoints: tuple[CheckpointSaved, ...] = ()
    notes: tuple[Note, ...] = ()
    step: int = 0
    epoch: float | None = None
    total: int = 0
    times: tuple[float, float] = (0.0, 0.0)

    def __getitem__(self, name: str) -> Points:
        return self.series.get(name, Points())

    @property
    def points(self) -> int:
        """How many training losses there are."""
        return len(self["loss"])

    @property
    def ended(self) -> bool:
        """True when no event will follow."""
        return self.state in ENDED


def fold(curve: Curve, events: Iterable[Event]) -> Curve:
    """The curve with ``events`` taken in, in the order of their ``seq``; what was folded before is passed over.

    A step below the newest one means that the run was resumed there: every series goes back with it.
    """
    fresh = sorted((e for e in events if e.seq > curve.seq), key=lambda e: e.seq)
    if not fresh:
        return curve
    said: dict[str, tuple[list[float], list[float], list[float]]] = {}
    series = dict(curve.series)
    checkpoints = {c.step: c for c in curve.checkpoints}
    notes, first = list(curve.notes), curve.times[0]
    step, epoch, state, reason = curve.step, curve.epoch, curve.state, curve.reason
    for event in fresh:
        if isinstance(event, Metric):
            if event.step < step:
                series = {name: points.before(event.step) for name, points in _extended(series, said).items()}
                said = {}
            first, step, epoch = first or event.time, event.step, event.epoch
            for name, value in event.values.items():
                columns = said.setdefault(name, ([], [], []))
                for column, item in zip(columns, (event.step, value, event.time), strict=True):
                    column.append(float(item))
        elif isinstance(event, CheckpointSaved):
            if event.best:
                checkpoints = {s: replace(c, best=False) for s, c in checkpoints.items()}
            checkpoints[event.step] = event
        elif isinstance(event, StateChanged):
            state, reason = event.state, event.reason
        elif isinstance(event, Note):
            notes.append(event)
    return replace(
        curve,
        seq=fresh[-1].seq,
        series=_extended(series, said),
        state=state,
        reason=reason,
        checkpoints=tuple(checkpoints[s] for s in sorted(checkpoints)),
        notes=tuple(notes),
        step=step,
        epoch=epoch,
        times=(first, fresh[-1].time),
    )


def _extended(
    series: Mapping[str, Points], said: Mapping[str, tuple[list[float], list[float], list[float]]]
) -> dict[str, Points]:
    return {**series, **{name: series.get(name, Points()).extended(*columns) for name, columns in said.items()}}


def joined(*parts: str) -> str:
    """The parts that say something, with semicolons between."""
    return "; ".join(part for part in parts if part)


def told(curve: Curve, record: Mapping[str, Any]) -> Curve:
    """The curve with what only the run's record says: its state, how many steps there will be, and its error.

    The record is the truth about the state: the event that tells of it may still be on its way, and a worker that
    was killed never sent one.
    """
    counts, error = record.get("counts") or {}, record.get("error") or {}
    state = str(record.get("state") or curve.state)
    reason = joined(str(error.get("what") or ""), str(error.get("todo") or "")) if error else ""
    return replace(
        curve,
        run=str(record.get("_id") or curve.run),
        state=state,
        reason=reason or (curve.reason if state == curve.state else ""),
        total=int(counts.get("steps") or curve.total),
    )


# --- series to series -----------------------------------------------------------------------------------------


def smooth(values: Floats, weight: float = 0.6) -> Floats:
    """Exponential moving average without the bias of its start, as TensorBoard draws it.

    ``weight`` is the share of the past, 0 for none, below 1. A value that is not finite stays a gap and leaves no
    trace in its neighbours. Shape ``(n,)`` to ``(n,)``. Worked in blocks with cumulative sums: 100 000 values
    took 13 ms on one busy core.

    Raises:
        ValueError: the weight is not in [0, 1).
    """
    if not 0 <= weight < 1:
        raise ValueError(f"the smoothing weight must be at least 0 and below 1, not {weight}")
    out = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    kept = np.asarray(values, dtype=np.float64)[finite]
    if weight == 0 or not len(kept):
        out[finite] = kept
        return out
    # weight ** -block must stay far from the largest float
    block = max(1, min(4096, int(200 / -math.log10(weight))))
    mean, carry = np.empty_like(kept), 0.0
    for start in range(0, len(kept), block):
        part = kept[start : start + block]
        powers = weight ** np.arange(1, len(part) + 1)
        mean[start : start + block] = powers * (carry + (1 - weight) * np.cumsum(part / powers))
        carry = mean[start + len(part) - 1]
    out[finite] = mean / (1 - weight ** np.arange(1, len(kept) + 1, dtype=np.float64))
    return out


def kept(values: Floats, buckets: int = 1000) -> NDArray[np.int64]:
    """Which of ``values`` to keep so that about ``2 * buckets`` of them look the same, ascending.

    The lowest and the highest of each bucket: spikes stay, the first and the last value stay, and a bucket with a
    value that is not finite keeps one such value, so that a gap stays a gap.

    Raises:
        ValueError: fewer than one bucket.
    """
    if buckets < 1:
        raise ValueError(f"downsampling needs at least one bucket, not {buckets}")
    count = len(values)
    if count <= 2 * buckets:
        return np.arange(count)
    width = math.ceil(count / buckets)
    whole = count // width * width
    grid = values[:whole].reshape(-1, width)
    finite = np.isfinite(grid)
    starts = np.arange(0, whole, width)
    holed = ~finite.all(axis=1)
    chosen = [
        np.array([0, count - 1]),
        starts + np.where(finite, grid, np.inf).argmin(axis=1),
        starts + np.where(finite, grid, -np.inf).argmax(axis=1),
        starts[holed] + (~finite[holed]).argmax(axis=1),
        whole + _tail(values[whole:]),
    ]
    return np.unique(np.concatenate(chosen))


def downsample(points: Points, buckets: int = 1000) -> Points:
    """The points that ``kept`` keeps."""
    keep = kept(points.values, buckets)
    return Points(points.steps[keep], points.values[keep], points.times[keep])


def _tail(values: Floats) -> NDArray[np.int64]:
    """What is kept of the last bucket, which is shorter than the others."""
    finite = np.flatnonzero(np.isfinite(values))
    chosen = [np.flatnonzero(~np.isfinite(values))[:1]]
    if len(finite):
        chosen.append(finite[[values[finite].argmin(), values[finite].argmax()]])
    return np.concatenate(chosen).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Picture:
    """What a chart of the loss draws: ``loss`` and its ``smooth`` twin over ``steps``, and the evaluations."""

    steps: Floats
    loss: Floats
    smooth: Floats
    evaluated: Points


def picture(
    curve: Curve, *, weight: float = 0.6, buckets: int = 1000, span: tuple[float, float] | None = None
) -> Picture:
    """The curve reduced to what a screen can show, whole or between two steps. The loss is smoothed before."""
    loss, evaluated = curve["loss"], curve["eval_loss"]
    both = Points(loss.steps, loss.values, smooth(loss.values, weight))
    if span is not None:
        both, evaluated = both.between(*span), evaluated.between(*span)
    keep = kept(both.values, buckets)
    return Picture(both.steps[keep], both.values[keep], both.times[keep], downsample(evaluated, buckets))


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


def marks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high`` for the marks of an axis, about ``count`` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or count < 1:
        return []
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / unit - 1e-9)
    return [round(k * unit, 12) for k in range(first, math.floor(high / unit + 1e-9) + 1)]
