"""This machine's own Ray cluster, for runs on several workers: started on first need, reused, stopped by us alone.

The cluster is a detached head on loopback, bounded to this machine's CPUs and memory, with Ray's token
authentication on and a token of its own in our home folder. It is found again through a small file beside the token.
Every process of it carries a mark in its environment and belongs to a session of its own, so that ``stop`` ends these
processes and no others (``ray stop`` would end every cluster of this machine).

Ray itself is imported only in the cluster's processes: a notebook's kernel that starts and submits does not load it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from ..errors import LaunchError, MissingPackage
from . import machine
from .layout import SLOT

try:
    import fcntl
except ImportError:  # Windows: two starters at the same moment are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["Cluster", "MARK", "ensure", "enter", "listening", "status", "stop"]

MARK = "LLMNB_RAY_CLUSTER"
_START_LIMIT_S = 180.0
_ANSWER_LIMIT_S = 60.0
# Ray's sockets live under this folder, and a socket's path may not be longer than 107 bytes.
_LONGEST_TEMP = 40
_MIB = 1 << 20
# As where Ray's client extra is not installed: nobody comes to this head by ray://, and that server imports for as long
# as the two agents that the head waits for, beside them.
_START = "import sys; sys.modules['grpc'] = None; from ray.scripts.scripts import main; sys.exit(main())"


@dataclass(frozen=True)
class Cluster:
    """A running cluster of ours.

    Attributes:
        mark: what its processes carry in their environment.
        address: host:port for ``ray.init``.
        temp_dir: where Ray keeps sockets and logs.
        pids: process id → start time of the parts that must live: gcs_server, raylet.
        home: the folder with the token and this description.
    """

    mark: str
    address: str
    temp_dir: str
    pids: Mapping[str, float]
    home: str

    @property
    def token_file(self) -> Path:
        """The file with the token, mode 0600."""
        return Path(self.home) / "ray-token"

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to speak with the cluster."""
        return {"RAY_ADDRESS": self.address, **_speaking(self.token_file)}


def ensure(home: str | Path) -> Cluster:
    """The cluster of ``home``, started when it does not run. Two callers at once get the same one.

    Raises:
        MissingPackage: Ray is not installed.
        LaunchError: it does not start; the end of its log is shown.
    """
    if find_spec("ray") is None:
        raise MissingPackage("ray", "ray", "Training on several workers")
    home = _folder(home)
    with _locked(home):
        found = _find(home)
        # While it lives, runs may be on it: one that is only slow must never be ended for a new one.
        if found is not None and _until_it_answers(found):
            return found
        _end_marked(_mark(home))  # what a crash left behind
        return _start(home)


def enter(home: str | Path) -> Cluster:
    """Makes this process one that ``ray.init()`` joins to the cluster of ``home``; raises as ``ensure``."""
    found = ensure(home)
    os.environ.update(found.environment())
    return found


def before_ray(home: str | Path) -> None:
    """Sets what Ray reads while it is imported, in a process that may ``enter`` later: a parcel may import Ray."""
    os.environ.update(_speaking(Path(home) / "ray-token"))


def status(home: str | Path) -> Cluster | None:
    """The running cluster of ``home``, or None."""
    return _find(Path(home).expanduser().absolute())


def stop(home: str | Path) -> bool:
    """Ends the cluster of ``home`` and nothing else. Runs whose workers are on it end with it: stop the runner first.

    Returns:
        False when there was none.
    """
    home = Path(home).expanduser().absolute()
    if not home.is_dir():
        return False
    with _locked(home):
        described = _read(home)
        ended = _end_marked(_mark(home))
        (home / "ray.json").unlink(missing_ok=True)
        if described is not None:
            shutil.rmtree(described.temp_dir, ignore_errors=True)
        return ended > 0


def listening(home: str | Path) -> list[tuple[str, str, int]]:
    """(process name, IP, port) of everything that the cluster listens on."""
    found = []
    for process in _marked(_mark(_folder(home))):
        with contextlib.suppress(psutil.Error):
            # ``connections`` until psutil 6, ``net_connections`` from there.
            ask = getattr(process, "net_connections", None) or process.connections
            for connection in ask(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
    return found


# --- finding --------------------------------------------------------------------------------------------------


def _folder(home: str | Path) -> Path:
    path = Path(home).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def _mark(home: Path) -> str:
    return hashlib.sha256(f"{home}:{os.getuid() if hasattr(os, 'getuid') else 0}".encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    with open(home / "ray.lock", "w", encoding="ascii") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(home: Path) -> Cluster | None:
    try:
        return Cluster(**json.loads((home / "ray.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _find(home: Path) -> Cluster | None:
    found = _read(home)
    return found if found is not None and _lives(found) and found.token_file.exists() else None


def _lives(found: Cluster) -> bool:
    return all(_alive(int(pid), born) for pid, born in found.pids.items())


def _until_it_answers(found: Cluster) -> bool:
    """False: it ended meanwhile; a head that was told to end closes its port first, and its process some time after."""
    end = time.monotonic() + _ANSWER_LIMIT_S
    while not _answers(found):
        if not _lives(found):
            return False
        if time.monotonic() > end:
            raise LaunchError(
                "This machine's Ray cluster does not answer.",
                seen=found.address,
                todo=f"see {found.temp_dir}/session_latest/logs; `llmnb ray stop` ends the cluster with all runs on it",
            )
        time.sleep(0.2)
    return True


def _answers(found: Cluster) -> bool:
    host, _, port = found.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def _alive(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _marked(mark: str, name: str = MARK) -> list[psutil.Process]:
    """Every process of the cluster. Ray writes the title of its agents and workers (``ray::…``) over their environment:
    these are told by their session, which is that of the cluster's other processes and never the caller's."""
    found, titled, sessions = [], [], set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid():
                continue
            if process.environ().get(name) == mark:
                found.append(process)
                sessions.add(_session(process.pid))
            elif "".join(process.cmdline()[:1]).startswith("ray::"):  # a process that ends has no words
                titled.append((process, _session(process.pid)))
    sessions.discard(_session(0))
    return found + [process for process, session in titled if session in sessions]


def _session(pid: int) -> int:
    return os.getsid(pid) if hasattr(os, "getsid") else 0


# --- starting -------------------------------------------------------------------------------------------------


def _start(home: Path) -> Cluster:
    mark = _mark(home)
    token = home / "ray-token"
    _private(token, secrets.token_hex(32))
    log = home / "ray-start.log"
    temp = _temp_dir(mark)
    seen = ""
    # A port that was free may be taken a moment later; and on a very busy machine Ray's agents import for longer than
    # the 15 s that its raylet waits for them (Ray 2.60, ray#65983; ports given by us do not spare all of that wait).
    for _ in range(6):
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(mode=0o700)
        command = [sys.executable, "-c", _START, "start", "--head", *_options(temp)]
        command += [f"--dashboard-agent-listen-port={_free_ports(1)[0]}"]
        with open(log, "wb") as out:
            os.chmod(log, 0o600)
            code = subprocess.run(
                command,
                env=_environment(mark, token),
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
                timeout=_START_LIMIT_S,
                check=False,
            ).returncode
        if code == 0:
            return _describe(home, mark, temp)
        _end_marked(mark)
        seen = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        if "port" not in seen.lower() and "timed out during startup" not in seen:
            break
    raise LaunchError("This machine's Ray cluster does not start.", seen=seen, todo=f"see {log}")


def _options(temp: Path) -> list[str]:
    free = machine.memory_free()
    return [
        "--port=0",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",  # nobody asks its Jobs API; it takes longer to start than all the rest
        "--include-log-monitor=false",  # 100 MB to copy log lines to drivers; ours write their own files
        "--no-monitor",  # 100 MB to ask for more machines
        "--disable-usage-stats",
        f"--temp-dir={temp}",
        f"--num-cpus={machine.cpus()}",
        f"--resources={json.dumps({SLOT: 1000})}",
        f"--memory={max(int(free * 0.8), 512 * _MIB)}",
        f"--object-store-memory={min(max(int(free * 0.05), 80 * _MIB), 1024 * _MIB)}",
    ]


def _environment(mark: str, token: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LLMNB_")) and k != "CUDA_VISIBLE_DEVICES"}
    # A run's processes start with an environment of their own: Ray could not use those that it starts beforehand.
    return env | {MARK: mark, "PYTHONUNBUFFERED": "1", "RAY_prestart_worker_first_driver": "0", **_speaking(token)}


def _speaking(token: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # How long a process waits for a head that was killed, before it ends itself; 60 s otherwise.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
        # Without this, Ray 2.60 turns 127.0.0.1 into the machine's outward address, and listens and looks there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _describe(home: Path, mark: str, temp: Path) -> Cluster:
    must_live: dict[str, float] = {}
    for process in _marked(mark):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(word.endswith(("/gcs_server", "/raylet")) for word in words[:4]):
                must_live[str(process.pid)] = process.create_time()
    address = (temp / "ray_current_cluster").read_text(encoding="ascii").strip()
    cluster = Cluster(mark, address, str(temp), must_live, str(home))
    try:
        if not _until_it_answers(cluster):
            raise LaunchError(
                "This machine's Ray cluster ended as soon as it began.", todo=f"see {temp}/session_latest/logs"
            )
    except LaunchError:
        _end_marked(mark)
        raise
    _private(home / "ray.json", json.dumps(asdict(cluster)))
    return cluster


def _private(path: Path, text: str) -> None:
    """A file that only its owner reads, in place at once."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(draft, path)


def _temp_dir(mark: str) -> Path:
    for root in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        path = Path(root) / f"llmnb-ray-{mark[:8]}"
        if len(str(path)) <= _LONGEST_TEMP and os.access(root, os.W_OK):
            return path
    raise LaunchError("Ray needs a temporary folder with a short path.", seen=tempfile.gettempdir(), todo="set TMPDIR")


def _free_ports(n: int) -> list[int]:
    """Free ports outside 10002–19999, where Ray's workers listen."""
    held: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < n:
            taken = socket.socket()
            taken.bind(("127.0.0.1", 0))
            held.append(taken)
            port = taken.getsockname()[1]
            if not 10002 <= port <= 19999:
                ports.append(port)
    finally:
        for taken in held:
            taken.close()
    return ports


# --- ending ---------------------------------------------------------------------------------------------------


def _end_marked(mark: str) -> int:
    """Ends every process that carries the mark; returns how many there were."""
    everyone = _marked(mark)
    _signal(everyone, signal.SIGTERM)
    _, left = psutil.wait_procs(everyone, timeout=3.0)
    for _ in range(5):  # a dying parent may have started one more
        left = list({*left, *_marked(mark)})
        if not left:
            break
        _signal(left, signal.SIGKILL)
        _, left = psutil.wait_procs(left, timeout=2.0)
    return len(everyone)


def _signal(processes: list[Any], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
