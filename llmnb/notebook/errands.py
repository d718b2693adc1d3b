"""Steps that take longer than a moment, one after another on a thread that ends when there is nothing left to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Errands"]

Step = Callable[[], None]


class Errands:
    """Steps in the order in which they were given.

    Args:
        name: the thread's.
        carry_out: calls a step, and shows what goes wrong in it: nothing may leave it.
    """

    def __init__(self, name: str, carry_out: Callable[[Step], None]) -> None:
        self._name, self._carry_out = name, carry_out
        self._lock = threading.Lock()
        self._waiting: list[Step] = []
        self._thread: threading.Thread | None = None

    def add(self, *steps: Step) -> None:
        """A step that waits already is not added again."""
        with self._lock:
            self._waiting += [step for step in steps if step not in self._waiting]
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def waits(self, step: Step) -> bool:
        """True while a step has not begun."""
        with self._lock:
            return step in self._waiting

    @property
    def idle(self) -> bool:
        """True when everything is done."""
        with self._lock:
            return self._thread is None

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                step = self._waiting.pop(0)
            self._carry_out(step)
