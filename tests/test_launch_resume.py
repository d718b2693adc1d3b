"""A run that goes on: the same run, from the database alone, with nothing said twice and nothing left unsaid."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fake_engine
import psutil
import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.checkpoint import Checkpoint
from llmnb.config import TrainConfig
from llmnb.errors import AdapterMismatch, ConfigError, DataError, LaunchError, RunError
from llmnb.events import CheckpointSaved, Metric, Note, StateChanged
from llmnb.launch import cluster, rayconfigs, runner, worker
from llmnb.launch.heart import Heart
from llmnb.launch.said import Said
from llmnb.launch.spool import Spool, read
from llmnb.options import CHANGEABLE
from llmnb.trainer import LLMTrainer as Settings

HERE = Path(__file__).parent


@pytest.fixture
def db(tmp_path):
    db = connect(f"mongomock://{tmp_path.name}", home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(8)]))
    return db


@pytest.fixture
def engine(monkeypatch):
    """The engine without torch: four steps, a checkpoint after each. Letters are read at once."""
    monkeypatch.setitem(Heart.__init__.__kwdefaults__, "every", 0.05)
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake_engine)


def model(tmp_path, base="nowhere", **changes) -> LLM:
    settings = {"select": Collection("sums").find(), "key": "text", "output_dir": str(tmp_path / "out")}
    return LLM("sums", base, trainer=LLMTrainer("t", **{**settings, **changes}))


def interrupted(db, llm, at: int, how: str = "stop"):
    """The run, told to end after step ``at``; checkpoints are those before."""

    def press(event):
        if isinstance(event, Metric) and event.step == at:
            run = db.run("latest")
            run.stop() if how == "stop" else db.store.runs.ask(run.id, "kill")
            end = time.monotonic() + 10
            while time.monotonic() < end and db.store.runs.get(run.id)["state"] != "stopping":
                time.sleep(0.01)

    run = db.apply(llm, on_event=press)
    assert run.state == "stopped"
    return run


def states(run) -> list[str]:
    return [event.state for event in run.events() if isinstance(event, StateChanged)]


def notes(run) -> list[str]:
    return [event.text for event in run.events() if isinstance(event, Note)]


def steps(run) -> list[int]:
    return [m["step"] for m in run.metrics()]


def gapless(run) -> bool:
    events = run.events()
    return [event.seq for event in events] == list(range(1, len(events) + 1))


# -- the same run ----------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_as_the_same_run(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    assert steps(run) == [1, 2, 3]
    heard = []
    assert run.resume(on_event=heard.append) is not run and run.state == "done"
    assert len(db.runs()) == 1 and run.record["attempt"] == 2
    assert steps(run) == [1, 2, 3, 4, 5, 6] and gapless(run)
    assert states(run) == ["starting", "running", "stopping", "stopped", "starting", "running", "done"]
    assert [text for text in notes(run) if "Resumed" in text] == ["Resumed (attempt 2): the run goes on after step 3."]
    assert heard == run.events()[-len(heard) :] and heard[0].state == "starting"
    assert fake_engine.BEGAN[-2:] == [0, 3]
    assert db.load("model", "sums").checkpoint.step == 6
    assert [c.step for c in run.checkpoints()] == [1, 2, 3, 4, 5, 6]


def test_what_was_lost_between_checkpoints_is_done_again_and_not_said_again(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=8, save_steps=3), at=5, how="kill")
    before = run.events()
    assert steps(run) == [1, 2, 3, 4, 5] and [c.step for c in run.checkpoints()] == [3]
    db.resume(run.id)
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7, 8] and gapless(run)
    assert run.events()[: len(before)] == before
    assert sum("8 rows" in text for text in notes(run)) == 1 and fake_engine.BEGAN[-1] == 3


def test_without_a_checkpoint_it_starts_again_from_its_beginning(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=4, save_steps=4), at=2, how="kill")
    assert run.checkpoints() == []
    run.resume()
    assert steps(run) == [1, 2, 3, 4] and run.state == "done"
    assert any("from its beginning" in text for text in notes(run))


def test_the_end_of_the_spool_and_an_unsaid_checkpoint_are_said(db, engine, tmp_path):
    """The worker died before the database had its last events, and between storing a checkpoint and telling of it."""
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    record = run.record
    spool = Spool(Path(record["workdir"]) / "events.jsonl")
    spool.say(Note(text="nobody shipped this"))
    spool.close()
    told = next(e for e in run.events() if isinstance(e, CheckpointSaved) and e.step == 3)
    db.store.events._table.delete({"run": run.id, "seq": told.seq})
    lines = (Path(record["workdir"]) / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["seq"] != told.seq]
    (Path(record["workdir"]) / "events.jsonl").write_text("".join(kept))
    run.resume()
    assert "nobody shipped this" in notes(run)
    assert [e.step for e in run.events() if isinstance(e, CheckpointSaved)] == [1, 2, 3, 4, 5, 6]
    assert run.events() == read(Path(record["workdir"]) / "events.jsonl")


def test_on_another_machine_it_goes_on_from_the_database_alone(db, engine, tmp_path, monkeypatch):
    """Another folder, and nothing of the former one; the checkpoint brings the metrics that were never shipped."""
    monkeypatch.chdir(tmp_path)
    run = interrupted(db, model(tmp_path, max_steps=6, output_dir="out"), at=3)
    (tmp_path / "out").rename(tmp_path / "gone")
    last = next(e for e in run.events() if isinstance(e, Metric) and e.step == 3)
    db.store.events._table.delete({"run": run.id, "seq": {"$gte": last.seq}})
    monkeypatch.setattr("llmnb.engine.manifest.metrics_of", lambda folder: [replace(last, seq=0)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.resume()
    assert steps(run) == [1, 2, 3, 4, 5, 6] and gapless(run)
    assert run.record["workdir"] == str(tmp_path / "elsewhere" / "out" / run.id)


def test_the_best_checkpoint_of_before_is_still_the_best(db, engine, tmp_path, monkeypatch):
    losses = [5.0, 1.0, 4.0, 3.0, 3.5, 2.0]
    llm = model(tmp_path, max_steps=6, save_total_limit=2, metric_for_best_model="loss", eval_strategy="steps")
    monkeypatch.setattr(fake_engine, "LOSSES", losses)
    run = interrupted(db, llm, at=4)
    assert [(c.step, c.best) for c in run.checkpoints()] == [(2, True), (4, False)]
    run.resume()
    assert [(c.step, c.best) for c in run.checkpoints()] == [(2, True), (6, False)]
    assert db.load("model", "sums").checkpoint.step == 2


# -- one at a time ---------------------------------------------------------------------------------------------


def test_of_two_who_resume_one_wins_and_a_run_that_goes_on_is_left_alone(db, engine, tmp_path, monkeypatch):
    run = interrupted(db, model(tmp_path, max_steps=60), at=3)
    monkeypatch.setenv("FAKE_ENGINE_PAUSE_MS", "20")
    gate, refused = threading.Barrier(4), []

    def press():
        gate.wait()
        try:
            db.run(run.id).resume(wait=False)
        except RunError as error:
            refused.append(error.what)

    people = [threading.Thread(target=press) for _ in range(4)]
    [person.start() for person in people]
    [person.join() for person in people]
    assert len(refused) == 3 and run.record["attempt"] == 2
    assert all("still goes on" in what or "at this moment" in what for what in refused)
    with pytest.raises(RunError, match="still goes on"):
        run.resume()
    assert run.wait(180).state == "done" and steps(run) == list(range(1, 61)) and gapless(run)


def test_a_worker_that_was_given_up_and_comes_back_changes_nothing(db, engine, tmp_path, monkeypatch):
    """Its machine slept; meanwhile the run was called lost and resumed elsewhere, and is done."""
    asleep, awake = threading.Event(), threading.Event()

    def doze(event):
        if isinstance(event, Metric) and event.step == 3:
            asleep.set()
            awake.wait(60)

    beat = db.store.runs.beat
    monkeypatch.setattr(db.store.runs, "beat", lambda *words: beat(*words) if not asleep.is_set() else True)
    ghost = threading.Thread(target=db.apply, args=(model(tmp_path, max_steps=50),), kwargs={"on_event": doze})
    ghost.start()
    assert asleep.wait(30)
    run = db.run("latest")
    db.store.runs.transition(run.id, "running", "lost")
    run.resume(output_dir=str(tmp_path / "elsewhere"), max_steps=6)
    saved, said = run.checkpoints(), run.events()
    monkeypatch.setattr(db.store.runs, "beat", beat)
    monkeypatch.setenv("FAKE_ENGINE_PAUSE_MS", "200")
    awake.set()
    ghost.join(60)
    assert not ghost.is_alive()
    assert run.state == "done" and run.record["attempt"] == 2
    assert run.events() == said and run.checkpoints() == saved


# -- further than planned, and other changes -------------------------------------------------------------------


def test_a_run_that_is_done_is_trained_further_when_it_is_asked_for(db, engine, tmp_path):
    run = db.apply(model(tmp_path, max_steps=4))
    with pytest.raises(RunError, match="nothing is left to do") as caught:
        run.resume()
    assert "num_train_epochs" in caught.value.todo and run.record["attempt"] == 1
    for less in ({"max_steps": 3}, {"max_steps": 4}, {"num_train_epochs": 1}):
        with pytest.raises(RunError, match=r"that far already|nothing is left"):
            run.resume(**less)
    run.resume(max_steps=6, save_steps=6)
    assert steps(run) == [1, 2, 3, 4, 5, 6] and [c.step for c in run.checkpoints()] == [1, 2, 3, 4, 6]
    assert run.record["config"]["arguments"] == {"max_steps": 6, "save_steps": 6}
    run.resume(num_train_epochs=2)  # of four steps, with this engine; max_steps would win, so it goes
    assert steps(run)[-1] == 8 and run.record["config"]["arguments"] == {"num_train_epochs": 2.0, "save_steps": 6}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: cannot change .* new run, with adapter_id"),
        ({"per_device_train_batch_size": 2, "lora_r": 4}, "2 settings are wrong"),
        ({"num_epochs": 2}, "num_epochs: is not an option of resume .* num_train_epochs"),
        ({"save_steps": 0}, "save_steps: must be above 0"),
        ({"evaluation_strategy": "sometimes"}, "'sometimes' is not a choice"),
    ],
)
def test_what_would_make_it_another_run_is_refused(changes, said, db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    with pytest.raises(ConfigError, match=said):
        run.resume(**changes)
    assert run.state == "stopped" and run.record["attempt"] == 1


def test_every_setting_that_may_change_is_one():
    assert set(CHANGEABLE) <= Settings.names()


# -- what is not in the database -------------------------------------------------------------------------------


def shout(text):
    return {"text": text.upper()}


def test_a_transform_must_be_given_again_and_be_the_same(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6, transform=shout), at=3)
    with pytest.raises(ConfigError, match=r"never loaded from the database[^$]*def shout") as caught:
        run.resume()
    with pytest.raises(ConfigError, match="not the one that the run began with"):
        run.resume(transform=lambda text: {"text": text.lower()})
    assert run.state == "stopped"
    assert run.resume(transform=shout).state == "done"
    assert "run.resume(transform=" in str(caught.value)


def test_what_was_not_given_at_first_is_refused(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    with pytest.raises(ConfigError, match="2 settings are wrong"):
        run.resume(transform=shout, trainer_kwargs={"compute_metrics": len})


def test_arguments_of_the_trainer_must_be_given_again(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6, training_kwargs={"compute_metrics": len}), at=3)
    with pytest.raises(ConfigError, match=r"trainer_kwargs\['compute_metrics'\]: was given when the run began"):
        run.resume()
    assert run.resume(trainer_kwargs={"compute_metrics": len}).state == "done"


def test_ray_configs_are_stored_as_plain_data_and_made_again():
    pytest.importorskip("ray")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    configs = {
        "scaling_config": ScalingConfig(num_workers=3, resources_per_worker={"CPU": 2}),
        "run_config": RunConfig(name="n", storage_path="/s", failure_config=FailureConfig(max_failures=2)),
        "torch_config": TorchConfig(backend="gloo", timeout_s=60),
    }
    summary = rayconfigs.described(configs)
    again = rayconfigs.rebuilt(json.loads(json.dumps(summary)))
    assert again == configs and again["run_config"].failure_config.max_failures == 2
    (kept,) = rayconfigs.described({"run_config": RunConfig(failure_config=FailureConfig(1))})["configs"].values()
    assert kept.keys() <= {"class", "failure_config", "checkpoint_config", "logging_config"}, "no path of this machine"
    assert rayconfigs.described({}) is None and rayconfigs.rebuilt(None) == {}
    secret = RunConfig(storage_path="s3://key:secret@bucket", worker_runtime_env={"env_vars": {"TOKEN": "secret"}})
    summary = rayconfigs.described({"run_config": secret})
    assert "secret" not in json.dumps(summary)
    with pytest.raises(ConfigError, match=r"worker_runtime_env.*is not in the database") as caught:
        rayconfigs.rebuilt(summary)
    assert len(caught.value.faults) == 2


# -- a base or rows that changed -------------------------------------------------------------------------------


def test_rows_that_changed_are_refused_with_both_numbers(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    db.execute(Collection("sums").insert_many([{"text": "more", "_fold": "train"} for _ in range(2)]))
    with pytest.raises(DataError, match="not those that run") as caught:
        run.resume()
    assert caught.value.seen == "8 rows then, 10 now" and run.state == "failed"
    assert "changed_data=True" in caught.value.todo and run.id in caught.value.todo
    assert run.resume(changed_data=True).state == "done" and steps(run) == [1, 2, 3, 4, 5, 6]
    assert any("goes on with other rows" in text for text in notes(run))
    db.execute(Collection("sums").update_one({"text": "more"}, {"$set": {"text": "less"}}))
    with pytest.raises(DataError) as caught:
        run.resume(max_steps=8)
    assert caught.value.seen.startswith("10 rows then and now")


def test_a_base_that_changed_is_refused(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    reporter = worker._Work(job_of(db, run), db.store, None, 1.0)
    reporter.before = {"base_fingerprint": "a"}
    reporter._same({"base_fingerprint": "a", "rows_digest": "b"})
    with pytest.raises(AdapterMismatch, match="not the one that run"):
        reporter._same({"base_fingerprint": "b"})


def job_of(db, run):
    from llmnb.config import ModelSpec
    from llmnb.job import TrainJob

    record = run.record
    return TrainJob(
        run=run.id,
        model=ModelSpec.from_json(db.store.models.get("sums", record["version"])["spec"]),
        version=record["version"],
        config=TrainConfig.from_json(record["config"]),
        uri=None,
        database=db.store.name,
        workdir=record["workdir"],
    )


def test_a_model_that_was_removed_cannot_be_filled(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    db.remove("model", "sums")
    with pytest.raises(RunError, match="is gone") as caught:
        run.resume()
    assert "adapter_id" in caught.value.todo and run.state == "stopped"


def test_as_many_workers_as_before_or_none(db, engine, tmp_path):
    run = interrupted(db, model(tmp_path, max_steps=6), at=3)
    db.store.runs.update(run.id, counts={**run.record["counts"], "ranks": 2})
    with pytest.raises((ConfigError, LaunchError), match=r"num_gpus|lives in this process"):
        run.resume()
    assert run.record["attempt"] == 1


# -- what went wrong is on the record --------------------------------------------------------------------------


def test_a_run_whose_loss_became_nan_is_flagged_until_it_goes_on_from_before(db, tmp_path, monkeypatch):
    text = "At step 2 the loss became NaN or infinite. Likely: the learning rate (9) is too high."

    def train(spec, config, data, hooks, **more):
        result = fake_engine.train(spec, config, data, hooks, **more)
        if not more.get("resume"):
            hooks.say(Note(level="warning", text=text, data={"step": 2, "what": ["loss"], "causes": ["…"]}))
        return result

    fake = type(sys)("fake")
    fake.train = train
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake)
    run = db.apply(model(tmp_path, max_steps=4))
    assert run.record["warning"] == text and run.state == "done"
    run.resume(max_steps=5)
    assert run.record["warning"] is None


# -- what was said ---------------------------------------------------------------------------------------------


def test_what_is_known_is_what_was_said_whole():
    said = Said(
        [
            Metric(step=3, values={"loss": 1.0, "learning_rate": 0.1}),
            CheckpointSaved(step=3, digest="a"),
            Note(text="8 rows"),
            StateChanged(state="running"),
        ]
    )
    assert said.knows(Metric(step=3, values={"loss": math.nan}))
    assert not said.knows(Metric(step=3, values={"eval_loss": 1.0})), "the evaluation of that step was never said"
    assert not said.knows(Metric(step=4, values={"loss": 1.0}))
    assert said.knows(Note(text="8 rows")) and not said.knows(StateChanged(state="running"))
    stored = [Checkpoint("r", 3, "a"), Checkpoint("r", 4, "b", size=7, best=True)]
    assert [(e.step, e.size, e.best) for e in said.unsaid(stored)] == [(4, 7, True)]


# -- exactly, from new processes -------------------------------------------------------------------------------

A_PERSON = """
import os, signal, sys, time
from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.events import Metric

what, uri, base, home = sys.argv[1:5]
db = connect(uri, home=home)


def train(name, lora, press=None):
    trainer = LLMTrainer(
        name, select=Collection("sums").find(), key="text", output_dir="out", max_seq_length=32, use_lora=lora,
        lora_dropout=0.1, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, max_steps=11,
        per_device_train_batch_size=2, logging_steps=1, save_steps=5, use_cpu=True,
    )
    return db.apply(LLM(name, base, trainer=trainer), on_event=press, progress=False)


def stop(event):
    if isinstance(event, Metric) and event.step == 3:
        db.run().stop()
        while db.run().state != "stopping":
            time.sleep(0.01)


def die(event):
    if isinstance(event, Metric) and event.step == 8:
        while not db.run().checkpoints():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


if what == "begin":
    train("whole-lora", True)
    train("whole-full", False)
    train("stopped-lora", True, stop)
    train("killed-full", False, die)
else:
    from llmnb.engine.loop import Loop

    trained, step = [], Loop.training_step
    Loop.training_step = lambda loop, *all: trained.append(loop.state.global_step) or step(loop, *all)
    for run in reversed(db.runs()):
        if run.look() != "done":
            kept = run.checkpoints()[-1].step
            assert run.resume(progress=False).state == "done"
            assert trained == list(range(kept, 11)), (kept, trained)
            trained.clear()
"""


def in_a_process(folder: Path, *words: str) -> int:
    """A Python process of its own, in a folder of its own; its exit status."""
    folder.mkdir()
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", A_PERSON, *words, str(folder / "home")], cwd=folder, env=env, check=False
    )
    return done.returncode


def curve(run) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["learning_rate"]) for m in run.metrics()]


def kept(db, run) -> dict[str, bytes]:
    """All files of the last checkpoint but those that tell the time, name the folder, or list a set in any order."""
    folder = db.store.checkpoints.fetch(run.checkpoints()[-1], resume=True)
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    aside = {"trainer_state.json", "training_args.bin", "adapter_config.json", ".llmnb-proved.json"}
    return {name: path.read_bytes() for name, path in files.items() if name not in aside}


@pytest.mark.mongod
@pytest.mark.slow
def test_trap21_trap22_n_steps_are_k_and_the_rest_from_a_new_process(mongo_uri, tiny_llama, tmp_path):
    """Bitwise, on one CPU worker: LoRA after a stop, all weights after kill -9; another home, another folder."""
    db = connect(mongo_uri, home=tmp_path / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(12)]))
    assert in_a_process(tmp_path / "here", "begin", mongo_uri, tiny_llama) == -signal.SIGKILL
    runs = {run.record["model"]: run for run in db.runs()}
    assert runs["stopped-lora"].state == "stopped" and [c.step for c in runs["killed-full"].checkpoints()] == [5]
    said = runs["killed-full"].events()
    (tmp_path / "here").rename(tmp_path / "gone")
    assert in_a_process(tmp_path / "there", "resume", mongo_uri, tiny_llama) == 0
    for whole, broken in (("whole-lora", "stopped-lora"), ("whole-full", "killed-full")):
        one, two = runs[whole], runs[broken]
        assert two.state == "done" and two.record["attempt"] == 2 and gapless(two)
        assert curve(two) == curve(one) and [step for step, *_ in curve(one)] == list(range(1, 12))
        ours, theirs = kept(db, one), kept(db, two)
        assert ours.keys() == theirs.keys() >= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "llmnb.json"}
        assert [name for name in ours if ours[name] != theirs[name]] == []
    assert runs["killed-full"].events()[: len(said)] == said
    assert any("goes on after step 5" in text for text in notes(runs["killed-full"]))
    db.close()


# -- several workers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a runner and a cluster of its own, ended afterwards."""
    home = tmp_path_factory.mktemp("ray") / "home"
    yield home
    runner.stop(home, patience=2.0)
    assert not cluster._marked(cluster._mark(home))


@pytest.fixture
def served(mongo_uri, home):
    """A database on a server, whose runs may be in the background; with rows of uneven length."""
    db = connect(mongo_uri, home=home)
    rows = [{"text": f"{i}+1={i + 1} " + "the cat sat " * (i % 5), "_fold": "train"} for i in range(35)]
    db.execute(Collection("sums").insert_many(rows))
    yield db
    for record in db.store.runs.list():
        if record["state"] not in ("done", "failed", "stopped", "lost"):
            db.run(record["_id"]).kill()
    db.close()


def on_two(tmp_path, base, **changes) -> LLM:
    settings = {
        "num_gpus": 2,
        "max_seq_length": 64,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "logging_steps": 1,
        "save_steps": 4,
    }
    return model(tmp_path, base, **{**settings, **changes})


def wait_for(what, limit: float = 240.0):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("waited too long")


def ranks_of(home) -> set[int]:
    """Processes that train as a rank."""
    found = set()
    for process in cluster._marked(cluster._mark(home)):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.add(process.pid)
    return found


def loss_curve(run) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in run.metrics()}


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
@pytest.mark.timeout(1500)  # five starts of workers; each took a minute and more on a machine with ten times its load
def test_trap21_killed_ranks_go_on_by_themselves_and_the_run_further_than_planned(served, home, tiny_llama, tmp_path):
    """kill -9 of rank 0, then of rank 1, on two workers; then resumed from the database alone. Tolerance: 1e-6."""
    from ray.train import FailureConfig, RunConfig

    db = served
    whole = db.apply(on_two(tmp_path, tiny_llama, max_steps=24), progress=False)
    again = {"run_config": RunConfig(failure_config=FailureConfig(max_failures=3))}
    run = db.apply(on_two(tmp_path, tiny_llama, max_steps=20, ray_configs=again), wait=False)
    seen = set()
    for starts, victim in ((1, 0), (2, 1)):
        wait_for(lambda starts=starts: run.state == "failed" or (run.record.get("rank0") or {}).get("starts") == starts)
        wait_for(lambda starts=starts: run.state == "failed" or len(run.checkpoints()) >= starts)
        rank0 = run.record["rank0"]["pid"]
        pid = rank0 if victim == 0 else (ranks_of(home) - {rank0}).pop()
        os.kill(pid, signal.SIGKILL)
        seen.add(pid)
    run.wait(400)
    assert run.state == "done" and len(seen) == 2
    assert gapless(run) and states(run) == ["starting", "running", "done"]
    again = [text for text in notes(run) if "started the workers again" in text]
    assert len(again) == 2 and "(1). The run goes on after step" in again[0] and "(2)" in again[1], notes(run)
    assert run.events() == read(Path(run.record["workdir"]) / "events.jsonl")
    saved = [event.step for event in run.events() if isinstance(event, CheckpointSaved)]
    assert saved == [4, 8, 12, 16, 20] == [c.step for c in run.checkpoints()]

    run.resume(max_steps=24, wait=True)
    ours, theirs = loss_curve(run), loss_curve(whole)
    assert list(ours) == list(theirs) == list(range(1, 25)) and gapless(run)
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-6
