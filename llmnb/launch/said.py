"""What a run said before it was picked up again, so that nothing of it is said twice. Pure functions of events."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoint import Checkpoint
from ..events import CheckpointSaved, Event, Metric, Note

__all__ = ["Said"]


class Said:
    """The memory of a run.

    A metric is known when every number of it was said at its step; a checkpoint by its step and digest; a note by its
    words. Changes of state are never known: a run may start more than once.

    Args:
        events: what was said.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._numbers: dict[int, frozenset[str]] = {}
        self._checkpoints: set[tuple[int, str]] = set()
        self._notes: set[str] = set()
        for event in events:
            if isinstance(event, Metric):
                self._numbers[event.step] = self._numbers.get(event.step, frozenset()) | event.values.keys()
            elif isinstance(event, CheckpointSaved):
                self._checkpoints.add((event.step, event.digest))
            elif isinstance(event, Note):
                self._notes.add(event.text)

    def knows(self, event: Event) -> bool:
        """True when the event would repeat what was said."""
        if isinstance(event, Metric):
            known = self._numbers.get(event.step)
            return known is not None and event.values.keys() <= known
        if isinstance(event, CheckpointSaved):
            return (event.step, event.digest) in self._checkpoints
        return isinstance(event, Note) and event.text in self._notes

    def unsaid(self, checkpoints: Iterable[Checkpoint]) -> list[CheckpointSaved]:
        """Events of stored checkpoints that nobody told of: the worker died between storing and telling."""
        made = [
            CheckpointSaved(step=c.step, digest=c.digest, size=c.size, metrics=dict(c.metrics), best=c.best)
            for c in checkpoints
        ]
        return [event for event in made if not self.knows(event)]
