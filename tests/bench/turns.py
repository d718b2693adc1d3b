"""Processes that are compared take turns, so that they meet the same moments of a noisy machine."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence

__all__ = ["in_turns"]

TURN_S = 1.0


def in_turns(alive: Callable[[], Sequence[int]]) -> dict[int, list[tuple[float, float]]]:
    """Lets one process run at a time, for ``TURN_S``, as long as there is more than one; then all of them.

    Args:
        alive: the ids of those that take part still.

    Returns:
        When each one ran, by its id; the turn in which one of the last two ended is left out.
    """
    ran: dict[int, list[tuple[float, float]]] = {}
    for pid in (everyone := alive()):
        os.kill(pid, signal.SIGSTOP)
    while len(alive()) > 1:
        for pid in alive():
            os.kill(pid, signal.SIGCONT)
            began = time.perf_counter()
            time.sleep(TURN_S)
            if len(left := alive()) < 2:
                break
            if pid in left:
                os.kill(pid, signal.SIGSTOP)
                ran.setdefault(pid, []).append((began, time.perf_counter()))
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return ran
