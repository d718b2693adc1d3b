"""Background runs on this machine's own Ray cluster: they outlive who started them, and give no secret away."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import LaunchError, RunError
from llmnb.events import StateChanged
from llmnb.launch import cluster, start
from llmnb.launch.spool import read

pytestmark = [pytest.mark.ray, pytest.mark.mongod, pytest.mark.slow]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a cluster of its own, ended afterwards."""
    home = tmp_path_factory.mktemp("ray") / "home"
    yield home
    cluster.stop(home, patience=2.0)
    assert cluster.status(home) is None
    assert not cluster._marked(cluster._mark(home))


@pytest.fixture
def db(mongo_uri, home):
    with connect(mongo_uri, home=home).store as store:
        db = connect(mongo_uri, home=home)
        db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(32)]))
        yield db
        for record in store.runs.list():
            if record["state"] not in ("done", "failed", "stopped", "lost"):
                db.run(record["_id"]).kill()
        db.close()


def model(tiny_llama, tmp_path, **changes) -> LLM:
    settings = {
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "max_seq_length": 32,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
    }
    return LLM("sums", tiny_llama, trainer=LLMTrainer("sums-trainer", **{**settings, **changes}))


@pytest.fixture
def without_torch(monkeypatch):
    """The workers of this test load no torch: it is the processes that are tested."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "without_torch"))
    monkeypatch.setenv("FAKE_ENGINE_PAUSE_MS", "20")


def wait_for(what, limit: float = 120.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")


SUBMITTER = """
import os, sys
from llmnb import LLM, Collection, LLMTrainer, connect
uri, home, base, out = sys.stdin.read().split()
db = connect(uri, home=home)
trainer = LLMTrainer("t", select=Collection("sums").find(), key="text", output_dir=out, max_steps=6, logging_steps=1,
                     save_steps=3, per_device_train_batch_size=2, max_seq_length=32, use_cpu=True)
run = db.apply(LLM("sums", base, trainer=trainer), wait=False)
assert "ray" not in sys.modules and "torch" not in sys.modules
print(run.id, flush=True)
os.kill(os.getpid(), 9)
"""


def command_lines() -> str:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return "\n".join(found)


def test_a_background_run_outlives_its_submitter_and_gives_no_secret_away(db, home, mongo_uri, tiny_llama, tmp_path):
    password = re.search(r"://[^:/@]+:([^@]+)@", mongo_uri).group(1)
    told = " ".join([mongo_uri, str(home), tiny_llama, str(tmp_path / "out")])
    done = subprocess.run([sys.executable, "-c", SUBMITTER], input=told, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = db.run(done.stdout.split()[-1])
    lines = ""
    while run.state not in ("done", "failed", "lost", "stopped"):
        lines += command_lines()
        time.sleep(0.2)
    assert run.wait(1, progress=False).state == "done"

    events = run.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [e.state for e in events if isinstance(e, StateChanged)] == ["starting", "running", "done"]
    assert [m["step"] for m in run.metrics() if "loss" in m] == [1, 2, 3, 4, 5, 6]
    folder = Path(run.record["workdir"])
    assert events == read(folder / "events.jsonl")
    assert [c.step for c in run.checkpoints()] == [3, 6]
    assert db.load("model", "sums").checkpoint.step == 6

    jobs = cluster.status(home).jobs()
    assert f"llmnb.launch.worker {folder}" in lines  # the worker was seen, so the look was no empty one
    texts = {
        "command lines": lines,
        "job": json.dumps(jobs.info(run.id)),
        "job log": jobs.logs(run.id),
        "record": json.dumps(run.record, default=str),
        "events": repr(events),
        "repr": repr(run) + repr(jobs),
    }
    for path in [*folder.rglob("*"), *Path(cluster.status(home).temp_dir).rglob("*")]:
        if path.is_file() and not path.is_symlink():
            texts[str(path)] = path.read_bytes().decode("utf-8", "replace")
    token = cluster.status(home).token_file.read_text()
    assert [name for name, text in texts.items() if password in text] == []
    assert [name for name, text in texts.items() if token in text] == []
    assert oct(os.stat(cluster.status(home).token_file).st_mode & 0o777) == "0o600"


def test_it_listens_on_loopback_only_and_asks_for_the_token(db, home):
    ours = cluster.ensure(home)
    found = cluster.listening(home)
    assert {name for name, _, _ in found} >= {"gcs_server", "raylet"}
    assert {ip.removeprefix("::ffff:") for _, ip, _ in found} == {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(ours.dashboard + "/api/jobs/", timeout=10)


def test_two_starters_get_one_cluster(home):
    code = "import sys; from llmnb.launch import cluster; print(cluster.ensure(sys.argv[1]).pids)"
    both = [subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert said[0] == said[1] and len(json.loads(said[0].decode().replace("'", '"'))) == 3


def test_a_failed_background_run_brings_the_workers_traceback(db, tiny_llama, tmp_path, without_torch):
    def broken(text):
        raise ValueError("the transform broke")

    run = db.apply(model(tiny_llama, tmp_path, transform=broken), wait=False)
    with pytest.raises(RunError, match="the transform broke") as caught:
        run.wait(120)
    assert "broken" in caught.value.remote_traceback and run.state == "failed"


def test_runs_wait_for_their_turn_and_stop_with_a_checkpoint(db, tiny_llama, tmp_path, without_torch):
    first = db.apply(model(tiny_llama, tmp_path, max_steps=5000, save_steps=5000), wait=False)
    wait_for(first.metrics)
    second = db.apply(model(tiny_llama, tmp_path, max_steps=1), wait=False)
    third = db.apply(model(tiny_llama, tmp_path, max_steps=1), wait=False)
    time.sleep(3.0)
    assert (first.state, second.state) == ("running", "queued")
    third.stop()
    first.stop()
    assert first.wait(60).state == "stopped" and len(first.checkpoints()) == 1
    assert second.wait(120).state == "done"
    assert third.state == "stopped"


def test_a_worker_killed_with_kill_9_is_called_lost(db, tiny_llama, tmp_path, without_torch):
    run = db.apply(model(tiny_llama, tmp_path, max_steps=5000, save_steps=5000), wait=False)
    wait_for(run.metrics)
    os.kill(run.record["owner"]["pid"], signal.SIGKILL)
    with pytest.raises(RunError, match="lost"):
        run.wait(60)
    assert run.state == "lost"


def test_a_job_that_never_comes_to_life_fails(db, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "command", lambda path, here: "echo no such Python >&2; exit 3")
    run = db.apply(model(tiny_llama, tmp_path), wait=False)
    with pytest.raises(RunError, match="before the run began"):
        run.wait(60)
    assert "no such Python" in run.error["seen"]


def test_waiting_shows_every_event(db, tiny_llama, tmp_path, without_torch):
    seen = []
    run = db.apply(model(tiny_llama, tmp_path, on_ray=True, max_steps=2), on_event=seen.append, progress=False)
    assert seen == run.events() and run.state == "done"


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
        wait_for(lambda: mine.pid in [p.pid for p in cluster._marked(cluster._mark(home))])
        assert cluster.stop(home, patience=0.0)
        reaper.join(5)
        assert mine.returncode is not None and theirs.poll() is None
        assert not cluster.stop(home)
    finally:
        for process in (mine, theirs):
            process.kill()
        theirs.wait()


def test_a_database_of_this_process_is_refused_on_ray_and_runs_here_otherwise(tiny_llama, tmp_path, capsys):
    db = connect(f"mongomock://{tmp_path.name}", home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(8)]))
    with pytest.raises(LaunchError, match="lives in this process"):
        db.apply(model(tiny_llama, tmp_path, on_ray=True))
    run = db.apply(model(tiny_llama, tmp_path, max_steps=1), wait=False)
    assert run.wait(60).state == "done"
    assert "lives in this process" in capsys.readouterr().err
