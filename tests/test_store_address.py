"""Addresses, the environment, and what a person is told when a database cannot be opened."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
import warnings

import mongomock
import pymongo
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmnb.errors import ArtifactError, ConnectError, DatabaseError, QueryError
from llmnb.query import Collection
from llmnb.store import environment, open_store
from llmnb.store.address import database_name, mask_uri, mock_name

DATAS = Collection("datas")


@pytest.mark.parametrize(
    ("uri", "masked"),
    [
        ("mongodb://user:secret@host:27017/shop", "mongodb://user:***@host:27017/shop"),
        ("mongodb://user:sec@re/t@host/shop?a=b", "mongodb://user:***@host/shop?a=b"),
        ("mongodb+srv://u:p%40x@cluster.example.net/", "mongodb+srv://u:***@cluster.example.net/"),
        ("mongodb://host/shop", "mongodb://host/shop"),
        ("mongodb://user@host/shop", "mongodb://user@host/shop"),
        (
            "mongodb://a,b:1/?tlsCertificateKeyFilePassword=secret&x=1",
            "mongodb://a,b:1/?tlsCertificateKeyFilePassword=***&x=1",
        ),
        (
            "mongodb://h/?authMechanism=MONGODB-AWS&authMechanismProperties=AWS_SESSION_TOKEN:secret",
            "mongodb://h/?authMechanism=MONGODB-AWS&authMechanismProperties=***",
        ),
        ("user:secret@host", "user:***@host"),
    ],
)
def test_a_masked_address_holds_no_secret(uri, masked):
    assert mask_uri(uri) == masked


@given(st.text(min_size=3, max_size=30))
def test_no_password_is_ever_shown(password):
    unlike = f"<{password}>"  # so that it cannot be a part of what surrounds it
    assert unlike not in mask_uri(f"mongodb://user:{unlike}@host/name?x=1")


def test_the_database_s_name():
    assert database_name("mongodb://u:p@a:1,b:2/shop?x=/y") == "shop"
    assert database_name("mongodb://host") == database_name("mongodb://host/?x=1") == "llmnb"
    assert mock_name("mongomock://test_llm") == "test_llm" and mock_name("mongomock://") == "llmnb"
    with pytest.raises(ConnectError):
        mock_name("mongomock://a.b")


def test_the_environment_is_read_in_one_place():
    env = environment.read({"LLMNB_URI": "mongodb://u:secret@h", "LLMNB_HOME": "/h", "LLMNB_MONGOD": ""})
    assert env.uri == "mongodb://u:secret@h" and str(env.home) == "/h" and env.mongod is None
    assert "secret" not in repr(env)
    assert str(environment.read({}).home) == ".llmnb"
    assert environment.for_child({"PATH": "/bin", "LLMNB_URI": "secret", "HF_TOKEN": "x"}) == {"PATH": "/bin"}


@pytest.mark.parametrize("uri", ["", "postgres://user:secret@host/db", "host:27017", "mongo://host", "/some/path"])
def test_what_is_no_address_says_what_is_one(uri):
    with pytest.raises(ConnectError, match="mongodb://") as caught:
        open_store(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["mongodb://user:p@ss:secret@host:1", "mongodb://host:99999999", "mongodb://host:x/"])
def test_a_malformed_address(uri):
    with pytest.raises(ConnectError, match="cannot be used") as caught:
        open_store(uri)
    assert "secret" not in str(caught.value)


def test_nobody_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ConnectError, match="does not answer") as caught:
        open_store(f"mongodb://user:secret@127.0.0.1:{port}/shop")
    assert time.monotonic() - began < 12
    assert f"user:***@127.0.0.1:{port}" in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.mongod
def test_a_wrong_password(mongo_uri):
    head, _, tail = mongo_uri.partition("://llmnb:")
    with pytest.raises(ConnectError, match="password is wrong") as caught:
        open_store(f"{head}://llmnb:wrongword@{tail.partition('@')[2]}")
    assert "wrongword" not in str(caught.value)


@pytest.mark.mongod
def test_a_user_who_may_only_read(mongod, mongo_uri, tmp_path):
    name = database_name(mongo_uri)
    with open_store(mongo_uri, home=tmp_path) as store:
        store.execute(DATAS.insert_one({"a": 1}))
    reader = f"reader{uuid.uuid4().hex[:6]}"
    with pymongo.MongoClient(mongod.uri) as client:
        client[name].command("createUser", reader, pwd="readerword", roles=[{"role": "read", "db": name}])
        try:
            uri = f"mongodb://{reader}:readerword@127.0.0.1:{mongod.port}/{name}?directConnection=true"
            with open_store(uri, home=tmp_path) as store:
                assert store.execute(DATAS.count_documents()) == 1 and store.runs.list() == []
                for write in (
                    lambda: store.execute(DATAS.insert_one({})),
                    lambda: store.runs.create("x", model="x", version=1, config={}),
                ):
                    with pytest.raises(DatabaseError, match="no right") as caught:
                        write()
                    assert "readWrite" in str(caught.value) and "readerword" not in str(caught.value)
        finally:
            client[name].command("dropUser", reader)


@pytest.mark.mongod
def test_what_prints_holds_no_password(mongod, mongo_uri, tmp_path):
    with open_store(mongo_uri, home=tmp_path) as store:
        password = mongod.uri.split(":")[2].split("@")[0]
        for text in (repr(store), store.describe(), store.safe_uri, repr(mongod), mongod.safe_uri):
            assert password not in text
        assert store.uri == mongo_uri and not store.in_process and not store.embedded


def test_a_mock_says_once_that_it_does_not_last(tmp_path):
    name = uuid.uuid4().hex
    with pytest.warns(UserWarning, match="in this process only"):
        first = open_store(f"mongomock://{name}", home=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = open_store(f"mongomock://{name}", home=tmp_path)
    first.execute(DATAS.insert_one({"a": 1}))
    assert second.execute(DATAS.count_documents()) == 1 and second.in_process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_store(f"mongomock://{name}x", home=tmp_path).execute(DATAS.count_documents()) == 0


@pytest.mark.mongod
def test_a_database_object_that_a_person_has(mongod, mongo_uri, tmp_path):
    with pymongo.MongoClient(mongod.uri) as client:
        database = client[database_name(mongo_uri)]  # not tz_aware, as most are
        store = open_store(database, home=tmp_path)
        run = store.runs.create("llm", model="llm", version=1, config={})
        assert store.runs.get(run["_id"]) == run and store.in_process and store.uri is None
        store.close()
        database.command("ping")  # theirs to close


def test_a_mock_s_database_object(tmp_path):
    store = open_store(mongomock.MongoClient()["mine"], home=tmp_path)
    run = store.runs.create("llm", model="llm", version=1, config={})
    assert store.runs.get(run["_id"]) == run and store.in_process


def test_what_is_no_database(tmp_path):
    for thing in (7, mongomock.MongoClient(), object()):
        with pytest.raises(QueryError, match="not a database"):
            open_store(thing, home=tmp_path)


def test_artifacts_of_the_environment_do_not_overrule_the_database(tmp_path, monkeypatch):
    name = uuid.uuid4().hex
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_store(f"mongomock://{name}", home=tmp_path).artifacts.where == "gridfs"
        monkeypatch.setenv("LLMNB_ARTIFACTS", f"file://{tmp_path}/env")
        assert open_store(f"mongomock://{name}", home=tmp_path).artifacts.where == f"file://{tmp_path}/env"
        monkeypatch.setenv("LLMNB_ARTIFACTS", f"file://{tmp_path}/later")
        assert open_store(f"mongomock://{name}", home=tmp_path).artifacts.where == f"file://{tmp_path}/env"
        assert open_store(f"mongomock://{name}", home=tmp_path, artifacts="gridfs").artifacts.where == "gridfs"
        with pytest.raises(ArtifactError, match="password"):
            open_store(f"mongomock://{name}", home=tmp_path, artifacts="s3://key:secret@bucket/x")


def test_the_package_loads_no_driver_until_it_is_used():
    code = "import sys, llmnb.store; print([m for m in ('pymongo', 'bson', 'fsspec', 'mongomock') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("code", [211, 91, 11600, 13436, 10107])
def test_a_server_that_starts_or_ends_is_away_and_no_query_is_at_fault(code):
    """After kill -9 and a start, mongod answers 211 for a moment: a worker has to wait, not to fail."""
    from pymongo.errors import OperationFailure

    from llmnb.errors import DatabaseError, QueryError
    from llmnb.store.tables import translated

    with pytest.raises(DatabaseError) as caught, translated("mongodb://host/"):
        raise OperationFailure("No keys found for HMAC that is valid for time", code)
    assert not isinstance(caught.value, QueryError)
    with pytest.raises(QueryError), translated("mongodb://host/"):
        raise OperationFailure("unknown operator: $foo", 2)
