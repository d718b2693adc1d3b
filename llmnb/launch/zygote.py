"""The zygote: a process that has imported everything a run needs, and forks a child for each run.

It stays single-threaded and never touches a GPU, so that a child starts from a sound copy; before each fork it looks,
and says so when that is no longer true. A child that had to import more tells it, and it imports that for the next one.

The child becomes whoever applied: their environment, folder and import path, the GPUs that the keeper chose. Then it is
a worker like any other (``worker.main``).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing.util
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import tickets

__all__ = ["Zygote", "carry", "main"]

HELD = 75  # another process carries the run out already (EX_TEMPFAIL)
_NOT_BEGUN = 70  # EX_SOFTWARE
_END_LIMIT_S, _FAILED_LIMIT_S = 60.0, 5.0
# What an imported library would start threads for: pools that a forked child could not use.
_NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_NO_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_MOST_TOLD = 60_000  # bytes that a pipe holds without a reader


class Zygote:
    """The loop.

    Args:
        home: the home folder.
        keeper: the keeper's line.
        taught: imports what children had to import, and what is likely but could start threads.
    """

    def __init__(self, home: Path, keeper: socket.socket, *, taught: bool) -> None:
        self.home, self._keeper, self._taught = home, keeper, taught
        self._children: dict[int, tuple[str, int]] = {}  # pid → (ticket's folder, where it tells what it imported)

    def serve(self) -> None:
        """Until the keeper is gone, or forking is no longer safe."""
        gc.disable()
        _warm_up(self._taught)
        gc.collect()
        gc.freeze()  # a child's collector leaves these objects alone, and their memory shared
        wakeup, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready = select.select([self._keeper.fileno(), wakeup], [], [])[0]
            if wakeup in ready:
                os.read(wakeup, 512)
                self._reap()
            if self._keeper.fileno() in ready:
                said = b""
                with contextlib.suppress(OSError):  # killed with a word of ours unread
                    said = self._keeper.recv(1 << 16)
                if not said:
                    self._call_another_keeper()
                    return
                spoiled = _spoiled()
                if spoiled:
                    self._tell({"spoiled": spoiled})
                    return
                order = json.loads(said)
                self._fork(order["path"], order["devices"])

    def _fork(self, path: str, devices: Sequence[str]) -> None:
        read, write = os.pipe()
        known = set(sys.modules)
        child = os.fork()
        if child == 0:
            code = _NOT_BEGUN
            try:
                os.close(read)
                self._keeper.close()
                code = _as_child(Path(path), devices, known, write)
            except BaseException:  # noqa: BLE001 - the border of the process
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # the zygote's own stack must not go on here
        os.close(write)
        self._children[child] = (path, read)
        self._tell({"path": path, "pid": child})

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            path, pipe = self._children.pop(pid)
            self._tell({"path": path, "status": os.waitstatus_to_exitcode(status)})
            with os.fdopen(pipe, "rb") as told, contextlib.suppress(ValueError):
                self._learn(json.loads(told.read(_MOST_TOLD)))

    def _learn(self, names: Sequence[str]) -> None:
        if not self._taught or self._children:
            return
        for name in names:
            with contextlib.suppress(Exception):  # a lesson that cannot be learned is none
                importlib.import_module(name)
        gc.freeze()

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._keeper.send(json.dumps(message).encode())

    def _call_another_keeper(self) -> None:
        """The keeper was killed. Runs may wait."""
        from .runner import socket_path

        command = [sys.executable, "-m", "llmnb.launch.keeper", str(self.home), str(socket_path(self.home))]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)


def _warm_up(taught: bool) -> None:
    from ..engine import warm

    importlib.import_module("llmnb.launch.worker")
    importlib.import_module("llmnb.store")
    warm.warm((*warm.MODULES, *warm.EXTRAS) if taught else warm.MODULES)


def _spoiled() -> str | None:
    """Why this process must not fork."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"the zygote has {threads} threads"
    from ..engine import warm

    return "the zygote has touched a GPU" if warm.touched_gpu() else None


# --- the child ------------------------------------------------------------------------------------------------


def _as_child(path: Path, devices: Sequence[str], known: set[str], tell: int) -> int:
    # As multiprocessing's fork does: what was registered for the zygote's end is not the child's to do.
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    gc.enable()
    code = _NOT_BEGUN
    try:
        code = carry(path, devices)
        return code
    finally:
        os.write(tell, json.dumps(_lessons(known)).encode()[:_MOST_TOLD])
        _limit_the_end(code)
        _wind_up()


def _wind_up() -> None:
    """What Python does at the end of a process, and ``os._exit`` does not."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _limit_the_end(code: int) -> None:
    """The run's end is recorded; what libraries do at a process's end must not hold its memory for long.

    With its head killed, Ray's farewell took longer than 15 s.
    """
    timer = threading.Timer(_FAILED_LIMIT_S if code else _END_LIMIT_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _lessons(known: set[str]) -> list[str]:
    """Modules that the run imported beyond the zygote's, of packages that the zygote has."""
    packages = {name.partition(".")[0] for name in known}
    fresh = [name for name in list(sys.modules) if name not in known and name.partition(".")[0] in packages]
    return [name for name in fresh if getattr(sys.modules[name], "__spec__", None) is not None]


def carry(path: Path, devices: Sequence[str]) -> int:
    """Carries out the run of a ticket in this process.

    Args:
        path: the ticket's folder.
        devices: the GPUs it was given.

    Returns:
        The process's exit code.
    """
    from ..engine import warm
    from . import worker
    from .reporting import own_folder

    ticket = tickets.read(path)
    if not tickets.hold(path, devices):
        return HELD
    worker.to_log_file(own_folder(ticket.workdir, ticket.run) / "worker.log")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # what was printed outlives a kill
    os.environ.clear()
    os.environ.update(tickets.environment(path))
    os.environ["PYTHONPATH"] = ticket.search
    if ticket.hides:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    os.chdir(ticket.cwd)
    sys.path[:] = dict.fromkeys([*ticket.paths, *sys.path])
    importlib.invalidate_caches()
    warm.reseed()
    code = worker.main([str(path / tickets.PARCEL)])
    if code == 0:  # nothing is left to record, also when the keeper is gone by now
        tickets.remove(path)
    return code


def main() -> int:
    """``python -m llmnb.launch.zygote HOME LINE [taught]``, or ``… alone TICKET DEVICES`` to carry out one run."""
    if sys.path[0] == os.getcwd():
        sys.path.pop(0)  # the folder that it was started in
    if sys.argv[1] == "alone":
        code = carry(Path(sys.argv[2]), [device for device in sys.argv[3].split(",") if device])
        _limit_the_end(code)
        return code
    for name, value in (_NO_THREADS | _NO_CUDA).items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = socket.socket(fileno=int(sys.argv[2]))
    Zygote(Path(sys.argv[1]), line, taught="taught" in sys.argv[3:]).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
