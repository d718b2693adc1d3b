"""Series made small and smooth enough to be drawn: spikes and gaps stay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .curve import Curve
from .points import Floats, Points

__all__ = ["Average", "Picture", "downsample", "kept", "marks", "picture", "smooth"]


@dataclass(frozen=True)
class Average:
    """Where an exponential moving average stands after ``count`` finite values, so that it can go on from there.

    Without the bias of its start, as TensorBoard draws it. ``weight`` is the share of the past, 0 for none, below 1.

    Raises:
        ValueError: the weight is not in [0, 1).
    """

    weight: float = 0.6
    mean: float = 0.0
    count: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < 1:
            raise ValueError(f"the smoothing weight must be at least 0 and below 1, not {self.weight}")

    def over(self, values: Floats) -> tuple[Floats, Average]:
        """``values`` smoothed, and where the average stands behind them.

        A value that is not finite stays a gap and leaves no trace in its neighbours. Shape ``(n,)`` to ``(n,)``. Worked
        in blocks with cumulative sums: 100 000 values took 13 ms on one busy core.
        """
        out = np.full(len(values), np.nan)
        finite = np.isfinite(values)
        kept = np.asarray(values, dtype=np.float64)[finite]
        if self.weight < 1e-12 or not len(kept):  # nothing to see, and its powers overflow
            out[finite] = kept
            return out, self
        # weight ** -block must stay far from the largest float
        block = max(1, min(4096, int(200 / -math.log10(self.weight))))
        mean, carry = np.empty_like(kept), self.mean
        for start in range(0, len(kept), block):
            part = kept[start : start + block]
            powers = self.weight ** np.arange(1, len(part) + 1)
            mean[start : start + block] = powers * (carry + (1 - self.weight) * np.cumsum(part / powers))
            carry = mean[start + len(part) - 1]
        places = np.arange(self.count + 1, self.count + len(kept) + 1, dtype=np.float64)
        out[finite] = mean / (1 - self.weight**places)
        return out, Average(self.weight, float(carry), self.count + len(kept))


def smooth(values: Floats, weight: float = 0.6) -> Floats:
    """The values' exponential moving average, from their beginning: see ``Average``.

    Raises:
        ValueError: the weight is not in [0, 1).
    """
    return Average(weight).over(values)[0]


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
    """What the charts draw.

    Attributes:
        steps: of ``loss`` and its ``smooth`` twin.
        loss: as it was said.
        smooth: its average.
        evaluated: evaluation losses.
        rates: learning rates.
        norms: gradient norms.
        average: where the smoothing stands after the curve's last loss.
    """

    steps: Floats
    loss: Floats
    smooth: Floats
    evaluated: Points
    rates: Points = field(default_factory=Points)
    norms: Points = field(default_factory=Points)
    average: Average = field(default_factory=Average)


def picture(
    curve: Curve, *, weight: float = 0.6, buckets: int = 1000, span: tuple[float, float] | None = None
) -> Picture:
    """The curve reduced to what a screen can show, whole or between two steps. The loss is smoothed before."""
    loss = curve["loss"]
    smoothed, average = Average(weight).over(loss.values)
    both = Points(loss.steps, loss.values, smoothed)
    rest = [curve[name] for name in ("eval_loss", "learning_rate", "grad_norm")]
    if span is not None:
        both, rest = both.between(*span), [points.between(*span) for points in rest]
    keep = kept(both.values, buckets)
    evaluated, rates, norms = (downsample(points, buckets) for points in rest)
    return Picture(both.steps[keep], both.values[keep], both.times[keep], evaluated, rates, norms, average)


def marks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high`` for the marks of an axis, about ``count`` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or count < 1:
        return []
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / unit - 1e-9)
    return [round(k * unit, 12) for k in range(first, math.floor(high / unit + 1e-9) + 1)]
