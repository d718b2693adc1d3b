"""Stop, kill and resume, as the buttons of a view press them: each on a thread, and never twice at once.

What can be pressed, and why the rest cannot, is a pure function of what is known about the run. The magics and the
methods of ``Run`` do the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import LlmnbError
from ..series import ENDED, Curve
from .words import error_words, number

__all__ = ["DOING", "Steering", "loses", "reasons"]

DOING = {"stop": "Stopping …", "kill": "Ending …", "resume": "Resuming …"}
# A letter is on its way as long as the run is in one of these.
_UNTIL = {"stop": ("queued", "starting", "running"), "kill": (), "resume": tuple(ENDED)}


def reasons(curve: Curve, record: Mapping[str, Any], *, gone: bool = False) -> dict[str, str]:
    """Why each button cannot be pressed; "" when it can."""
    if gone:
        return dict.fromkeys(DOING, "the run was removed")
    state = curve.state or "queued"
    if state in ENDED:
        over = f"the run has ended ({state})"
        all_done = state == "done" and curve.total and curve.step >= curve.total
        further = "all its steps are done: %llm_resume RUN --num_train_epochs N trains it further"
        return {"stop": over, "kill": over, "resume": further if all_done else ""}
    asked = state == "stopping" or record.get("control") in ("stop", "kill")
    return {
        "stop": "it is stopping already" if asked else "",
        "kill": "it is ending already" if record.get("control") == "kill" else "",
        "resume": "the run goes on",
    }


def loses(curve: Curve) -> str:
    """What a kill loses, for the question before it."""
    if curve.step == 0:
        return "end it before its first step"
    if not curve.checkpoints:
        return f"lose all {number(curve.step)} steps: no checkpoint is saved yet"
    return f"lose what came after step {number(curve.checkpoints[-1].step)}"


class Steering:
    """One view's hands on its run.

    Args:
        run: the handle.
        changed: called on any thread when ``doing`` or ``said`` is another.
        again: called when the run goes on, so that it is watched again.

    Attributes:
        doing: "stop", "kill" or "resume" while it is carried out, else "".
        said: what came of the last one, when a person should know; else "".
    """

    def __init__(self, run: Any, changed: Callable[[], None], again: Callable[[], None]) -> None:
        self._run, self._changed, self._again = run, changed, again
        self._lock = threading.Lock()
        self._busy = False
        self.doing = self.said = ""

    def press(self, what: str) -> None:
        """Does it on a thread; while one is carried out only a kill gets past it."""
        with self._lock:
            if what not in DOING or self.doing == what or (self.doing and what != "kill"):
                return
            self.doing, self.said, self._busy = what, "", True
        self._changed()
        threading.Thread(target=self._carry_out, args=(what,), name=f"llmnb-{what}", daemon=True).start()

    def _carry_out(self, what: str) -> None:
        """The border of a thread: what goes wrong is shown."""
        said = ""
        try:
            if what == "resume":
                self._run.resume(wait=False)
            else:
                getattr(self._run, what)()
        except LlmnbError as error:
            said = error_words(error)
        except Exception as error:  # noqa: BLE001 - the view shows it, and can be used on
            said = f"{type(error).__name__}: {error}"
        with self._lock:
            if self.doing == what:
                self._busy = False
                self.doing, self.said = ("" if said else what), said
        self._changed()
        if what == "resume" or said:
            self._again()

    def saw(self, state: str) -> None:
        """The run is in this state: what was asked for has happened, or not yet."""
        with self._lock:
            if self.doing and not self._busy and state not in _UNTIL[self.doing]:
                if self.doing == "kill" and state not in ENDED:
                    return
                self.doing = ""
