"""The keeper: holds the queue of a runner, answers callers, and sees every run to its end.

One process per home folder, for as long as there is something to keep: a run that goes on, one that waits, or a warm
zygote. It imports nothing but the standard library, so that it is there in a fraction of a second, and it never touches
the database: how a run ended that did not say so itself is recorded by ``burial``, in a process of its own.

What it knows is on disk (``tickets``). When it is killed, its zygote starts another one, which reads the tickets,
watches the runs that go on and starts those that wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tickets
from .tickets import Ticket
from .zygotes import Zygotes

__all__ = ["Keeper", "main"]

# Without a run for so long, the zygote ends and gives about half a gigabyte back, and the keeper with it.
_IDLE_S = 1800.0
_LOOK_EVERY_S = 0.5
_PATIENCE_S = 30.0
_HELD = 75  # a process that was started for a run which another one carries out already (EX_TEMPFAIL)
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h


@dataclass
class Entry:
    """A run that waits or goes on.

    Attributes:
        path: its ticket's folder.
        ticket: what is to be done.
        begun: somebody was told to carry it out.
        pid: who does, 0 until that is known.
        born: when that process began.
        devices: the GPUs it has.
        kills: how many processes had been killed for memory when it began.
        adopted: it was begun by an earlier keeper, so its end is not told and must be looked for.
    """

    path: Path
    ticket: Ticket
    begun: bool = False
    pid: int = 0
    born: str | None = None
    devices: Sequence[str] = ()
    kills: int = 0
    adopted: bool = False


class Keeper:
    """The loop and the queue.

    Args:
        home: the home folder.
        listener: the socket on which callers come.
        idle_s: ends after so many seconds without a run.
    """

    def __init__(self, home: Path, listener: socket.socket, *, idle_s: float = _IDLE_S) -> None:
        self.home, self._idle_s = home, idle_s
        self._wait = selectors.DefaultSelector()
        self._wait.register(listener, selectors.EVENT_READ, lambda: self._caller(listener))
        self._entries: dict[Path, Entry] = {}
        self._zygotes = Zygotes(home, self._wait, began=self._began, ended=self._ended_child, lost=self._again)
        self._undertakers: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
        self._unburied: set[Path] = set()
        self._used = time.monotonic()
        self._end_at: float | None = None
        self._lines: list[socket.socket] = []
        self.told_to_end = False

    # -- the loop --------------------------------------------------------------------------------------------

    def serve(self, wakeup: int) -> None:
        """Until there is nothing to keep. Signals make ``wakeup`` readable."""
        self._wait.register(wakeup, selectors.EVENT_READ, lambda: os.read(wakeup, 512))
        while True:
            self._reap()
            if self.told_to_end and self._end_at is None:
                self._end(_PATIENCE_S)
            self._look()
            if self._is_over():
                break
            for key, _ in self._wait.select(self._pause()):
                key.data()
        self._zygotes.leave()
        for line in self._lines:
            _answer(line, {"ended": True})

    def _pause(self) -> float:
        if self._end_at is not None or any(entry.adopted for entry in self._entries.values()):
            return _LOOK_EVERY_S
        return max(min(self._idle_s, 60.0), 0.1)

    def _is_over(self) -> bool:
        now = time.monotonic()
        if not self._entries and not self._undertakers:
            return self._end_at is not None or now - self._used > self._idle_s
        self._used = now
        if self._end_at is None or now < self._end_at:
            return False
        for entry in self._entries.values():
            _signal(entry, signal.SIGKILL)
        return now > self._end_at + _PATIENCE_S  # those who record it need a moment more than the runs

    def _end(self, patience: float) -> None:
        """Runs that go on are asked to stop with a checkpoint; runs that wait never begin. Then it ends."""
        self._end_at = time.monotonic() + patience
        self._zygotes.leave()
        for entry in list(self._entries.values()):
            self._meet(entry)
            if entry.pid:
                _signal(entry, signal.SIGTERM)
            else:
                self._bury(entry, {"stopped": "the runner was stopped before it began"})

    # -- callers ---------------------------------------------------------------------------------------------

    def _caller(self, listener: socket.socket) -> None:
        line, _ = listener.accept()
        line.settimeout(5.0)
        try:
            with line.makefile("rb") as said:
                question = json.loads(said.readline())
        except (OSError, ValueError):
            line.close()
            return
        if question["do"] == "end":
            self._lines.append(line)
            self._end(float(question["patience"]))
        elif question["do"] == "drop":
            _answer(line, {"dropped": self._drop(question["run"])})
        else:
            self._look()
            _answer(line, self._state())

    def _state(self) -> dict[str, Any]:
        entries = self._entries.values()
        return {
            "keeper": os.getpid(),
            "zygote": self._zygotes.pid,
            "running": {entry.ticket.run: entry.pid for entry in entries if entry.begun},
            "waiting": {entry.ticket.run: self._blocked(entry)[0] for entry in entries if not entry.begun},
        }

    def _drop(self, run: str) -> bool:
        found = [entry for entry in self._entries.values() if entry.ticket.run == run and not entry.begun]
        for entry in found:
            self._forget(entry)
        return bool(found)

    # -- the queue -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Reads new tickets, sees which adopted runs have ended, and begins what can begin."""
        if self._end_at is None:
            buried = {path for _, path in self._undertakers.values()} | self._unburied
            for path, ticket in tickets.listed(self.home):
                if path not in self._entries and path not in buried:
                    self._entries[path] = entry = Entry(path, ticket)
                    self._meet(entry)
                    entry.adopted = entry.begun
        for entry in list(self._entries.values()):
            if entry.adopted and (entry.born is None or tickets.birth(entry.pid) != entry.born):
                self._ended(entry, None)
        if self._end_at is None:
            for entry in list(self._entries.values()):
                if not entry.begun and not self._blocked(entry)[0]:
                    self._begin(entry)

    def _meet(self, entry: Entry) -> None:
        """Finds out who carries it out."""
        held = tickets.holder(entry.path)
        if held is not None:
            entry.begun, entry.pid, entry.born = True, int(held["pid"]), held["born"]
            entry.devices, entry.kills = held["devices"], int(held["kills"])

    def _blocked(self, entry: Entry) -> tuple[list[str], list[str]]:
        others = list(self._entries.values())
        running = {other.ticket.run: (other.ticket, other.devices) for other in others if other.begun}
        ahead = [other.ticket for other in others[: others.index(entry)] if not other.begun]
        return tickets.waits_for(entry.ticket, running, ahead)

    def _begin(self, entry: Entry) -> None:
        entry.devices, entry.kills = self._blocked(entry)[1], tickets.memory_kills()
        entry.begun, entry.pid, entry.born = True, 0, None
        self._zygotes.carry(entry.path, entry.ticket, entry.devices)

    def _began(self, path: Path, pid: int) -> None:
        if path in self._entries:
            self._entries[path].pid = pid
            self._entries[path].born = tickets.birth(pid)

    def _again(self, paths: Sequence[Path]) -> None:
        """The zygote fell while it had these: those that nobody carries out begin again."""
        for path in paths:
            if path in self._entries:
                self._entries[path].begun = False
                self._meet(self._entries[path])

    # -- the end of a run ------------------------------------------------------------------------------------

    def _ended_child(self, path: Path, status: int) -> None:
        if path in self._entries:
            self._ended(self._entries[path], status)

    def _ended(self, entry: Entry, status: int | None) -> None:
        """A run's process is gone. ``status``: its exit code, -N for signal N, None when nobody could see it."""
        if status == _HELD:
            self._meet(entry)
            entry.adopted = True
        elif status == 0:
            self._forget(entry)
        else:
            killed = status in (None, -signal.SIGKILL) and tickets.memory_kills() > entry.kills
            asked = status == -signal.SIGTERM and self._end_at is not None
            stopped = "the runner was stopped" if asked else None
            self._bury(entry, {"status": status, "memory": killed, "stopped": stopped})

    def _bury(self, entry: Entry, cause: Mapping[str, Any]) -> None:
        ticket = entry.ticket
        command = [ticket.python, "-m", "llmnb.launch.burial", str(entry.path), json.dumps(cause)]
        env = {**os.environ, "PYTHONPATH": ticket.search}
        undertaker = subprocess.Popen(command, env=env, cwd=tickets.folder(self.home), stdin=subprocess.DEVNULL)
        self._undertakers[undertaker.pid] = (undertaker, entry.path)
        del self._entries[entry.path]

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.path]
        tickets.remove(entry.path)

    def _reap(self) -> None:
        """Children that ended: undertakers, zygotes, and runs that a zygote left behind."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid in self._undertakers:
                undertaker, path = self._undertakers.pop(pid)
                undertaker.returncode = code
                if code == 0:
                    tickets.remove(path)
                else:  # the next keeper tries again
                    self._unburied.add(path)
            elif not self._zygotes.ended(pid, code):
                for entry in [entry for entry in self._entries.values() if entry.pid == pid]:
                    self._ended(entry, code)


def _answer(line: socket.socket, answer: Mapping[str, Any]) -> None:
    with line, contextlib.suppress(OSError):
        line.sendall(json.dumps(answer).encode() + b"\n")


def _signal(entry: Entry, number: int) -> None:
    if entry.pid and entry.born is not None and tickets.birth(entry.pid) == entry.born:
        with contextlib.suppress(OSError):
            os.kill(entry.pid, number)


# --- the process ----------------------------------------------------------------------------------------------


def main() -> int:
    """``python -m llmnb.launch.keeper HOME SOCKET``. Says "ready" when it listens, and goes on in the background."""
    home, path = Path(sys.argv[1]), Path(sys.argv[2])
    lock = open(tickets.folder(home) / "lock", "w", encoding="ascii")  # noqa: SIM115 - held while the process lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print("another one is there")
        return 0
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(64)
    print("ready", flush=True)
    if os.fork():  # whoever started it waits for this process, and gets no child to care for
        os._exit(0)
    out = os.open(os.devnull, os.O_RDWR)
    os.dup2(out, 1)
    _keep(home, listener)
    path.unlink(missing_ok=True)
    if path.parent != tickets.folder(home):
        path.parent.rmdir()
    return 0


def _keep(home: Path, listener: socket.socket) -> None:
    if sys.platform == "linux":  # runs whose zygote is killed become children of the keeper
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    tickets.tidy(home)
    read, write = os.pipe()
    os.set_blocking(write, False)
    keeper = Keeper(home, listener, idle_s=float(os.environ.get("LLMNB_RUNNER_IDLE_S", _IDLE_S)))
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: setattr(keeper, "told_to_end", True))
    keeper.serve(read)


if __name__ == "__main__":
    sys.exit(main())
