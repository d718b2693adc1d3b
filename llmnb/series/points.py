"""One series: steps, values, times. Growing it by a few points costs a few points, however long it is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Points"]

Floats = NDArray[np.float64]
Columned = Sequence[float] | Floats
_NONE: Floats = np.empty(0, dtype=np.float64)
_NONE.flags.writeable = False


class _Shelf:
    """Room for three columns with some to spare.

    Several ``Points`` may look at it, each at its own length. What was written is never written again, so none of
    them ever changes; only the longest can be extended here, the others are copied.
    """

    def __init__(self, columns: Sequence[Floats], spare: int) -> None:
        self.used = len(columns[0])
        self.data = np.empty((3, self.used + spare))
        self.data[:, : self.used] = columns
        self._lock = threading.Lock()

    def add(self, at: int, new: Sequence[Floats]) -> int | None:
        """Writes ``new`` behind the first ``at``; the new length, or None when that is not possible here."""
        with self._lock:
            end = at + len(new[0])
            if at != self.used or end > self.data.shape[1]:
                return None
            self.data[:, at:end] = new
            self.used = end
            return end


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
    _shelf: _Shelf | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        """The newest value, or None."""
        return float(self.values[-1]) if len(self) else None

    def extended(self, steps: Columned, values: Columned, times: Columned) -> Points:
        """With newer points behind.

        A step that is not above the last one takes the place of what stood from there on: a resumed run says its
        steps again, and the newer word counts.
        """
        new = [np.asarray(part, dtype=np.float64) for part in (steps, values, times)]
        keep = _newest_word(new[0])
        new = [part[keep] for part in new]
        old = len(self) if not len(new[0]) else int(np.searchsorted(self.steps, new[0][0]))
        if old == len(self) and self._shelf is not None:
            end = self._shelf.add(old, new)
            if end is not None:
                return _on(self._shelf, end)
        parts = zip((self.steps, self.values, self.times), new, strict=True)
        columns = [np.concatenate([before[:old], after]) for before, after in parts]
        shelf = _Shelf(columns, max(64, len(columns[0]) // 2))
        return _on(shelf, shelf.used)

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


def _on(shelf: _Shelf, end: int) -> Points:
    steps, values, times = shelf.data[:, :end]
    return Points(steps, values, times, shelf)


def _newest_word(steps: Floats) -> NDArray[np.bool_]:
    """Marks the points that no later point takes back (those below every step that follows)."""
    if len(steps) < 2:
        return np.ones(len(steps), dtype=bool)
    after = np.minimum.accumulate(steps[::-1])[::-1]
    keep = np.ones(len(steps), dtype=bool)
    keep[:-1] = steps[:-1] < after[1:]
    return keep
