"""What a run says while it lives: metrics, checkpoints, changes of state, notes.

Every event of a run carries a ``seq``, 1, 2, 3, … without gaps; ``(run, seq)`` is unique, so sending an event
twice does nothing. The engine makes events without a number; the spool numbers them (``numbered``). This room
knows neither database nor files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

__all__ = ["CheckpointSaved", "Event", "Metric", "Note", "StateChanged", "from_dict"]

E = TypeVar("E", bound="Event")
_MOST = 2**63


@dataclass(frozen=True, kw_only=True)
class Event:
    """Attributes: ``seq``: place in the run, 0 while not numbered; ``time``: seconds since the epoch (UTC)."""

    kind: ClassVar[str] = "event"
    seq: int = 0
    time: float = field(default_factory=time.time)

    def numbered(self: E, seq: int) -> E:
        """The same event with its place in the run."""
        # Not ``dataclasses.replace``: this is on the training's thread, and that costs four times as much.
        event = object.__new__(type(self))
        event.__dict__.update(self.__dict__, seq=seq)
        return event

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``from_dict`` reads it back."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Metric(Event):
    """Numbers at a step.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done, a fraction.
        values: name → number. Names: ``loss``, ``eval_loss``, ``learning_rate`` (per step), ``grad_norm``,
            ``tokens_per_second``, ``tokens`` (trained so far), ``memory`` (bytes), … NaN and Inf are kept.
    """

    kind: ClassVar[str] = "metric"
    step: int
    epoch: float | None = None
    values: Mapping[str, float]

    def numbers(self) -> tuple[float, ...] | None:
        """(seq, time, step, epoch, the values …), or None when one of them cannot be written down as it is.

        It can when it is one of Python's own numbers, finite and of 64 bits.
        """
        found: tuple[Any, ...] = (self.seq, self.time, self.step, self.epoch, *self.values.values())
        for number in found:  # a loop: this is on the training's thread
            kind = type(number)
            if (kind is not float and kind is not int) or not -_MOST < number < _MOST:
                return None
        return found


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is in the database.

    Attributes:
        step: optimizer steps done when it was taken.
        digest: the checkpoint's digest.
        size: bytes.
        metrics: the newest evaluation at that step.
        best: True when it is the best so far.
    """

    kind: ClassVar[str] = "checkpoint"
    step: int
    digest: str
    size: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class StateChanged(Event):
    """The run went to another state (queued, starting, running, stopping, done, failed, stopped, lost)."""

    kind: ClassVar[str] = "state"
    state: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Note(Event):
    """Something a person should know.

    Attributes:
        level: "info", "warning" or "error".
        text: a sentence or two.
        data: figures that belong to it (``{"truncated": 12}``).
    """

    kind: ClassVar[str] = "note"
    level: str = "info"
    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


_KINDS: dict[str, type[Event]] = {cls.kind: cls for cls in (Metric, CheckpointSaved, StateChanged, Note)}


def from_dict(data: Mapping[str, Any]) -> Event:
    """The event that ``to_dict`` wrote. Unknown fields (``_id``, ``run``) are passed over.

    Raises:
        KeyError: the kind is not one of ours.
    """
    cls = _KINDS[data["kind"]]
    names = cls.__dataclass_fields__
    return cls(**{key: value for key, value in data.items() if key in names and key != "kind"})
