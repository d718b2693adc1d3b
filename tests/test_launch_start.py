"""Starting and following: the handle, the progress line, what is refused before any work; the real engine stopped."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import LaunchError, NotFound, RunError
from llmnb.events import CheckpointSaved, Metric, Note, StateChanged
from llmnb.launch import cluster, machine
from llmnb.launch.progress import Progress


@pytest.fixture
def db(tmp_path):
    db = connect(f"mongomock://{tmp_path.name}", home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(32)]))
    return db


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake_engine)


def model(base, tmp_path, **changes) -> LLM:
    settings = {
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 1,
        "max_seq_length": 32,
        "logging_steps": 1,
        "save_steps": 1000,
        "use_cpu": True,
    }
    return LLM("sums", base, trainer=LLMTrainer("t", **{**settings, **changes}))


def test_what_cannot_be_honoured_is_refused_before_a_run_is_recorded(db, engine, tmp_path):
    for changes in ({"num_gpus": 2}, {"ray_configs": {"run_config": {}}}, {"deepspeed": {}}):
        with pytest.raises(LaunchError, match="lives in this process"):
            db.apply(model("base", tmp_path, **changes))
        with pytest.raises(LaunchError, match="lives in this process"):
            db.apply(model("base", tmp_path, **changes), wait=False)
    assert db.runs() == [] and db.show("model") == []


def test_not_waited_for_it_goes_on_in_this_process_when_the_database_does(db, engine, tmp_path):
    run = db.apply(model("base", tmp_path, max_steps=3), wait=False)
    seen = []
    assert run.wait(30, on_event=seen.append).state == "done"
    assert [m["step"] for m in run.metrics()] == [1, 2, 3]
    assert seen == run.events()


def test_waiting_too_short_says_that_the_run_goes_on(db, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE_PAUSE_MS", "10")
    run = db.apply(model("base", tmp_path, max_steps=500), wait=False)
    with pytest.raises(RunError, match="has not ended"):
        run.wait(0.3)
    run.stop()
    assert run.wait(30).state == "stopped"


def test_a_removed_run_still_has_a_repr(db, engine, tmp_path):
    run = db.apply(model("base", tmp_path, max_steps=1))
    assert "step 1/1" in repr(run)
    db.remove("run", run.id)
    assert repr(run) == f"<Run {run.id}: removed>"
    with pytest.raises(NotFound):
        _ = run.state


# -- with the real engine --------------------------------------------------------------------------------------


def test_trap22_a_stopped_run_of_the_real_engine_resumes_where_it_was(db, tiny_llama, tmp_path):
    stops = []

    def press(event):
        if isinstance(event, Metric) and event.step == 3 and not stops:
            stops.append(db.run("latest"))
            stops[0].stop()

    llm = model(tiny_llama, tmp_path, max_steps=4000)
    run = db.apply(llm, on_event=press)
    assert run.state == "stopped"
    (checkpoint,) = run.checkpoints()
    assert 3 <= checkpoint.step < 4000 and checkpoint.resumable
    folder = db.store.checkpoints.fetch(checkpoint, resume=True)
    needed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"}
    assert needed <= {path.name for path in folder.rglob("*")}

    run.resume(max_steps=checkpoint.step + 2)
    assert [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, checkpoint.step + 3))
    assert run.state == "done"


# -- a cluster that is slow ------------------------------------------------------------------------------------


KILLED = """
import os, sys
import llmnb.launch.runner as runner
import llmnb.launch.start as start
from llmnb import LLM, Collection, LLMTrainer, connect
uri, home, base, when = sys.argv[1:]
killed = lambda *words, **more: os.kill(os.getpid(), 9)
if when == "recorded":
    start._to_our_runner = killed
else:
    runner.submit = killed
db = connect(uri, home=home)
trainer = LLMTrainer("t", select=Collection("sums").find(), key="text", output_dir=home + "/out", use_cpu=True)
db.apply(LLM("sums", base, trainer=trainer), wait=False)
"""


@pytest.mark.mongod
@pytest.mark.parametrize("when", ["recorded", "named"])
def test_a_run_whose_starter_is_killed_before_it_is_handed_over_is_lost_at_once(mongo_uri, tiny_llama, tmp_path, when):
    db = connect(mongo_uri, home=tmp_path)
    db.execute(Collection("sums").insert_many([{"text": f"{i}", "_fold": "train"} for i in range(8)]))
    killed = subprocess.run([sys.executable, "-c", KILLED, mongo_uri, str(tmp_path), tiny_llama, when], check=False)
    assert killed.returncode == -9
    run = db.run()
    assert run.record["state"] == "queued" and bool(run.record.get("runner")) is (when == "named")
    assert run.look() == "lost" and "before the run began" in str(run.error)
    db.store.runs.reopen(run.id, 1, starter={**machine.this_process(), "since": time.time()})
    assert run.look() == "queued", "whoever starts it is alive"
    db.close()


def test_a_cluster_that_is_slow_to_answer_is_not_ended(tmp_path, monkeypatch):
    """Its processes live, so runs may be on it: it is waited for."""
    import psutil

    me = psutil.Process()
    found = cluster.Cluster("m", "127.0.0.1:8", str(tmp_path), {str(me.pid): me.create_time()}, "")
    found = cluster.Cluster(**{**found.__dict__, "home": str(tmp_path)})
    (tmp_path / "ray.json").write_text(json.dumps(found.__dict__))
    found.token_file.write_text("token")
    answers, ended = iter([False, False, True]), []
    monkeypatch.setattr(cluster, "_answers", lambda found: next(answers))
    monkeypatch.setattr(cluster, "_end_marked", lambda *args: ended.append(args))
    assert cluster.ensure(tmp_path) == found and ended == []
    monkeypatch.setattr(cluster, "_answers", lambda found: False)
    monkeypatch.setattr(cluster, "_ANSWER_LIMIT_S", 0.3)
    with pytest.raises(LaunchError, match="does not answer"):
        cluster.ensure(tmp_path)
    assert ended == []


def test_a_cluster_that_ends_instead_of_answering_makes_room_for_a_new_one(tmp_path, monkeypatch):
    """A head that was told to end closes its port before its process is gone."""
    import psutil

    head = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found = cluster.Cluster(
        "m", "127.0.0.1:8", "", {str(head.pid): psutil.Process(head.pid).create_time()}, str(tmp_path)
    )
    (tmp_path / "ray.json").write_text(json.dumps(found.__dict__))
    found.token_file.write_text("token")
    asked = []

    def answers(found):
        asked.append(found)
        if len(asked) == 3:
            head.kill()
        return False

    monkeypatch.setattr(cluster, "_answers", answers)
    monkeypatch.setattr(cluster, "_start", lambda home: "a new one")
    assert cluster.ensure(tmp_path) == "a new one" and len(asked) < 10
    head.wait()


def test_a_cluster_of_dead_processes_is_none(tmp_path):
    (tmp_path / "ray.json").write_text(
        json.dumps({"mark": "m", "address": "", "temp_dir": "", "pids": {"1": 1.0}, "home": str(tmp_path)})
    )
    assert cluster.status(tmp_path) is None
    (tmp_path / "ray.json").write_text("{torn")
    assert cluster.status(tmp_path) is None


# -- the progress line -----------------------------------------------------------------------------------------


def story() -> list:
    metrics = [Metric(step=i, time=100.0 + i, values={"loss": 1 / i, "tokens_per_second": 1234.5}) for i in range(1, 6)]
    return [
        StateChanged(state="running"),
        Note(text="32 rows, 10 steps", data={"steps": 10}),
        *metrics,
        CheckpointSaved(step=5, digest="d", size=2_000_000, metrics={"eval_loss": 0.25}, best=True),
        Note(level="warning", text="the loss is [bold]"),
        StateChanged(state="done"),
    ]


def test_progress_in_plain_lines():
    out = io.StringIO()
    with Progress("run-1", out=out) as progress:
        for event in story():
            progress(event)
        assert progress.seconds_left(105.0) == pytest.approx(5.0)
    text = out.getvalue()
    assert "run-1: running" in text and "step 1/10  loss 1.0000  1,234 tokens/s" in text
    assert "checkpoint 5 saved, 2.0 MB, eval_loss 0.25 (best)" in text and "warning: the loss is [bold]" in text


def test_progress_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("run-1", out=out) as progress:
        for event in story():
            progress(event)
    text = out.getvalue()
    assert "5/10" in text and "loss 0.2000" in text and "1,234 tokens/s" in text and "ETA" in text
    assert "[bold]" in text


def test_gpus_that_are_hidden_are_not_counted(monkeypatch):
    from llmnb.launch import machine

    for value, names in (("", []), ("-1", []), ("0", ["0"]), ("0, 2", ["0", "2"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        machine.gpus_visible.cache_clear()
        assert machine.gpus_visible() == len(names) and machine.devices() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    machine.gpus_visible.cache_clear()
    assert machine.gpus_visible() == len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    machine.gpus_visible.cache_clear()


@pytest.mark.ray
def test_a_storage_path_that_ray_made_up_is_none_of_the_person_s(tmp_path):
    """Ray fills in a folder of the home, where a person said nothing: nothing of a run may lie there."""
    from ray.train import FailureConfig, RunConfig

    from llmnb.launch.rayconfigs import storage_path

    assert storage_path(None) is None
    assert storage_path(RunConfig(failure_config=FailureConfig(max_failures=1))) is None
    assert storage_path(RunConfig(storage_path=str(tmp_path))) == str(tmp_path)
