"""The courier, round by round: a run's folder on one side, the database on the other, no process and no cluster."""

from __future__ import annotations

import pytest

from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ArtifactError, ConnectError, NotFound
from llmnb.events import CheckpointSaved, Metric
from llmnb.job import TrainJob
from llmnb.launch import away, courier, porter, wrapping
from llmnb.query import Collection
from llmnb.store import open_folder, open_store

URL = "http://127.0.0.1:9"


class Jobs:
    """What a courier asks of a cluster."""

    def __init__(self) -> None:
        self.status, self.calls = "RUNNING", []

    def info(self, id: str) -> dict[str, str]:
        return {"status": self.status, "message": "the node went away"}

    def logs(self, id: str) -> str:
        return ""

    def stop(self, id: str) -> None:
        self.calls.append(("stop", id))

    def put_package(self, name: str, content: bytes) -> None:
        self.calls.append(("package", name, content))


@pytest.fixture
def jobs(monkeypatch):
    found = Jobs()
    monkeypatch.setattr(courier, "at", lambda url: found)
    return found


@pytest.fixture
def sent(store, tmp_path, jobs):
    """(courier, the worker's side of the folder, run id) of a run that was furnished."""
    select = Collection("texts").find()
    store.execute(Collection("texts").insert_many([{"text": "a", "_fold": "train"}, {"text": "b", "_fold": "valid"}]))
    spec, config = ModelSpec(identifier="m", model_name_or_path="base"), TrainConfig(select=select)
    version = store.models.add(spec, config)
    run = store.runs.create("m", model="m", version=version, config=config)["_id"]
    url = f"file://{tmp_path / 'away'}"
    store.runs.update(run, away=url, ray_address=URL, job=run, package="parcel.zip")
    job = TrainJob(run, spec, version, config, None, store.name, str(tmp_path / "out"), away=url)
    away.furnish(job, store, url)
    there = away.open_for(job)
    assert [row["text"] for row in there.rows(select, fold="valid")] == ["b"]
    return courier.Courier(store, open_folder(url, home=tmp_path / "home"), run), there, run


def saved(there, run, tmp_path, step: int, **more) -> CheckpointSaved:
    folder = tmp_path / f"made-{step}"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(f"weights {step}")
    (folder / "optimizer.pt").write_text(f"state {step}")
    made = there.checkpoints.put(run, step, folder, **more)
    there.models.point("m", 1, f"{run}/{step}")
    return CheckpointSaved(seq=step, step=step, digest=made.digest)


def test_a_run_comes_home_in_order_and_once(sent, store, tmp_path):
    one, there, run = sent
    assert there.runs.transition(run, "queued", "starting", owner={"host": "over-there", "pid": 1})
    assert not one.round()
    assert store.runs.get(run)["state"] == "starting" and store.runs.get(run)["owner"] is None
    there.runs.transition(run, "starting", "running", counts={"steps": 2})
    there.events.append(run, [saved(there, run, tmp_path, 1, metrics={"eval_loss": 1.0}, best=True)])
    assert not one.round() and not one.round()
    assert [(c.step, c.best, c.resumable) for c in store.checkpoints.list(run)] == [(1, True, True)]
    there.events.append(run, [saved(there, run, tmp_path, 2), Metric(seq=3, step=2, values={"loss": 0.5})])
    there.checkpoints.mark_best(run, 2)
    there.runs.transition(run, "running", "done", reason="")
    assert one.round()
    assert [event.seq for event in store.events.since(run)] == [1, 2, 3]
    assert [(c.step, c.best, c.resumable) for c in store.checkpoints.list(run)] == [(1, False, False), (2, True, True)]
    assert (store.models.get("m", 1)["checkpoint"], store.runs.get(run)["state"]) == (f"{run}/2", "done")
    assert courier.Courier(store, one.there, run).round()  # another one, after the first died
    assert len(store.events.since(run)) == 3


def test_an_event_never_tells_of_a_checkpoint_that_is_not_home(sent, store, tmp_path, monkeypatch):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    there.events.append(run, [saved(there, run, tmp_path, 1)])

    def broken(*args, **kwargs):
        raise ArtifactError("The line is down.")

    with monkeypatch.context() as patch:
        patch.setattr(one.there.checkpoints, "fetch", broken)
        with pytest.raises(ArtifactError):
            one.round()
    assert store.events.since(run) == [] and store.checkpoints.list(run) == []
    one.round()
    assert len(store.events.since(run)) == len(store.checkpoints.list(run)) == 1


def test_what_the_worker_removed_goes_here_too(sent, store, tmp_path):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    saved(there, run, tmp_path, 1)
    one.round()
    saved(there, run, tmp_path, 2)
    there.checkpoints.remove(run, 1)
    one.round()
    assert [c.step for c in store.checkpoints.list(run)] == [2]


def test_a_folder_that_is_gone_takes_nothing_with_it(sent, store, tmp_path, monkeypatch):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    saved(there, run, tmp_path, 1)
    one.round()
    monkeypatch.setattr(one, "_bring_pointer", lambda ours: there.remove())  # in the middle of a round
    with pytest.raises(NotFound):
        one.round()
    assert [c.step for c in store.checkpoints.list(run)] == [1]


def test_a_courier_of_the_attempt_before_brings_nothing_into_the_next(sent, store, tmp_path):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    assert not one.round()
    store.runs.transition(run, "running", "stopped", reason="killed")
    store.runs.reopen(run, 1, away="file:///another")
    there.events.append(run, [Metric(seq=1, step=1, values={"loss": 1.0})])
    courier.work(one)  # it ends by itself
    assert store.events.since(run) == [] and store.runs.get(run).get("courier") is None


def test_a_letter_to_a_run_that_has_not_begun_keeps_it_from_beginning(sent, store, jobs):
    one, there, run = sent
    store.runs.ask(run, "stop")
    while not one.round():
        pass
    assert store.runs.get(run)["state"] == "stopped"
    assert jobs.calls == [("stop", run), ("package", "parcel.zip", wrapping.EMPTY)]
    assert not there.runs.transition(run, "queued", "starting")


def test_a_letter_to_a_run_at_work_is_read_there(sent, store, jobs):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    store.runs.ask(run, "stop")
    assert not one.round()
    assert there.runs.control(run, 1) == "stop" and jobs.calls == []
    there.runs.transition(run, "running", "stopped", reason="stopped on request")
    assert one.round() and store.runs.get(run)["reason"] == "stopped on request"


@pytest.mark.parametrize("state, ends", [("queued", "failed"), ("running", "lost")])
def test_a_job_that_ended_without_a_word_is_told(state, ends, sent, store, jobs, monkeypatch):
    one, there, run = sent
    if state != "queued":
        there.runs.transition(run, "queued", state)
    assert not one.round()
    monkeypatch.setattr(courier, "_ASK_S", 0.0)
    assert not one.round()  # the job runs: patience
    jobs.status = "FAILED"
    assert one.round()
    told = store.runs.get(run)
    assert told["state"] == ends and "the node went away" in told["error"]["seen"]
    assert ("package", "parcel.zip", wrapping.EMPTY) in jobs.calls


def test_a_run_that_falls_silent_is_lost_and_one_that_beats_is_not(sent, store, jobs, monkeypatch):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    one.round()
    for _ in range(2):
        assert store.runs.find_lost(limit_s=-100.0, grace_s=0.0) == []  # only the courier judges
    monkeypatch.setattr(courier, "_LOST_S", 0.0)
    monkeypatch.setattr(courier, "_ASK_S", 0.0)
    assert one.round()
    assert store.runs.get(run)["state"] == "lost" and "no beat" in store.runs.get(run)["error"]["seen"]


def test_while_the_database_is_away_nothing_is_lost(sent, store, tmp_path, monkeypatch):
    one, there, run = sent
    there.runs.transition(run, "queued", "running")
    there.events.append(run, [saved(there, run, tmp_path, 1)])
    rounds = []

    def sleep(seconds: float) -> None:
        rounds.append(seconds)
        if len(rounds) == 3:
            patch.undo()
            there.runs.transition(run, "running", "done")

    patch = pytest.MonkeyPatch()
    patch.setattr(store.runs, "get", lambda id: (_ for _ in ()).throw(ConnectError("away")))
    monkeypatch.setattr(courier.time, "sleep", sleep)
    courier.work(one)
    assert rounds[:3] == [2.0, 4.0, 8.0]
    assert store.runs.get(run)["state"] == "done" and store.runs.get(run)["courier"] == courier.FINISHED
    assert not (tmp_path / "away").exists()


def test_what_fails_after_the_folder_was_furnished_leaves_no_rows(store, tmp_path):
    select = Collection("texts").find()
    store.execute(Collection("texts").insert_one({"text": "private", "_fold": "train"}))
    spec, config = ModelSpec(identifier="m", model_name_or_path="base"), TrainConfig(select=select)
    run = store.runs.create("m", model="m", version=store.models.add(spec, config), config=config)["_id"]
    url = f"file://{tmp_path / 'away'}"
    job = TrainJob(run, spec, 1, config, None, store.name, str(tmp_path / "out"), away=url)
    with pytest.raises(ValueError), away.furnished(job, store, url):
        assert list((tmp_path / "away" / "rows").iterdir())
        raise ValueError("the cluster refuses")
    assert not (tmp_path / "away").exists()


@pytest.mark.mongod
def test_a_folder_of_artifacts_that_is_not_seen_over_there_is_said(mongo_uri, tmp_path):
    folder = tmp_path / "artifacts"
    with open_store(mongo_uri, artifacts=str(folder), home=tmp_path / "home") as store:
        away.show_folder(store.settings.artifacts)
        config = TrainConfig(select=Collection("texts").find())
        job = TrainJob("r", ModelSpec(identifier="m"), 1, config, mongo_uri, store.name, str(tmp_path / "out"))
    path = job.write(tmp_path / "job.pickle")
    assert porter._unready(path) is None
    folder.rmdir()  # as it is on a machine that does not mount it
    told = porter._unready(path)
    assert str(folder) in told["seen"] and "s3://" in told["todo"]
