"""Raw batches without an object for each document: the driver's own bytes and errors, on a real mongod."""

from __future__ import annotations

import bson
import pymongo
import pytest
from bson import decode_all, raw_bson

from llmnb.errors import QueryError
from llmnb.query import Collection
from llmnb.store import batches, open_store, queries

pytestmark = pytest.mark.mongod
COUNT = 400
STAGES = [{"$sort": {"_id": -1}}]
FIND = {"batch_size": 90}


@pytest.fixture
def collection(mongo_uri):
    with pymongo.MongoClient(mongo_uri) as client:
        found = client.get_default_database()["datas"]
        texts = ("", "ä" * 50, "long " * 2000)  # from 4 kB on the driver hands out views
        found.insert_many({"_id": i, "text": texts[i % 3], "turns": [{"n": [i, [i]]}] * (i % 4)} for i in range(COUNT))
        yield found


@pytest.mark.parametrize(
    "ask",
    [
        lambda found: found.find_raw_batches({}, **FIND),
        lambda found: found.find_raw_batches({"_id": {"$lt": 7}}, {"turns": 1}).sort([("_id", -1)]).skip(1).limit(3),
        lambda found: found.find_raw_batches({"_id": -1}),
        lambda found: found.aggregate_raw_batches(STAGES, batchSize=90),
    ],
    ids=["several batches", "sorted", "nothing", "aggregated"],
)
def test_batches_are_those_of_the_driver(collection, ask):
    seen, own = list(batches.lean(ask(collection))), list(ask(collection))
    assert [bytes(batch) for batch in seen] == [bytes(batch) for batch in own]


def made(monkeypatch, work):
    """How many RawBSONDocuments a work makes."""
    count, begin = 0, raw_bson.RawBSONDocument.__init__

    def counting(self, *given, **named):
        nonlocal count
        count += 1
        begin(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(raw_bson.RawBSONDocument, "__init__", counting)
        work()
    return count


def test_no_object_is_made_of_a_document(collection, monkeypatch):
    assert made(monkeypatch, lambda: list(collection.find_raw_batches({}, **FIND))) >= COUNT
    assert made(monkeypatch, lambda: list(batches.lean(collection.find_raw_batches({}, **FIND)))) < 50


def test_what_is_fingerprinted_is_read_so(collection, mongo_uri, tmp_path, monkeypatch):
    with open_store(mongo_uri, home=tmp_path) as store:
        select = Collection("datas").find()
        found = []
        assert made(monkeypatch, lambda: queries.skim(store.database, select, "", "train", found.append)) < 50
        assert [document["_id"] for batch in found for document in decode_all(batch)] == list(range(COUNT))


def test_a_refused_question_is_an_error_and_so_is_a_cursor_that_is_gone(collection, mongo_uri, tmp_path):
    with open_store(mongo_uri, home=tmp_path) as store, pytest.raises(QueryError, match=r"\$nonsense"):
        queries.skim(store.database, Collection("datas").find({"_id": {"$nonsense": 1}}), "", None, len)
    cursor = batches.lean(collection.find_raw_batches({}, **FIND))
    next(cursor)
    collection.database.command("killCursors", collection.name, cursors=[cursor.cursor_id])
    with pytest.raises(pymongo.errors.CursorNotFound):
        list(cursor)


@pytest.mark.parametrize(
    "module, name", [(raw_bson, "_RAW_ARRAY_BSON_OPTIONS"), (bson, "_convert_raw_document_lists_to_streams")]
)
def test_a_driver_without_these_names_reads_in_its_own_way(collection, monkeypatch, module, name):
    cursor = collection.find_raw_batches({}, **FIND)
    monkeypatch.delattr(module, name)
    assert batches.lean(cursor) is cursor
    assert "_unpack_response" not in vars(cursor)
