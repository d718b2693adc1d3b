"""Tickets: what the runner knows about a run, as files that outlive every process that reads them.

Each run that waits or goes on has a folder in the home folder's ``runner``, for this user only. Folders sort by the
order in which runs were applied. In each lie ``ticket`` (what is to be done), the parcel and the environment of whoever
applied (until the run takes them) and ``holder`` (which process carries it out, once one does). The runner's memory is
these files: a runner that was killed is replaced by one that reads them.

Only the standard library is used here: the keeper must start at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RUNNER", "Ticket", "birth", "folder", "hold", "holder", "listed", "put", "read", "remove", "waits_for"]

# In the environment of every process of a runner: its home's mark.
RUNNER = "LLMNB_RUNNER"
PARCEL = "job.pickle"
_OLD_DRAFT_S = 60.0


@dataclass(frozen=True)
class Ticket:
    """A run that is to be carried out on this machine.

    Attributes:
        run: its id.
        attempt: which attempt at it this is.
        workdir: the run's own folder.
        python: which Python carries it out.
        search: PYTHONPATH for it.
        paths: ``sys.path`` of whoever applied.
        cwd: the folder that they were in.
        kind: digest of everything that imports depend on; runs of one kind can share what was imported.
        devices: the GPUs it may use; none for the CPU.
        whole: it takes all of them, not one.
        hides: True when GPUs that it is not given must be hidden from it.
        uri, artifacts: the database, for whoever has to record how the run ended; hidden from repr.
    """

    run: str
    workdir: str
    python: str
    search: str
    paths: Sequence[str]
    cwd: str
    kind: str
    attempt: int = 1
    devices: Sequence[str] = ()
    whole: bool = False
    hides: bool = False
    uri: str | None = field(default=None, repr=False)
    artifacts: str | None = field(default=None, repr=False)


def folder(home: Path) -> Path:
    """Where the runner of ``home`` keeps its files; made when it is not there."""
    path = home / "runner"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def put(home: Path, ticket: Ticket, fill: Callable[[Path], object]) -> Path:
    """Puts a ticket at the end of the queue, in one step.

    Args:
        home: the home folder.
        ticket: the ticket.
        fill: writes the parcel and the environment into the folder that it is given.
    """
    name = f"{time.time_ns():020d}-{ticket.run}"
    draft = folder(home) / f".{name}"
    draft.mkdir(mode=0o700)
    fill(draft)
    _write(draft / "ticket", json.dumps(asdict(ticket)))
    return draft.rename(draft.with_name(name))


def read(path: Path) -> Ticket:
    """The ticket in a folder."""
    return Ticket(**json.loads((path / "ticket").read_text(encoding="utf-8")))


def environment(path: Path) -> dict[str, str]:
    """The environment of whoever applied; empty when the run took it already."""
    try:
        return dict(json.loads((path / PARCEL).with_suffix(".env").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def listed(home: Path) -> list[tuple[Path, Ticket]]:
    """All tickets with their folders, in the order in which the runs were applied."""
    found = []
    for file in sorted((home / "runner").glob("[0-9]*/ticket")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # removed meanwhile; or another version's
            found.append((file.parent, read(file.parent)))
    return found


def hold(path: Path, devices: Sequence[str]) -> bool:
    """Says that this process carries the ticket's run out. False: another one does already."""
    me = {"pid": os.getpid(), "born": birth(os.getpid()), "devices": list(devices), "kills": memory_kills()}
    try:
        handle = os.open(path / "holder", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(me))
    return True


def holder(path: Path) -> dict[str, Any] | None:
    """Who carries the ticket's run out: ``pid``, ``born``, ``devices``, ``kills``. None: nobody has begun."""
    try:
        return dict(json.loads((path / "holder").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # it is being written, or its writer died at that
        return {"pid": 0, "born": None, "devices": [], "kills": 0}


def remove(path: Path) -> None:
    """The run is over, or taken back: its ticket and all that lies beside it go."""
    shutil.rmtree(path, ignore_errors=True)


def tidy(home: Path) -> None:
    """Removes tickets whose writer died while it wrote them."""
    for draft in folder(home).glob(".[0-9]*"):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > _OLD_DRAFT_S:
                shutil.rmtree(draft, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def memory_kills() -> int:
    """How many processes the system has killed since it started because memory ran out; 0 where it does not say."""
    total = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                total += int(count) if name == "oom_kill" else 0
    return total


def birth(pid: int) -> str | None:
    """When a process began, as its system says it; None when it has ended."""
    if sys.platform != "linux":
        return _birth_by_psutil(pid)
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]


def _birth_by_psutil(pid: int) -> str | None:
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.1f}"
    return None


def waits_for(
    ticket: Ticket, running: Mapping[str, tuple[Ticket, Sequence[str]]], ahead: Sequence[Ticket]
) -> tuple[list[str], list[str]]:
    """Whose end a run waits for, and the GPUs it takes when there is nobody.

    On the CPU one run at a time has the machine. A run on one GPU takes one that is free, a run on several workers
    takes the machine's GPUs alone. Runs on the CPU and runs on GPUs do not wait for each other.

    Args:
        ticket: the run.
        running: id → (ticket, GPUs that it took), of those that go on.
        ahead: those that wait in front of it.
    """
    rivals = [other for other, _ in running.values() if bool(other.devices) == bool(ticket.devices)]
    before = [other for other in ahead if bool(other.devices) == bool(ticket.devices)]
    if ticket.devices and not ticket.whole and not before and not any(other.whole for other in rivals):
        taken = {device for _, devices in running.values() for device in devices}
        free = [device for device in ticket.devices if device not in taken]
        if free:
            return [], free[:1]
    blocking = [other.run for other in (*rivals, *before)]
    return blocking, ([] if blocking else list(ticket.devices))
