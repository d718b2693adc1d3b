"""The runner: who carries out background runs on this machine. This is its caller's side.

A runner is a few processes, detached, one set per home folder. The **keeper** (``keeper``) holds the queue and answers
here; it uses the standard library only, so that it is there at once. The **zygote** (``zygote``) has imported torch
and everything else that a run needs, and forks a child for each run. The child takes the environment, the folder and
the import path of whoever applied, and trains. Its memory comes back with its end, and nothing is imported twice. A
child that ends without a word is buried (``burial``): its run is recorded as what it is. The queue is files
(``tickets``), so it survives the keeper.

Where processes cannot be forked safely (not Linux) the keeper starts each run as a fresh process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from ..errors import LaunchError
from ..job import TrainJob
from . import cluster, machine, tickets
from .layout import spread
from .parcel import environment, import_paths, pack
from .tickets import Ticket

try:
    import fcntl
except ImportError:  # Windows has no Unix sockets either
    fcntl = None  # type: ignore[assignment]

__all__ = ["forgot", "status", "stop", "submit", "take_back"]

_ANSWER_LIMIT_S = 20.0
_HANDING_OVER_S = 60.0
# A socket's path may not be longer than 107 bytes.
_LONGEST_PATH = 100

# What libraries read while they are imported, or while Python starts. A token is no setting: it is read when used.
_READ_AT_IMPORT = (
    "ACCELERATE_ BITSANDBYTES_ BNB_ CUDA_ DS_ GOMP_ HF_ HUGGINGFACE_ KMP_ LANG LC_ LD_ MALLOC_ MKL_ NUMEXPR_ NVIDIA_ "
    "OMP_ OPENBLAS_ PYTHON PYTORCH_ TORCH TRANSFORMERS_ USE_ XDG_"
)
_PREFIXES = tuple(_READ_AT_IMPORT.split())
_TOKENS = frozenset({"HF_TOKEN"})


def submit(job: TrainJob, home: Path) -> list[str]:
    """Hands a job over; the runner is started when it does not run.

    Args:
        job: what to do. It is written to files that only this user reads, and that its one reader removes.
        home: the home folder; one runner for each.

    Returns:
        Ids of the runs whose end it waits for, none when it begins at once.

    Raises:
        LaunchError: the runner does not start.
    """
    cpu = bool(job.config.arguments.get("use_cpu"))
    devices = [] if cpu else machine.devices()
    ticket = Ticket(
        run=job.run,
        attempt=job.attempt,
        workdir=job.workdir,
        python=sys.executable,
        search=os.pathsep.join(import_paths()),
        paths=[os.path.abspath(path or os.getcwd()) for path in sys.path],
        cwd=os.getcwd(),
        kind=_kind(environment()),
        devices=devices,
        whole=spread(job),
        hides=bool(devices) or cpu or "CUDA_VISIBLE_DEVICES" in os.environ,
        uri=job.uri,
        artifacts=job.artifacts,
    )
    tickets.put(home, ticket, lambda folder: pack(job, folder, home))
    waiting: Mapping[str, list[str]] = _told(home, {"do": "look"})["waiting"]
    return list(waiting.get(job.run, ()))


def status(home: str | Path) -> dict[str, Any] | None:
    """What the runner of ``home`` does; None when there is none.

    Returns:
        ``{"keeper": pid, "zygote": pid or None, "running": {run: pid}, "waiting": {run: [runs it waits for]}}``
    """
    return _ask(Path(home).expanduser().absolute(), {"do": "status"}, 5.0)


def forgot(record: Mapping[str, Any]) -> bool:
    """True when nobody will begin a queued run, although its record names a runner of this machine.

    A runner that is gone while runs wait is started again.
    """
    home = _place(record)
    if home is None:
        return False
    if any(ticket.run == record["_id"] for _, ticket in tickets.listed(home)):
        if _ask(home, {"do": "status"}, 5.0) is None:
            _told(home, {"do": "look"})
        return False
    # Whoever applied may be about to hand it over.
    return machine.gone(record.get("starter") or {}) or time.time() - float(record["runner"]["since"]) > _HANDING_OVER_S


def _place(record: Mapping[str, Any]) -> Path | None:
    """The home of the runner that has a run, when it is on this machine."""
    place = record.get("runner") or {}
    here = place.get("host") == socket.gethostname() and not record.get("ray_address")
    return Path(place["home"]) if here else None


def take_back(record: Mapping[str, Any]) -> bool:
    """Takes a run that has not begun out of the queue of the runner that its record names.

    Returns:
        False when it is not there, or has begun, or the runner is not on this machine.
    """
    home, run = _place(record), str(record["_id"])
    if home is None:
        return False
    answer = _ask(home, {"do": "drop", "run": run}, _ANSWER_LIMIT_S)
    if answer is not None:
        return bool(answer["dropped"])
    for path, ticket in tickets.listed(home):  # nobody there who could begin it meanwhile
        if ticket.run == run and tickets.holder(path) is None:
            tickets.remove(path)
            return True
    return False


def stop(home: str | Path, *, patience: float = 30.0) -> bool:
    """Ends the runner of ``home``, and the Ray cluster that its runs used.

    Runs that go on save a checkpoint first; they get ``patience`` seconds for it. Runs that wait are recorded as
    stopped.

    Returns:
        False when there was neither.
    """
    home = Path(home).expanduser().absolute()
    answered = _ask(home, {"do": "end", "patience": patience}, patience + _ANSWER_LIMIT_S) is not None
    left = _marked(home)
    for process in left:  # a keeper that does not answer, or that was killed
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5.0)
    return cluster.stop(home) or answered or bool(left)


def _marked(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(tickets.RUNNER) == _mark(home):
                found.append(process)
    return found


# --- which runs may share what was imported --------------------------------------------------------------------


def _kind(env: Mapping[str, str]) -> str:
    settings = {name: value for name, value in env.items() if name.startswith(_PREFIXES) and name not in _TOKENS}
    package = Path(__file__).resolve().parents[1]
    ours = max(path.stat().st_mtime_ns for path in package.rglob("*.py"))
    installed = [os.stat(path).st_mtime_ns for path in site.getsitepackages() if os.path.isdir(path)]
    facts = [sys.executable, sys.version, import_paths(), str(package), ours, installed, sorted(settings.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# --- speaking with the keeper ----------------------------------------------------------------------------------


def _mark(home: Path) -> str:
    return hashlib.sha256(f"{home}:{os.getuid() if hasattr(os, 'getuid') else 0}".encode()).hexdigest()[:12]


def socket_path(home: Path) -> Path:
    """Where the keeper listens: in the home folder, or in a folder with a short path when that one's is too long."""
    path = home / "runner" / "socket"
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return path
    # Not wherever TMPDIR says: every caller must find the same one.
    root = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    return Path(root) / f"llmnb-{_mark(home)}" / "socket"


def _ask(home: Path, question: Mapping[str, Any], limit_s: float) -> dict[str, Any] | None:
    """The keeper's answer; None when there is no keeper."""
    if not hasattr(socket, "AF_UNIX") or not (home / "runner").is_dir():
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(limit_s)
        try:
            line.connect(str(socket_path(home)))
            line.sendall(json.dumps(question).encode() + b"\n")
            with line.makefile("rb") as answer:
                said = answer.readline()
        except OSError:
            return None
    return dict(json.loads(said)) if said else None


def _told(home: Path, question: Mapping[str, Any]) -> dict[str, Any]:
    """The keeper's answer; it is started when there is none."""
    end = time.monotonic() + _ANSWER_LIMIT_S
    while (answer := _ask(home, question, _ANSWER_LIMIT_S)) is None:
        if time.monotonic() > end:
            raise LaunchError("The runner does not answer.", seen=str(home), todo="llmnb ray stop, then try again")
        with _starting(home):
            if _ask(home, {"do": "status"}, 5.0) is None:
                _start(home)
    return answer


@contextlib.contextmanager
def _starting(home: Path) -> Iterator[None]:
    with open(tickets.folder(home) / "start.lock", "w", encoding="ascii") as file:
        if fcntl is None:
            raise LaunchError("Background runs need Linux or macOS.", todo="leave out wait=False and on_ray")
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(home: Path) -> None:
    """Starts a keeper, and waits until it listens."""
    log, place = tickets.folder(home) / "keeper.log", socket_path(home).parent
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise LaunchError(
            "The runner's folder belongs to somebody else.", seen=str(place), todo="use a shorter path for LLMNB_HOME"
        )
    env = environment() | {tickets.RUNNER: _mark(home), "PYTHONPATH": os.pathsep.join(import_paths())}
    with open(log, "ab") as out:
        os.chmod(log, 0o600)
        keeper = subprocess.Popen(
            [sys.executable, "-m", "llmnb.launch.keeper", str(home), str(socket_path(home))],
            env=env,
            cwd=tickets.folder(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            start_new_session=True,
            umask=0o077,
        )
    ready, _ = keeper.communicate()  # at once: what stays is its child
    if not ready:
        seen = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise LaunchError("The runner does not start.", seen=seen, todo=f"see {log}")
