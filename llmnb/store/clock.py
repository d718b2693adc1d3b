"""The database's time, so that heartbeats of several machines compare although their clocks differ."""

from __future__ import annotations

import datetime as dt
from typing import Any

__all__ = ["Clock"]


class Clock:
    """UTC as the server has it, in whole milliseconds (what MongoDB keeps).

    Args:
        server_time: the server's time at this moment; None when the database lives in this process.
    """

    def __init__(self, server_time: Any = None) -> None:
        self._ahead = dt.timedelta(0)
        if isinstance(server_time, dt.datetime):
            if server_time.tzinfo is None:
                server_time = server_time.replace(tzinfo=dt.timezone.utc)
            ahead = server_time - dt.datetime.now(dt.timezone.utc)
            # Less than that is the time the answer took to come.
            if abs(ahead) > dt.timedelta(seconds=1):
                self._ahead = ahead

    def now(self) -> dt.datetime:
        """The time, with its time zone."""
        moment = dt.datetime.now(dt.timezone.utc) + self._ahead
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
