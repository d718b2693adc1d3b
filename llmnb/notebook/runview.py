"""The run view: the live charts with their controls, and below them what belongs to the run, in one box.

It is what ``%llm_watch``, ``%llm_train --start`` and ``%llm_resume`` show, and what the panel becomes after Start. The
box lives as long as its kernel, also after the run's end. What a saved file shows without a kernel is the still picture
in the output after it, out of sight while the box lives.
"""

from __future__ import annotations

from typing import Any

import ipywidgets
from IPython.display import DisplayHandle, display

from .chatbox import ChatBox
from .live import LiveView
from .picker import Picker

__all__ = ["RunView"]

_AT_ONCE = 0.5  # seconds that a cell waits for the first look, so that a short run is there with the cell


class RunView:
    """One display of one run.

    Args:
        session: the shell's.
        run: the handle.
        others: ids of runs to draw over it.
    """

    def __init__(self, session: Any, run: Any, others: list[str] | None = None) -> None:
        self._session, self._run = session, run
        database = session.database()
        self.chat = ChatBox(session, database, [run.id])
        self.picker = Picker(session, database, run.id, chat=self.chat.choose)
        self.live = LiveView(run, session, saved=self._saved, below=self.chat.said)
        self.chat.kept_by = self.live.keep_again
        parts = [self.live.widget, self.picker.widget, self.chat.widget]
        self.widget = ipywidgets.VBox(parts, layout=ipywidgets.Layout(overflow="visible", width="100%"))
        self.widget.add_class("llmnb-run")
        if others:
            self.live.compare(others)

    def display(self) -> None:
        """Puts the view into the cell's output. Must be called on the thread that runs the cell."""
        self._watch(_AT_ONCE)
        display(self.widget)
        self.live.keep(display(self.live.keepsake, raw=True, display_id=True))

    def take_over(self, kept: DisplayHandle | None) -> None:
        """Lives where another view was displayed, which holds this view's widget in itself from now on."""
        self._watch(_AT_ONCE)
        if kept is not None:
            self.live.keep(kept)

    def _watch(self, wait: float) -> None:
        find_lost = self._session.database().store.runs.find_lost
        self._session.poller().watch(self._run, self.live, find_lost, wait)

    def _saved(self) -> None:
        """On the poller's thread: a checkpoint was saved."""
        self.picker.refresh()
        self.chat.refresh()
