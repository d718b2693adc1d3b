"""The training panel: the page's form on one side, ``panel_data`` on the other.

The page says ``ready``, ``edit``, ``look``, ``load`` and ``start``; the panel says what it knows, one message for each
part, and all of it again at each ``ready``, so that a page that is loaded again shows what it showed before. What takes
longer than a moment runs on a thread that ends when nothing is left to do. The widget's state holds nothing.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Mapping
from typing import Any

import anywidget
from IPython.display import DisplayHandle, display

from .. import form
from ..errors import ConfigError, DatabaseError, LlmnbError
from . import panel_data, still
from .errands import Errands
from .page import script, style
from .tables import short

__all__ = ["Panel", "TrainPanel"]


class TrainPanel(anywidget.AnyWidget):
    """The widget. Only its ``send`` is used from threads; it has no traits of its own."""

    _esm = script("panel_rows.js", "panel.js")
    _css = style("panel.css")


class Panel:
    """One display of the form. All of its state sits under one lock.

    Args:
        session: the shell's; it keeps what was typed for the next panel.
        database: the connected ``Datalayer``.
    """

    def __init__(self, session: Any, database: Any) -> None:
        self._session, self._database = session, database
        self._lock = threading.RLock()
        self.widget = TrainPanel()
        self.widget.on_msg(self._heard)
        self._values: dict[str, Any] = dict(session.typed or panel_data.START)
        self._said = "" if session.typed else panel_data.WELCOME
        self._tab = form.TABS[0]
        self._phase = "editing"
        self._opened = False
        self._told: dict[str, Any] = {"form": panel_data.form_of()}
        self._live: DisplayHandle | None = None
        self._kept: DisplayHandle | None = None
        self._starter: threading.Thread | None = None
        self._errands = Errands("llmnb-panel", self._carry_out)
        self._known: dict[str, tuple[Any, Any]] = {}  # part → (what it was asked for, the answer)

    def display(self) -> None:
        """Puts the panel into the cell's output. Must be called on the thread that runs the cell."""
        self._live = display(self.widget, display_id=True)
        self._kept = display(self._keepsake({}), raw=True, display_id=True)

    # -- the page's side -------------------------------------------------------------------------------------

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        kind = message.get("kind") if isinstance(message, dict) else None
        with self._lock:
            if kind == "ready":
                state = {"values": self._values, "tab": self._tab, "phase": self._phase, "said": self._said}
                self.widget.send({"kind": "all", "content": {**state, "told": self._told}})
                if not self._opened:  # what a person does not wait for comes after what they do
                    self._opened = True
                    self._errands.add(self._look, self._consider)
            elif kind == "edit" and self._phase == "editing":
                self._take(message)
                self._errands.add(self._consider if message.get("done") else self._quickly)
            elif kind == "look":
                self._errands.add(self._look)
            elif kind == "load":
                run = str(message.get("run"))
                self._errands.add(lambda: self._load(run))
            elif kind == "start" and self._phase == "editing":
                self._take(message)
                self._phase = "starting"
                self._tell("phase", phase="starting")
                # Not behind a preview that takes its time.
                self._starter = threading.Thread(target=self._carry_out, args=(self._start,), daemon=True)
                self._starter.start()

    def _take(self, message: Mapping[str, Any]) -> None:
        known = {row.name for row in form.rows()}
        self._values = {k: v for k, v in dict(message["values"]).items() if k in known and isinstance(v, (str, bool))}
        self._tab = str(message.get("tab") or self._tab)
        self._said = str(message.get("said") or self._said)
        self._session.typed = self._values

    def _tell(self, part: str, /, **content: Any) -> None:
        with self._lock:
            self._told[part] = content
            self.widget.send({"kind": part, "content": content})

    # -- what takes longer -----------------------------------------------------------------------------------

    def _carry_out(self, step: Callable[[], None]) -> None:
        """The border of a thread: what goes wrong is shown."""
        try:
            step()
        except LlmnbError as error:
            self._tell("trouble", words=_words(error))
        except Exception as error:  # noqa: BLE001 - the panel shows it, and can be used on
            self._tell("trouble", words=f"{type(error).__name__}: {error}")

    def _look(self) -> None:
        found = panel_data.names(self._database.store)
        with self._lock:
            # Where there is one choice it is made; a person can still make another.
            for row, known in (("model_name_or_path", found["bases"]), ("collection", found["collections"])):
                if len(known) == 1 and not self._values.get(row):
                    self._values[row] = known[0][0]
                    self._tell("values", values=self._values)
        self._tell("names", **found)
        self._session.previews().warm()

    def _quickly(self) -> None:
        """While the person still types."""
        self._check()

    def _check(self) -> panel_data.Checked:
        with self._lock:
            values = dict(self._values)
        collections = [name for name, _ in self._told.get("names", {}).get("collections", [])]
        checked = panel_data.check(values, collections)
        self._tell("checked", **checked.to_page(values))
        self._forecast(checked)
        return checked

    def _consider(self) -> None:
        """Checks, and shows the rows and the model that the choices mean."""
        self._tell("trouble", words="")
        checked = self._check()
        if self._kept is not None and self._phase == "editing":
            self._kept.update(self._keepsake(self._told["checked"]), raw=True)
        with self._lock:
            values = dict(self._values)
        self._answer("fields", values.get("collection"), self._fields)
        self._answer("rows", panel_data.seen(values), self._rows)
        self._forecast(checked)
        self._answer("shape", panel_data.shaped(values), self._shape)
        self._forecast(checked)

    def _answer(self, part: str, question: Any, find: Callable[[Any], Any]) -> None:
        """Finds a part anew when what it depends on has changed, and somebody still wants to know."""
        with self._lock:
            late = self._errands.waits(self._consider) or self._phase != "editing"
            if late or self._known.get(part, (None,))[0] == question:
                return
        try:
            answer = find(question)
        except LlmnbError as error:
            answer = None
            self._tell(part, trouble=_words(error))
            if isinstance(error, DatabaseError):
                return  # it may come back: the next look asks again
        with self._lock:
            self._known[part] = question, answer

    def _fields(self, collection: str | None) -> None:
        found = panel_data.fields(self._database.store, collection) if collection else []
        self._tell("fields", fields=found)

    def _rows(self, question: Mapping[str, Any]) -> Any:
        described = panel_data.described(question) if question.get("collection") else None
        if described is None:
            self._tell("rows", waits="Choose a model and a collection to see rows as the model will.")
            return None
        spec, config = described
        self._tell("rows", waits="Reading rows …")
        documents, found = panel_data.sample(self._database.store, config)
        if not documents:
            self._tell("rows", trouble="No document matches: change the collection or the filter.")
            return None
        answer = {**self._session.previews().rows(spec, config, documents), "all": found}
        self._tell("rows", **answer)
        return answer

    def _shape(self, question: Mapping[str, Any]) -> Any:
        described = panel_data.described(question)
        return self._session.previews().shape(*described) if described else None

    def _forecast(self, checked: panel_data.Checked) -> None:
        if checked.plan is None:
            self._tell("outlook", words="")
            return
        rows, shape = (self._known.get(part, (None, None))[1] for part in ("rows", "shape"))
        config = checked.plan.parcel.config
        self._tell("outlook", words=panel_data.outlook(config, rows["all"] if rows else 0, rows, shape))

    def _load(self, run: str) -> None:
        values, left = panel_data.loaded(self._database.store, run)
        with self._lock:
            self._values = self._session.typed = values
        self._said = f"Settings of {run}." + (f" Not among them, for Python only: {', '.join(left)}." if left else "")
        self._tell("values", values=values, said=self._said)
        self._consider()

    # -- starting --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        run, trouble = None, ""
        try:
            run = self._begin()
        except ConfigError as error:
            at, rest = form.by_row(error.faults)
            self._tell("checked", faults=at, rest=rest)
        except LlmnbError as error:
            trouble = _words(error)
        finally:
            if run is None:
                with self._lock:
                    self._phase = "editing"
                self._tell("phase", phase="editing", trouble=trouble)
        if run is not None:
            self._session.close_previews()
            self._watch(run)

    def _begin(self) -> Any:
        checked = self._check()
        if checked.plan is None:
            raise LlmnbError("The settings have faults.", todo="each is shown on its row")
        return self._database.apply(checked.plan.llm, wait=False)

    def _watch(self, run: Any) -> None:
        """The same place becomes the run's view."""
        from .runview import RunView

        view = RunView(self._session, run)
        view.take_over(self._kept)
        with self._lock:
            self._phase = "running"
        self._tell("live", model=view.widget.model_id, run=run.id)

    def _keepsake(self, checked: Mapping[str, Any]) -> dict[str, str]:
        """What a saved notebook shows of the panel without a kernel: the line that does the same."""
        line = str(checked.get("magic") or "")
        text = "The training panel: run this cell to open it." + (
            f" What was typed, as a line:\n\n{line}" if line else ""
        )
        return {"text/plain": text, "text/html": still.kept(f"<pre>{html.escape(text)}</pre>")}


def _words(error: LlmnbError) -> str:
    """An error in one or two sentences."""
    seen = f" ({short(error.seen, 120)})" if error.seen else ""
    what = error.what.rstrip(".") + seen + "."
    return f"{what} To do: {error.todo}." if error.todo else what
