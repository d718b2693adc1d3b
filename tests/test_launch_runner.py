"""The runner: a queue, a warm process, a fork for each run; and what is true after each of them was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import RunError
from llmnb.events import Metric, StateChanged
from llmnb.launch import runner, tickets
from llmnb.launch.burial import Cause, bury
from llmnb.launch.spool import Spool, read
from llmnb.launch.tickets import Ticket

WITHOUT_TORCH = str(Path(__file__).parent / "without_torch")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder whose runner serves all tests of this file, ended afterwards."""
    home = tmp_path_factory.mktemp("runner") / "home"
    yield home
    runner.stop(home, patience=2.0)
    assert runner.status(home) is None and not runner._marked(home)


@pytest.fixture
def db(mongo_uri, home, monkeypatch):
    """A database, and runs whose engine is the fake one, at 20 ms a step: it is the processes that are tested."""
    monkeypatch.setenv("PYTHONPATH", WITHOUT_TORCH)
    monkeypatch.setenv("FAKE_ENGINE_PAUSE_MS", "20")
    db = connect(mongo_uri, home=home)
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(8)]))
    yield db
    for record in db.store.runs.list():
        if record["state"] not in ("done", "failed", "stopped", "lost"):
            db.run(record["_id"]).kill(patience=0.5)
    db.close()


def model(tmp_path, base="base", **changes) -> LLM:
    settings = {
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(tmp_path / "out"),
        "max_seq_length": 32,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 5000,
        "use_cpu": True,
    }
    return LLM("sums", base, trainer=LLMTrainer("sums-trainer", **{**settings, **changes}))


def wait_for(what, limit: float = 60.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("waited too long")


def long_run(db, tmp_path, **changes):
    """A run that is in the middle of its steps."""
    run = db.apply(model(tmp_path, max_steps=5000, **changes), wait=False)
    wait_for(run.metrics)
    return run


def numbered(run) -> list:
    """A run's events: none missing, none twice, and the database has what the spool has."""
    events = run.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events == read(Path(run.record["workdir"]) / "events.jsonl")
    return events


def teller(path: Path):
    """A transform that writes down what process it finds itself in."""

    def tell(text):
        import json
        import os
        import sys

        if os.path.exists(path):
            return text
        facts = {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "session": os.getsid(0),
            "cwd": os.getcwd(),
            "found": sorted(name for name in os.environ if name.startswith(("TEST_", "LLMNB_R"))),
            "path": sys.path,
            "left_behind": getattr(json, "left_behind", None),
            "seed": sys.modules["torch"].initial_seed() if "torch" in sys.modules else None,
        }
        json.left_behind = "by an earlier run"
        with open(path, "w") as file:
            file.write(json.dumps(facts))
        return text

    return tell


pytestmark = [pytest.mark.mongod]


# -- one after another -----------------------------------------------------------------------------------------


def test_runs_are_forks_of_one_warm_process_and_know_nothing_of_each_other(db, home, tmp_path, monkeypatch):
    told = []
    for number in (1, 2):
        place = tmp_path / f"place{number}"
        place.mkdir()
        monkeypatch.chdir(place)
        monkeypatch.setenv(f"TEST_{number}", "x")
        monkeypatch.syspath_prepend(str(place))
        began = time.monotonic()
        run = db.apply(model(tmp_path, transform=teller(tmp_path / f"facts{number}")), wait=False)
        assert time.monotonic() - began < 5.0, "it waits for no import"
        assert run.wait(180).state == "done"
        told.append(json.loads((tmp_path / f"facts{number}").read_text()))
        monkeypatch.delenv(f"TEST_{number}")
    zygote = runner.status(home)["zygote"]
    assert [facts["parent"] for facts in told] == [zygote, zygote]
    assert told[0]["pid"] != told[1]["pid"] == told[1]["session"]
    assert [facts["cwd"] for facts in told] == [str(tmp_path / "place1"), str(tmp_path / "place2")]
    assert [facts["found"] for facts in told] == [["TEST_1"], ["TEST_2"]]
    assert [str(tmp_path / f"place{n}") in told[n - 1]["path"] for n in (1, 2)] == [True, True]
    assert told[1]["left_behind"] is None


def test_what_imports_depend_on_gives_another_warm_process(db, home, tmp_path, monkeypatch):
    assert db.apply(model(tmp_path), wait=False).wait(180).state == "done"
    first = runner.status(home)["zygote"]
    monkeypatch.setenv("HF_TOKEN", "read when it is used")
    assert db.apply(model(tmp_path), wait=False).wait(180).state == "done"
    assert runner.status(home)["zygote"] == first
    monkeypatch.setenv("OMP_NUM_THREADS", "1" if os.environ.get("OMP_NUM_THREADS") != "1" else "2")
    assert db.apply(model(tmp_path), wait=False).wait(180).state == "done"
    assert runner.status(home)["zygote"] != first
    assert not psutil.pid_exists(first)


def test_runs_wait_for_their_turn_and_say_for_whom(db, home, tmp_path):
    first = long_run(db, tmp_path)
    second, third, fourth = (db.apply(model(tmp_path, max_steps=1), wait=False) for _ in range(3))
    assert repr(fourth) == f"<Run {fourth.id}: queued, waits for {first.id}, {second.id}, {third.id}>"
    assert runner.status(home)["waiting"] == {
        second.id: [first.id],
        third.id: [first.id, second.id],
        fourth.id: [first.id, second.id, third.id],
    }
    third.stop()
    assert list(runner.status(home)["waiting"]) == [second.id, fourth.id]
    first.stop()
    assert first.wait(180).state == "stopped" and len(first.checkpoints()) == 1
    assert second.wait(180).state == fourth.wait(180).state == "done" and third.state == "stopped"
    assert second.record["started"] < fourth.record["started"]
    assert first.record["ended"] <= second.record["started"]
    assert [(event.seq, event.state) for event in third.events()] == [(1, "stopped")]


def test_a_run_that_never_comes_to_life_fails(db, tmp_path, monkeypatch):
    first = long_run(db, tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    run = db.apply(model(tmp_path), wait=False)
    gone.rmdir()
    monkeypatch.chdir(tmp_path)
    first.kill()
    with pytest.raises(RunError, match="before the run began"):
        run.wait(180)
    assert "gone" in run.error["seen"]
    end = time.monotonic() + 10
    while not run.events() and time.monotonic() < end:  # another process says it, after the run's state
        time.sleep(0.05)
    assert [e.state for e in run.events()] == ["failed"]


def test_no_secret_is_seen_and_no_file_is_left(db, home, mongo_uri, tmp_path):
    password = re.search(r"://[^:/@]+:([^@]+)@", mongo_uri).group(1)
    run = long_run(db, tmp_path)
    seen = ""
    for process in runner._marked(home):
        seen += " ".join(process.cmdline()) + json.dumps(process.environ())
    assert str(home) in seen and password not in seen
    for path in (home / "runner").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.name.endswith(".lock"), path
    run.stop()
    run.wait(180)
    wait_for(lambda: not tickets.listed(home))
    assert {path.name for path in (home / "runner").iterdir()} <= {"keeper.log", "lock", "start.lock", "socket"}
    assert password not in (home / "runner" / "keeper.log").read_text()


SUBMITTER = """
import os, sys
from llmnb import LLM, Collection, LLMTrainer, connect
uri, home, out = sys.stdin.read().split()
db = connect(uri, home=home)
trainer = LLMTrainer("t", select=Collection("sums").find(), key="text", output_dir=out, max_steps=30, logging_steps=1,
                     save_steps=15, max_seq_length=32, use_cpu=True)
run = db.apply(LLM("sums", "base", trainer=trainer), wait=False)
assert not {"torch", "ray"} & set(sys.modules)
print(run.id, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_background_run_outlives_whoever_applied(db, home, mongo_uri, tmp_path):
    told = " ".join([mongo_uri, str(home), str(tmp_path / "out")])
    done = subprocess.run([sys.executable, "-c", SUBMITTER], input=told, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = db.run(done.stdout.split()[-1])
    assert run.wait(180).state == "done"
    events = numbered(run)
    assert [e.state for e in events if isinstance(e, StateChanged)] == ["starting", "running", "done"]
    assert [m["step"] for m in run.metrics()] == list(range(1, 31))
    assert [c.step for c in run.checkpoints()] == [15, 30] and db.load("model", "sums").checkpoint.step == 30


def test_a_failed_background_run_brings_its_own_traceback(db, tmp_path):
    def broken(text):
        raise ValueError("the transform broke")

    run = db.apply(model(tmp_path, transform=broken), wait=False)
    with pytest.raises(RunError, match="the transform broke") as caught:
        run.wait(180)
    assert "broken" in caught.value.remote_traceback and run.state == "failed"
    assert "the transform broke" in run.logs()
    numbered(run)


def test_waiting_shows_every_event(db, tmp_path):
    seen = []
    run = db.apply(model(tmp_path, on_ray=True), on_event=seen.append, progress=False)
    assert seen == run.events() and run.state == "done"


# -- killed ----------------------------------------------------------------------------------------------------


def test_a_run_killed_with_kill_9_is_lost_at_once_with_all_it_said(db, tmp_path):
    run = long_run(db, tmp_path)
    os.kill(run.record["owner"]["pid"], signal.SIGKILL)
    wait_for(lambda: run.state == "lost", 20)
    events = numbered(run)
    assert [e.state for e in events if isinstance(e, StateChanged)] == ["starting", "running", "lost"]
    assert events[-1].state == "lost"
    assert run.error["type"] == "WorkerLost" and "SIGKILL" in run.error["what"]
    assert "run.resume()" in run.error["todo"] and "memory" in run.error["todo"]


def test_a_run_whose_record_is_gone_is_given_up_after_one_attempt(db, home, tmp_path):
    run = long_run(db, tmp_path)
    pid = run.record["owner"]["pid"]
    db.store.runs._table.delete({"_id": run.id})
    os.kill(pid, signal.SIGKILL)
    log = tickets.folder(home) / "keeper.log"
    wait_for(lambda: f"run {run.id} could not be recorded" in log.read_text())
    time.sleep(4)  # it came every second
    assert log.read_text().count(f"run {run.id} could not be recorded") == 1
    for path, ticket in tickets.listed(home):
        if ticket.run == run.id:
            tickets.remove(path)


def test_the_warm_process_may_be_killed(db, home, tmp_path):
    run = long_run(db, tmp_path)
    first = runner.status(home)["zygote"]
    os.kill(first, signal.SIGKILL)
    steps = len(run.metrics())
    wait_for(lambda: len(run.metrics()) > steps + 20)
    again = db.apply(model(tmp_path), wait=False)
    os.kill(run.record["owner"]["pid"], signal.SIGKILL)
    assert again.wait(180).state == "done"
    assert runner.status(home)["zygote"] not in (None, first)
    wait_for(lambda: run.state == "lost")
    assert "SIGKILL" in run.error["what"], "its end is seen although the process that forked it is gone"


def test_the_keeper_may_be_killed_and_the_queue_stays(db, home, tmp_path):
    run = long_run(db, tmp_path)
    waiting = db.apply(model(tmp_path), wait=False)
    first = runner.status(home)["keeper"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: (runner.status(home) or {}).get("keeper") not in (None, first))
    status = runner.status(home)
    assert status["running"] == {run.id: run.record["owner"]["pid"]} and status["waiting"] == {waiting.id: [run.id]}
    run.stop()
    assert run.wait(180).state == "stopped" and waiting.wait(180).state == "done"
    numbered(run)
    numbered(waiting)


def test_when_all_of_the_runner_is_killed_whoever_looks_starts_it_again(db, home, tmp_path):
    run = long_run(db, tmp_path)
    waiting = db.apply(model(tmp_path), wait=False)
    status = runner.status(home)
    for pid in (status["zygote"], status["keeper"], run.record["owner"]["pid"]):
        os.kill(pid, signal.SIGKILL)
    assert waiting.wait(180).state == "done"
    wait_for(lambda: run.state == "lost")
    assert numbered(run)[-1].state == "lost"


def test_stop_lets_runs_save_and_says_so_of_those_that_waited(mongo_uri, tmp_path, monkeypatch, db):
    own = tmp_path / "home"
    other = connect(mongo_uri, home=own)
    run = long_run(other, tmp_path)
    waiting = other.apply(model(tmp_path), wait=False)
    assert runner.stop(own, patience=30.0)
    assert run.state == "stopped" and len(run.checkpoints()) == 1
    assert waiting.state == "stopped" and "before it began" in waiting.record["reason"]
    assert [e.state for e in waiting.events()] == ["stopped"]
    assert not runner._marked(own) and not tickets.listed(own) and not runner.stop(own)
    other.close()


def test_a_runner_without_work_ends_by_itself(mongo_uri, tmp_path, monkeypatch, db):
    own = tmp_path / ("a-path-too-long-for-a-socket" * 4)
    monkeypatch.setenv("LLMNB_RUNNER_IDLE_S", "0.3")
    other = connect(mongo_uri, home=own)
    run = other.apply(model(tmp_path), wait=False)
    assert run.wait(180).state == "done"
    assert not runner.socket_path(own).is_relative_to(own)
    wait_for(lambda: not runner._marked(own), 20)
    assert not runner.socket_path(own).parent.exists()
    other.close()


def test_a_process_that_cannot_be_forked_is_not(mongo_uri, tmp_path, monkeypatch, db):
    """A library that starts a thread when it is imported: each run is a fresh process then."""
    site = tmp_path / "site"
    site.mkdir()
    text = (Path(WITHOUT_TORCH) / "sitecustomize.py").read_text()
    text = text.replace("Path(__file__).parents[1]", repr(str(Path(__file__).parent)))
    (site / "sitecustomize.py").write_text(
        text + "\nimport threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    own = tmp_path / "home"
    other = connect(mongo_uri, home=own)
    try:
        run = other.apply(model(tmp_path, transform=teller(tmp_path / "facts")), wait=False)
        assert run.wait(180).state == "done"
        assert json.loads((tmp_path / "facts").read_text())["parent"] == runner.status(own)["keeper"]
        assert "threads" in (own / "runner" / "keeper.log").read_text()
    finally:
        runner.stop(own)
        other.close()


def test_a_farewell_that_hangs_holds_no_memory_for_ever():
    lines = (
        "import atexit, time",
        "from llmnb.launch import zygote",
        "zygote._FAILED_LIMIT_S = 0.3",
        "atexit.register(time.sleep, 60)",
        "zygote._limit_the_end(7)",
        "zygote._wind_up()",
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == 7
    assert time.monotonic() - began < 30


def test_two_callers_at_once_get_one_runner(tmp_path):
    code = "import sys; from pathlib import Path; from llmnb.launch import runner; "
    code += "print(runner._told(Path(sys.argv[1]), {'do': 'look'})['keeper'])"
    home = tmp_path / "home"
    home.mkdir()
    try:
        both = [subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE) for _ in range(3)]
        assert len({process.communicate(timeout=60)[0] for process in both}) == 1
    finally:
        assert runner.stop(home)


# -- whose turn it is ------------------------------------------------------------------------------------------


def ticket(run: str, devices: str = "", whole: bool = False) -> Ticket:
    return Ticket(run, "", "", "", [], "", "", devices=list(devices), whole=whole)


def test_whose_turn_it_is_with_gpus():
    a, b, c = ticket("a", "01"), ticket("b", "01"), ticket("c", "01")
    cpu, all_of_them = ticket("cpu"), ticket("all", "01", whole=True)
    assert tickets.waits_for(a, {}, []) == ([], ["0"])
    assert tickets.waits_for(b, {"a": (a, ["0"])}, []) == ([], ["1"])
    assert tickets.waits_for(c, {"a": (a, ["0"]), "b": (b, ["1"])}, []) == (["a", "b"], [])
    assert tickets.waits_for(all_of_them, {}, []) == ([], ["0", "1"])
    assert tickets.waits_for(all_of_them, {"a": (a, ["0"])}, []) == (["a"], [])
    assert tickets.waits_for(b, {"a": (a, ["0"])}, [all_of_them]) == (["a", "all"], []), "in order"
    assert tickets.waits_for(a, {"all": (all_of_them, ["0", "1"])}, []) == (["all"], [])
    assert tickets.waits_for(cpu, {"a": (a, ["0"])}, [all_of_them]) == ([], []), "the CPU is free"
    assert tickets.waits_for(ticket("d"), {"cpu": (cpu, [])}, []) == (["cpu"], [])
    assert tickets.waits_for(ticket("d", "7"), {"a": (a, ["0"])}, []) == ([], ["7"])


# -- burial ----------------------------------------------------------------------------------------------------


def dead_run(store, tmp_path, **fields):
    record = store.runs.create("x", model="x", version=1, config={}, workdir=str(tmp_path))
    store.runs.transition(record["_id"], "queued", "starting", owner={"host": "elsewhere", "pid": 1, "born": 0})
    store.runs.transition(record["_id"], "starting", "running", **fields)
    spool = Spool(tmp_path / "events.jsonl")
    for step in (1, 2, 3):
        spool.say(Metric(step=step, values={"loss": 1.0}))
    store.events.append(record["_id"], spool.take(0, 1))
    return record["_id"], spool


def test_a_burial_ships_what_was_said_and_can_be_repeated(store, tmp_path):
    run, spool = dead_run(store, tmp_path)
    spool.close()
    before = store.runs.get(run)
    assert bury(store, before, Cause(status=-9, memory=True))
    assert not bury(store, before, Cause(status=-9)) and not bury(store, store.runs.get(run))
    record, events = store.runs.get(run), store.events.since(run)
    assert record["state"] == "lost" and "Memory ran out" in record["error"]["what"] and record["last_seq"] == 4
    assert [e.seq for e in events] == [1, 2, 3, 4] and events[-1].state == "lost"
    assert events == read(tmp_path / "events.jsonl")


def test_a_burial_believes_the_runs_own_last_words(store, tmp_path):
    run, spool = dead_run(store, tmp_path)
    spool.say(StateChanged(state="done"))
    spool.close()
    assert bury(store, store.runs.get(run), Cause(status=1))
    assert store.runs.get(run)["state"] == "done" and store.runs.get(run)["error"] is None
    assert [e.seq for e in store.events.since(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("letter", "asked", "reason"), [("kill", None, "killed"), (None, "all stop", "all stop")])
def test_a_run_that_was_to_end_is_stopped(store, tmp_path, letter, asked, reason):
    run, spool = dead_run(store, tmp_path, control=letter)
    spool.close()
    assert bury(store, store.runs.get(run), Cause(status=-15, stopped=asked))
    assert (store.runs.get(run)["state"], store.runs.get(run)["reason"]) == ("stopped", reason)


def test_a_run_of_a_later_attempt_is_not_buried(store, tmp_path):
    run, spool = dead_run(store, tmp_path)
    spool.close()
    seen = store.runs.get(run)
    store.runs.transition(run, "running", "lost")
    store.runs.reopen(run, 1)
    store.runs.transition(run, "queued", "starting")
    bury(store, seen)
    assert store.runs.get(run)["state"] == "starting"


# -- with the real engine --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_of_the_real_engine_give_their_memory_back(db, home, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")

    def staying() -> list[psutil.Process]:
        """Keeper and warm process, once the run's own process is gone: its last moments come after its state."""
        status, found = runner.status(home), runner._marked(home)
        return found if {process.pid for process in found} == {status["keeper"], status["zygote"]} else []

    def settled() -> list[psutil.Process]:
        try:
            return wait_for(staying, 180)
        except AssertionError:
            raise AssertionError(f"{runner.status(home)}, and there are {runner._marked(home)}") from None

    # The first run teaches: when its process is gone, the warm one begins to import what that run had to. It is done
    # with it before it forks the second.
    seen = []
    for number in (1, 2, 3):
        told = teller(tmp_path / f"facts{number}")
        run = db.apply(model(tmp_path, tiny_llama, transform=told), wait=False)
        assert run.wait(240).state == "done"
        used = sum(process.memory_full_info().uss for process in settled())
        seen.append((runner.status(home)["zygote"], used))
    assert len({pid for pid, _ in seen}) == 1
    assert seen[2][1] < seen[1][1] + 30e6, "a run leaves nothing in memory"
    seeds = {json.loads((tmp_path / f"facts{number}").read_text())["seed"] for number in (1, 2, 3)}
    assert len(seeds) == 3 and None not in seeds, "random numbers are each run's own"
    log = (Path(run.record["workdir"]) / "worker.log").read_text()
    assert "Traceback" not in log
    points = [m for m in run.metrics() if "loss" in m]
    assert [m["step"] for m in points] == [1, 2]
