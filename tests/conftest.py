"""Fixtures that several rooms share, and the rule for skips.

With CI=true a skip is a failure, except for tests that carry the ``gpu`` marker.
"""

from __future__ import annotations

import gc
import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    strict = os.environ.get("CI") == "true" and "gpu" not in item.keywords
    if report.skipped and strict and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped where a skip is a failure: {report.longrepr}"


_frozen_at = 0  # modules


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What was imported lives to the end: without this, each training's full collections walk all of it."""
    global _frozen_at
    if len(sys.modules) > _frozen_at + 100:
        gc.collect()
        gc.freeze()
        _frozen_at = len(sys.modules)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a tiny random Llama with a chat template (tests/tiny.py)."""
    from tiny import make_model

    return str(make_model("llama", tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="session")
def mongod(tmp_path_factory):
    """A real mongod of this test session: ``llmnb.store.embedded.Server``."""
    from llmnb.store import embedded

    home = tmp_path_factory.mktemp("mongod")
    server = embedded.start(home)
    yield server
    embedded.stop(home)


@pytest.fixture
def mongo_uri(mongod):
    """The URI, password included, of a fresh database on the session's mongod; dropped afterwards."""
    import uuid

    import pymongo

    name = f"t{uuid.uuid4().hex[:12]}"
    scheme, _, rest = mongod.uri.partition("://")
    host, _, tail = rest.partition("/")
    yield f"{scheme}://{host}/{name}?{tail.partition('?')[2]}"
    with pymongo.MongoClient(mongod.uri) as client:
        client.drop_database(name)


@pytest.fixture(params=[pytest.param("mongod", marks=pytest.mark.mongod), "mongomock"])
def store(request, tmp_path):
    """An open, empty store: once on a real mongod, once on mongomock. ``tmp_path / "home"`` is its home."""
    import uuid
    import warnings

    from llmnb.store import open_store

    if request.param == "mongod":
        uri = request.getfixturevalue("mongo_uri")
    else:
        uri = f"mongomock://test_{uuid.uuid4().hex[:12]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        opened = open_store(uri, home=tmp_path / "home")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def s3_server():
    """A local S3 server of this test session: ``bucket.Server``."""
    from bucket import Server

    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server, with the way to it in this process's environment. fsspec's clients are made anew."""
    from fsspec import AbstractFileSystem

    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    yield s3_server
    for cls in _subclasses(AbstractFileSystem):
        if "s3" in (cls.protocol or ()):  # an abstract class has none
            cls.clear_instance_cache()


def _subclasses(cls):
    return {cls}.union(*(_subclasses(one) for one in cls.__subclasses__()))
