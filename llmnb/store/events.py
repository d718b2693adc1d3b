"""Events of runs as records. ``(run, seq)`` is the record's id, so storing an event twice does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..events import Event, Metric, Note, from_dict
from .runs import Runs
from .tables import Duplicate, Table, plain

if TYPE_CHECKING:
    from ..series import Columns

__all__ = ["Events"]

# Events in one question, and in one record of its answer (which may not be larger than 16 MB).
_PART, _RECORD = 100_000, 10_000


def _key(run: str, seq: int) -> str:
    # Sorts by seq within a run, so that the id's own index serves a tail.
    return f"{run}/{seq:09d}"


def _range(run: str, after: int) -> dict[str, str]:
    return {"$gt": _key(run, after), "$lt": f"{run}/:"}  # ":" comes right after "9"


def _event(record: dict[str, Any]) -> Event:
    try:
        return from_dict(record)
    except KeyError:
        text = f"An event of a kind that this version does not know: {record.get('kind')!r}."
        return Note(seq=record["seq"], time=record["time"], level="warning", text=text)


class Events:
    """The collection ``llmnb.events``."""

    def __init__(self, table: Table, runs: Runs) -> None:
        self._table, self._runs = table, runs

    def append(self, run: str, events: Sequence[Event], attempt: int | None = None) -> None:
        """Stores events; those that are there already stay as they are.

        They are written in the order of their ``seq``, so that a reader who asks for what comes after the
        last one seen never misses one.

        Args:
            run: the run's id.
            events: numbered.
            attempt: of the run, in which they were said. Nothing is stored when the run is in a later one by now:
                the numbers are that one's. None asks nothing.

        Raises:
            ValueError: an event without a number.
        """
        waiting = {event.seq: event for event in sorted(events, key=lambda event: event.seq)}
        if not waiting:
            return
        if min(waiting) < 1:
            raise ValueError("an event without a seq cannot be stored; number it first")
        newest = max(waiting)
        if attempt is not None and not self._runs.holds(run, attempt):
            return
        while waiting:
            try:
                self._table.insert_many([self._record(run, event) for event in waiting.values()])
                break
            except Duplicate:  # sent before, or by another sender who is at it now: what is there is not sent again
                ids = [_key(run, seq) for seq in waiting]
                for record in self._table.find({"_id": {"$in": ids}}, {"seq": 1}):
                    waiting.pop(record["seq"], None)
        self._runs.saw(run, newest)

    @staticmethod
    def _record(run: str, event: Event) -> dict[str, Any]:
        # Not ``to_dict``: ``plain`` copies, too, and this runs beside every training.
        told = event.__dict__ if type(event) is Metric and event.numbers() else plain(event.__dict__)
        return {"_id": _key(run, event.seq), "run": run, "kind": event.kind, **told}

    def since(self, run: str, seq: int = 0, limit: int = 0, kinds: Iterable[str] | None = None) -> list[Event]:
        """Events after ``seq``, in order; at most ``limit`` (0: all); of some kinds only, when given."""
        wanted: dict[str, Any] = {"_id": _range(run, seq)}
        if kinds is not None:
            wanted["kind"] = {"$in": [kinds] if isinstance(kinds, str) else list(kinds)}
        return [_event(record) for record in self._table.find(wanted, sort=[("_id", 1)], limit=limit)]

    def at(self, run: str, seqs: Iterable[int]) -> list[Event]:
        """The events with these numbers, in order; those that are not there are passed over."""
        wanted = {"_id": {"$in": [_key(run, seq) for seq in seqs]}}
        return [_event(record) for record in self._table.find(wanted, sort=[("_id", 1)])]

    def columns(self, run: str, names: Sequence[str], after: int, until: int) -> Columns | None:
        """The metrics after ``after`` up to ``until`` as columns, of these names only; None where that cannot be had.

        The server makes them: of 100 000 metrics this process decodes some lists in place of 100 000 records, which
        took 0.5 s in place of 1.6 s, and kept Python's lock for 0.08 s of them.
        """
        if not self._table.aggregates:
            return None
        import numpy as np

        from ..series import Columns

        # Each field keeps its place in every list: what was not said is null.
        said = {f"v{i}": {"$push": {"$ifNull": [f"$values.{name}", None]}} for i, name in enumerate(names)}
        group: dict[str, Any] = {"_id": {"$floor": {"$divide": ["$seq", _RECORD]}}, "epoch": {"$last": "$epoch"}}
        group |= {**said, **{name: {"$push": f"${name}"} for name in ("seq", "step", "time")}}
        found: list[dict[str, Any]] = []
        for start in range(after, until, _PART):
            keys = {"$gt": _key(run, start), "$lte": _key(run, min(until, start + _PART))}
            stages: list[dict[str, Any]] = [{"$match": {"_id": keys, "kind": Metric.kind}}, {"$group": group}]
            found += self._table.aggregate(stages)
        found.sort(key=lambda part: part["_id"])
        values, there = {}, {}
        for i, name in enumerate(names):
            column = [item for part in found for item in part[f"v{i}"]]
            values[name] = np.array(column, dtype=np.float64)  # null becomes NaN
            there[name] = ~np.isnan(values[name])
            if not there[name].all():  # a NaN that was said is one of the run's
                there[name] = np.array([item is not None for item in column], dtype=bool)
        seqs, steps, times = ([item for part in found for item in part[name]] for name in ("seq", "step", "time"))
        if not (np.diff(seqs) > 0).all():  # the server reads by _id, and need not: asking it to sort doubles the time
            return None
        return Columns(
            np.array(seqs, dtype=np.int64),
            np.array(steps, dtype=np.float64),
            np.array(times, dtype=np.float64),
            values,
            there,
            found[-1]["epoch"] if found else None,
        )

    def last_seq(self, run: str) -> int:
        """The number of the newest stored event, 0 when there is none."""
        found = self._table.find({"_id": _range(run, 0)}, {"seq": 1}, sort=[("_id", -1)], limit=1)
        return int(found[0]["seq"]) if found else 0

    def remove(self, run: str) -> int:
        """Removes a run's events; how many there were."""
        return self._table.delete({"_id": _range(run, 0)})
