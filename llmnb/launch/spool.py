"""The spool: what a run says, on this machine's disk first, then shipped to the database.

One JSON line per event, appended and handed to the operating system at once, so that an event outlives the process
that said it. The thread that trains only appends; a ``Shipper`` thread of its own sends batches to a sink and backs
off while the sink is away. This module knows no database: a sink is any function that takes events.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DatabaseError, LaunchError
from ..events import Event, Metric, Note, from_dict

try:
    import fcntl
except ImportError:  # not on Windows; there nothing stops a second writer
    fcntl = None  # type: ignore[assignment]

__all__ = ["Shipper", "Spool", "read"]

# Events kept in memory for the shipper. Older ones that are safe on disk are read back from there, so that a
# database which is away for a day costs disk, not memory.
_IN_MEMORY = 5_000
_FLOOD = 50  # events in a batch, from where the next may come four times as late


def _plain(value: Any) -> Any:
    """What JSON does not know: numpy and torch scalars by their number, mappings as dicts, the rest as text."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)


_encode = json.JSONEncoder(default=_plain, separators=(",", ":")).encode


@functools.lru_cache  # a run says a handful of sets of names
def _form(names: tuple[str, ...]) -> str:
    values = ",".join([_encode(name).replace("%", "%%") + ":%r" for name in names])
    return f'{{"kind":"metric","seq":%r,"time":%r,"step":%r,"epoch":%r,"values":{{{values}}}}}\n'


def _line(event: Event) -> bytes:
    # Not ``to_dict``: its deep copy costs more than the write. NaN and Infinity are words that ``json`` reads back.
    if type(event) is Metric and (numbers := event.numbers()) is not None:
        # What a run says most, and on the training's thread: a third of the time of ``json``, for the same words.
        return (_form(tuple(event.values)) % numbers).encode()
    return (_encode({"kind": event.kind, **event.__dict__}) + "\n").encode()


class Spool:
    """The numbered events of one run in one file. One writer at a time; any number of readers.

    Args:
        path: the file; made with its folders when it is not there.
        at_least: a number that is known to be taken already (the database's newest), for a file that lost its tail.

    Raises:
        LaunchError: another process writes this file.
    """

    def __init__(self, path: str | Path, *, at_least: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._hold()
        seq, self._good = _scan(self._fd)
        if os.fstat(self._fd).st_size > self._good:
            os.ftruncate(self._fd, self._good)  # a torn last line: it was never numbered for anybody
        self._lock = threading.Lock()
        self._seq = max(seq, at_least)
        self._on_disk = self._seq
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._recent: deque[Event] = deque()
        self._full_since: float | None = None
        self._retry_at = 0.0
        self._mark = (0, 0)  # (number, byte behind it) of the last read from the file
        self.said = threading.Event()

    def _hold(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise LaunchError(
                "Another process writes this run's events.", seen=str(self.path), todo="a run has one worker"
            ) from error

    @property
    def last_seq(self) -> int:
        """The newest number, 0 when nothing was said."""
        return self._seq

    def say(self, event: Event) -> Event:
        """Numbers an event and appends it. Never raises for a full or failing disk: the event is kept in memory.

        Returns:
            The numbered event.
        """
        with self._lock:
            self._seq += 1
            event = event.numbered(self._seq)
            self._recent.append(event)
            if self._waiting:  # ``settle`` tries again, on another thread
                self._waiting.append((event.seq, _line(event)))
            elif not self._append(line := _line(event)):
                self._waiting.append((event.seq, line))
                self._full_since = time.time()
            else:
                self._on_disk = event.seq
            while len(self._recent) > _IN_MEMORY and self._recent[0].seq <= self._on_disk:
                self._recent.popleft()
        if not self.said.is_set():  # the shipper takes only after it has cleared it
            self.said.set()
        return event

    def _append(self, line: bytes) -> bool:
        try:
            written = os.write(self._fd, line)
            if written == len(line):
                self._good += written
                return True
            raise OSError(errno.ENOSPC, "short write")
        except OSError:
            # Half a line may have reached the file; without it the next line starts cleanly.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._good)
            self._retry_at = time.monotonic() + 1.0
            return False

    def _drain(self) -> bool:
        while self._waiting:
            if not self._append(self._waiting[0][1]):
                return False
            self._on_disk = self._waiting.popleft()[0]
        return True

    def settle(self) -> int:
        """Tries again to write what a full disk refused.

        Returns:
            How many events still live in memory only.
        """
        with self._lock:
            waited, since = len(self._waiting), self._full_since
            if waited and time.monotonic() >= self._retry_at and self._drain():
                self._full_since = None
            left = len(self._waiting)
        if waited and not left and since is not None:
            self.say(
                Note(
                    level="warning",
                    text=f"The disk refused this run's events for {time.time() - since:.0f} s; none was lost.",
                    data={"events": waited},
                )
            )
        return left

    def take(self, after: int, limit: int = 500) -> list[Event]:
        """Events numbered above ``after``, oldest first, at most ``limit``: from memory, else from the file."""
        with self._lock:
            if after >= self._seq:
                return []
            if self._recent and self._recent[0].seq <= after + 1:
                start = after + 1 - self._recent[0].seq
                return list(islice(self._recent, start, start + limit))
        return self._from_disk(after, limit)

    def _from_disk(self, after: int, limit: int) -> list[Event]:
        seq, offset = self._mark
        found: list[Event] = []
        with open(self.path, "rb") as file:
            file.seek(offset if seq <= after else 0)
            while len(found) < limit and (line := file.readline()):
                event = _parse(line)
                if event is not None and event.seq > after:
                    found.append(event)
            if found:
                self._mark = (found[-1].seq, file.tell())
        return found

    def forget(self, through: int) -> None:
        """Events up to ``through`` arrived: they need not be kept in memory once they are on disk."""
        with self._lock:
            while self._recent and self._recent[0].seq <= min(through, self._on_disk):
                self._recent.popleft()

    def close(self) -> None:
        """Closes the file. Events that a full disk refused are tried once more."""
        with self._lock:
            if self._fd < 0:
                return
            self._drain()
            os.close(self._fd)
            self._fd = -1


def _scan(fd: int) -> tuple[int, int]:
    """(newest number, length in bytes of the part that consists of whole lines)."""
    seq = good = 0
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        for line in file:
            event = _parse(line)
            if event is None:
                if line.endswith(b"\n"):  # a damaged line inside the file: kept as it is, passed over
                    good += len(line)
                    continue
                break
            good += len(line)
            seq = max(seq, event.seq)
    return seq, good


def _parse(line: bytes) -> Event | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return from_dict(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def _lines(path: Path) -> Iterator[Event]:
    with open(path, "rb") as file:
        for line in file:
            event = _parse(line)
            if event is not None:
                yield event


def read(path: str | Path, after: int = 0) -> list[Event]:
    """The events of a spool file numbered above ``after``; also while it is being written. No file: none."""
    try:
        return [event for event in _lines(Path(path)) if event.seq > after]
    except FileNotFoundError:
        return []


class Shipper:
    """A thread that sends a spool's events to a sink, in order, in batches; more than once when it must.

    Args:
        spool: where the events are.
        sink: takes a batch; must not mind an event it has already. While it raises, the shipper waits and tries again.
        start_after: the newest number that the sink has already.
        every: seconds between batches when events keep coming; up to four times that when they come by the hundred.
        longest: the longest pause between two tries, seconds.
        describe: turns an exception of the sink into a text without secrets.
    """

    def __init__(
        self,
        spool: Spool,
        sink: Callable[[Sequence[Event]], Any],
        *,
        start_after: int = 0,
        every: float = 0.25,
        longest: float = 10.0,
        batch: int = 500,
        describe: Callable[[BaseException], str] = str,
    ) -> None:
        self._spool, self._sink, self._describe = spool, sink, describe
        self._every, self._longest, self._batch = every, longest, batch
        self._shipped = start_after
        self._closing = threading.Event()
        self._hurry = threading.Event()
        self._moved = threading.Condition()
        self._away_since: float | None = None
        self.trouble: str | None = None
        self._thread = threading.Thread(target=self._work, name="llmnb-shipper", daemon=True)
        self._thread.start()

    @property
    def shipped(self) -> int:
        """The newest number that arrived."""
        return self._shipped

    def flush(self, timeout: float = 30.0) -> bool:
        """Waits until everything said so far has arrived.

        Returns:
            False when the time was not enough: the sink is away. The events stay in the spool.
        """
        target, end = self._spool.last_seq, time.monotonic() + timeout
        self._hurry.set()
        self._spool.said.set()
        with self._moved:
            while self._shipped < target and self._thread.is_alive():
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._moved.wait(min(left, 0.5))
        self._hurry.clear()
        return self._shipped >= target

    def close(self, timeout: float = 30.0) -> bool:
        """``flush``, also of what was said meanwhile; then ends the thread."""
        end = time.monotonic() + timeout
        arrived = self.flush(timeout)
        while arrived and self._spool.last_seq > self._shipped:
            arrived = self.flush(end - time.monotonic())
        self._closing.set()
        self._hurry.set()
        self._spool.said.set()
        self._thread.join(5.0)
        return arrived

    def _work(self) -> None:
        pause, every = 0.1, 0.01
        while not self._closing.is_set():
            self._spool.said.wait(1.0)
            self._spool.said.clear()
            self._spool.settle()
            events = self._spool.take(self._shipped, self._batch)
            if not events:
                continue
            if self._send(events):
                pause = 0.1
                if self._spool.last_seq > self._shipped:
                    self._spool.said.set()
                # A run's first words are waited for; of a flood, fewer and larger batches cost the training less.
                every = min(every * 2, self._every * (4 if len(events) > _FLOOD else 1))
                if len(events) < self._batch:  # all of them, when it looked
                    self._hurry.wait(every)
            else:
                self._closing.wait(pause)
                pause = min(pause * 2, self._longest)
                self._spool.said.set()

    def _send(self, events: Sequence[Event]) -> bool:
        try:
            self._sink(events)
        except Exception as error:  # noqa: BLE001 - a border: whatever the sink raises, training goes on
            self.trouble = self._describe(error)
            if _is_poison(error):
                return self._one_by_one(events)
            if self._away_since is None:
                self._away_since = time.time()
            return False
        if self._away_since is not None:
            away, self._away_since = time.time() - self._away_since, None
            if away > 2.0:  # a blip is nobody's concern
                self._spool.say(
                    Note(
                        level="warning",
                        text=f"The database was away for {away:.0f} s; the events of that time came later.",
                        data={"seconds": round(away, 1), "trouble": self.trouble or ""},
                    )
                )
        self.trouble = None
        self._arrived(events[-1].seq)  # last: whoever waits for it must find the note said
        return True

    def _one_by_one(self, events: Sequence[Event]) -> bool:
        """An event that the sink cannot take must not hold up those behind it: a note takes its place."""
        for event in events:
            try:
                self._sink([event])
            except Exception as error:  # noqa: BLE001 - as above
                if not _is_poison(error):
                    return False
                text = f"A {event.kind} event could not be stored: {self._describe(error)[:300]}"
                try:
                    self._sink([Note(seq=event.seq, time=event.time, level="warning", text=text)])
                except Exception as again:  # noqa: BLE001 - as above
                    self.trouble = self._describe(again)
                    return False
            self._arrived(event.seq)
        return True

    def _arrived(self, seq: int) -> None:
        self._spool.forget(seq)
        with self._moved:
            self._shipped = max(self._shipped, seq)
            self._moved.notify_all()


def _is_poison(error: Exception) -> bool:
    """True when the fault lies in an event (a number too large for the database), not in the way there."""
    if isinstance(error, (DatabaseError, OSError)):
        return False
    return isinstance(error, (TypeError, ValueError, OverflowError)) or type(error).__module__.startswith("bson")
