"""Events folded into a curve: everything that a view of a run shows, as of one event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..events import CheckpointSaved, Event, Metric, Note, StateChanged
from .points import Floats, Points

__all__ = ["DRAWN", "ENDED", "Columns", "Curve", "fold", "joined", "taken", "told"]

# The series that a view of a run draws.
DRAWN = ("loss", "eval_loss", "learning_rate", "grad_norm")
ENDED = frozenset({"done", "failed", "stopped", "lost"})


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


@dataclass(frozen=True, eq=False)
class Columns:
    """Many metrics as columns, in the order of their ``seq``. Shapes ``(n,)``.

    Attributes:
        seqs: of the events.
        steps: optimizer steps done.
        times: seconds since the epoch.
        values: name → values; ``said`` marks which of them were said.
        said: name → mask.
        epoch: of the last one.
    """

    seqs: NDArray[np.int64]
    steps: Floats
    times: Floats
    values: Mapping[str, Floats]
    said: Mapping[str, NDArray[np.bool_]]
    epoch: float | None = None

    def __len__(self) -> int:
        return len(self.seqs)


def taken(curve: Curve, columns: Columns) -> Curve:
    """The curve with the metrics of ``columns`` taken in, all above ``curve.seq``: what ``fold`` gives, much faster.

    Only the named series are there afterwards as far as ``columns`` reaches. Events of other kinds, in between, must
    be folded in before: a fold passes over what is not above ``seq``.
    """
    if not len(columns):
        return curve
    steps = columns.steps
    # A step below the one before it takes back all that stood from there on, in every series.
    down = np.flatnonzero(np.diff(steps, prepend=float(curve.step)) < 0)
    lowest = np.full(len(steps) + 1, np.inf)
    lowest[down] = steps[down]
    lowest = np.minimum.accumulate(lowest[::-1])[::-1]
    keep = steps < lowest[1:]
    old = {name: points.before(lowest[0]) if len(down) else points for name, points in curve.series.items()}
    new = {}
    for name, values in columns.values.items():
        mine = keep & columns.said[name]
        if mine.any():
            new[name] = old.get(name, Points()).extended(steps[mine], values[mine], columns.times[mine])
    return replace(
        curve,
        seq=max(curve.seq, int(columns.seqs[-1])),
        series={**old, **new},
        step=int(steps[-1]),
        epoch=columns.epoch,
        times=(curve.times[0] or float(columns.times[0]), max(curve.times[1], float(columns.times[-1]))),
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
