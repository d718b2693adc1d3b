"""The checkpoint picker: checkpoints as rows, and what can be done with them.

The page says ``ready``, ``look``, ``choose``, and what to do: ``chat``, ``evaluate``, ``merge``, ``export``,
``remove``, ``stop``. The picker says ``list`` (rows), ``doing`` (what is being done, what came of the last thing) and,
at each ``ready``, ``all`` of it, so that a page that is loaded again shows what it showed before. It answers a ``look``
at once with what it is doing ``now``: a page that takes something to be done finds out that the kernel never heard of
it. Whatever reads the database or takes longer runs on a thread that ends when nothing is left to do. The widget's
state holds nothing.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import ipywidgets
from IPython.display import DisplayHandle, display

from ..errors import LlmnbError
from . import picker_data, still
from .page import script, style

__all__ = ["Picker", "PickerTable", "PickerView"]


class PickerTable(anywidget.AnyWidget):
    """The widget. Only its ``send`` is used from threads; it has no traits of its own."""

    _esm = script("picker_result.js", "picker.js")
    _css = style("picker.css")


class Picker:
    """One display of checkpoints. All of its state sits under one lock.

    Args:
        session: the shell's.
        database: the connected ``Datalayer``.
        experiment: whose checkpoints; None: all.
        chat: called with names ("base", "EXPERIMENT/STEP") when the person wants to ask them; None: the line that does
            it is shown.
    """

    def __init__(
        self,
        session: Any,
        database: Any,
        experiment: str | None = None,
        chat: Callable[[list[str]], None] | None = None,
    ) -> None:
        self._session, self._database, self._experiment, self.chat = session, database, experiment, chat
        self._lock = threading.RLock()
        self.widget = PickerTable()
        self.widget.on_msg(self._heard)
        self._list: dict[str, Any] = {"rows": None, "more": 0, "trouble": "", "experiment": experiment}
        self._chosen: list[str] = []
        self._filter = ""
        self._busy: dict[str, Any] | None = None
        self._result: dict[str, Any] | None = None
        self._looks = 0  # how many looks are wanted
        self._looker: threading.Thread | None = None
        self._worker: threading.Thread | None = None
        self._process: Any = None
        self._closed = False
        self._kept: DisplayHandle | None = None
        session.pickers.add(self)

    def display(self, around: Any = None) -> None:
        """Puts the picker into the cell's output. Must be called on the thread that runs the cell.

        Args:
            around: a widget that holds the picker's, to be shown in its place.
        """
        display(self.widget if around is None else around)
        self._kept = display(self._keepsake(), raw=True, display_id=True)
        self.refresh()

    def refresh(self) -> None:
        """Looks again, soon; from any thread. For a checkpoint that was saved or removed meanwhile."""
        with self._lock:
            if self._closed:
                return
            self._looks += 1
            if self._looker is None:
                self._looker = threading.Thread(target=self._look, name="llmnb-picker", daemon=True)
                self._looker.start()

    def close(self) -> None:
        """Nothing more will come; a merge that is under way ends. What is shown stays."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.stop()

    # -- the page's side -------------------------------------------------------------------------------------

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        if not isinstance(message, dict):
            return
        kind = message.get("kind")
        with self._lock:
            if kind == "ready":
                self._tell("all", list=self._list, doing=self._doing(), chosen=self._chosen, filter=self._filter)
                self.refresh()
            elif kind == "look":
                self._tell("now", **self._doing())
                self.refresh()
            elif kind == "choose":
                self._chosen = [str(name) for name in message.get("names", ())]
                self._filter = str(message.get("filter") or "")
            elif kind == "stop":
                if self._process is not None:
                    self._process.stop()
            elif kind in _ACTIONS and self._busy is None:
                action, words = _ACTIONS[kind]
                names = [str(name) for name in message.get("names", ())]
                folder = str(message.get("folder") or "")
                self._begin(words.format(names=", ".join(names)), lambda: action(self, names, folder))

    def _tell(self, part: str, /, **content: Any) -> None:
        with self._lock:
            if not self._closed:
                self.widget.send({"kind": part, "content": {**content, "now": time.time()}})

    def _doing(self) -> dict[str, Any]:
        return picker_data.state(self._busy, self._result)

    # -- looking ---------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """On a thread of its own, until nobody wants another look."""
        while True:
            with self._lock:
                if not self._looks or self._closed:
                    self._looker = None
                    return
                self._looks = 0
                before = self._list
            self._look_once(before)

    def _look_once(self, before: Mapping[str, Any]) -> None:
        try:
            rows, more = picker_data.rows(self._database, self._experiment)
            now = {**before, "rows": rows, "more": more, "trouble": ""}
        except LlmnbError as error:
            now = {**before, "trouble": f"The database does not answer; trying again. ({error.what})"}
        except Exception as error:  # noqa: BLE001 - the border of a thread: what went wrong is shown
            now = {**before, "trouble": f"The checkpoints cannot be read: {type(error).__name__}: {error}"}
        with self._lock:
            self._list = now
            if now == before:
                self._tell("same")
                return
            there = {row["name"] for row in now["rows"] or ()}
            self._chosen = [name for name in self._chosen if name in there]
            self._tell("list", **now)
        if self._kept is not None and not now["trouble"]:
            self._kept.update(self._keepsake(), raw=True)

    def _keepsake(self) -> dict[str, str]:
        """What a saved notebook shows of the picker without a kernel."""
        try:
            listed = picker_data.found(self._database, self._experiment)
        except LlmnbError as error:
            text = picker_data.fault(error)
            return {"text/plain": text, "text/html": still.kept(f"<div>{html.escape(text)}</div>")}
        shown = picker_data.table(listed[: picker_data.SHOWN])
        return {"text/plain": repr(shown), "text/html": still.kept(shown._repr_html_())}

    # -- acting ----------------------------------------------------------------------------------------------

    def _begin(self, words: str, work: Callable[[], dict[str, Any] | None]) -> None:
        self._busy, self._result = {"words": words, "now": "", "began": time.time(), "stops": ""}, None
        self._tell("doing", **self._doing())
        self._worker = threading.Thread(target=self._carry_out, args=(work,), name="llmnb-picker-work", daemon=True)
        self._worker.start()

    def _carry_out(self, work: Callable[[], dict[str, Any] | None]) -> None:
        """The border of a thread: what goes wrong is shown, and stays to be read."""
        try:
            result = work()
        except LlmnbError as error:
            result = {"fault": picker_data.fault(error)}
        except Exception as error:  # noqa: BLE001 - as above
            result = {"fault": f"{type(error).__name__}: {error}"}
        with self._lock:
            self._busy, self._result, self._process = None, result, None
            self._tell("doing", **self._doing())
        self.refresh()

    def _chat(self, names: list[str], _folder: str) -> dict[str, Any] | None:
        for name in names:
            if name != "base":
                self._database.named(name)
        if self.chat is None:
            return picker_data.asked(names)
        self.chat(names)
        return None

    def _merge(self, names: list[str], folder: str) -> dict[str, Any]:
        from ..launch.merging import MergeProcess

        process = MergeProcess()
        self._can_stop(process, "Stop merging")
        (name,) = names
        report = self._database.merge(name, _folder_of(folder), say=self._said(), process=process)
        return picker_data.merged(name, folder, report)

    def _can_stop(self, process: Any, words: str) -> None:
        with self._lock:
            self._process = process
            assert self._busy is not None
            self._busy["stops"] = words

    def _evaluate(self, names: list[str], _folder: str) -> dict[str, Any]:
        from ..launch.evaluating import EvaluationProcess

        process = EvaluationProcess()
        self._can_stop(process, "Stop evaluating")
        return picker_data.evaluated(self._database.evaluate(names, say=self._said(), process=process))

    def _said(self) -> Callable[[str], None]:
        def say(words: str) -> None:
            with self._lock:
                if self._busy is not None:
                    self._busy["now"] = words
                    self._tell("doing", **self._doing())

        return say

    def _export(self, names: list[str], folder: str) -> dict[str, Any]:
        (name,) = names
        checkpoint = self._database.named(name)
        self._database.export(checkpoint, _folder_of(folder))
        return picker_data.exported(checkpoint, folder)

    def _remove(self, names: list[str], _folder: str) -> dict[str, Any]:
        for name in names:
            checkpoint = self._database.named(name)
            self._database.remove("checkpoint", checkpoint.experiment, checkpoint.step)
        return {"head": f"Removed {', '.join(names)}.", "lines": []}


class PickerView:
    """A picker of its own, with a chat below it from the moment that somebody is asked.

    Args:
        session: the shell's.
        database: the connected ``Datalayer``.
        experiment: whose checkpoints; None: all.
    """

    def __init__(self, session: Any, database: Any, experiment: str | None = None) -> None:
        self._session, self._database = session, database
        self.picker = Picker(session, database, experiment, self._ask)
        layout = ipywidgets.Layout(overflow="visible", width="100%")
        self.widget = ipywidgets.VBox([self.picker.widget], layout=layout)
        self._chat: Any = None

    def display(self) -> None:
        """Puts it into the cell's output. Must be called on the thread that runs the cell."""
        self.picker.display(self.widget)

    def _ask(self, names: list[str]) -> None:
        """On the picker's thread."""
        if self._chat is not None:
            self._chat.choose(names)
            return
        from .chatbox import ChatBox

        self._chat = ChatBox(self._session, self._database, names)
        self.widget.children = (self.picker.widget, self._chat.widget)


def _folder_of(text: str) -> str:
    from ..errors import ConfigError, Fault

    if not text.strip():
        raise ConfigError([Fault("folder", "is needed", "a new folder, relative to the notebook's or absolute")])
    return text.strip()


_ACTIONS: dict[str, tuple[Callable[[Picker, list[str], str], dict[str, Any] | None], str]] = {
    "chat": (Picker._chat, "Opening the chat"),
    "evaluate": (Picker._evaluate, "Evaluating {names}"),
    "merge": (Picker._merge, "Merging {names}"),
    "export": (Picker._export, "Exporting {names}"),
    "remove": (Picker._remove, "Removing {names}"),
}
