"""Artifacts and a run's records on S3: a real S3 protocol, spoken with a local server."""

from __future__ import annotations

import builtins

import pytest
from bucket import BUCKET

from llmnb.errors import ArtifactError, MissingPackage
from llmnb.store import open_store

pytestmark = pytest.mark.mongod


@pytest.fixture
def store(mongo_uri, s3, tmp_path, request):
    with open_store(mongo_uri, artifacts=f"s3://{BUCKET}/{request.node.name}", home=tmp_path / "home") as store:
        yield store


def folder_with(tmp_path, **files: bytes):
    folder = tmp_path / "made"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_checkpoints_go_to_s3_and_come_back_proved(store, s3, tmp_path, request):
    weights = bytes(range(256)) * 40_000  # 10 MB: more than one part of an upload
    folder = folder_with(tmp_path, adapter_model__safetensors=weights, optimizer__pt=b"state")
    saved = store.checkpoints.put("run", 1, folder, metrics={"eval_loss": 1.0})
    assert len(s3.keys(request.node.name)) == 2
    fetched = store.checkpoints.fetch(saved, resume=True)
    assert (fetched / "adapter_model.safetensors").read_bytes() == weights
    assert (fetched / "optimizer.pt").read_bytes() == b"state"
    assert "a-secret-for-tests" not in str(list(store.database["llmnb.settings"].find())) + repr(store)

    store.checkpoints.remove("run", 1)
    assert s3.keys(request.node.name) == []


def test_equal_bytes_are_stored_once_and_damage_is_seen(store, s3, tmp_path, request):
    folder = folder_with(tmp_path, adapter_model__safetensors=b"weights")
    store.checkpoints.put("run", 1, folder)
    again = store.checkpoints.put("run", 2, folder)
    (key,) = s3.keys(request.node.name)
    s3.client().put_object(Bucket=BUCKET, Key=key, Body=b"WEIGHTS")
    with pytest.raises(ArtifactError, match="damaged"):
        store.checkpoints.fetch(again)
    s3.client().delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(ArtifactError, match="missing"):
        store.checkpoints.fetch(again)


def test_what_no_record_names_is_collected(store, s3, tmp_path, monkeypatch, request):
    store.checkpoints.put("run", 1, folder_with(tmp_path, adapter_model__safetensors=b"kept"))
    place = store.artifacts._place(store.artifacts.where)
    place.write([b"an upload ", b"that broke off"])
    assert len(s3.keys(request.node.name)) == 2
    assert store.artifacts.gc() == {"files": 0, "bytes": 0}  # it may still be on its way
    monkeypatch.setattr("llmnb.store.artifacts.UPLOAD_GRACE_S", -10.0)
    assert store.artifacts.gc() == {"files": 1, "bytes": 24}
    assert len(s3.keys(request.node.name)) == 1


def test_a_bucket_that_is_not_there_is_said(mongo_uri, s3, tmp_path):
    with open_store(mongo_uri, artifacts="s3://no-such-bucket/x", home=tmp_path) as store:
        with pytest.raises(ArtifactError) as raised:
            store.checkpoints.put("run", 1, folder_with(tmp_path, adapter_model__safetensors=b"weights"))
        assert "no-such-bucket" in str(raised.value)
    assert [bucket["Name"] for bucket in s3.client().list_buckets()["Buckets"]] == [BUCKET]  # none is made unasked


def test_missing_credentials_are_said(mongo_uri, s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with open_store(mongo_uri, artifacts=f"s3://{BUCKET}/x", home=tmp_path) as store:
        with pytest.raises(ArtifactError, match="credentials") as raised:
            store.checkpoints.put("run", 1, folder_with(tmp_path, adapter_model__safetensors=b"weights"))
        assert "AWS_ACCESS_KEY_ID" in raised.value.todo


def test_without_s3fs_the_extra_is_named(mongo_uri, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "s3fs":
            raise ImportError("No module named 's3fs'")
        return real(name, *args, **kwargs)

    def none(url):
        __import__("s3fs")  # as fsspec does it

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("fsspec.core.url_to_fs", none)
    with open_store(mongo_uri, artifacts=f"s3://{BUCKET}/x", home=tmp_path) as store:
        with pytest.raises(MissingPackage, match="s3fs") as raised:
            store.checkpoints.put("run", 1, folder_with(tmp_path, adapter_model__safetensors=b"weights"))
        assert "llmnb[s3]" in raised.value.todo
