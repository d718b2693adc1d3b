"""A second Ray cluster on this machine that is not ours: own folders, own ports, own token, own copy of our package.

Its processes see only the worker's side of llmnb (``PYTHONPATH`` names a copy of it, and ``sitecustomize`` takes this
checkout away), lie in a working directory of their own, and share no environment with the tests.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import llmnb
from llmnb.errors import LaunchError
from llmnb.launch.cluster import _free_ports, _marked
from llmnb.launch.jobs import Jobs

MARK = "LLMNB_TEST_FOREIGN_CLUSTER"
PERSONS_SIDE = (
    "notebook",
    "cli",
    "db.py",
    "llm.py",
    "model.py",
    "pipelines.py",
    "trainer.py",
    "checks.py",
    "demo",
    "series.py",
    "form",
)

SITE = """
import gc, os, socket, sys
gc.set_threshold(700, 10, 1000)  # a dozen processes of Ray's that import: no full collections meanwhile
words = " ".join(sys.orig_argv)
if "/agent.py" in words or "/agent/main.py" in words:  # the raylet waits 15 s for them, and then crashes
    try:
        os.nice(-10)
    except OSError:
        pass  # not root
elif "/dashboard.py" in words or "client.server" in words:
    os.nice(10)
here = os.path.dirname(os.path.abspath(__file__))
checkout = {checkout!r}
sys.path[:] = [p for p in sys.path if p.rstrip("/") != checkout]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f) + getattr(f, "__module__", "")]
if os.path.exists(here + "/without_torch"):
    import fake_engine
    sys.modules["llmnb.engine.training"] = fake_engine
if os.path.exists(here + "/wall"):  # a port that this cluster does not reach
    port, reach = int(open(here + "/wall").read()), socket.socket.connect
    def connect(self, address):
        if isinstance(address, tuple) and address[1] == port:
            raise ConnectionRefusedError(111, "there is a wall")
        return reach(self, address)
    socket.socket.connect = connect
"""


class Foreign:
    """A running cluster.

    Attributes:
        address, client, url: ``host:port``, ``ray://…``, ``http://…``.
        token_file: what a client needs.
        package: its copy of llmnb.
    """

    def __init__(self, root: Path, *, cpus: int = 4, **env: str) -> None:
        self.root = root
        self.temp = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))  # short: sockets lie in it
        self.mark = self.temp.name
        self.cwd, self.site, self.home = root / "cwd", root / "site", root / "home"
        for folder in (self.cwd, self.site, self.home):
            folder.mkdir(parents=True)
        self.package = self.site / "llmnb"
        source = Path(llmnb.__file__).parent
        shutil.copytree(source, self.package, ignore=shutil.ignore_patterns("__pycache__", *PERSONS_SIDE))
        shutil.copy(Path(__file__).parent / "fake_engine.py", self.site)
        (self.site / "sitecustomize.py").write_text(SITE.format(checkout=str(source.parent)))
        self.token_file = root / "token"
        self.token_file.write_text(secrets.token_hex(32))
        self.env = {
            "PATH": os.path.dirname(sys.executable) + ":/usr/bin:/bin",
            "HOME": str(self.home),
            "PYTHONPATH": str(self.site),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_prestart_worker_first_driver": "0",  # a run's processes have an environment of their own
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            MARK: self.mark,
            **env,
        }
        # A port that was free may be taken a moment later.
        for left in (3, 2, 1, 0):
            done = self._start(cpus)
            if done.returncode == 0:
                break
            self.stop()
            assert left, done.stdout + done.stderr
        end = time.monotonic() + 60
        while not self._answers():
            if time.monotonic() > end:
                self.stop()
                raise AssertionError("the foreign cluster does not answer")
            time.sleep(0.2)

    def _start(self, cpus: int) -> subprocess.CompletedProcess[str]:
        port, dashboard, agent, client = _free_ports(4)
        self.address, self.url, self.client = (
            f"127.0.0.1:{port}",
            f"http://127.0.0.1:{dashboard}",
            f"ray://127.0.0.1:{client}",
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}"]
        command += ["--no-monitor"]
        command += [f"--temp-dir={self.temp}", "--disable-usage-stats", "--object-store-memory=80000000"]
        return self._run(command, self.env, self.cwd)

    def join(self, home: Path, *, cpus: int = 4) -> None:
        """A second node, whose ``~`` is ``home``; its processes carry ``MARK`` too."""
        home.mkdir(parents=True)
        for left in (3, 2, 1, 0):
            done = self._join(home, cpus)
            if done.returncode == 0:
                return
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("HOME") == str(home):
                        process.kill()
            assert left, done.stdout + done.stderr

    def _join(self, home: Path, cpus: int) -> subprocess.CompletedProcess[str]:
        agent, grpc, metrics, envs = _free_ports(4)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.address}"]
        command += ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"]
        command += [f"--runtime-env-agent-port={envs}"]
        command += ["--disable-usage-stats", "--object-store-memory=80000000"]
        return self._run(command, {**self.env, "HOME": str(home)}, home)

    @staticmethod
    def _run(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            start_new_session=True,  # by which its agents and workers are told
        )

    def lose(self, home: Path) -> None:
        """A node's machine is gone: everything on it, at once."""
        raylet = next(p for p in self.processes() if p.name() == "raylet" and p.environ().get("HOME") == str(home))
        gone = [process for process in self.processes() if os.getsid(process.pid) == os.getsid(raylet.pid)]
        for process in gone:
            process.kill()

    def switch(self, name: str, text: str | None = "") -> None:
        """Turns ``without_torch`` or ``wall`` on, or off with None, for processes that start from now on."""
        if text is None:
            (self.site / name).unlink(missing_ok=True)
        else:
            (self.site / name).write_text(text)

    def _answers(self) -> bool:
        try:
            self.jobs().prove()
        except LaunchError:
            return False
        return True

    def jobs(self) -> Jobs:
        return Jobs(self.url, self.token_file.read_text())

    def processes(self) -> list[psutil.Process]:
        return _marked(self.mark, MARK)

    def stop(self) -> None:
        left: list[psutil.Process] = []
        for _ in range(3):
            left = list({*left, *self.processes()})
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            _, left = psutil.wait_procs(left, timeout=5)
        assert not left
        shutil.rmtree(self.temp, ignore_errors=True)
