"""The main path, as a person walks it: documents → apply → checkpoints → load → predict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmnb import LLM, Collection, Document, LLMTrainer, connect
from llmnb.errors import (
    ConfigError,
    DataError,
    InUse,
    LlmnbError,
    ModelError,
    NotFound,
)


@pytest.fixture(params=["mongomock", pytest.param("mongod", marks=pytest.mark.mongod)])
def uri(request, tmp_path):
    if request.param == "mongomock":
        return f"mongomock://{tmp_path.name}"
    return request.getfixturevalue("mongo_uri")


@pytest.fixture
def db(uri, tmp_path):
    db = connect(uri, home=tmp_path / "home")
    yield db
    db.close()


def sums(count: int = 40, train: int = 32):
    return [
        Document({"text": f"{i}+1={i + 1}", "_fold": "train" if i < train else "valid", "n": i}) for i in range(count)
    ]


def trainer(tmp_path, **changes) -> LLMTrainer:
    settings = {
        "identifier": "sums-trainer",
        "select": Collection("sums").find(),
        "key": "text",
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-2,
        "max_seq_length": 32,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 3,
        "use_cpu": True,
    }
    return LLMTrainer(**{**settings, **changes})


def model(tiny_llama, tmp_path, identifier="sums", **changes) -> LLM:
    return LLM(identifier, tiny_llama, trainer=trainer(tmp_path, **changes))


def test_forty_sums_make_four_steps_and_keep_three_checkpoints(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    llm = model(tiny_llama, tmp_path)
    run = db.apply(llm)
    assert run.state == "done"
    assert run.record["counts"]["steps"] == 4
    experiment = db.show("checkpoint")[-1]
    assert db.show("checkpoint", experiment) == [2, 3, 4]
    assert [m["step"] for m in run.metrics() if "loss" in m] == [1, 2, 3, 4]
    assert db.load("model", "sums").checkpoint.step == 4


def test_the_best_step_is_the_models_when_asked(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    # A rate that rises until the loss explodes: an early step is the best one.
    llm = model(
        tiny_llama,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        save_total_limit=None,
    )
    run = db.apply(llm)
    evals = {m["step"]: m["eval_loss"] for m in run.metrics() if "eval_loss" in m}
    best = min(evals, key=evals.get)
    loaded = db.load("model", "sums")
    assert loaded.checkpoint.step == best
    assert [c.step for c in db.checkpoints(run.id) if c.best] == [best]
    assert loaded.checkpoint.digest == db.load("checkpoint", run.id, best).digest


def test_the_callers_own_object_answers_with_the_trained_weights(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    llm = model(tiny_llama, tmp_path, num_train_epochs=6)
    before = llm.predict("7+1=", max_new_tokens=8)
    db.apply(llm)
    after = llm.predict("7+1=", max_new_tokens=8)
    assert before != after
    assert db.load("model", "sums").predict("7+1=", max_new_tokens=8) == after
    base = LLM("base", tiny_llama)
    assert base.predict("7+1=", max_new_tokens=8) == before
    experiment = db.show("checkpoint")[-1]
    for adapter in (db.load("checkpoint", experiment), experiment, f"{experiment}/{llm.checkpoint.step}"):
        assert LLM("again", tiny_llama, adapter_id=adapter).predict("7+1=", max_new_tokens=8) == after


@pytest.mark.mongod
def test_another_process_with_only_the_uri_gives_the_same_answer(mongo_uri, tiny_llama, tmp_path):
    db = connect(mongo_uri, home=tmp_path / "home")
    db.execute(Collection("sums").insert_many(sums()))
    llm = model(tiny_llama, tmp_path, num_train_epochs=3)
    db.apply(llm)
    code = (
        "import json, os; from llmnb import connect; db = connect(os.environ['LLMNB_URI'], home=os.environ['HOME2']);"
        "print(json.dumps(db.load('model', 'sums').predict('7+1=', max_new_tokens=8)))"
    )
    env = {**os.environ, "LLMNB_URI": mongo_uri, "HOME2": str(tmp_path / "elsewhere")}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == llm.predict("7+1=", max_new_tokens=8)


def test_two_runs_with_one_output_dir_and_what_may_be_removed(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    first = db.apply(model(tiny_llama, tmp_path, save_steps=2))
    second = db.apply(model(tiny_llama, tmp_path, save_steps=2, num_train_epochs=2))
    assert db.show("checkpoint") == [first.id, second.id]
    assert db.show("checkpoint", first.id) == [2, 4]
    assert db.show("model", "sums") == [1, 2]
    with pytest.raises(InUse, match="sums"):
        db.remove("checkpoint", second.id, 8)
    db.remove("checkpoint", first.id, 2)
    assert db.show("checkpoint", first.id) == [4]
    db.remove("model", "sums", 1)
    assert db.show("model", "sums") == [2]
    assert db.load("model", "sums").predict("1+1=", max_new_tokens=2) is not None
    with pytest.raises(NotFound, match="sums"):
        db.load("model", "sum")


def test_removing_one_of_two_models_that_share_bytes_leaves_the_other(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    one = db.apply(model(tiny_llama, tmp_path, "one", save_steps=4))
    two = db.apply(model(tiny_llama, tmp_path, "two", save_steps=4))
    same = [db.load("checkpoint", run.id) for run in (one, two)]
    weights = [(Path(c.path) / "adapter_model.safetensors").read_bytes() for c in same]
    assert weights[0] == weights[1]  # same seed, same data: the same bytes, stored once
    answer = db.load("model", "two").predict("1+1=", max_new_tokens=4)
    db.remove("model", "one")
    db.remove("checkpoint", one.id)
    db.store.artifacts.gc()
    fresh = connect(db.store.uri, home=tmp_path / "elsewhere") if not db.store.in_process else db
    assert fresh.load("model", "two").predict("1+1=", max_new_tokens=4) == answer


def test_a_failed_training_leaves_the_previous_version(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    db.apply(model(tiny_llama, tmp_path, save_steps=4))
    good = db.load("model", "sums").checkpoint

    def broken(text):
        raise ValueError("the transform broke")

    with pytest.raises(LlmnbError, match="the transform broke"):
        db.apply(model(tiny_llama, tmp_path, transform=broken))
    run = db.run("latest")
    assert run.state == "failed" and "the transform broke" in json.dumps(run.record["error"])
    assert db.load("model", "sums").checkpoint == good


def test_a_tokenizer_without_a_pad_token_trains_with_batch_four(db, tmp_path):
    from tiny import make_model, make_tokenizer

    folder = make_model("llama", tmp_path / "nopad", tokenizer=make_tokenizer(pad=False))
    db.execute(Collection("sums").insert_many(sums()))
    llm = model(str(folder), tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    run = db.apply(llm)
    assert run.record["counts"]["steps"] == 8
    assert isinstance(llm.predict(["1+1=", "12+1="], max_new_tokens=4), list)


def test_full_fine_tuning_makes_whole_models_that_load_as_such(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    llm = model(tiny_llama, tmp_path, use_lora=False, save_steps=4, learning_rate=1e-3)
    db.apply(llm)
    loaded = db.load("model", "sums")
    assert loaded.checkpoint.kind == "model"
    assert loaded.predict("1+1=", max_new_tokens=4) == llm.predict("1+1=", max_new_tokens=4)


def test_merge_gives_a_folder_that_plain_transformers_loads(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    llm = model(tiny_llama, tmp_path, num_train_epochs=4, save_steps=16)
    db.apply(llm)
    report = llm.merge(tmp_path / "merged")
    assert report["max_logit_gap"] < 1e-3
    merged = LLM("merged", tmp_path / "merged")
    assert merged.predict("7+1=", max_new_tokens=8) == llm.predict("7+1=", max_new_tokens=8)
    assert merged.predict("7+1=", max_new_tokens=8) != LLM("b", tiny_llama).predict("7+1=", max_new_tokens=8)


def test_fit_is_apply_in_other_words(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    llm = LLM("sums", tiny_llama)
    configuration = trainer(tmp_path, select=None, key=None)
    run = llm.fit(X="text", select=Collection("sums").find(), configuration=configuration, db=db, max_steps=1)
    assert run.state == "done" and run.record["counts"]["steps"] == 1
    assert configuration.select is None  # the person's own configuration is not changed


def test_bad_input_is_named_before_any_long_work(db, tiny_llama, tmp_path):
    db.execute(Collection("sums").insert_many(sums()))
    with pytest.raises(DataError, match="sums"):
        db.apply(model(tiny_llama, tmp_path, select=Collection("sumz").find()))
    with pytest.raises(DataError, match="text"):
        db.apply(model(tiny_llama, tmp_path, key="txt"))
    with pytest.raises(ConfigError, match="use 4, 8 or None"):
        LLM("x", tiny_llama, bits=6)
    with pytest.raises(ConfigError, match="select"):
        db.apply(model(tiny_llama, tmp_path, select=None))
    with pytest.raises(ModelError, match="nowhere"):
        db.apply(LLM("x", str(tmp_path / "nowhere"), trainer=trainer(tmp_path)))
    with pytest.raises(ModelError, match="nowhere"):
        LLM("x", str(tmp_path / "nowhere")).predict("hello")
    assert db.show("checkpoint") == []


def test_an_adapter_from_another_base_is_refused(db, tiny_llama, tmp_path):
    from tiny import make_model

    from llmnb.errors import AdapterMismatch

    db.execute(Collection("sums").insert_many(sums()))
    run = db.apply(model(tiny_llama, tmp_path, save_steps=4))
    other = make_model("llama", tmp_path / "other", seed=7)
    with pytest.raises(AdapterMismatch):
        LLM("x", str(other), adapter_id=db.load("checkpoint", run.id)).predict("1+1=")
