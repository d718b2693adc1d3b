"""The keeper's side of the zygote: one warm process at a time, what it is asked, and what to do when it cannot fork.

Only the standard library is used here, as in ``keeper``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import tickets
from .tickets import Ticket

__all__ = ["Zygotes"]

# A zygote is trusted less each time it fails: first with what earlier runs taught it, then without, then not at all.
_TAUGHT, _PLAIN, _NONE = range(3)


class Zygotes:
    """Starts zygotes and hands runs to them.

    Args:
        home: the home folder.
        wait: where to listen to them.
        began: called with (ticket's folder, process id) when a run's process is there.
        ended: called with (ticket's folder, exit code) when it has ended.
        lost: called with the folders of tickets that were handed to a zygote which fell before it said more.
    """

    def __init__(
        self,
        home: Path,
        wait: selectors.BaseSelector,
        *,
        began: Callable[[Path, int], None],
        ended: Callable[[Path, int], None],
        lost: Callable[[Sequence[Path]], None],
    ) -> None:
        self._home, self._wait = home, wait
        self._began, self._ended, self._lost = began, ended, lost
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._kind = ""
        self._trust: dict[str, int] = {}
        self._asked: set[Path] = set()  # handed over, not begun
        self._others: dict[int, tuple[subprocess.Popen[bytes], Path | None]] = {}  # zygotes that were left; fresh runs

    @property
    def pid(self) -> int | None:
        """The zygote's process id."""
        return self._process.pid if self._process is not None else None

    def carry(self, path: Path, ticket: Ticket, devices: Sequence[str]) -> None:
        """Has a run carried out: by a fork of the zygote, or by a fresh process where none can be trusted."""
        if sys.platform != "linux" or self._trust.get(ticket.kind) == _NONE:
            self._carry_alone(path, ticket, devices)
            return
        if self._process is None or self._kind != ticket.kind:
            self.leave()
            self._start(path, ticket)
        self._asked.add(path)
        assert self._line is not None
        with contextlib.suppress(OSError):  # it died this moment, which is heard next
            self._line.send(json.dumps({"path": str(path), "devices": list(devices)}).encode())

    def leave(self) -> None:
        """Ends the zygote. Its runs go on, as children of the keeper."""
        if self._line is not None:
            self._hang_up()

    def ended(self, pid: int, code: int) -> bool:
        """A child of the keeper has ended. False when it is none of ours."""
        if self._process is not None and pid == self._process.pid:
            self._process.returncode = code
            self._fell()
            return True
        if pid not in self._others:
            return False
        process, path = self._others.pop(pid)
        process.returncode = code
        if path is not None:
            self._ended(path, code)
        return True

    # -- one zygote ------------------------------------------------------------------------------------------

    def _start(self, path: Path, ticket: Ticket) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        taught = [] if self._trust.get(ticket.kind) == _PLAIN else ["taught"]
        command = [ticket.python, "-m", "llmnb.launch.zygote", str(self._home), str(its.fileno()), *taught]
        with its:
            self._process = subprocess.Popen(
                command,
                env=self._environment(path, ticket),
                cwd=tickets.folder(self._home),
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        self._line, self._kind = mine, ticket.kind
        self._wait.register(mine, selectors.EVENT_READ, self._hear)

    @staticmethod
    def _environment(path: Path, ticket: Ticket) -> dict[str, str]:
        own = {name: os.environ[name] for name in (tickets.RUNNER, "PATH") if name in os.environ}
        return {**tickets.environment(path), **own, "PYTHONPATH": ticket.search}

    def _hear(self) -> None:
        assert self._line is not None
        try:
            said = self._line.recv(1 << 16)
        except OSError:
            said = b""
        message = json.loads(said) if said else {}
        if "path" in message:
            self._heard(message)
        else:
            self._fell(message.get("spoiled"))

    def _heard(self, message: Mapping[str, Any]) -> None:
        path = Path(message["path"])
        self._asked.discard(path)
        if "pid" in message:
            self._began(path, message["pid"])
        else:
            self._ended(path, message["status"])

    def _fell(self, spoiled: str | None = None) -> None:
        """It ended, or says that it cannot fork any more."""
        self._hang_up()
        if spoiled:
            print(f"llmnb: {spoiled}", file=sys.stderr, flush=True)
        if spoiled or any(tickets.holder(path) is None for path in self._asked):
            self._trust[self._kind] = min(self._trust.get(self._kind, _TAUGHT) + 1, _NONE)
        asked, self._asked = self._asked, set()
        self._lost(sorted(asked))

    def _hang_up(self) -> None:
        line, process, self._line, self._process = self._line, self._process, None, None
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGKILL)
            self._others[process.pid] = (process, None)
        if line is not None:
            self._wait.unregister(line)
            with line, contextlib.suppress(OSError, ValueError):  # what it said before stays true
                while said := line.recv(1 << 16, socket.MSG_DONTWAIT):
                    if "path" in (message := json.loads(said)):
                        self._heard(message)

    # -- without one -----------------------------------------------------------------------------------------

    def _carry_alone(self, path: Path, ticket: Ticket, devices: Sequence[str]) -> None:
        command = [ticket.python, "-m", "llmnb.launch.zygote", "alone", str(path), ",".join(devices)]
        process = subprocess.Popen(
            command,
            env=self._environment(path, ticket),
            cwd=tickets.folder(self._home),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._others[process.pid] = (process, path)
        self._began(path, process.pid)
