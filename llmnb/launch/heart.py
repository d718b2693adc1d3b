"""The worker's heart: a thread that says "I live", reads the letters from upstream, and keeps the spool settled.

The thread that trains never touches the network for any of this; it reads ``letter``, which is a plain attribute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import DatabaseError

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["Heart", "patiently"]

T = TypeVar("T")
BEAT_S = 2.0


def patiently(ask: Callable[[], T], patience_s: float, trouble: Callable[[str], None] = lambda text: None) -> T:
    """Asks the database; while it is away, asks again with growing pauses.

    Args:
        ask: what to ask.
        patience_s: after so many seconds the database's own error is raised.
        trouble: told once, when the first try fails.
    """
    end, pause = time.monotonic() + patience_s, 0.1
    while True:
        try:
            return ask()
        except DatabaseError as error:
            if time.monotonic() + pause > end:
                raise
            if pause == 0.1:
                trouble(str(error))
        time.sleep(pause)
        pause = min(pause * 2, 5.0)


class Heart:
    """Beats every two seconds until it is stopped.

    Args:
        store: the database.
        run: the run's id.
        attempt: which attempt of it this worker carries out.
        on_letter: called on this thread with "stop" or "kill", once for each.
        each_beat: called on this thread with every beat.

    Attributes:
        letter: what the worker is asked for: None, "stop" or "kill". Also set from outside (a signal).
        superseded: True once another worker carries the run out, in a later attempt: nothing is left to say.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        attempt: int,
        *,
        on_letter: Callable[[str], None],
        each_beat: Callable[[], object] = lambda: None,
        every: float = BEAT_S,
    ) -> None:
        self._store, self._run, self._attempt, self._every = store, run, attempt, every
        self._on_letter, self._each_beat = on_letter, each_beat
        self._told: str | None = None
        self._over = threading.Event()
        self.letter: str | None = None
        self.superseded = False
        self.trouble: str | None = None
        self._thread = threading.Thread(target=self._live, name="llmnb-heart", daemon=True)

    def start(self) -> None:
        """Begins to beat."""
        self._thread.start()

    def ask(self, letter: str) -> None:
        """A letter from this machine: a signal, a key. Safe in a signal handler; "kill" is never taken back."""
        if self.letter != "kill":
            self.letter = letter

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def _live(self) -> None:
        while not self._over.is_set():
            try:
                self._each_beat()
                self._beat()
            except Exception as error:  # noqa: BLE001 - a border: without a heart the run would be called lost
                # The database is away, mostly: the next beat tells it that we lived all the time.
                self.trouble = type(error).__name__
            self._over.wait(self._every)

    def _beat(self) -> None:
        if not self._store.runs.beat(self._run, self._attempt):
            self._find_out()
        letter = self._store.runs.control(self._run, self._attempt)
        if letter:
            self.ask(letter)
        if self.letter and self.letter != self._told:
            self._on_letter(self.letter)
            self._told = self.letter

    def _find_out(self) -> None:
        """The record is in a final state, or gone. "lost" was a mistake: we live. Anything else is an order."""
        before = "stopping" if self._told else "running"
        runs, attempt = self._store.runs, self._attempt
        if not runs.transition(self._run, "lost", before, attempt=attempt, error=None, ended=None):
            self.superseded = not runs.holds(self._run, attempt)
            self.ask("kill")
