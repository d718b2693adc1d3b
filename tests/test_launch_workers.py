"""Runs on several workers: the same losses as one, DeepSpeed, letters, failures, and what is refused beforehand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConfigError, MissingPackage, RunError
from llmnb.events import StateChanged
from llmnb.job import TrainJob
from llmnb.launch import cluster, deaths, layout, room, runner, workers
from llmnb.launch.layout import plan
from llmnb.launch.spool import read
from llmnb.launch.workers import RankFailed, _cause

# --- what is refused, and how many workers there are: no cluster ----------------------------------------------


class Scaling:
    """Looks like ``ray.train.ScalingConfig``, which is only looked at."""

    def __init__(self, num_workers=1, use_gpu=False, resources_per_worker=None, placement_strategy="PACK"):
        self.num_workers, self.use_gpu, self.resources_per_worker = num_workers, use_gpu, resources_per_worker
        self.placement_strategy = placement_strategy


def planned(ray_configs=None, *, gpus=0, bits=None, background=True, **settings):
    return plan(TrainConfig(**settings), ray_configs or {}, bits=bits, gpus=gpus, background=background)


@pytest.mark.parametrize(
    ("settings", "workers", "on_ray"),
    [
        ({}, 1, False),
        ({"num_gpus": 2}, 2, True),
        ({"num_gpus": 2, "gpus": 4}, 2, True),
        ({"gpus": 4}, 4, True),
        ({"gpus": 4, "num_gpus": 1}, 1, False),
        ({"gpus": 4, "arguments": {"use_cpu": True}}, 1, False),
        ({"gpus": None}, 1, False),
        ({"gpus": 4, "background": False}, 1, False),
        ({"deepspeed": {}}, 1, True),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}, "num_gpus": 2}, 2, True),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}, "bits": 4}, 1, True),
        ({"ray_configs": {"scaling_config": Scaling(3)}}, 3, True),
        ({"ray_configs": {"scaling_config": Scaling(2)}, "num_gpus": 2}, 2, True),
        ({"ray_configs": {"run_config": object()}}, 1, True),
    ],
)
def test_how_many_workers(settings, workers, on_ray):
    found = planned(**settings)
    assert (found.workers, found.on_ray) == (workers, on_ray)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_gpus": 2, "background": False}, "on_ray: is False, and num_gpus needs Ray"),
        ({"deepspeed": {}, "background": False}, "deepspeed needs Ray"),
        ({"num_gpus": 4, "gpus": 2}, "4 GPUs are asked for, and this machine has 2"),
        ({"num_gpus": 3, "ray_configs": {"scaling_config": Scaling(2)}}, "says 3, .* says 2"),
        ({"ray_configs": {"scaling_config": Scaling((1, 4))}}, "may change while the run goes on"),
        ({"ray_configs": {"scaling_config": Scaling(0)}}, "1 worker or more"),
        ({"ray_configs": {"scaling_config": {"num_workers": 2}}}, "must be a ray.train.ScalingConfig, not dict"),
        ({"ray_configs": {"scale_config": Scaling(2)}}, "did you mean scaling_config"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "stage is 4"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}, "bits": 4}, "4-bit weights cannot be"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "fp16 is on, and this machine has no GPU"),
        ({"deepspeed": "nowhere.json"}, "nowhere.json cannot be read"),
        (
            {"ray_configs": {"scaling_config": Scaling(2, resources_per_worker={"CPU": 512})}},
            "workers ask for 1024 CPUs, and this machine has",
        ),
        (
            {"ray_configs": {"scaling_config": Scaling(2, placement_strategy="STRICT_SPREAD")}},
            "2 nodes, and this machine has 1 node.*ray_address of a larger cluster",
        ),
        ({"ray_configs": {"scaling_config": Scaling(2), "datasets": {}}}, "datasets"),
        ({"ray_configs": {"train_loop_per_worker": print}}, "train_loop_per_worker"),
        ({"ray_configs": {"train_loop_config": {}}}, "train_loop_config"),
    ],
)
def test_what_cannot_be_is_said_beforehand(settings, said):
    with pytest.raises(ConfigError, match=said):
        planned(**settings)


def test_all_faults_are_said_together():
    with pytest.raises(ConfigError) as caught:
        planned({"nothing": 1, "scaling_config": Scaling(2)}, num_gpus=3, deepspeed={"zero_optimization": {"stage": 9}})
    assert len(caught.value.faults) == 3


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(layout, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="deepspeed"):
        planned(deepspeed={})
    assert planned(deepspeed={}, gpus=None).on_ray  # another machine may have it


def test_a_configuration_of_deepspeed_in_a_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 7}}))
    with pytest.raises(ConfigError, match="stage is 7"):
        planned(deepspeed=str(path))


LOST = "The actor died because its node has died. Node Id: 3f"
KILLED = "Worker unexpectedly exits with a connection error code 2. End of file."


@pytest.mark.parametrize(
    ("seen", "memory", "what", "todo"),
    [
        (LOST, False, "Worker 1 of 2 was lost with its node", "run.resume.. goes on .*, on the nodes that are there"),
        (LOST, True, "lost with its node", "see whether that machine"),
        (KILLED, False, "died without a word: killed by SIGKILL, or crashed", "if memory ran out: a smaller batch"),
        (KILLED, True, "killed because memory ran out", "bits=4, or fewer workers"),
        ("ray.exceptions.OutOfMemoryError: Task was killed", False, "because memory ran out", "a smaller batch"),
        ("Worker exits because it received SIGTERM.", False, "ended by SIGTERM", "run.stop.. ends all"),
    ],
)
def test_why_a_worker_died_is_said_with_advice(seen, memory, what, todo):
    found = deaths.why(1, 2, seen, memory_killed=memory)
    assert re.search(what, found[0]) and re.search(todo, found[1])


def test_a_node_that_is_gone_is_the_cause_also_when_ray_only_knows_silence(monkeypatch):
    seen = "The actor 7f is unavailable: The actor is temporarily unavailable: UnavailableError"
    assert deaths.does_not_answer(seen) and not deaths.does_not_answer(KILLED)
    assert deaths.why(1, 2, seen, node_lost=True)[0].startswith("Worker 1 of 2 was lost with its node")
    looks = iter([True, True, False])

    class Ray:
        def nodes():
            return [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": next(looks, True)}]

    assert workers._lost_a_node(Ray, {"a", "b"}, seen) is True
    assert workers._lost_a_node(Ray, {"a", "b"}, KILLED) is False


def test_a_head_that_is_gone_is_named(monkeypatch, tmp_path):
    class job:
        ray_address = None

    monkeypatch.setenv("LLMNB_HOME", str(tmp_path))
    with pytest.raises(RunError, match="cluster of this machine is gone"):
        workers._ask_for_the_head(job)
    job.ray_address = "http://head:8265"
    workers._ask_for_the_head(job)


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:20441", True),
        ("recv() failed: Connection reset by peer", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("only rank 1 broke", False),
    ],
)
def test_an_error_that_only_tells_of_another_rank(text, peer):
    assert deaths.lost_a_peer(text) is peer


@pytest.mark.parametrize(
    ("asked", "there", "free", "said", "never"),
    [
        ({"CPU": 2}, {"CPU": 4}, {"CPU": 2}, "", False),
        ({"CPU": 4}, {"CPU": 4}, {"CPU": 1}, "4 CPUs, and of the cluster's 4 CPUs are free: 1", False),
        ({"CPU": 4}, {"CPU": 4}, {}, "", False),
        ({"CPU": 8, "GPU": 1}, {"CPU": 4}, {"CPU": 4}, "8 CPUs and 1 GPU, and the cluster has 4 CPUs and 0 GPUs", True),
        ({"node": 2}, {"node": 1}, {}, "2 nodes, and the cluster has 1 node", True),
    ],
)
def test_what_workers_wait_for(asked, there, free, said, never):
    assert room.lacking(asked, there, free) == (said, never)


class Failed(Exception):
    def __init__(self, failures):
        super().__init__("Training failed")
        self.worker_failures = failures


def test_the_first_failure_is_the_cause_and_a_dead_worker_comes_before_its_consequences():
    class work:
        class job:
            workers = 3

        mask = staticmethod(str)

    def rank(number, when):
        told = {"type": "ValueError", "what": f"of {number}", "seen": None, "todo": None, "traceback": "…"}
        return RankFailed(told, number, when)

    assert _cause(Failed({0: rank(0, 20.0), 2: rank(2, 10.0)}), work).rank == 2
    died = _cause(Failed({0: rank(0, 20.0), 1: OSError("actor died")}), work)
    assert isinstance(died, RunError) and died.what.startswith("Worker 1 of 3 died") and "actor died" in died.seen


# --- on a cluster ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a cluster of its own, ended afterwards."""
    home = tmp_path_factory.mktemp("ray") / "home"
    yield home
    runner.stop(home, patience=2.0)
    assert not cluster._marked(cluster._mark(home))


@pytest.fixture
def db(mongo_uri, home):
    db = connect(mongo_uri, home=home)
    rows = [{"text": f"{i}+1={i + 1} " + "the cat sat " * (i % 5), "_fold": "train"} for i in range(35)]
    db.execute(Collection("sums").insert_many(rows + [{"text": f"{i}+1={i + 1}", "_fold": "valid"} for i in range(3)]))
    yield db
    for record in db.store.runs.list():
        if record["state"] not in ("done", "failed", "stopped", "lost"):
            db.run(record["_id"]).kill()
    db.close()


def model(base, tmp_path, **changes) -> LLM:
    settings = {
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(tmp_path / "out"),
        "max_seq_length": 64,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "lora_dropout": 0.0,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    return LLM("sums", base, trainer=LLMTrainer("sums-trainer", **{**settings, **changes}))


def losses(run) -> list[float]:
    return [m[name] for m in run.metrics() for name in ("loss", "eval_loss") if name in m]


def close(ours, theirs) -> bool:
    return len(ours) == len(theirs) > 6 and max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-4


ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def wait_for(what, limit: float = 240.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("waited too long")


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
def test_two_workers_learn_what_one_does_and_give_no_secret_away(db, home, mongo_uri, tiny_llama, tmp_path):
    # 35 rows: the last window of an epoch is partial, and one rank has fewer rows than the other.
    one = db.apply(model(tiny_llama, tmp_path, per_device_train_batch_size=8, use_cpu=True), progress=False)
    several = model(tiny_llama, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_gpus=2)
    two = db.apply(several, progress=False)
    assert close(losses(two), losses(one))
    assert two.record["counts"]["ranks"] == 2 and two.record["counts"]["rows_per_step"] == 8

    events = two.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [e.state for e in events if isinstance(e, StateChanged)] == ["starting", "running", "done"]
    assert "2 workers train on the CPU" in " ".join(e.text for e in events if e.kind == "note")
    folder = Path(two.record["workdir"])
    assert events == read(folder / "events.jsonl")
    assert [c.step for c in two.checkpoints()] == [3, 6]
    again = db.load("model", "sums")
    assert again.checkpoint.step == 6 and isinstance(again.predict("7+1=", max_new_tokens=3), str)

    password = re.search(r"://[^:/@]+:([^@]+)@", mongo_uri).group(1)
    ours = cluster.status(home)
    looked_at = [p for p in [*folder.rglob("*"), *Path(ours.temp_dir).rglob("*")] if p.is_file() and not p.is_symlink()]
    assert any("worker" in p.name and "ray" in str(p) for p in looked_at)
    assert [str(p) for p in looked_at if password.encode() in p.read_bytes()] == []
    show = (
        "import ray; ray.init(log_to_driver=False); from ray._private import state; print(state.actors(), state.jobs())"
    )
    env = {**os.environ, **ours.environment()}
    shown = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True, check=True).stdout
    assert "RayTrainWorker" in shown and password not in shown
    assert {ip.removeprefix("::ffff:") for _, ip, _ in cluster.listening(home)} == {"127.0.0.1"}


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
def test_two_workers_stream_their_own_rows_and_go_on_in_the_middle_of_an_epoch(db, tiny_llama, tmp_path):
    settings = {"streaming": True, "eval_strategy": "no", "lr_scheduler_type": "constant"}
    one = model(tiny_llama, tmp_path, **settings, per_device_train_batch_size=4, max_steps=12, use_cpu=True)
    whole = db.apply(one, progress=False)
    two = model(tiny_llama, tmp_path, **settings, per_device_train_batch_size=2, max_steps=6, num_gpus=2)
    part = db.apply(two, progress=False)
    counts = part.record["counts"]
    assert counts["streaming"] and counts["ranks"] == 2 and counts["found"] == 35
    part.resume(max_steps=12).wait(400)
    assert part.state == "done" and [c.step for c in part.checkpoints()] == [3, 6, 9, 12]
    assert len(losses(whole)) == 12 and losses(part) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
@pytest.mark.deepspeed
def test_trap18_a_whole_model_of_zero3_is_loaded_and_predicts(db, tiny_llama, tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({**ZERO, "zero_optimization": {"stage": 3}}))
    shared = {"deepspeed": str(path), "num_gpus": 2, "use_lora": False, "learning_rate": 1e-3, "eval_strategy": "no"}
    whole = model(tiny_llama, tmp_path, per_device_train_batch_size=2, max_steps=2, save_steps=2, **shared)
    run = db.apply(whole, wait=False).wait(400)
    assert run.record["counts"]["ranks"] == 2
    assert run.record["config"]["deepspeed"]["zero_optimization"] == {"stage": 3}  # the file's content, not its path
    again = db.load("model", "sums")
    assert again.checkpoint.experiment == run.id and isinstance(again.predict("7+1=", max_new_tokens=3), str)


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
def test_trap22_a_letter_reaches_all_ranks_and_a_failure_brings_its_ranks_own_traceback(db, tiny_llama, tmp_path):
    run = db.apply(
        model(tiny_llama, tmp_path, per_device_train_batch_size=1, num_gpus=2, max_steps=5000, save_steps=5000),
        wait=False,
    )
    wait_for(run.metrics)
    run.stop()
    assert run.wait(180).state == "stopped"
    (checkpoint,) = run.checkpoints()
    assert checkpoint.step == run.metrics()[-1]["step"] and checkpoint.resumable
    kept = {path.name for path in db.store.checkpoints.fetch(checkpoint, resume=True).iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= kept
    assert [e.state for e in run.events() if isinstance(e, StateChanged)][-2:] == ["stopping", "stopped"]

    def broken(text):
        if os.environ["RANK"] == "1":
            raise ValueError("only rank 1 broke")
        return {"text": text}

    with pytest.raises(RunError, match="ValueError: only rank 1 broke") as caught:
        db.apply(model(tiny_llama, tmp_path, num_gpus=2, transform=broken), progress=False)
    assert "in broken" in caught.value.remote_traceback
    assert db.load("model", "sums").checkpoint.experiment == run.id  # the version before still answers


def train_workers(home) -> set[int]:
    """Process ids of all ranks on this home's cluster."""
    return {p.pid for p in cluster._marked(cluster._mark(home)) if p.name().startswith("ray::RayTrainWo")}


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank", "said"),
    [(signal.SIGKILL, 1, "Worker 1 of 2 died without a word"), (signal.SIGTERM, 0, "Worker 0 of 2 .*")],
)
def test_a_worker_that_is_killed_is_named(number, rank, said, db, home, tiny_llama, tmp_path):
    others = train_workers(home)
    run = db.apply(
        model(tiny_llama, tmp_path, per_device_train_batch_size=1, num_gpus=2, max_steps=5000, save_steps=5000),
        wait=False,
    )
    wait_for(run.metrics)
    rank0 = run.record["rank0"]["pid"]
    (rank1,) = [pid for pid in train_workers(home) - others if pid != rank0] if rank else (None,)
    os.kill(rank1 if rank else rank0, number)
    with pytest.raises(RunError, match=said) as caught:
        run.wait(240)
    assert "run.resume() goes on from the newest checkpoint" in caught.value.todo
    assert run.state == "failed"
    events = run.events()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events == read(Path(run.record["workdir"]) / "events.jsonl")


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workers.machine, "cpus", lambda: 8)
    job = TrainJob("r", ModelSpec(), 1, TrainConfig(), None, "d", "w", workers=4)
    env = workers._rank_environment(job)
    assert (env["OMP_NUM_THREADS"], env["RAYON_NUM_THREADS"]) == ("2", "2")
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert workers._rank_environment(job)["RAYON_NUM_THREADS"] == "3"
