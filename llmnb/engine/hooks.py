"""What a training run calls out, and what it gives back. No torch here.

The engine is given functions and calls them; it does not know who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..events import Event

__all__ = ["Hooks", "TrainResult"]


class SaveCheckpoint(Protocol):
    """Called when a checkpoint folder is complete; the folder may be deleted once this returned."""

    def __call__(
        self, folder: Path, step: int, metrics: dict[str, float], kind: str, base_fingerprint: str, best: bool
    ) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """Functions that a run calls. All of them are called on rank 0 only, and ``control`` too.

    Attributes:
        say: takes an event without a number.
        checkpoint: a folder is complete; ``best`` is True when it is the best so far by the run's own metric.
        control: polled each step. "stop": save a checkpoint and end. "kill": end now. It must return at once.
        read: the counts of the rows and their digest, before the model is loaded. May refuse them by raising.
        started: the counts of the run, once, before step 1: rows, cut, dropped, tokens, steps, trainable,
            parameters, precision, …
        counted: these counts again, once rows that are read while they are trained were counted. Returns at once.
    """

    say: Callable[[Event], None] = _nothing
    checkpoint: SaveCheckpoint = _nothing
    control: Callable[[], str | None] = _nothing
    read: Callable[[dict[str, Any]], None] = _nothing
    started: Callable[[dict[str, Any]], None] = _nothing
    counted: Callable[[dict[str, Any]], None] = _nothing


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: optimizer steps done in this call (a resumed run counts from where it went on).
        last_step: optimizer steps done in all.
        metrics: the last loss, the newest evaluation, train_loss (mean over this call), seconds.
        best_step: the checkpoint that is best by the run's own metric; None when the run chose none.
        stopped: True when it was told to stop or to end at once.
        kind: "adapter" or "model", as its checkpoints are.
        base_fingerprint: identifies the base's weights.
    """

    steps: int
    last_step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    stopped: bool = False
    kind: str = "adapter"
    base_fingerprint: str = ""
