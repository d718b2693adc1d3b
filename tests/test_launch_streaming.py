"""Which runs read their documents while they train; a database that is away meanwhile; real runs."""

from __future__ import annotations

import threading
import time

import pytest
from test_launch_worker import gapless, make_job

from llmnb import LLMTrainer
from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConfigError, ConnectError
from llmnb.events import Metric
from llmnb.launch import streaming, worker
from llmnb.launch.run import Run
from llmnb.query import Collection

TEXTS = Collection("texts")
WORDS = ("the", "cat", "sat", "on", "the", "mat", "and", "a", "dog", "ran", "to", "the", "park")


@pytest.fixture(autouse=True)
def documents(store):
    store.database["texts"].insert_many(
        [{"text": " ".join(WORDS[: 2 + i % 9]), "_fold": "valid" if i % 10 == 0 else "train"} for i in range(60)]
    )


def config_of(tmp_path, *, select=None, streaming=None, method="sft", **arguments):
    return TrainConfig(
        select=select or TEXTS.find(),
        key="text",
        output_dir=str(tmp_path / "out"),
        streaming=streaming,
        method=method,
        max_seq_length=64,
        lora_dropout=0.0,
        arguments={"use_cpu": True, **arguments},
    )


def chosen(store, tmp_path, **more):
    return streaming.streamed(make_job(store, tmp_path, config=config_of(tmp_path, **more)), store, lambda ask: ask())


def test_many_documents_are_streamed_and_few_are_read_first(store, tmp_path, monkeypatch):
    assert chosen(store, tmp_path) == {}
    assert {fold: len(found) for fold, found in chosen(store, tmp_path, streaming=True).items()} == {
        "train": 54,
        "valid": 6,
    }
    monkeypatch.setattr(streaming, "MOST_AT_ONCE", 59)
    assert len(chosen(store, tmp_path)["train"]) == 54
    assert chosen(store, tmp_path, streaming=False) == {}
    assert chosen(store, tmp_path, select=TEXTS.find().limit(59)) == {}, "what is selected counts, not the collection"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"select": TEXTS.aggregate([{"$match": {}}])}, "aggregation"),
        ({"method": "dpo"}, "pairs"),
        ({"train_sampling_strategy": "group_by_length"}, "length"),
        ({"dataloader_num_workers": 2}, "thread"),
    ],
)
def test_where_it_cannot_be_all_is_read_first_unless_it_was_asked_for(store, tmp_path, monkeypatch, more, why):
    monkeypatch.setattr(streaming, "MOST_AT_ONCE", 1)
    assert chosen(store, tmp_path, **more) == {}
    with pytest.raises(ConfigError, match=why):
        chosen(store, tmp_path, streaming=True, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"select": TEXTS.aggregate([])},
        {"method": "dpo", "key": ("prompt", "chosen", "rejected")},
        {"group_by_length": True},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_the_trainer_says_so_before_any_work(more):
    with pytest.raises(ConfigError, match="streaming"):
        LLMTrainer(**{"select": TEXTS.find(), "key": "text", **more}, streaming=True).freeze()
    assert LLMTrainer(**{"select": TEXTS.find(), "key": "text", **more}).freeze().config.streaming is None


def test_a_classifier_reads_all_first():
    from llmnb.pipelines import TextClassification  # noqa: F401 - the task it trains is the one below

    trainer = LLMTrainer(select=TEXTS.find(), key=("text", "label"), streaming=True)
    with pytest.raises(ConfigError, match="labels"):
        trainer.freeze(ModelSpec(model_name_or_path="x", task="text-classification"))


def real_job(store, tmp_path, base, **more):
    job = make_job(store, tmp_path, config=config_of(tmp_path, **more))
    object.__setattr__(job, "model", ModelSpec(identifier="sums", model_name_or_path=base))
    return job


GIVEN = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_strategy": "epoch"}


def test_a_run_from_the_database_is_the_run_that_read_all_first(store, tmp_path, tiny_llama):
    losses = {}
    for stream in (True, False):
        job = real_job(store, tmp_path, tiny_llama, streaming=stream, save_strategy="no", **GIVEN)
        worker.work(job, store=store)
        run = Run(store, job.run)
        assert run.state == "done", run.error
        losses[stream] = [(m["step"], m["loss"]) for m in run.metrics() if "loss" in m]
        losses[stream, "eval"] = [m["eval_loss"] for m in run.metrics() if "eval_loss" in m]
        counts = run.record["counts"]
        assert counts["found"] == counts["rows"] == 54 and counts["tokens"] > 54 and counts["dropped"] == 0
        assert bool(counts.get("streaming")) is stream and gapless(run.events())
    assert losses[True] == losses[False] and len(losses[True]) == 12
    assert losses[True, "eval"] == losses[False, "eval"] and losses[True, "eval"]


def test_a_database_that_is_away_is_waited_for(store, tmp_path, tiny_llama, monkeypatch):
    """Documents are refused for three seconds, from the moment that the first loss was said."""
    from llmnb.engine import streaming as engine
    from llmnb.store.addressed import Addressed

    monkeypatch.setattr(engine, "AHEAD_ROWS", 8)
    monkeypatch.setattr(engine, "_FIRST", 4)
    monkeypatch.setattr(engine, "_MOST", 4)
    away_until, refused, fetch = [0.0], [], Addressed.fetch

    def refusing(self, *args):
        if time.monotonic() < away_until[0]:
            refused.append(threading.current_thread().name)
            raise ConnectError("away")
        return fetch(self, *args)

    def cut(event):
        if isinstance(event, Metric) and event.step == 1:
            away_until[0] = time.monotonic() + 3.0

    monkeypatch.setattr(Addressed, "fetch", refusing)
    job = real_job(store, tmp_path, tiny_llama, streaming=True, save_strategy="no", **GIVEN)
    worker.work(job, store=store, on_event=cut)
    run = Run(store, job.run)
    assert run.state == "done" and [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, 13))
    assert len(refused) > 1 and "llmnb-rows" in refused


def test_other_documents_are_noticed_when_a_run_goes_on(store, tmp_path, monkeypatch):
    """The digest is that of the ids, and of the rows of the first documents."""
    from tiny import make_tokenizer

    from llmnb.engine.streaming import Streamed

    def digest():
        found = chosen(store, tmp_path, streaming=True)["train"]
        return Streamed(found, make_tokenizer(), config_of(tmp_path), blank=0, head=range(50)).digest()

    first = digest()
    assert digest() == first
    one = store.execute(TEXTS.find_one({"_fold": "train"}))
    store.execute(TEXTS.update_one({"_id": one["_id"]}, {"$set": {"text": "another"}}))
    second = digest()
    assert second != first
    store.execute(TEXTS.delete_one({"_id": one["_id"]}))
    assert digest() not in (first, second)


def test_a_folder_in_place_of_a_database_has_no_ids(store, tmp_path):
    job = make_job(store, tmp_path, config=config_of(tmp_path, streaming=True))
    with pytest.raises(ConfigError, match="log_to_db"):
        streaming.streamed(job, object(), lambda ask: ask())
