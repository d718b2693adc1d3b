"""A run on two nodes that share no folder: two raylets on this machine, one worker on each, each with its own ``~``."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from foreign import Foreign

from llmnb import LLM, Collection, LLMTrainer, connect

# Three runs whose dozen processes import; on a busy machine a minute and more each.
pytestmark = [pytest.mark.ray, pytest.mark.mongod, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    root = tmp_path_factory.mktemp("nodes")
    # Ray does not join nodes on loopback.
    cluster = Foreign(root, cpus=2, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1")
    try:
        cluster.join(root / "home2", cpus=2)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def db(mongo_uri, tmp_path, nodes, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(nodes.token_file))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    db = connect(mongo_uri, home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(17)]))
    yield db
    for run in db.runs():
        if run.state not in ("done", "failed", "stopped", "lost"):
            run.kill()
    db.close()


def model(base: str, folder: Path, address: str, *, workers: int = 2, **changes) -> LLM:
    from ray.train import ScalingConfig

    scaling = ScalingConfig(num_workers=workers, placement_strategy="STRICT_SPREAD", resources_per_worker={"CPU": 1})
    settings = {
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "max_seq_length": 64,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "ray_address": address,
        "ray_configs": {"scaling_config": scaling},
    }
    return LLM("sums", base, trainer=LLMTrainer("sums-trainer", **{**settings, **changes}))


def wait_for(what, limit: float = 300.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("waited too long")


def test_one_worker_on_each_of_two_nodes(nodes, db, tiny_llama, tmp_path):
    run = db.apply(model(tiny_llama, tmp_path, nodes.url), wait=False)
    assert run.wait(400).state == "done"
    # STRICT_SPREAD: one on each. The caller's folder stayed here.
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("*.safetensors"))
    counts = run.record["counts"]
    assert (counts["ranks"], counts["rows_per_step"], len(run.metrics())) == (2, 4, 2)
    # Both ranks' parts of the state came together: a run could go on from the database alone.
    (checkpoint,) = run.checkpoints()
    files = {path.name for path in db.store.checkpoints.fetch(checkpoint, resume=True).rglob("*")}
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
    assert isinstance(db.load("model", "sums").predict("7+1=", max_new_tokens=3), str)

    # A run for more nodes than there are waits, says for what, and can be stopped.
    run = db.apply(model(tiny_llama, tmp_path, nodes.url, workers=3), wait=False)
    (said,) = wait_for(lambda: run.record.get("waits_for"))
    assert "3 nodes, and the cluster has 2 nodes" in said
    assert any("wait for 3 nodes" in event.text for event in run.events() if event.kind == "note")
    run.stop()
    assert run.wait(180).state == "stopped"

    # A machine goes away in the middle of a run.
    run = db.apply(model(tiny_llama, tmp_path, nodes.url, max_steps=5000, save_steps=5000), wait=False)
    wait_for(run.metrics)
    nodes.lose(nodes.root / "home2")
    wait_for(lambda: run.state in ("failed", "lost"))
    assert run.state == "failed" and "was lost with its node" in run.error["what"]
    assert "on the nodes that are there" in run.error["todo"]
