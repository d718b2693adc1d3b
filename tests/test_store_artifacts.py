"""Bytes by digest: damage, full disks, garbage, races, and places other than GridFS."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import os
import threading

import pymongo
import pymongo.monitoring
import pytest
from bson import ObjectId
from pymongo.errors import WriteError

from llmnb.errors import ArtifactError, QueryError
from llmnb.store import artifacts, open_store
from llmnb.store.tables import no_space


@pytest.fixture(params=["gridfs", "file", "memory"])
def placed(request, store, tmp_path):
    """A store whose artifacts go to GridFS, to a folder, to fsspec's memory."""
    if request.param != "gridfs":
        url = f"file://{tmp_path}/artifacts" if request.param == "file" else f"memory://{store.name}"
        store = open_store(store.database, artifacts=url, home=store.home)
    return store


def write(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def uploads(store):
    return list(store.artifacts._place(store.settings.artifacts).names())


def age(store, **delta):
    """Makes every claim older, as if its holder had died that long ago."""
    old = dt.datetime.now(dt.timezone.utc) - dt.timedelta(**delta)
    store.database["llmnb.artifacts"].update_many({"claims.0": {"$exists": True}}, {"$set": {"claims.0.at": old}})


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 20) - 1, 1 << 20, 5_000_001])
def test_bytes_come_back_under_their_sha256(placed, tmp_path, size):
    data = os.urandom(size)
    path = write(tmp_path / "in", data)
    digest = placed.artifacts.put_file(path)
    assert digest == hashlib.sha256(data).hexdigest()
    assert placed.artifacts.exists(digest) and placed.artifacts.size(digest) == size
    assert placed.artifacts.fetch(digest, tmp_path / "deep" / "out").read_bytes() == data
    assert placed.artifacts.put_file(path) == digest and len(uploads(placed)) == 1
    assert placed.artifacts.stats()["bytes"] == size


def test_files_that_look_alike_are_told_apart(placed, tmp_path):
    """Equal size and equal bytes wherever the sample looks; they differ elsewhere."""
    a = bytearray(os.urandom(1_000_000))
    b = bytearray(a)
    b[200_000] ^= 1
    first, second = (placed.artifacts.put_file(write(tmp_path / n, bytes(d))) for n, d in (("a", a), ("b", b)))
    assert first != second
    assert placed.artifacts.fetch(second, tmp_path / "out").read_bytes() == bytes(b)


def damage(store, how):
    """Changes or removes stored bytes behind our back."""
    if store.artifacts.where == "gridfs":
        chunks, files = store.database["llmnb.fs.chunks"], store.database["llmnb.fs.files"]
        chunk = chunks.find_one(sort=[("n", -1)])
        if how == "changed":
            chunks.update_one({"_id": chunk["_id"]}, {"$set": {"data": b"X" + chunk["data"][1:]}})
        elif how == "truncated":
            chunks.delete_one({"_id": chunk["_id"]})
        else:
            files.delete_many({})
        return
    place = store.artifacts._place(store.settings.artifacts)
    (name, _, _), *_ = place.names()
    path = place._path(name)
    if how == "missing":
        place._fs.rm_file(path)
        return
    data = place._fs.cat_file(path)
    place._fs.pipe_file(path, b"X" + data[1:] if how == "changed" else data[:-1])


@pytest.mark.parametrize("how", ["changed", "truncated", "missing"])
def test_damage_is_found_and_never_handed_out(placed, tmp_path, how):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"w" * 700_000)
    saved = placed.checkpoints.put("exp", 1, tmp_path / "ckpt")
    damage(placed, how)
    with pytest.raises(ArtifactError, match=r"damaged|missing"):
        placed.checkpoints.fetch(saved)
    left = [p for p in (placed.home / "cache").rglob("*") if p.is_file()]
    assert left == [], "nothing half-read stays behind"


def test_bytes_that_went_missing_are_stored_anew(placed, tmp_path):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"w" * 700_000)
    placed.checkpoints.put("exp", 1, tmp_path / "ckpt")
    damage(placed, "missing")
    again = placed.checkpoints.put("exp", 2, tmp_path / "ckpt")
    assert (placed.checkpoints.fetch(again) / "adapter.safetensors").read_bytes() == b"w" * 700_000
    assert placed.checkpoints.fetch(placed.checkpoints.get("exp", 1))


class Trips(pymongo.monitoring.CommandListener):
    def __init__(self):
        self.names = []

    def started(self, event):
        self.names.append(event.command_name)

    def succeeded(self, event): ...

    def failed(self, event): ...


def test_what_can_be_asked_once_for_all_files_is(mongo_uri, tmp_path):
    """A checkpoint is stored beside a training step: each trip costs both of them Python's lock."""
    trips = Trips()
    client = pymongo.MongoClient(mongo_uri, event_listeners=[trips])
    store = open_store(client.get_default_database(), home=tmp_path)
    for step in (1, 2):
        for number in range(20):  # one of them changes
            write(tmp_path / "ckpt" / f"{number}.safetensors", f"{number} {step if number == 0 else 0}".encode())
        trips.names.clear()
        kept = store.checkpoints.put("exp", step, tmp_path / "ckpt")
    assert len(trips.names) < 20, trips.names  # 80 and more when each file is asked for
    assert (store.checkpoints.fetch(kept) / "0.safetensors").read_bytes() == b"0 2"
    client.close()


def test_a_cache_that_was_changed_is_not_trusted(store, tmp_path):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"right")
    saved = store.checkpoints.put("exp", 1, tmp_path / "ckpt")
    at = store.checkpoints.fetch(saved)
    (at / "adapter.safetensors").write_bytes(b"wrong")
    assert (store.checkpoints.fetch(saved) / "adapter.safetensors").read_bytes() == b"right"
    (at / "adapter.safetensors").unlink()
    assert (store.checkpoints.fetch(saved) / "adapter.safetensors").read_bytes() == b"right"
    os.utime(at / "adapter.safetensors")  # another time, the same bytes: proved by reading, not fetched
    store.artifacts.fetch = None
    assert store.checkpoints.fetch(saved) == at


def test_many_fetch_one_checkpoint_at_once(store, tmp_path):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"w" * 300_000)
    saved = store.checkpoints.put("exp", 1, tmp_path / "ckpt")
    errors = []

    def fetch():
        try:
            assert (store.checkpoints.fetch(saved) / "adapter.safetensors").read_bytes() == b"w" * 300_000
        except Exception as error:  # noqa: BLE001 - a thread's border
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [p.name for p in (store.home / "cache").iterdir()] == [saved.digest]


def test_what_a_killed_fetch_left_behind_goes_after_a_day(store, tmp_path):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"w")
    saved = store.checkpoints.put("exp", 1, tmp_path / "ckpt")
    old, new = (store.home / "cache" / name for name in (".part-old", ".part-new"))
    for left in (old, new):
        write(left / "half", b"")
    os.utime(old, (0, 0))
    store.checkpoints.fetch(saved)
    assert not old.exists() and new.exists()


# -- no space left --------------------------------------------------------------------------------------------


def test_no_space_in_a_folder(store, tmp_path, monkeypatch):
    store = open_store(store.database, artifacts=f"file://{tmp_path}/artifacts", home=store.home)
    write(tmp_path / "old" / "adapter.safetensors", b"old" * 100)
    kept = store.checkpoints.put("exp", 1, tmp_path / "old")
    place = store.artifacts._place(store.settings.artifacts)
    real = place._fs.open

    def full(path, mode="rb", **more):
        file = real(path, mode, **more)
        if "w" in mode:
            file = FullFile(file)
        return file

    class FullFile:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(place._fs, "open", full)
    write(tmp_path / "new" / "adapter.safetensors", b"new" * 100)
    with pytest.raises(ArtifactError, match="No space left") as caught:
        store.checkpoints.put("exp", 2, tmp_path / "new")
    assert "llmnb db gc" in str(caught.value)
    monkeypatch.undo()
    assert [c.step for c in store.checkpoints.list("exp")] == [1] and len(uploads(store)) == 1
    assert (store.checkpoints.fetch(kept) / "adapter.safetensors").read_bytes() == b"old" * 100


def test_a_place_that_keeps_less_than_it_was_given(store, tmp_path, monkeypatch):
    moved = open_store(store.database, artifacts=str(tmp_path / "artifacts"), home=store.home)
    fs = moved.artifacts._place(moved.settings.artifacts)._fs
    real = type(fs).size
    monkeypatch.setattr(type(fs), "size", lambda self, path: real(self, path) - 1)
    with pytest.raises(ArtifactError, match="Writing to") as caught:
        moved.artifacts.put_file(write(tmp_path / "f", b"12345"))
    assert "4 of 5 bytes" in str(caught.value.seen)
    assert moved.artifacts.stats()["files"] == 0 and not any(p.is_file() for p in (tmp_path / "artifacts").rglob("*"))


def test_no_space_in_the_database(store, tmp_path, monkeypatch):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"old" * 100)
    kept = store.checkpoints.put("exp", 1, tmp_path / "ckpt")
    place = store.artifacts._place(None)

    class Full:
        def write(self, chunk):
            raise WriteError("No space left on device", 14031)

        def abort(self):
            pass

    monkeypatch.setattr(place._fs, "new_file", lambda **_: Full())
    write(tmp_path / "ckpt" / "adapter.safetensors", b"new" * 100)
    with pytest.raises(ArtifactError, match="No space left"):
        store.checkpoints.put("exp", 2, tmp_path / "ckpt")
    monkeypatch.undo()
    assert [c.step for c in store.checkpoints.list("exp")] == [1]
    assert (store.checkpoints.fetch(kept) / "adapter.safetensors").read_bytes() == b"old" * 100
    assert store.checkpoints.put("exp", 2, tmp_path / "ckpt").step == 2


def test_no_space_for_the_cache(store, tmp_path, monkeypatch):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"w" * 100)
    saved = store.checkpoints.put("exp", 1, tmp_path / "ckpt")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.tempfile, "mkstemp", full)
    with pytest.raises(ArtifactError, match="No space left"):
        store.checkpoints.fetch(saved)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_what_counts_as_no_space(code):
    assert no_space(OSError(code, os.strerror(code))) and no_space(WriteError("x", 14031))
    assert not no_space(OSError(errno.EACCES, "no"))


def test_a_put_that_breaks_off_leaves_nothing(placed, tmp_path, monkeypatch):
    write(tmp_path / "ckpt" / "a.safetensors", b"a" * 300_000)
    write(tmp_path / "ckpt" / "b.safetensors", b"b" * 300_000)
    real = placed.checkpoints._table.replace

    def broken(record):
        raise QueryError("refused")

    monkeypatch.setattr(placed.checkpoints._table, "replace", broken)
    with pytest.raises(QueryError):
        placed.checkpoints.put("exp", 1, tmp_path / "ckpt")
    assert uploads(placed) == [] and placed.artifacts.stats()["files"] == 0
    monkeypatch.setattr(placed.checkpoints._table, "replace", real)
    assert placed.checkpoints.fetch(placed.checkpoints.put("exp", 1, tmp_path / "ckpt"))


def test_a_file_that_cannot_be_read(store, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        store.artifacts.put_file(tmp_path / "nothing")


# -- garbage --------------------------------------------------------------------------------------------------


def test_gc_removes_what_no_record_names_and_nothing_else(placed, tmp_path):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"kept" * 1000)
    kept = placed.checkpoints.put("exp", 1, tmp_path / "ckpt")
    orphan = placed.artifacts.put_file(write(tmp_path / "orphan", b"orphan" * 1000))
    assert placed.artifacts.gc() == {"files": 0, "bytes": 0}, "its putter may still be at work"
    age(placed, hours=2)
    assert placed.artifacts.gc(dry_run=True) == {"files": 1, "bytes": 6000} and placed.artifacts.exists(orphan)
    assert placed.artifacts.gc() == {"files": 1, "bytes": 6000}
    assert not placed.artifacts.exists(orphan) and len(uploads(placed)) == 1
    assert placed.checkpoints.fetch(kept)
    with pytest.raises(ArtifactError, match="not stored"):
        placed.artifacts.fetch(orphan, tmp_path / "out")


def test_gc_removes_uploads_that_broke_off_long_ago(placed, tmp_path):
    write(tmp_path / "ckpt" / "adapter.safetensors", b"kept")
    kept = placed.checkpoints.put("exp", 1, tmp_path / "ckpt")
    long_ago = ObjectId.from_datetime(dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=3))
    just_now = ObjectId()
    if placed.artifacts.where == "gridfs":
        chunks = placed.database["llmnb.fs.chunks"]
        for began in (long_ago, just_now):
            chunks.insert_one({"files_id": began, "n": 0, "data": b"half"})
    else:
        place = placed.artifacts._place(placed.settings.artifacts)
        for began in (long_ago, just_now):
            name = f"{str(began)[-2:]}/{began}"
            place._fs.makedirs(place._path(name).rpartition("/")[0], exist_ok=True)
            place._fs.pipe_file(place._path(name), b"half")
    assert placed.artifacts.gc()["files"] == 1
    assert {name.rpartition("/")[2] for name, _, _ in uploads(placed)} >= {str(just_now)}
    assert str(long_ago) not in {name.rpartition("/")[2] for name, _, _ in uploads(placed)}
    assert placed.checkpoints.fetch(kept)


def test_trap26_gc_beside_running_puts_takes_nothing_that_is_needed(store, tmp_path):
    """Checkpoints that share bytes come and go while garbage is collected; each that stands can be read."""
    over, errors = threading.Event(), []

    def collect():
        while not over.is_set():
            store.artifacts.gc()

    def come_and_go(number):
        try:
            for step in range(8):
                folder = tmp_path / f"{number}-{step}"
                write(folder / "shared.safetensors", b"shared" * 1000)
                write(folder / "own.safetensors", b"%d" % (step % 2))
                saved = store.checkpoints.put(f"exp-{number}", step, folder)
                for file in store.checkpoints.record(saved.experiment, step)["files"]:
                    store.artifacts.fetch(file["sha256"], tmp_path / f"out-{number}")
                if step % 2:
                    store.checkpoints.remove(saved.experiment, step)
        except Exception as error:  # noqa: BLE001 - a thread's border
            errors.append(error)

    workers = [threading.Thread(target=come_and_go, args=(n,)) for n in range(3)]
    collector = threading.Thread(target=collect)
    for thread in (collector, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    over.set()
    collector.join()
    assert errors == []
    assert store.artifacts.stats()["files"] == 2, "the shared bytes, and those of the steps that stand"


@pytest.mark.parametrize("moment", ["before the look at records", "after it"])
def test_trap26_a_put_in_the_middle_of_a_collection(store, tmp_path, monkeypatch, moment):
    """The put claims bytes that garbage collection has already chosen to remove; they stay, or are stored anew."""
    path = write(tmp_path / "ckpt" / "adapter.safetensors", b"w" * 1000)
    store.artifacts.put_file(path)
    age(store, hours=2)  # nobody needs it: a candidate
    real = store.checkpoints._named

    def meanwhile(among):
        found = real(among) if moment == "after it" else None
        with contextlib.suppress(StopIteration):
            next(once)
            store.checkpoints.put("exp", 1, tmp_path / "ckpt")
        return real(among) if found is None else found

    once = iter([1])
    monkeypatch.setattr(store.artifacts, "named", meanwhile)
    store.artifacts.gc()
    fetched = store.checkpoints.fetch(store.checkpoints.get("exp", 1))
    assert (fetched / "adapter.safetensors").read_bytes() == b"w" * 1000


# -- places ---------------------------------------------------------------------------------------------------


def test_artifacts_stay_readable_when_new_ones_go_elsewhere(store, tmp_path):
    write(tmp_path / "a" / "adapter.safetensors", b"first")
    write(tmp_path / "b" / "adapter.safetensors", b"second")
    first = store.checkpoints.put("exp", 1, tmp_path / "a")
    moved = open_store(store.database, artifacts=str(tmp_path / "artifacts"), home=store.home)
    assert moved.artifacts.where == f"file://{tmp_path}/artifacts"
    second = moved.checkpoints.put("exp", 2, tmp_path / "b")
    assert any(p.is_file() for p in (tmp_path / "artifacts").rglob("*"))
    later = open_store(store.database, home=store.home)  # reads the setting from the database
    assert later.artifacts.where == moved.artifacts.where
    assert (later.checkpoints.fetch(first) / "adapter.safetensors").read_bytes() == b"first"
    assert (later.checkpoints.fetch(second) / "adapter.safetensors").read_bytes() == b"second"
    later.checkpoints.remove("exp", 1)
    later.checkpoints.remove("exp", 2)
    assert later.artifacts.stats()["files"] == 0 and not any(p.is_file() for p in (tmp_path / "artifacts").rglob("*"))


def test_two_databases_share_one_folder(store, tmp_path):
    import mongomock

    url = f"file://{tmp_path}/artifacts"
    one = open_store(store.database, artifacts=url, home=tmp_path / "one")
    two = open_store(mongomock.MongoClient()["two"], artifacts=url, home=tmp_path / "two")
    write(tmp_path / "ckpt" / "adapter.safetensors", b"same")
    saved = one.checkpoints.put("exp", 1, tmp_path / "ckpt")
    two.checkpoints.put("exp", 1, tmp_path / "ckpt")
    two.checkpoints.remove("exp", 1)
    two.artifacts.gc()
    assert (one.checkpoints.fetch(saved) / "adapter.safetensors").read_bytes() == b"same"


def test_a_url_that_nothing_serves(store, tmp_path):
    store = open_store(store.database, artifacts="nowhere://x/y", home=store.home)
    with pytest.raises(ArtifactError, match="Nothing can be kept at this URL"):
        store.artifacts.put_file(write(tmp_path / "f", b"x"))
