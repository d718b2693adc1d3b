"""A selection by the ``_id`` of its documents: the same documents as its rows, in any order, some at a time."""

from __future__ import annotations

import datetime as dt
import json
import random
import uuid

import pytest
from bson import Binary, Decimal128, Int64, ObjectId

from llmnb.errors import QueryError
from llmnb.query import Collection, Document

DATAS = Collection("datas")
MIXED = [
    1,
    Int64(2),
    2.5,
    "a",
    "",
    "ä" * 50,
    ObjectId("0123456789abcdef00000000"),
    ObjectId(),
    Binary(uuid.UUID(int=5).bytes, 4),
    b"\x00\x01",
    dt.datetime(2026, 1, 2, 3, 4, 5, 678000),
    {"a": 1, "b": [1, "x"]},
    {"b": [1, "x"], "a": 1},
    True,
    None,
    Decimal128("1.50"),
]


def put(store, documents):
    store.database["datas"].insert_many([dict(d) for d in documents])


def whole(store, select, fold="train"):
    return [dict(d) for d in store.rows(select, fold=fold)]


def test_ids_of_every_type_are_read_back(store):
    # mongomock holds True for 1, knows no order of dicts, and keeps a UUID as one.
    mixed = [i for i in MIXED if not (store.mock and isinstance(i, (dict, Decimal128, bool, Binary)))]
    put(store, [{"_id": value, "text": str(at), "_fold": "train"} for at, value in enumerate(mixed)])
    found = store.addressed(DATAS.find())["train"]
    assert len(found) == len(mixed)
    order = list(range(len(found)))
    random.Random(0).shuffle(order)
    read = found.fetch(order)
    assert [mixed[i] for i, d in zip(order, read, strict=True) if type(d) is not Document] == []
    if not store.mock:  # which has an order of its own for ids of several types, and times without a zone
        assert [dict(d) for d in read] == [whole(store, DATAS.find())[i] for i in order]
        assert [found.name(i) for i in order] == [str(d["_id"]) for d in read]


@pytest.mark.parametrize(
    "select",
    [
        DATAS.find(),
        DATAS.find({"n": {"$gt": 3}}),
        DATAS.find().sort("n", -1),
        DATAS.find().sort("n", -1).skip(2).limit(10),
        DATAS.find({}, ["text"]),
        DATAS.find({}, {"text": 1, "_id": 0}),
        DATAS.find({}, {"n": 0}),
        DATAS.find({}, {"_id": 0}),
    ],
    ids=str,
)
def test_folds_order_and_fields_are_those_of_rows(store, select):
    put(store, [{"_id": (i * 7) % 30, "n": i, "text": f"t{i}"} for i in range(30)])
    put(
        store, [{"_id": f"f{i}", "n": 40 + i, "text": "own fold", "_fold": ("train", "valid")[i % 2]} for i in range(4)]
    )
    found = store.addressed(select)
    for fold in ("train", "valid"):
        rows = whole(store, select, fold)
        one = found.get(fold)
        assert ([dict(d) for d in one.fetch(range(len(one)))] if one else []) == rows


def test_the_short_way_to_an_object_id_s_fold_is_the_long_one():
    from llmnb.store import folds

    for _ in range(20):
        value = ObjectId()
        assert folds._canonical(value) == json.dumps(folds._plain(value), sort_keys=True)


def test_a_document_that_is_gone_is_none_and_one_that_changed_is_as_it_is_now(store):
    put(store, [{"_id": i, "text": f"t{i}", "_fold": "train"} for i in range(5)])
    found = store.addressed(DATAS.find({"text": {"$ne": "x"}}))["train"]
    store.execute(DATAS.delete_many({"_id": 3}))
    store.execute(DATAS.update_many({"_id": 2}, {"$set": {"text": "x", "_fold": "valid"}}))
    read = found.fetch([3, 2, 4])
    assert read[0] is None
    assert dict(read[1]) == {"_id": 2, "text": "x", "_fold": "train"}, "its place in the run does not change"


def test_only_what_is_wanted_is_read(store):
    put(store, [{"_id": 1, "text": "t", "blob": b"0" * 1000, "meta": {"a": 1, "b": 2}, "_fold": "train"}])
    (read,) = store.addressed(DATAS.find())["train"].fetch([0], ["text", "meta"])
    assert dict(read) == {"_id": 1, "text": "t", "meta": {"a": 1, "b": 2}, "_fold": "train"}
    (read,) = store.addressed(DATAS.find({}, ["blob"]))["train"].fetch([0], ["text"])
    assert set(read) == {"_id", "blob", "_fold"}, "the selection's own fields go before"


def test_the_digest_is_that_of_the_ids_in_their_order(store):
    put(store, [{"_id": i, "n": -i, "_fold": "train"} for i in range(10)])
    one = store.addressed(DATAS.find())["train"].digest()
    assert one == store.addressed(DATAS.find())["train"].digest()
    assert one != store.addressed(DATAS.find().sort("n"))["train"].digest()
    put(store, [{"_id": "10", "_fold": "train"}])
    assert one != store.addressed(DATAS.find())["train"].digest()


def test_a_selection_of_few_documents_is_not_addressed_when_only_many_are(store):
    put(store, [{"_id": i} for i in range(10)])
    assert store.addressed(DATAS.find(), most=10) == {}
    assert sum(map(len, store.addressed(DATAS.find(), most=9).values())) == 10
    assert store.addressed(DATAS.find({"_id": -1})) == {}


@pytest.mark.parametrize("select", [DATAS.aggregate([{"$match": {}}]), DATAS.find_one(), DATAS.count_documents()])
def test_other_selections_are_refused(store, select):
    with pytest.raises(QueryError):
        store.addressed(select)


@pytest.mark.mongod
def test_a_view_whose_ids_are_not_its_own_is_refused(store):
    if store.mock:
        return
    put(store, [{"_id": i, "_fold": "train"} for i in range(4)])
    twice = [{"$set": {"n": [1, 2]}}, {"$unwind": "$n"}]
    store.database.command("create", "twice", viewOn="datas", pipeline=twice)
    for select in (Collection("twice").find(), Collection("twice").find().sort("n")):
        with pytest.raises(QueryError, match="same _id"):
            store.addressed(select)
