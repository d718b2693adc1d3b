"""A run once more: the same losses, and what changed since is said."""

from __future__ import annotations

import contextlib
import sys

import fake_engine
import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import ConfigError, RunError
from llmnb.events import Note
from llmnb.launch import runner
from llmnb.launch.heart import Heart
from llmnb.launch.reproducing import Sameness, changed_rows


def model(base, tmp_path, **changes) -> LLM:
    settings = {
        "select": Collection("sums").find({"odd": True}),
        "key": "text",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "max_seq_length": 64,
        "lora_dropout": 0.1,
        "use_cpu": True,
        "seed": 7,
    }
    return LLM("sums", base, trainer=LLMTrainer("t", **{**settings, **changes}))


@pytest.fixture
def db(tmp_path):
    db = connect(f"mongomock://{tmp_path.name}", home=tmp_path / "home")
    rows = [{"text": f"{i}+1={i + 1}", "odd": i % 2 == 1, "_fold": "train"} for i in range(30)]
    db.execute(Collection("sums").insert_many(rows))
    return db


def said(run) -> str:
    return " ".join(event.text for event in run.events() if isinstance(event, Note))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_lora": False, "learning_rate": 1e-3}], ids=["lora", "full"])
def test_a_run_again_has_the_same_losses_to_the_last_bit(changes, db, tiny_llama, tmp_path):
    run = db.apply(model(tiny_llama, tmp_path, **changes), progress=False)
    again = run.reproduce(progress=False)
    found = again.same_as(run)
    assert found.same and found == Sameness(6, 0, 6, 0.0) and "to the last bit" in str(found)
    assert f"reproduces {run.id}: the same rows, base and package versions" in said(again)
    assert (again.record["model"], db.load("model", "sums").checkpoint.experiment) == ("sums-again", run.id)
    counts = again.record["counts"]
    assert counts["seed"] == 7 and counts["versions"]["torch"] and counts["device"] == "cpu"
    first = [c.digest for c in run.checkpoints()]
    assert [c.step for c in again.checkpoints()] == [3, 6] and len(first) == 2


@pytest.mark.slow
@pytest.mark.mongod
def test_the_next_run_takes_the_rows_that_the_first_has_kept(mongo_uri, tiny_llama, tmp_path):
    home = tmp_path / "home"
    with contextlib.closing(connect(mongo_uri, home=home)) as db:
        rows = [{"_id": i, "text": f"{i}+1={i + 1} " * (i % 9 + 1), "odd": i % 2 == 1} for i in range(60)]
        db.execute(Collection("sums").insert_many(rows))
        try:
            settings = {"max_seq_length": 16, "eval_strategy": "steps", "eval_steps": 3, "max_cut_share": 1.0}
            run = db.apply(model(tiny_llama, tmp_path, **settings), progress=False)
            again = run.reproduce(wait=False, progress=False)
            assert again.wait(300).state == "done"
            assert again.same_as(run).same
            first, second = run.record["counts"], again.record["counts"]
            assert (first["rows_cached"], second["rows_cached"]) == (False, True)
            names = {"rows_digest", "rows", "cut", "tokens", "trained_tokens", "key", "kind", "eval_rows"}
            assert {n: first[n] for n in names} == {n: second[n] for n in names} and first["cut"]
            assert "kept in the cache" in said(again) and "kept in the cache" not in said(run)
            told = [[e.text for e in r.events() if isinstance(e, Note) and e.data.get("rows")] for r in (run, again)]
            assert told[0] == told[1] != []
            files = list((home / "cache" / "rows").iterdir())
            assert len(files) == 2 and {file.stat().st_mode & 0o777 for file in files} == {0o600}
            db.execute(Collection("sums").update_one({"_id": 1}, {"$set": {"text": "another"}}))
            assert not run.reproduce(identifier="third", progress=False, wait=True).record["counts"]["rows_cached"]
        finally:
            runner.stop(home, patience=2.0)


@pytest.fixture
def engine(monkeypatch):
    """The engine without torch. Letters are read at once."""
    monkeypatch.setitem(Heart.__init__.__kwdefaults__, "every", 0.05)
    monkeypatch.setitem(sys.modules, "llmnb.engine.training", fake_engine)


def test_what_changed_since_is_said_first(db, engine, tmp_path):
    run = db.apply(model("nowhere", tmp_path))
    counts = {**run.record["counts"], "versions": {"torch": "1.0"}, "base_fingerprint": "another"}
    db.store.runs.update(run.id, counts=counts)
    db.execute(Collection("sums").insert_one({"text": "31+1=32", "odd": True, "_fold": "train"}))
    again = run.reproduce(identifier="other")
    text = said(again)
    assert f"reproduces {run.id}. Changed since:" in text and "torch 1.0 then" in text
    assert "the rows (15 then, 16 now)" in text
    assert again.record["model"] == "other"


def test_another_base_is_named():
    first = {"run": "r", "changed": ["torch 1 then, 2 now"], "rows_digest": "a", "base_fingerprint": "b"}
    note = changed_rows(first, {"rows_digest": "a", "base_fingerprint": "c"})
    assert note.level == "warning" and note.data["changed"] == ["torch 1 then, 2 now", "the base model"]
    assert changed_rows({"run": "r"}, {}).level == "info"


def test_functions_are_given_again_and_a_run_that_never_began_is_refused(db, engine, tmp_path):
    def shout(text):
        return {"text": text.upper()}

    run = db.apply(model("nowhere", tmp_path, transform=shout))
    with pytest.raises(ConfigError, match=r"run.reproduce\(transform="):
        run.reproduce()
    assert run.reproduce(transform=shout).state == "done"
    empty = db.store.runs.create("t", model="sums", version=1, config=None)["_id"]
    with pytest.raises(RunError, match="never began to train"):
        db.run(empty).reproduce()


def test_sameness_of_curves_that_are_not():
    assert str(Sameness(6, 1, 4, 0.25)) == (
        "the same loss at 4 of 6 steps, largest difference 0.25; 1 steps only in one of them"
    )
    assert not Sameness(0, 0, 0, 0.0).same
