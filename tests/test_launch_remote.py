"""Runs on a Ray cluster that is not ours: four kinds of address, nothing shared, what goes wrong beforehand."""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from bucket import BUCKET
from foreign import Foreign

import llmnb
from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import ConfigError, LaunchError, RunError
from llmnb.events import StateChanged
from llmnb.launch import away, jobs, remote, wrapping
from llmnb.store import open_folder

pytestmark = [pytest.mark.ray, pytest.mark.mongod, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    there = Foreign(tmp_path_factory.mktemp("foreign"), FAKE_ENGINE_PAUSE_MS="20")
    yield there
    there.stop()
    assert not there.processes()


@pytest.fixture
def foreign(cluster, monkeypatch):
    """The cluster, with its token in this process's environment, and the engine without torch."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_file))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    cluster.switch("without_torch")
    yield cluster
    for name in ("without_torch", "wall"):
        cluster.switch(name, None)


@pytest.fixture
def db(mongo_uri, tmp_path):
    db = connect(mongo_uri, home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(16)]))
    yield db
    for run in db.runs():
        if run.state not in ("done", "failed", "stopped", "lost"):
            run.kill()
    db.close()


def model(folder: Path, address: str, base: str = "base", **changes) -> LLM:
    settings = {
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "ray_address": address,
    }
    return LLM("sums", base, trainer=LLMTrainer("sums-trainer", **{**settings, **changes}))


def address_of(foreign: Foreign, kind: str, monkeypatch) -> str:
    if kind == "auto":
        monkeypatch.setenv("RAY_ADDRESS", foreign.address)
        return "auto"
    return {"host:port": foreign.address, "ray://": foreign.client, "http://": foreign.url}[kind]


def wait_for(what, limit: float = 60.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")


def states(run) -> list[str]:
    return [event.state for event in run.events() if isinstance(event, StateChanged)]


@pytest.mark.parametrize("kind", ["auto", "host:port", "ray://", "http://"])
def test_each_kind_of_address_reaches_the_cluster(kind, foreign, db, tmp_path, monkeypatch):
    def loud(text: str) -> str:  # travels by value: its module is not there
        return text.upper()

    loaded = "ray" in sys.modules
    run = db.apply(model(tmp_path, address_of(foreign, kind, monkeypatch), transform=loud), wait=False)
    assert run.wait(240).state == "done"
    assert ("ray" in sys.modules) == loaded  # neither finding the cluster nor asking it loads Ray here

    assert run.record["ray_address"] == foreign.url
    assert Path(run.record["workdir"]) == foreign.home / ".llmnb" / "runs" / run.id
    assert states(run) == ["starting", "running", "done"]
    assert [event.seq for event in run.events()] == list(range(1, len(run.events()) + 1))
    assert [m["step"] for m in run.metrics() if "loss" in m] == [1, 2, 3, 4]
    assert [c.step for c in run.checkpoints()] == [2, 4]
    assert db.load("model", "sums").checkpoint.step == 4
    assert not (tmp_path / "out").exists()  # nothing is written where only the caller's machine has a folder
    wait_for(lambda: not list((foreign.home / ".llmnb" / "runs").iterdir()))  # and nothing stays over there


STORED = """
import sys
from ray._raylet import GcsClient
found = GcsClient(address=sys.argv[1]).internal_kv_get(f"gcs://{sys.argv[2]}".encode(), None)
sys.stdout.buffer.write(found or b"nothing")
"""


def stored_package(foreign: Foreign, name: str) -> bytes:
    env = {**foreign.env, "RAY_AUTH_TOKEN_PATH": str(foreign.token_file)}
    command = [sys.executable, "-c", STORED, foreign.address, name]
    return subprocess.run(command, env=env, capture_output=True, check=True).stdout


def test_no_secret_shows_and_the_parcel_is_gone_once_it_was_read(foreign, db, mongo_uri, tmp_path, monkeypatch):
    password = re.search(r"://[^:/@]+:([^@]+)@", mongo_uri).group(1)
    monkeypatch.setenv("HF_TOKEN", "hf_atokenofmine")
    monkeypatch.setenv("HF_HOME", "/a/path/of/this/machine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-a-run-without-s3")

    def looked(text: str) -> str:
        import os
        import time

        time.sleep(0.1)  # long enough to be seen
        print("here:", os.environ.get("HF_TOKEN"), os.environ.get("HF_HOME"), os.environ.get("AWS_SECRET_ACCESS_KEY"))
        return text

    run = db.apply(model(tmp_path, foreign.url, transform=looked, max_steps=100_000, save_steps=100_000), wait=False)
    package = run.record["package"]
    wait_for(lambda: run.state == "running")
    wait_for(lambda: stored_package(foreign, package) == wrapping.EMPTY)  # Ray keeps it for as long as the job runs
    lines = " ".join(" ".join(process.cmdline()) for process in foreign.processes())
    environs = [json.dumps(process.environ()) for process in foreign.processes()]
    assert "porter.py" in lines
    run.stop()
    run.wait(180)
    assert "here: hf_atokenofmine None None" in run.logs(1_000_000)

    texts = {"command lines": lines, "environments": " ".join(environs), "record": json.dumps(run.record, default=str)}
    texts["job"] = json.dumps(foreign.jobs().info(run.id))
    assert run.id in texts["job"]
    for folder in (foreign.temp, foreign.cwd, foreign.home):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                texts[str(path)] = path.read_bytes().decode("utf-8", "replace")
    assert [where for where, text in texts.items() if password in text] == []


# --- what goes wrong before a run begins ----------------------------------------------------------------------------


def nobody() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "http://127.0.0.1:{}"])
def test_an_address_nobody_listens_at_is_said_within_seconds(form, db, tmp_path):
    began = time.monotonic()
    with pytest.raises(LaunchError, match="Nobody answers") as raised:
        db.apply(model(tmp_path, form.format(nobody())), wait=False)
    assert time.monotonic() - began < 10
    assert "refused" in str(raised.value.seen) and raised.value.todo
    assert db.run().state == "failed" and db.run().error["what"] == raised.value.what


@pytest.mark.parametrize("address", ["tcp://head:1", "head", "http://", "nonsense://"])
def test_what_is_no_address_is_said(address):
    with pytest.raises(LaunchError, match="not the address of a Ray cluster"):
        remote.find(address)


def test_a_listener_that_is_no_ray_cluster_is_said():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(LaunchError, match="is not a Ray cluster's dashboard"):
            remote.find(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


TAKEN = """
import pathlib, sys
tries = pathlib.Path(sys.argv[1].rpartition("@")[2])
tries.write_text(tries.read_text() + "x")
if len(tries.read_text()) < {good}:
    raise RuntimeError("Starting Ray client server failed. See ray_client_server_23000.err for detailed logs.")
print("URL http://127.0.0.1:8265")
"""


@pytest.mark.parametrize(("good", "found"), [(2, True), (99, False)])
def test_a_port_that_another_cluster_took_first_is_not_the_end(good, found, tmp_path, monkeypatch):
    tries = tmp_path / "tries"
    tries.write_text("")
    monkeypatch.setattr(remote, "_ASK_RAY", TAKEN.format(good=good))
    if found:
        assert remote._ask_ray(f"ray://@{tries}") == "http://127.0.0.1:8265" and tries.read_text() == "xx"
        return
    with pytest.raises(LaunchError, match="cannot be used") as raised:
        remote._ask_ray(f"ray://@{tries}")
    assert "client server failed" in raised.value.seen and tries.read_text() == "xxx"


@pytest.mark.parametrize("kind", ["http://", "host:port"])
@pytest.mark.parametrize("given", ["", "0" * 64])
def test_a_missing_and_a_wrong_token_are_said(kind, given, foreign, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(given)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(LaunchError) as raised:
        remote.find(address_of(foreign, kind, monkeypatch))
    assert "RAY_AUTH_TOKEN_PATH" in raised.value.todo
    assert foreign.token_file.read_text() not in str(raised.value)


@pytest.mark.parametrize("fault", ["python", "no llmnb", "version", "package", "import", "database"])
def test_what_the_cluster_lacks_is_named_on_the_record_though_nobody_waits(
    fault, foreign, db, mongod, tmp_path, monkeypatch
):
    changes, init = {}, foreign.package / "__init__.py"
    text = init.read_text()
    if fault == "python":
        monkeypatch.setattr(wrapping, "PYTHON", "3.7")
    elif fault == "no llmnb":
        foreign.switch("without_torch", None)
        foreign.package.rename(foreign.site / "gone")
    elif fault == "version":
        init.write_text(text.replace("__version__ = ", "__version__ = '9.9' + "))
    elif fault == "package":
        monkeypatch.setattr(remote, "needs", lambda job, s3: ["pymongo", "a_package_of_tomorrow"])
    elif fault == "import":
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "only_here.py").write_text("class Words(str): pass\n")
        only_here = importlib.import_module("only_here")
        changes["transform"] = functools.partial(max, key=only_here.Words)
    else:
        foreign.switch("wall", str(mongod.port))
    try:
        run = db.apply(model(tmp_path, foreign.url, **changes), wait=False)
        wait_for(lambda: db.store.runs.get(run.id)["state"] == "failed")  # not through the handle: nobody looks
    finally:
        if fault == "no llmnb":
            (foreign.site / "gone").rename(foreign.package)
        init.write_text(text)
    told = run.error
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    version = llmnb.__version__
    seen = {
        "python": f"Python {here} on the cluster, 3.7 where the run was started",
        "no llmnb": "cannot import it",
        "version": f"llmnb 9.9{version} on the cluster, {version} where the run was started",
        "package": "a_package_of_tomorrow",
        "import": "only_here",
        "database": "does not answer",
    }[fault]
    assert told["type"] == "LaunchError" and seen in told["seen"] and told["todo"], told
    if fault in ("no llmnb", "version", "package"):
        assert f"pip install 'llmnb[train,ray]=={version}'" in told["todo"]
    with pytest.raises(RunError, match=re.escape(told["what"])):
        run.wait(5)
    if fault == "no llmnb":  # nothing there could overwrite it
        wait_for(lambda: stored_package(foreign, run.record["package"]) in (wrapping.EMPTY, b"nothing"))


def test_the_worker_says_itself_that_versions_differ(foreign, db, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_watch", lambda store, run: None)  # the launching process is gone
    monkeypatch.setattr(wrapping, "PYTHON", "3.7")
    run = db.apply(model(tmp_path, foreign.url), wait=False)
    wait_for(lambda: db.store.runs.get(run.id)["state"] == "failed")
    assert "3.7" in run.error["seen"]


def test_a_worker_that_is_killed_over_there_is_lost_within_seconds(foreign, db, tmp_path, monkeypatch):
    run = db.apply(model(tmp_path, foreign.url, max_steps=100_000, save_steps=100_000), wait=False)
    wait_for(lambda: run.state == "running")
    monkeypatch.setattr(socket, "gethostname", lambda: "another-machine")  # no process of it can be seen from here
    psutil.Process(run.record["owner"]["pid"]).kill()
    with pytest.raises(RunError, match="gone without a word"):
        run.wait(30)
    assert run.state == "lost" and run.error["seen"]


def test_a_run_that_waits_for_its_turn_can_be_stopped(foreign, db, tmp_path):
    other = foreign.jobs().submit("sleep 100", id=f"other-{uuid.uuid4().hex}", cpus=4.0, gpus=0.0, metadata={})
    try:
        run = db.apply(model(tmp_path, foreign.url), wait=False)
        time.sleep(1.0)
        assert run.state == "queued"
        run.stop()
        assert run.wait(180).state == "stopped"
        assert stored_package(foreign, run.record["package"]) in (wrapping.EMPTY, b"nothing")
    finally:
        foreign.jobs().stop(other)
    assert wait_for(lambda: foreign.jobs().info(run.id)["status"] == "STOPPED")


# --- a cluster that never reaches the database ------------------------------------------------------------------------


@pytest.fixture
def walled(foreign, mongod):
    """The cluster, and nothing in it can reach the database."""
    foreign.switch("wall", str(mongod.port))
    return foreign


def couriers(run) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "llmnb.launch.courier" in words and run.id in words[-1]:
                found.append(process)
    return found


def assert_all_is_home(db, run, steps: int, saved: list[int]) -> None:
    events = run.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, steps + 1))
    assert [c.step for c in run.checkpoints()] == saved
    assert [c.step for c in run.checkpoints() if c.resumable] == saved[-1:]
    loaded = db.load("model", "sums").checkpoint
    assert (loaded.experiment, loaded.step) == (run.id, saved[-1])
    assert (Path(loaded.path) / "adapter_model.safetensors").read_text() == f"weights of sums at {saved[-1]}"


def test_a_run_without_the_database_comes_home_whole(walled, db, tmp_path, mongo_uri):
    db.execute(Collection("sums").insert_many([{"text": "v", "_fold": "valid"}]))
    run = db.apply(model(tmp_path, walled.url, log_to_db=False, save_total_limit=1), wait=False)
    folder = Path(run.record["away"].removeprefix("file://"))
    password = re.search(r"://[^:/@]+:([^@]+)@", mongo_uri).group(1)
    wait_for(lambda: list((folder / "rows").glob("*")))
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert password.encode() not in kept

    assert run.wait(240).state == "done"
    assert states(run) == ["starting", "running", "done"]
    assert_all_is_home(db, run, 4, [4])
    counts = run.record["counts"]
    assert (counts["rows"], counts["steps"]) == (16, 4)
    wait_for(lambda: run.record.get("courier") == "finished")
    assert not folder.exists() and wait_for(lambda: not couriers(run)) is not None


def test_a_killed_courier_is_started_again_and_nothing_comes_twice(walled, db, tmp_path):
    def slow(text: str) -> str:
        import time

        time.sleep(0.3)
        return text

    run = db.apply(model(tmp_path, walled.url, transform=slow, log_to_db=False), wait=False)
    (first,) = wait_for(lambda: couriers(run))
    away.ensure_courier(db.store, run.id)
    away._started.clear()
    away.ensure_courier(db.store, run.id)
    assert couriers(run) == [first]  # one for each run
    wait_for(lambda: run.state != "queued")
    first.kill()
    first.wait(5)
    away._started.clear()  # half a minute later
    run.look()
    wait_for(lambda: [process for process in couriers(run) if process.pid != first.pid])
    assert run.wait(240).state == "done"
    assert_all_is_home(db, run, 4, [2, 4])


def test_a_letter_reaches_a_run_without_the_database(walled, db, tmp_path):
    run = db.apply(model(tmp_path, walled.url, max_steps=100_000, save_steps=100_000, log_to_db=False), wait=False)
    wait_for(lambda: run.state == "running" and run.metrics())
    run.stop()
    assert run.wait(180).state == "stopped"
    steps = max(m["step"] for m in run.metrics())
    assert_all_is_home(db, run, steps, [steps])


def test_a_failed_run_without_the_database_says_why(walled, db, tmp_path):
    def broken(text: str) -> str:
        raise ValueError("this row is odd")

    run = db.apply(model(tmp_path, walled.url, transform=broken, log_to_db=False), wait=False)
    with pytest.raises(RunError, match="this row is odd"):
        run.wait(180)
    assert "in broken" in run.error["traceback"] and run.state == "failed"


def test_a_killed_worker_without_the_database_is_lost_and_its_run_goes_on(walled, db, tmp_path):
    settings = {"max_steps": 300, "save_steps": 50, "log_to_db": False}
    run = db.apply(model(tmp_path, walled.url, **settings), wait=False)
    wait_for(lambda: run.checkpoints())
    owner = open_folder(run.record["away"]).runs.get(run.id)["owner"]
    psutil.Process(owner["pid"]).kill()
    with pytest.raises(RunError, match="gone without a word"):
        run.wait(180)
    assert run.state == "lost"

    assert run.resume(wait=False).wait(240).state == "done"
    assert_all_is_home(db, run, 300, list(range(50, 301, 50)))
    assert run.record["attempt"] == 2
    assert len([event for event in run.events() if event.kind == "checkpoint"]) == 6


@pytest.mark.parametrize("name", ["train_loop_per_worker", "train_loop_config", "datasets", "no_such_thing"])
def test_what_is_no_business_of_the_person_is_refused_before_anything_is_recorded(name, db, tmp_path):
    with pytest.raises(ConfigError, match=name) as raised:
        db.apply(model(tmp_path, "http://127.0.0.1:1", ray_configs={name: print}), wait=False)
    assert "ray_configs" in str(raised.value)
    assert db.runs() == [] and db.show("model") == []


def test_a_cluster_elsewhere_needs_a_database_or_a_folder_that_it_reaches(db, tmp_path, monkeypatch):
    elsewhere = jobs.Jobs("http://10.1.2.3:8265")
    monkeypatch.setattr(remote, "find", lambda address: elsewhere)
    with pytest.raises(LaunchError, match="cannot reach this database"):
        db.apply(model(tmp_path, "http://10.1.2.3:8265"), wait=False)
    with pytest.raises(ConfigError, match="storage"):
        db.apply(model(tmp_path, "http://10.1.2.3:8265", log_to_db=False), wait=False)
    assert {run.state for run in db.runs()} == {"failed"}


def test_workers_without_the_database_whose_storage_is_on_s3(walled, db, s3, tiny_llama, tmp_path):
    """The real engine on two ranks."""
    from ray.train import RunConfig, ScalingConfig

    configs = {
        "scaling_config": ScalingConfig(num_workers=2),
        "run_config": RunConfig(name="mine", storage_path=f"s3://{BUCKET}/llm-finetune"),
    }
    walled.switch("without_torch", None)
    settings = {"per_device_train_batch_size": 2, "max_seq_length": 32, "ray_configs": configs, "log_to_db": False}
    run = db.apply(model(tmp_path, walled.url, tiny_llama, **settings), wait=False)
    assert run.record["away"] == f"s3://{BUCKET}/llm-finetune/llmnb/{run.id}"
    assert run.wait(400).state == "done"
    events = run.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [m["step"] for m in run.metrics() if "loss" in m] == [1, 2, 3, 4]
    assert [(c.step, c.resumable) for c in run.checkpoints()] == [(2, False), (4, True)]
    assert (Path(db.load("model", "sums").checkpoint.path) / "adapter_model.safetensors").stat().st_size > 1000
    wait_for(lambda: run.record.get("courier") == "finished")
    assert s3.keys(f"llm-finetune/llmnb/{run.id}") == []
    assert s3.keys("llm-finetune/mine")  # Ray's own

    secret = s3.env["AWS_SECRET_ACCESS_KEY"]
    assert secret not in json.dumps(run.record, default=str) + repr(run.events()) + run.logs(1000)
    assert secret not in json.dumps(walled.jobs().info(run.id)) + str([p.environ() for p in walled.processes()])
