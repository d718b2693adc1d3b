"""What became of documents that are read while they are trained: said when an epoch, or the run, ends.

Knows the Trainer's callback protocol, counts and our hooks; no documents.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..events import Note
from .callbacks import Killed
from .counts import Counts

if TYPE_CHECKING:
    from .loop import Loop
    from .streaming import Streamed

__all__ = ["Tally"]


class Tally(TrainerCallback):
    """Adds up what all ranks counted, and says it once; again only when a later epoch lost more documents.

    Args:
        loop: the run.
        stream: its training rows.
        counts: of the run; what was counted is put into it.
    """

    def __init__(self, loop: Loop, stream: Streamed, counts: dict[str, Any]) -> None:
        self.loop, self.stream, self.counts = loop, stream, counts
        self._dropped = -1
        self._warned = False
        if loop.args.world_size == 1:  # on several ranks only a step's end is a common place
            stream.look = self._look

    def _look(self) -> None:
        if self.loop.hooks.control() == "kill":
            raise Killed

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._warned or not self.loop.is_world_process_zero():
            return
        refusal = self.stream.refusal()
        if refusal is not None:
            self._warned = True
            text = f"Of what was read by now: {refusal.what} The run goes on; {refusal.todo}."
            self.loop.hooks.say(Note(level="warning", text=text, data={"rows": "train", "seen": refusal.seen}))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = self._of_all()
        report = counts.report(self.stream.reader, ())
        if report.dropped <= self._dropped:
            return
        first, self._dropped = self._dropped < 0, report.dropped
        if first:
            self.counts.update(report.numbers(), found=len(self.stream), read=report.found)
            self.loop.hooks.counted(dict(self.counts))
        level = "warning" if report.cut or report.dropped else "info"
        head = f"Of {report.found:,} documents read by the end of epoch {math.ceil(state.epoch or 1)}"
        for note in report.notes or (f"{report.tokens:,} tokens, {report.trained_tokens:,} of them trained",):
            self.loop.hooks.say(Note(level=level, text=f"{head}: {note}", data={"rows": "train"}))

    def _of_all(self) -> Counts:
        own = self.stream.counted()
        if self.loop.args.world_size == 1:
            return own
        found: list[Any] = [None] * self.loop.args.world_size
        torch.distributed.all_gather_object(found, own)
        total, *others = found
        for other in others:
            total.take_in(other)
        return total  # type: ignore[no-any-return]
