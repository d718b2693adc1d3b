"""The bottom floors: errors, queries, events, checkpoints, jobs as values."""

import datetime as dt
import inspect
import json
import math
import os
import pickle
import re

import pytest

from llmnb import Checkpoint, Collection, Document, errors, events
from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConfigError, Fault, LlmnbError, NotFound, QueryError
from llmnb.job import TrainJob
from llmnb.query import from_json


def test_every_error_pickles_with_all_it_says():
    made = [
        ConfigError([Fault("bits", "6 is not possible", "use 4"), Fault("x", "y")]),
        NotFound("model", "lm", ["llm", "other"]),
        errors.MissingPackage("ray", "ray", "A background run"),
        errors.RunError("The run failed.", seen=3, todo="look", remote_traceback="Traceback …"),
    ]
    plain = {
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, LlmnbError) and cls not in {type(e) for e in made}
    }
    made += [cls("It broke.", seen=[1], todo="mend it") for cls in plain]
    for error in made:
        twin = pickle.loads(pickle.dumps(error))
        assert type(twin) is type(error) and str(twin) == str(error) and vars(twin) == vars(error)


def test_the_tree_in_the_docstring_is_the_tree():
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, LlmnbError):
            assert re.search(rf"\b{name}\b", errors.__doc__), name
            assert name in errors.__all__


def test_not_found_offers_near_names():
    assert "did you mean 'llm'?" in str(NotFound("model", "lm", ["llm", "other"]))


@pytest.mark.parametrize(
    "query",
    [
        Collection("d").find(),
        Collection("d").find({"n": {"$gt": 1}}, {"text": 1}).sort("n", -1).skip(2).limit(5),
        Collection("d").find_one({"when": dt.datetime(2024, 5, 1, 12, 0, 0, 5000)}),
        Collection("d").find({"name": re.compile("^a", re.I), "raw": b"\x00\x01", "nan": math.nan}),
        Collection("d").aggregate([{"$match": {"a": 1}}]).limit(3),
        Collection("d").count_documents({"a": None}),
        Collection("d").insert_many([{"a": 1}, Document({"b": [1, {"c": 2.5}]})]),
        Collection("d").update_many({"a": 1}, {"$set": {"b": 2}}),
        Collection("d").delete_many({}),
    ],
)
def test_queries_go_to_json_and_back(query):
    text = json.dumps(query.to_json(), allow_nan=False)
    back = from_json(json.loads(text))
    assert back == query and hash(back) == hash(query)
    assert json.dumps(back.to_json()) == text


def test_bad_queries_are_refused():
    for make in (
        lambda: Collection("llmnb.runs"),
        lambda: Collection(""),
        lambda: Collection("d").find("text"),
        lambda: Collection("d").insert_many([]),
        lambda: Collection("d").aggregate([{"$out": "x"}]),
        lambda: Collection("d").find().limit(-1),
        lambda: Collection("d").find({"f": print}).to_json(),
        lambda: from_json({"op": "drop", "collection": "d"}),
        lambda: from_json({"op": "find", "collection": "llmnb.runs"}),
    ):
        with pytest.raises(QueryError):
            make()


def test_a_query_value_is_not_changed_by_refining_it():
    base = Collection("d").find({"a": 1})
    assert base.limit(3) != base and base.limit_to == 0
    assert base.where(_fold="train").filter == {"$and": [{"a": 1}, {"_fold": "train"}]}


def test_events_go_to_dicts_and_back():
    made = [
        events.Metric(step=3, epoch=0.5, values={"loss": 1.5}),
        events.CheckpointSaved(step=3, digest="ab", size=10, metrics={"eval_loss": 1.0}, best=True),
        events.StateChanged(state="done"),
        events.Note(level="warning", text="12 rows were cut", data={"cut": 12}),
    ]
    for event in made:
        data = {**event.numbered(7).to_dict(), "_id": "x", "run": "r"}
        assert events.from_dict(data) == event.numbered(7)
    lost = events.from_dict(json.loads(json.dumps(events.Metric(step=1, values={"loss": math.nan}).to_dict())))
    assert math.isnan(lost.values["loss"])


def test_documents_read_dotted_paths():
    assert Document({"a": {"b": 1}}).get_path("a.b") == 1
    assert Document({"a": 1}).get_path("a.b", "none") == "none"


def test_a_checkpoint_is_a_name_not_a_place():
    one = Checkpoint("20261121-180412-345-llm", 300, "abc", {"eval_loss": 1.0})
    assert str(one) == "20261121-180412-345-llm/300"
    assert one.at("/x") == one and "path" not in one.to_dict()
    assert Checkpoint.from_dict({**one.to_dict(), "_id": 1}) == one


def test_a_job_hides_its_secrets_and_its_file_is_private(tmp_path):
    secret = "mongodb://me:hunter2@localhost/x"
    job = TrainJob(
        run="r",
        model=ModelSpec(),
        version=1,
        config=TrainConfig(),
        uri=secret,
        database="x",
        workdir=str(tmp_path),
        ray_configs={"token": "hunter2"},
        transform=lambda text: {"text": text * 2},
    )
    assert "hunter2" not in repr(job)
    path = job.write(tmp_path / "deep" / "job")
    assert oct(os.stat(path).st_mode & 0o777) == "0o600"
    back = TrainJob.read(path)
    assert back.uri == secret and back.transform("a") == {"text": "aa"} and back.config == job.config


def test_a_function_of_a_file_beside_the_notebook_travels(tmp_path, monkeypatch):
    import importlib
    import subprocess
    import sys

    (tmp_path / "beside.py").write_text("WORD = 'x'\ndef shout(text):\n    return {'text': text.upper() + WORD}\n")
    monkeypatch.syspath_prepend(tmp_path)
    beside = importlib.import_module("beside")
    job = TrainJob("r", ModelSpec(), 1, TrainConfig(), None, "x", str(tmp_path), transform=beside.shout)
    path = job.write(tmp_path / "job")
    code = f"from llmnb.job import TrainJob; print(TrainJob.read({str(path)!r}).transform('a'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "{'text': 'Ax'}"
