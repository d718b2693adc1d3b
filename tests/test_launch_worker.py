"""A run from queued to its end, whatever ends it: the record is true, the events have no gap, the model loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_engine
import pytest

from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ArtifactError, ConnectError, LaunchError, NotFound, RunError
from llmnb.events import CheckpointSaved, Metric, Note, StateChanged
from llmnb.job import TrainJob
from llmnb.launch import worker
from llmnb.launch.keeping import to_remove
from llmnb.launch.masking import Mask
from llmnb.launch.parcel import pack
from llmnb.launch.run import Run
from llmnb.launch.spool import read
from llmnb.query import Collection
from llmnb.store import open_store


@pytest.fixture(params=["mongomock", pytest.param("mongod", marks=pytest.mark.mongod)])
def store(request, tmp_path):
    uri = f"mongomock://{tmp_path.name}" if request.param == "mongomock" else request.getfixturevalue("mongo_uri")
    with open_store(uri, home=tmp_path / "home") as store:
        store.execute(Collection("texts").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(8)]))
        yield store


@pytest.fixture
def engine(monkeypatch):
    """The engine without torch, in this process."""
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake_engine)
    return fake_engine


def make_job(store, tmp_path, *, config=None, transform=None, uri=None, **arguments) -> TrainJob:
    spec = ModelSpec(identifier="sums", model_name_or_path="nowhere")
    config = config or TrainConfig(
        select=Collection("texts").find(), key="text", output_dir=str(tmp_path / "out"), arguments=arguments
    )
    version = store.models.add(spec, config)
    record = store.runs.create("sums", model="sums", version=version, config=config)
    return TrainJob(
        run=record["_id"],
        model=spec,
        version=version,
        config=config,
        uri=uri,
        database=store.name,
        workdir=str(worker.own_folder(config.output_dir, record["_id"])),
        transform=transform,
    )


def gapless(events) -> bool:
    return [event.seq for event in events] == list(range(1, len(events) + 1))


def states(events) -> list[str]:
    return [event.state for event in events if isinstance(event, StateChanged)]


# -- the good way ----------------------------------------------------------------------------------------------


def test_a_run_goes_from_queued_to_done(store, tmp_path, engine):
    job, seen = make_job(store, tmp_path, max_steps=4), []
    worker.work(job, store=store, on_event=seen.append)
    run = Run(store, job.run)
    record, events = run.record, run.events()
    assert record["state"] == "done" and record["error"] is None and record["ended"] >= record["started"]
    assert record["counts"]["steps"] == 4
    assert states(events) == ["starting", "running", "done"]
    assert gapless(events) and events == seen == read(Path(record["workdir"]) / "events.jsonl")
    assert record["last_seq"] == events[-1].seq
    assert [m["step"] for m in run.metrics()] == [1, 2, 3, 4]
    assert [c.step for c in run.checkpoints()] == [1, 2, 3, 4]
    assert store.models.get("sums")["checkpoint"] == f"{job.run}/4"
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    assert [s.digest for s in saved] == [c.digest for c in run.checkpoints()]
    assert repr(run).startswith(f"<Run {job.run}: done, step 4/4")
    assert run.wait(1) is run


def test_trap20_the_limit_keeps_the_best_and_the_newest(store, tmp_path, engine):
    job = make_job(
        store,
        tmp_path,
        max_steps=6,
        save_total_limit=2,
        load_best_model_at_end=True,
        losses=[5.0, 1.0, 4.0, 3.0, 3.5, 2.0],
    )
    worker.work(job, store=store)
    checkpoints = store.checkpoints.list(job.run)
    assert [c.step for c in checkpoints] == [2, 6]
    assert [c.step for c in checkpoints if c.best] == [2]
    assert store.models.get("sums")["checkpoint"] == f"{job.run}/2"


def test_the_model_points_at_the_newest_when_no_best_is_asked_for(store, tmp_path, engine):
    job = make_job(store, tmp_path, max_steps=3, save_total_limit=1, losses=[1.0, 2.0, 3.0])
    worker.work(job, store=store)
    assert [c.step for c in store.checkpoints.list(job.run)] == [3]
    assert store.models.get("sums")["checkpoint"] == f"{job.run}/3"


@pytest.mark.parametrize(
    ("steps", "limit", "best", "gone"),
    [
        ([1, 2, 3], None, None, []),
        ([1, 2, 3], 0, 1, []),
        ([1, 2, 3, 4], 3, None, [1]),
        ([1, 2, 3, 4], 2, 1, [2, 3]),
        ([1, 2, 3, 4], 1, 1, [2, 3]),
        ([1, 2, 3, 4], 1, 4, [1, 2, 3]),
        ([1, 2, 3, 4], 3, 9, [1]),
        ([], 2, None, []),
    ],
)
def test_which_checkpoints_go(steps, limit, best, gone):
    assert to_remove(steps, limit, best) == gone


def test_a_broken_follower_does_not_end_the_training(store, tmp_path, engine, capsys):
    def broken(event):
        raise RuntimeError("no screen")

    job = make_job(store, tmp_path)
    worker.work(job, store=store, on_event=broken)
    assert Run(store, job.run).state == "done"
    assert capsys.readouterr().err.count("no screen") == 1


def test_log_to_db_false_keeps_the_events_in_the_spool(store, tmp_path, engine):
    config = TrainConfig(
        select=Collection("texts").find(), key="text", output_dir=str(tmp_path / "out"), log_to_db=False
    )
    job = make_job(store, tmp_path, config=config)
    worker.work(job, store=store)
    run = Run(store, job.run)
    assert store.events.since(job.run) == []
    assert states(run.events()) == ["starting", "running", "done"] and gapless(run.events())
    assert [m["step"] for m in run.metrics()] == [1, 2, 3, 4]
    assert run.state == "done" and run.record["last_seq"] == run.events()[-1].seq
    assert [c.step for c in run.checkpoints()] == [1, 2, 3, 4]


def test_a_run_begins_once(store, tmp_path, engine):
    job = make_job(store, tmp_path)
    worker.work(job, store=store)
    with pytest.raises(RunError, match="cannot begin"):
        worker.work(job, store=store)
    assert Run(store, job.run).state == "done"


def test_named_validation_sets_and_the_valid_fold(store, tmp_path, monkeypatch):
    seen = {}

    def train(spec, config, data, hooks, **more):
        seen.update({name: [row["text"] for row in rows()] for name, rows in data.items()})
        return fake_engine.train(spec, config, data, hooks, **more)

    fake = type(sys)("fake")
    fake.train = train
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake)
    store.execute(Collection("texts").insert_many([{"text": "v", "_fold": "valid"}]))
    store.execute(Collection("other").insert_many([{"text": "o", "_fold": "train"}]))
    worker.work(make_job(store, tmp_path), store=store)
    assert len(seen.pop("train")) == 8 and seen == {"valid": ["v"]}
    seen.clear()
    config = TrainConfig(
        select=Collection("texts").find(),
        output_dir=str(tmp_path / "out"),
        eval_selects={"others": Collection("other").find()},
    )
    worker.work(make_job(store, tmp_path, config=config), store=store)
    assert len(seen.pop("train")) == 8 and seen == {"others": ["o"]}


# -- the ways a run fails --------------------------------------------------------------------------------------


def test_a_failed_run_says_why_and_leaves_the_model_as_it_was(store, tmp_path, engine):
    good = make_job(store, tmp_path)
    worker.work(good, store=store)

    def broken(text):
        raise ValueError("the transform broke at " + text)

    job = make_job(store, tmp_path, transform=broken)
    with pytest.raises(ValueError, match="the transform broke"):
        worker.work(job, store=store)
    run = Run(store, job.run)
    error = run.error
    assert run.state == "failed"
    assert error["type"] == "ValueError" and error["what"].startswith("the transform broke at 0+1=1")
    assert "in broken" in error["traceback"]
    assert states(run.events())[-1] == "failed" and gapless(run.events())
    assert store.models.get("sums")["checkpoint"] == f"{good.run}/4"
    with pytest.raises(RunError, match="the transform broke") as caught:
        run.wait(1)
    assert "in broken" in caught.value.remote_traceback
    assert "in broken" in str(caught.value.__cause__)


def test_no_space_for_a_checkpoint_fails_with_a_reason(store, tmp_path, engine, monkeypatch):
    def full(*args, **kwargs):
        raise ArtifactError("No space left for the checkpoint.", seen="28", todo="make room")

    monkeypatch.setattr(store.checkpoints, "put", full)
    job = make_job(store, tmp_path)
    with pytest.raises(ArtifactError):
        worker.work(job, store=store)
    assert Run(store, job.run).error["todo"] == "make room"
    with pytest.raises(NotFound):
        store.models.get("sums")


def test_an_output_dir_that_cannot_be_written_is_said(store, tmp_path, engine):
    (tmp_path / "out").write_text("a file is in the way")
    job = make_job(store, tmp_path)
    with pytest.raises(ArtifactError, match="output folder"):
        worker.work(job, store=store)
    assert Run(store, job.run).state == "failed"


def test_secrets_are_masked_wherever_they_stand(store, tmp_path, engine):
    uri = "mongodb://anna:s3cr%40tpw@example.org:27017/shop"

    def broken(text):
        raise ValueError(f"cannot connect to {uri} with s3cr@tpw")

    job = make_job(store, tmp_path, transform=broken, uri=uri)
    with pytest.raises(ValueError):
        worker.work(job, store=store)
    run = Run(store, job.run)
    everything = json.dumps(run.record, default=str) + repr(run.events()) + repr(job)
    everything += "".join(p.read_text(errors="replace") for p in Path(run.record["workdir"]).rglob("*") if p.is_file())
    assert "s3cr" not in everything
    assert "mongodb://***@example.org:27017/shop" in run.error["what"]


def test_the_mask():
    mask = Mask(["mongodb+srv://u:p%2Fw0rd@h/d", "hf_abcdefgh", None, "", "mongodb://localhost/x"])
    assert mask("u:p%2Fw0rd and p/w0rd and hf_abcdefgh") == "*** and *** and ***"
    assert (
        mask("see s3://key:secret@bucket/x, and mail me@example.org")
        == "see s3://***@bucket/x, and mail me@example.org"
    )
    assert mask("mongodb://localhost/x") == "mongodb://localhost/x"
    assert "p%2Fw0rd" not in repr(mask)


# -- stopping --------------------------------------------------------------------------------------------------


def in_thread(job, store):
    """The run on a thread, until it says that it is running."""
    thread = threading.Thread(target=lambda: worker.work(job, store=store), daemon=True)
    thread.start()
    wait_for(lambda: Run(store, job.run).metrics())
    return thread


def wait_for(what, limit: float = 30.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")


def test_trap22_stop_saves_a_checkpoint_with_what_resuming_needs(store, tmp_path, engine):
    job = make_job(store, tmp_path, max_steps=2000, pause_ms=10, save_steps=5000)
    thread = in_thread(job, store)
    run = Run(store, job.run)
    run.stop()
    run.stop()  # a second person presses it, too
    assert run.wait(20).state == "stopped"
    thread.join(5)
    events = run.events()
    assert states(events) == ["starting", "running", "stopping", "stopped"] and gapless(events)
    (checkpoint,) = run.checkpoints()
    assert checkpoint.resumable
    assert (store.checkpoints.fetch(checkpoint, resume=True) / "optimizer.pt").exists()
    assert store.models.get("sums")["checkpoint"] == str(checkpoint)
    with pytest.raises(RunError, match="ended already"):
        run.stop()


def test_kill_ends_without_a_checkpoint(store, tmp_path, engine):
    job = make_job(store, tmp_path, max_steps=2000, pause_ms=10, save_steps=5000)
    thread = in_thread(job, store)
    run = Run(store, job.run)
    run.kill()
    assert run.wait(20).state == "stopped"
    thread.join(5)
    assert run.checkpoints() == []


def test_stop_before_it_began(store, tmp_path, engine):
    job = make_job(store, tmp_path)
    run = Run(store, job.run)
    run.stop()
    assert run.state == "stopped" and states(run.events()) == ["stopped"]
    with pytest.raises(RunError, match="cannot begin"):
        worker.work(job, store=store)
    assert run.state == "stopped"


def test_an_interrupt_stops_with_a_checkpoint(store, tmp_path, engine):
    job = make_job(store, tmp_path, max_steps=2000, pause_ms=10, save_steps=5000)
    said = []

    def press(event):
        said.append(event)
        if isinstance(event, Metric) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        worker.work(job, store=store, on_event=press)
    assert signal.getsignal(signal.SIGINT) is before
    run = Run(store, job.run)
    assert run.state == "stopped" and run.record["reason"] == "interrupted"
    assert len(run.checkpoints()) == 1 and gapless(run.events())


def test_an_interrupt_before_the_first_step_leaves_a_true_state(store, tmp_path, monkeypatch):
    fake = type(sys)("fake")

    def train(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    fake.train = train
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake)
    job = make_job(store, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        worker.work(job, store=store)
    assert Run(store, job.run).state == "stopped"


def test_a_second_interrupt_ends_at_once_also_while_the_database_is_away(store, tmp_path, engine, monkeypatch, capsys):
    """The first one's checkpoint cannot be stored, and would be waited for."""
    job = make_job(store, tmp_path, max_steps=2000, pause_ms=10, save_steps=5000)
    began = []

    def away(*args, **kwargs):
        raise ConnectError("away")

    def press(event):
        if isinstance(event, Metric) and event.step == 3:
            for room, name in [(store.runs, "transition"), (store.runs, "beat"), (store.runs, "control")]:
                monkeypatch.setattr(room, name, away)
            for room, name in [(store.events, "append"), (store.checkpoints, "put")]:
                monkeypatch.setattr(room, name, away)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=later, daemon=True).start()

    def later():
        time.sleep(2)
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        worker.work(job, store=store, on_event=press)
    assert began and time.monotonic() - began[0] < 10, "and not the minutes that a job waits"
    assert "the database is away" in capsys.readouterr().err


# -- the database goes away ------------------------------------------------------------------------------------


def test_a_database_that_is_away_for_a_while_loses_nothing(store, tmp_path, engine, monkeypatch):
    """Every write is refused for two seconds in the middle of the run."""
    away_until = [0.0]

    def refusing(method):
        def call(*args, **kwargs):
            if time.monotonic() < away_until[0]:
                raise ConnectError("away")
            return method(*args, **kwargs)

        return call

    for room, name in (
        (store.runs, "transition"),
        (store.runs, "beat"),
        (store.runs, "control"),
        (store.events, "append"),
        (store.checkpoints, "put"),
        (store.checkpoints, "list"),
        (store.models, "point"),
    ):
        monkeypatch.setattr(room, name, refusing(getattr(room, name)))

    def cut(event):
        if isinstance(event, Metric) and event.step == 2:
            away_until[0] = time.monotonic() + 2.5

    job = make_job(store, tmp_path, max_steps=4)
    worker.work(job, store=store, on_event=cut)
    run = Run(store, job.run)
    assert run.state == "done"
    assert gapless(run.events()) and [m["step"] for m in run.metrics()] == [1, 2, 3, 4]
    assert [c.step for c in run.checkpoints()] == [1, 2, 3, 4]
    assert run.events() == read(Path(run.record["workdir"]) / "events.jsonl")


def test_a_run_called_lost_by_mistake_is_found_again(store, tmp_path, engine):
    job = make_job(store, tmp_path, max_steps=400, pause_ms=10, save_steps=1000)
    thread = in_thread(job, store)
    assert store.runs.transition(job.run, "running", "lost")
    wait_for(lambda: Run(store, job.run).state == "running")
    Run(store, job.run).stop()
    thread.join(20)
    assert Run(store, job.run).state == "stopped"


# -- folders (trap 25) -----------------------------------------------------------------------------------------


def test_trap25_two_runs_with_one_output_dir_never_mix(store, tmp_path, engine):
    first, second = make_job(store, tmp_path, max_steps=4), make_job(store, tmp_path, max_steps=2)
    worker.work(first, store=store)
    worker.work(second, store=store)
    runs = [Run(store, job.run) for job in (first, second)]
    folders = [Path(run.record["workdir"]) for run in runs]
    assert folders[0] != folders[1] and all(f.parent == tmp_path / "out" for f in folders)
    assert [len(list(f.glob("checkpoint-*"))) for f in folders] == [4, 2]
    assert [c.step for c in runs[1].checkpoints()] == [1, 2]
    assert gapless(runs[1].events()) and len(runs[1].metrics()) == 2


def test_trap25_a_job_that_names_the_shared_folder_still_gets_its_own(store, tmp_path, engine):
    from dataclasses import replace

    jobs = [replace(make_job(store, tmp_path, max_steps=n), workdir=str(tmp_path / "out")) for n in (3, 1)]
    for job in jobs:
        worker.work(job, store=store)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert [c.step for c in store.checkpoints.list(jobs[1].run)] == [1]


def test_trap25_a_folder_of_another_run_is_refused(store, tmp_path, engine):
    job = make_job(store, tmp_path)
    folder = Path(job.workdir)
    folder.mkdir(parents=True)
    (folder / "run").write_text("20200101-000000-000-other\n")
    with pytest.raises(LaunchError, match="another run"):
        worker.work(job, store=store)
    assert Run(store, job.run).state == "failed"


# -- as a process of its own -----------------------------------------------------------------------------------

AS_PROCESS = (
    "import sys; sys.path.insert(0, {tests!r}); import fake_engine;"
    "sys.modules['llmnb.engine.training'] = fake_engine;"
    "from llmnb.launch.worker import main; sys.exit(main(sys.argv[1:]))"
)


def start_process(job, tmp_path, **pipes) -> subprocess.Popen:
    path = pack(job, Path(job.workdir), tmp_path / "home")
    code = AS_PROCESS.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes)


@pytest.fixture
def server_store(mongo_uri, tmp_path):
    with open_store(mongo_uri, home=tmp_path / "home") as store:
        store.execute(Collection("texts").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(8)]))
        yield store


@pytest.mark.mongod
def test_trap23_an_undrained_pipe_never_blocks_training(server_store, tmp_path):
    """The run prints far more than a pipe holds, into pipes that nobody reads."""
    job = make_job(server_store, tmp_path, uri=server_store.uri, max_steps=20, save_steps=20, say_much=100_000)
    process = start_process(job, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert Run(server_store, job.run).wait(240).state == "done"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    assert len(Run(server_store, job.run).logs(1)) == 100_000


@pytest.mark.mongod
def test_trap23_a_reader_that_dies_does_not_end_the_training(server_store, tmp_path):
    """As when a kernel is killed: the other end of the worker's pipes is gone."""
    job = make_job(
        server_store, tmp_path, uri=server_store.uri, max_steps=60, pause_ms=20, save_steps=60, say_much=2000
    )
    process = start_process(job, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    try:
        assert Run(server_store, job.run).wait(240).state == "done"
    finally:
        process.kill()
        process.wait()


@pytest.mark.mongod
def test_sigterm_stops_with_a_checkpoint(server_store, tmp_path):
    job = make_job(server_store, tmp_path, uri=server_store.uri, max_steps=9000, pause_ms=10, save_steps=9999)
    process = start_process(job, tmp_path)
    run = Run(server_store, job.run)
    try:
        wait_for(run.metrics, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert run.state == "stopped" and len(run.checkpoints()) == 1 and gapless(run.events())


@pytest.mark.mongod
def test_a_killed_worker_is_noticed(server_store, tmp_path):
    job = make_job(server_store, tmp_path, uri=server_store.uri, max_steps=9000, pause_ms=10, save_steps=9999)
    process = start_process(job, tmp_path)
    run = Run(server_store, job.run)
    wait_for(run.metrics, 60)
    process.kill()
    process.wait()
    with pytest.raises(RunError, match="lost"):
        run.wait(30)
    assert run.state == "lost" and str(process.pid) in run.error["seen"]
    with pytest.raises(NotFound):
        server_store.models.get("sums")


@pytest.mark.mongod
def test_the_parcel_is_private_and_gone_after_it_was_read(server_store, tmp_path):
    job = make_job(server_store, tmp_path, uri=server_store.uri)
    folder = Path(job.workdir)
    path = pack(job, folder, tmp_path / "home")
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o600"}
    code = AS_PROCESS.format(tests=str(Path(__file__).parent))
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
    assert not list(folder.glob("job.*"))
    assert Run(server_store, job.run).state == "done"


def test_the_count_note_travels(store, tmp_path, engine):
    job = make_job(store, tmp_path)
    worker.work(job, store=store)
    (note,) = [event for event in Run(store, job.run).events() if isinstance(event, Note)]
    assert note.text == "8 rows, 4 steps" and note.data["rows"] == 8


def test_a_mark_that_a_full_disk_refused_is_nobody_s(tmp_path):
    from llmnb.launch.worker import _claim

    (tmp_path / "run").touch()
    _claim(tmp_path, "a")
    assert (tmp_path / "run").read_text().strip() == "a"
    with pytest.raises(LaunchError, match="belongs to another run"):
        _claim(tmp_path, "b")
