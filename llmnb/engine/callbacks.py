"""What happens between steps: the counts before the first one, stop and kill, early stopping.

Knows the Trainer's callback protocol and our hooks, no models and no rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .loop import Loop

__all__ = ["Finished", "Killed", "Patience", "Watch"]

_CODES = {None: 0, "stop": 1, "kill": 2}


class Killed(Exception):
    """The run was told to end at once. Never leaves the engine."""


class Finished(Exception):
    """The checkpoint that the run goes on from is its last step's. Never leaves the engine."""


class Watch(TrainerCallback):
    """Says the counts, and obeys ``hooks.control``.

    Args:
        loop: the run.
        started: called with the Trainer's state before step 1.
        own_logging: choose how often to log: every step of a short run, every tenth of a long one.
    """

    def __init__(self, loop: Loop, started: Callable[[Any], None], own_logging: bool) -> None:
        self.loop = loop
        self.started = started
        self.own_logging = own_logging
        self.stopped = False
        self._asked: torch.Tensor | None = None
        self._work: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.pick_up()
        if self.own_logging:
            state.logging_steps = max(1, min(10, state.max_steps // 50))
        self.started(state)
        if state.global_step >= state.max_steps:
            raise Finished  # Trainer would do one step more
        self._obey(self._ask(), control)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.ending = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loop.ending = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._obey(self._ask(), control)
        if control.should_training_stop and args.logging_strategy != "no":
            control.should_log = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A window of many micro-batches is long; on several ranks only the step's end is a common place.
        if args.world_size == 1 and self.loop.hooks.control() == "kill":
            raise Killed

    on_prediction_step = on_substep_end

    def _obey(self, code: int, control: Any) -> None:
        if code == _CODES["kill"]:
            self.stopped = True
            raise Killed
        if code == _CODES["stop"]:
            self.stopped = True
            control.should_training_stop = True

    def _ask(self) -> int:
        """The order that stands, the same on every rank.

        On several ranks it is read one step late: the sum was sent while the step was computed, so that nobody waits.
        """
        args = self.loop.args
        word = self.loop.hooks.control() if self.loop.is_world_process_zero() else None
        code = _CODES.get(word, 0)
        if args.world_size == 1:
            return code
        last = 0
        if self._work is not None and self._asked is not None:
            self._work.wait()
            last = int(self._asked.item())
        self._asked = torch.tensor(code, device=args.device)
        self._work = torch.distributed.all_reduce(self._asked, op=torch.distributed.ReduceOp.MAX, async_op=True)
        return last


class Patience(TrainerCallback):
    """Ends a run after ``patience`` evaluations in a row that are not better by more than ``threshold``.

    Its count is kept in the checkpoints, so that a resumed run ends where the whole one would have.
    """

    def __init__(self, loop: Loop, patience: int, threshold: float) -> None:
        self.loop = loop
        self.patience = patience
        self.threshold = threshold

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        name = args.metric_for_best_model
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:  # another evaluation set
            return
        memory = self.loop.patience
        best = memory.get("best")
        gain = -math.inf if math.isnan(value) else math.inf if best is None else value - best
        if best is not None and not args.greater_is_better and not math.isnan(value):
            gain = -gain
        if gain > self.threshold:
            memory.update(best=value, waited=0)
        else:
            memory["waited"] = memory.get("waited", 0) + 1
        if memory["waited"] >= self.patience:
            control.should_training_stop = True
