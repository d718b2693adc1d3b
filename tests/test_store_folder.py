"""A store in a folder: what a run's worker does with a database, done with files, on this machine's disk and on S3."""

from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path

import pytest
from bson import ObjectId
from bucket import BUCKET
from hypothesis import given
from hypothesis import strategies as some

from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConnectError, NotFound, RunError
from llmnb.events import Metric, Note
from llmnb.query import Collection
from llmnb.store import open_folder
from llmnb.store.matching import changed, matches
from llmnb.store.tables import Duplicate

SELECT = Collection("texts").find({"n": {"$gt": 1}})


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path / 'away'}"
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def folder(url, tmp_path):
    """A folder that was furnished with run "r" of version 1 of model "m"."""
    with open_folder(url, home=tmp_path / "home") as folder:
        config = TrainConfig(select=SELECT).to_json()
        run = {"_id": "r", "state": "queued", "model": "m", "version": 1, "config": config, "attempt": 1, "last_seq": 3}
        spec = ModelSpec(identifier="m").to_json()
        model = {"_id": "m/1", "identifier": "m", "version": 1, "spec": spec, "config": config, "checkpoint": None}
        folder.adopt({**run, "control": None, "heartbeat": None}, {**model, "ready": False})
        yield folder


def saved(folder, tmp_path, step: int, text: str, **more):
    made = tmp_path / f"made-{step}"
    made.mkdir(exist_ok=True)
    (made / "adapter_model.safetensors").write_text(text)
    (made / "optimizer.pt").write_text(f"state {step}")
    return folder.checkpoints.put("r", step, made, **more)


def test_a_run_goes_through_its_states_and_two_writers_keep_each_others_fields(folder, url, tmp_path):
    rank0 = open_folder(url, home=tmp_path / "other")
    assert folder.runs.get("r")["config"]["select"] == json.loads(json.dumps(SELECT.to_json()))
    assert folder.runs.transition("r", "queued", "starting", attempt=1, owner={"host": "a", "pid": 1})
    assert not rank0.runs.transition("r", "queued", "starting")
    assert rank0.runs.transition("r", "starting", "running", counts={"steps": 4})
    assert folder.runs.beat("r", 1) and rank0.runs.beat("r", 1)
    rank0.runs.update("r", rank0={"pid": 2})
    assert folder.runs.ask("r", "stop") and rank0.runs.control("r", 1) == "stop"
    assert not folder.runs.beat("r", 2)
    for seen in (folder.runs.get("r"), rank0.runs.get("r"), open_folder(url, home=tmp_path).runs.get("r")):
        assert (seen["state"], seen["counts"], seen["rank0"]["pid"]) == ("running", {"steps": 4}, 2)
        assert isinstance(seen["heartbeat"], dt.datetime) and seen["heartbeat"].tzinfo is not None
    assert rank0.runs.transition("r", ("running", "stopping"), "stopped", error=None)
    assert not folder.runs.beat("r")
    with pytest.raises(NotFound):
        folder.runs.get("another")
    with pytest.raises(RunError):
        folder.runs.update("r", state="done")


def test_events_have_their_numbers_once(folder, url, tmp_path):
    said = [Metric(seq=n, step=n, values={"loss": math.nan if n == 2 else 1.0 / n}) for n in range(1, 6)]
    folder.events.append("r", said[:3])
    folder.events.append("r", said[1:])
    folder.events.append("r", [Note(seq=5, text="too late")])
    seen = open_folder(url, home=tmp_path).events
    assert [event.seq for event in seen.since("r")] == [1, 2, 3, 4, 5]
    assert math.isnan(seen.since("r")[1].values["loss"]) and seen.since("r", 4) == said[4:]
    assert seen.last_seq("r") == 5 and folder.runs.get("r")["last_seq"] == 5


def test_checkpoints_and_the_model_that_points_at_them(folder, url, tmp_path):
    saved(folder, tmp_path, 1, "one", metrics={"eval_loss": math.inf}, best=True)
    second = saved(folder, tmp_path, 2, "two")
    folder.models.point("m", 1, "r/2")
    there = open_folder(url, home=tmp_path / "there")
    assert [(c.step, c.best, c.resumable) for c in there.checkpoints.list("r")] == [(1, True, False), (2, False, True)]
    assert there.checkpoints.get("r", 1).metrics == {"eval_loss": math.inf}
    assert (there.checkpoints.fetch(second, resume=True) / "optimizer.pt").read_text() == "state 2"
    assert there.models.get("m", 1)["checkpoint"] == "r/2"
    folder.checkpoints.remove("r", 1)
    assert [c.step for c in there.checkpoints.list("r")] == [2]
    assert saved(folder, tmp_path, 1, "one again").digest != second.digest
    assert [c.step for c in there.checkpoints.list("r")] == [1, 2]
    assert not there.checkpoints.get("r", 1).best  # nothing of what was removed shines through


def test_rows_keep_their_types_and_their_order(folder, url, tmp_path):
    when = dt.datetime(2026, 11, 21, tzinfo=dt.timezone.utc)
    rows = [{"_id": ObjectId(), "n": 2**40, "x": 1.0, "when": when, "b": b"\x00"}, {"text": "no id"}, {"n": None}]
    folder.put_rows(SELECT, "train", iter(rows))
    there = open_folder(url, home=tmp_path / "there")
    assert list(there.rows(SELECT, fold="train")) == rows
    assert list(there.rows(SELECT, fold="train", limit=1)) == rows[:1]
    with pytest.raises(NotFound, match="texts"):
        next(iter(there.rows(SELECT, fold="valid")))
    folder.remove()
    with pytest.raises(NotFound):
        there.runs.get("r")
    folder.remove()


def test_a_key_is_taken_once(folder):
    table = folder._table("words")
    table.insert({"_id": "a/b c", "n": 1})
    with pytest.raises(Duplicate):
        table.insert({"_id": "a/b c", "n": 2})
    with pytest.raises(Duplicate):
        table.insert_many([{"_id": "x"}, {"_id": "a/b c"}])
    assert table.find({}) == [{"_id": "a/b c", "n": 1}]
    assert table.change({"_id": "c"}, {"$inc": {"last": 1}}, upsert=True) == {"_id": "c", "last": 1}
    assert table.delete({}) == 2 and table.count({}) == 0


def test_a_folder_that_is_away_is_away_as_a_database_is(folder, url, monkeypatch):
    def away(*args, **kwargs):
        raise ConnectionResetError("the line is down")

    for name in ("cat_file", "pipe_file", "ls"):
        monkeypatch.setattr(folder._folder.fs, name, away, raising=False)
    with pytest.raises(ConnectError, match="does not answer"):
        folder.runs.beat("r")


WORDS = some.sampled_from(["a", "b", None, 1, 2.5])
RECORDS = some.fixed_dictionaries({"x": WORDS}, optional={"y": some.lists(WORDS, max_size=3), "z": WORDS})
FILTERS = some.one_of(
    some.fixed_dictionaries({"x": WORDS}),
    some.fixed_dictionaries({"z": some.fixed_dictionaries({"$exists": some.booleans()})}),
    some.fixed_dictionaries(
        {"y": some.dictionaries(some.sampled_from(["$in", "$nin"]), some.lists(WORDS, max_size=2), min_size=1)}
    ),
    some.fixed_dictionaries({"z": some.dictionaries(some.sampled_from(["$ne", "$eq"]), WORDS, min_size=1)}),
    some.fixed_dictionaries({"$or": some.lists(some.fixed_dictionaries({"x": WORDS}), min_size=1, max_size=2)}),
)


@pytest.fixture(scope="module")
def server(mongod):
    import pymongo

    with pymongo.MongoClient(mongod.uri) as client:
        yield client["matching"]["records"]
        client.drop_database("matching")


@pytest.mark.mongod
@given(records=some.lists(RECORDS, min_size=1, max_size=4), filter=FILTERS)
def test_matching_is_what_mongodb_does(server, records, filter):
    server.drop()
    server.insert_many([{**record, "_id": n} for n, record in enumerate(records)])
    theirs = [found["_id"] for found in server.find(filter).sort("_id", 1)]
    assert [n for n, record in enumerate(records) if matches(record, filter)] == theirs


@pytest.mark.mongod
def test_changing_is_what_mongodb_does(server):
    server.drop()
    record = {"_id": 1, "n": 2, "old": 1, "claims": [{"id": "a"}, {"id": "b"}]}
    change = {
        "$set": {"new": {"deep": 1}},
        "$unset": {"old": ""},
        "$inc": {"n": 3, "m": 1},
        "$max": {"top": 4},
        "$pull": {"claims": {"id": "a"}},
    }
    for step in (change, {"$push": {"claims": {"id": "c"}}, "$max": {"top": 3}}):
        server.replace_one({"_id": 1}, record, upsert=True)
        server.update_one({"_id": 1}, step)
        record = changed(record, step)
        assert record == server.find_one({"_id": 1})
    for unknown in ({"$rename": {"n": "k"}}, {"$set": {"a.b": 1}}):
        with pytest.raises(NotImplementedError):
            changed(record, unknown)
    with pytest.raises(NotImplementedError):
        matches(record, {"n": {"$mod": [2, 0]}})


def test_only_whole_files_are_read(tmp_path):
    folder = open_folder(str(tmp_path / "away"), home=tmp_path)
    table = folder._table("words")
    table.insert({"_id": "a"})
    (file,) = (tmp_path / "away" / "records" / "words").iterdir()
    Path(f"{file}.1234.part").write_text('{"a": {"x":')  # a writer that died
    assert table.find({}) == [{"_id": "a"}]
