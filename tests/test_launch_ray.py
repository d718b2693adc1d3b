"""This machine's own Ray cluster: on loopback, behind a token, one for each home, ended by us alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from llmnb.launch import cluster, runner

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a cluster of its own, ended afterwards."""
    home = tmp_path_factory.mktemp("ray") / "home"
    yield home
    found = cluster.status(home)
    everything = [p for pid in found.pids for p in (psutil.Process(int(pid)), *psutil.Process(int(pid)).children(True))]
    assert {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= {p.cmdline()[0].strip() for p in everything}
    assert runner.stop(home)
    assert cluster.status(home) is None
    assert not cluster._marked(cluster._mark(home))
    assert not [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_two_starters_get_one_cluster(home):
    code = "import sys; from llmnb.launch import cluster; print(cluster.ensure(sys.argv[1]).pids)"
    both = [subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=500)[0] for process in both]
    assert said[0] == said[1] and len(json.loads(said[0].decode().replace("'", '"'))) == 2


ASK = """
import os, sys
if sys.argv[2] == "enter":
    from llmnb.launch import cluster
    address = cluster.enter(sys.argv[1]).address
    assert os.environ["RAY_ADDRESS"] == address
else:
    address = sys.argv[2]
from ray._raylet import GcsClient
print(len(GcsClient(address).internal_kv_keys(b"", None, timeout=10)))
"""


def test_it_listens_on_loopback_only_and_asks_for_the_token(home, tmp_path):
    ours = cluster.ensure(home)
    found = cluster.listening(home)
    assert {name for name, _, _ in found} >= {"gcs_server", "raylet", "ray::DashboardAgent"}
    assert {ip.removeprefix("::ffff:") for _, ip, _ in found} == {"127.0.0.1"}
    assert oct(os.stat(ours.token_file).st_mode & 0o777) == "0o600"
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    env = {**os.environ, **ours.environment()}

    def ask(how: str, **changes: str):
        command = [sys.executable, "-c", ASK, str(home), how]
        return subprocess.run(command, env={**env, **changes}, capture_output=True, text=True, timeout=120, check=False)

    entered, refused = ask("enter"), ask(ours.address, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert entered.returncode == 0 and int(entered.stdout) >= 0, entered.stderr
    assert refused.returncode != 0 and "nauthenticated" in refused.stderr, refused.stderr


DRIVE = """
import json, sys, time
from llmnb.launch import cluster
cluster.enter(sys.argv[1])
import ray
ray.init(log_to_driver=False)
time.sleep(4)  # workers that Ray starts beforehand come with the first driver
print(json.dumps([" ".join(p.cmdline()) for p in cluster._marked(cluster._mark(cluster._folder(sys.argv[1])))]))
"""


def test_the_head_starts_what_runs_need_and_nothing_more(tmp_path):
    """Each further process of Ray's imports for seconds, beside the agents that the head waits for."""
    home = tmp_path / "home"
    try:
        driver = subprocess.run(
            [sys.executable, "-c", DRIVE, str(home)], stdout=subprocess.PIPE, timeout=500, check=True
        )
    finally:
        cluster.stop(home)
    words = json.loads(driver.stdout)
    parts = ("gcs_server", "raylet/raylet", "dashboard/dashboard.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    assert all(any(part in one for one in words) for part in parts), words
    more = ("monitor.py", "client.server", "default_worker", "ray::IDLE")
    # The raylet's own line says how it would start a worker.
    assert not [one for one in words if "raylet/raylet" not in one and any(part in one for part in more)], words


def test_stop_ends_our_processes_only(tmp_path_factory):
    home = tmp_path_factory.mktemp("other") / "home"
    home.mkdir()
    mine, theirs = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, cluster.MARK: mark})
        for mark in (cluster._mark(home), "somebody-elses")
    )
    try:
        reaper = threading.Thread(target=mine.wait, daemon=True)
        reaper.start()
        end = time.monotonic() + 30
        while mine.pid not in [p.pid for p in cluster._marked(cluster._mark(home))] and time.monotonic() < end:
            time.sleep(0.05)
        assert runner.stop(home)
        reaper.join(5)
        assert mine.returncode is not None and theirs.poll() is None
        assert not runner.stop(home)
    finally:
        for process in (mine, theirs):
            process.kill()
        theirs.wait()
