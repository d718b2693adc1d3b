"""The training panel without a browser: what the page is told, and what its clicks do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import pytest

pytest.importorskip("anywidget")

import llmnb.notebook.panel as panel
from llmnb import Collection, connect, form
from llmnb.config import ModelSpec
from llmnb.errors import ConfigError, DatabaseError, Fault, LaunchError, NotFound
from llmnb.events import StateChanged
from llmnb.launch.run import Run
from llmnb.notebook import panel_data
from llmnb.notebook.session import Session

ROWS = {"rows": [], "found": 100, "used": 100, "cut": 0, "tokens": 5000, "longest": 60, "kind": "text", "notes": []}
SHAPE = {"total": 331_000_000, "trained": 4_700_000, "layers": 24, "hidden": 1024, "vocabulary": 50_272, "width": 2}


class FakePreviews:
    """A preview's process that knows one answer."""

    def __init__(self):
        self.asked, self.closed = [], False

    def warm(self):
        pass

    def rows(self, spec, config, documents):
        self.asked.append(("rows", spec.model_name_or_path, config.max_seq_length, len(documents)))
        return dict(ROWS)

    def shape(self, spec, config):
        self.asked.append(("shape", spec.model_name_or_path, config.lora_r))
        return {"shape": SHAPE, "pace": 1e13, "room": 16_000_000_000}

    def close(self):
        self.closed = True


class Handle:
    def __init__(self, first):
        self.shown = [first]

    def update(self, data, raw=False):
        self.shown.append(data)


@pytest.fixture
def db(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        database = connect(f"mongomock://{request.node.name[:40]}")
    documents = [{"text": f"{i}+1={i + 1}", "n": i, "_fold": "valid" if i % 10 == 0 else "train"} for i in range(200)]
    database.execute(Collection("docs").insert_many(documents))
    yield database
    database.close()


@pytest.fixture
def session(db):
    found = Session(type("Shell", (), {"user_ns": {}})())
    found._database, found._previews = db, FakePreviews()
    yield found
    found.close()


@pytest.fixture
def page(monkeypatch):
    """A stand-in for the browser: every message to it, and every display."""

    class Page:
        def __init__(self):
            self.messages, self.handles = [], []

        def told(self, kind):
            """The newest content of a kind, or None."""
            found = [m["content"] for m in self.messages if m["kind"] == kind]
            return found[-1] if found else None

        def count(self, kind):
            return sum(m["kind"] == kind for m in self.messages)

    found = Page()
    monkeypatch.setattr(panel.TrainPanel, "send", lambda self, m, buffers=None: found.messages.append(m))

    def display(first, display_id=False, raw=False):
        found.handles.append(Handle(first))
        return found.handles[-1]

    monkeypatch.setattr(panel, "display", display)
    return found


def settled(opened):
    """Waits until the panel has nothing left to do."""
    end = time.monotonic() + 20
    while not opened._errands.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert opened._errands.idle
    if opened._starter is not None:
        opened._starter.join(20)
        assert not opened._starter.is_alive()


@pytest.fixture
def opened(session, db, page):
    found = panel.Panel(session, db)
    found.display()
    hears(found, "ready")
    return found


def hears(opened, kind, wait=True, **more):
    opened._heard(None, {"kind": kind, **more}, [])
    if wait:
        settled(opened)


def types(opened, **values):
    hears(opened, "edit", values={**opened._values, "model_name_or_path": "gpt2", **values}, done=True)


# --- what the page is told ------------------------------------------------------------------------------------


def test_a_page_that_is_ready_gets_all_and_again_after_a_reload(opened, page):
    told = page.told("all")
    assert [row["name"] for row in told["told"]["form"]["rows"]] == [row.name for row in form.rows()]
    assert page.told("names")["collections"] == [("docs", 200)]
    types(opened, lora_r="32")
    assert told["said"].startswith("LoRA: The usual choice")
    hears(opened, "edit", values=opened._values, said="Full: why", tab="LoRA", done=True)
    hears(opened, "ready")
    again = page.told("all")
    assert again["values"]["lora_r"] == "32" and again["phase"] == "editing"
    assert (again["said"], again["tab"]) == ("Full: why", "LoRA")
    assert again["told"]["checked"] == page.told("checked") and again["told"]["outlook"] == page.told("outlook")
    json.dumps(again)


def test_the_only_collection_is_chosen(opened, page):
    assert page.told("values")["values"]["collection"] == "docs"
    assert page.told("checked")["faults"] == {"model_name_or_path": "is needed: a hub id or a folder"}
    assert page.told("rows") == {"waits": "Choose a model and a collection to see rows as the model will."}


def test_faults_stand_at_their_rows_and_go_again(opened, page):
    types(opened, learning_rate="0", lora_r="x")
    told = page.told("checked")
    assert set(told["faults"]) == {"learning_rate", "lora_r"} and "python" not in told
    types(opened, learning_rate="2e-4", lora_r="4")
    told = page.told("checked")
    assert told["faults"] == {} and told["rest"] == []
    assert "learning_rate=0.0002" in told["python"] and "--lora_r 4" in told["magic"]


def test_a_collection_that_is_not_there(opened, page):
    types(opened, collection="dcs")
    assert page.told("checked")["faults"] == {"collection": "there is no collection 'dcs': did you mean docs?"}


def test_rows_and_shape_are_asked_for_once(opened, page, session):
    types(opened)
    asked = session.previews().asked
    assert asked == [("rows", "gpt2", 512, 180), ("shape", "gpt2", 16)], "180 documents are in the training fold"
    types(opened, learning_rate="1e-3")
    assert len(asked) == 2
    types(opened, max_seq_length="64")
    assert asked[2:] == [("rows", "gpt2", 64, 180)]
    types(opened, lora_r="8", max_seq_length="64")
    assert asked[3:] == [("shape", "gpt2", 8)]
    assert page.told("rows")["all"] == 180


def test_the_sentence_under_the_form(opened, page):
    types(opened, max_steps="100", per_device_train_batch_size="4")
    said = page.told("outlook")["words"].replace("\u202f", " ")
    assert said == "LoRA r 16 · 4.7 M trained of 331 M · 100 steps · 20 000 tokens · a few seconds and 1.7 GB of 16 GB"
    types(opened, max_steps="x")
    assert page.told("outlook")["words"] == ""


def test_a_training_that_needs_more_memory_than_there_is(opened, page):
    types(opened, per_device_train_batch_size="512")
    assert "more than there is: QLoRA" in page.told("outlook")["words"]


def test_a_preview_that_fails_says_why_and_the_form_goes_on(opened, page, session):
    def fail(*_):
        raise NotFound("model", "gpt2")

    session.previews().rows = fail
    types(opened)
    assert "no model 'gpt2'" in page.told("rows")["trouble"]
    assert page.told("checked")["faults"] == {} and "LoRA r 16" in page.told("outlook")["words"]


def test_typing_looks_at_no_rows(opened, page, session):
    hears(opened, "edit", values={**opened._values, "model_name_or_path": "g"}, done=False)
    assert page.told("checked")["faults"] == {} and session.previews().asked == []


def test_what_the_page_says_is_not_trusted(opened):
    hears(opened, "edit", values={"lora_r": "4", "evil": "x", "lora_alpha": ["a"]}, done=True)
    assert opened._values == {"lora_r": "4"}


def test_no_password_reaches_the_page(session, db, page):
    db.store.uri, db.store.safe_uri = "mongodb://me:hunter2@h/shop", "mongodb://me:***@h/shop"
    opened = panel.Panel(session, db)
    opened.display()
    hears(opened, "ready")
    types(opened)
    assert "hunter2" not in json.dumps(page.messages)


def test_what_stays_in_the_file_is_the_line_that_does_the_same(opened, page):
    kept = page.handles[1]
    types(opened, filter='{"lang": "<b>"}')
    assert "\n%llm_train --model gpt2 --collection docs" in kept.shown[-1]["text/plain"]
    assert "<b>" not in kept.shown[-1]["text/html"] and "llmnb-kept" in kept.shown[-1]["text/html"]


# --- starting -------------------------------------------------------------------------------------------------


@pytest.fixture
def applied(db, monkeypatch):
    """``db.apply`` that records a run and waits until it may return."""

    class Applied(list):
        go = threading.Event()

    found = Applied()

    def apply(llm, wait):
        assert wait is False and threading.current_thread() is not threading.main_thread()
        found.append(llm)
        found.go.wait(10)
        return Run(db.store, db.store.runs.create("gpt2", model="gpt2", version=1, config={})["_id"])

    monkeypatch.setattr(db, "apply", apply)
    found.go.set()
    return found


def test_start_pressed_twice_starts_once_and_answers_at_once(opened, page, applied, session, db):
    types(opened, lora_r="4")
    applied.go.clear()
    begin = time.monotonic()
    hears(opened, "start", wait=False, values=opened._values)
    hears(opened, "start", wait=False, values=opened._values)
    assert page.told("phase") == {"phase": "starting"} and time.monotonic() - begin < 0.1
    applied.go.set()
    settled(opened)
    assert len(applied) == 1 and applied[0].trainer.lora_r == 4
    live = page.told("live")
    assert db.store.runs.get(live["run"])["state"] == "queued" and live["model"]
    hears(opened, "start", values=opened._values)
    assert len(applied) == 1, "it runs: the place belongs to the run's view"
    assert session._previews is None


def test_the_run_ends_in_the_panels_place(opened, page, applied, db):
    types(opened)
    hears(opened, "start", values=opened._values)
    run = page.told("live")["run"]
    db.store.runs.transition(run, "queued", "failed", error={"what": "no memory", "type": "X", "todo": ""})
    db.store.events.append(run, [StateChanged(seq=1, state="failed")])
    end = time.monotonic() + 20
    while "no memory" not in page.handles[1].shown[-1]["text/html"] and time.monotonic() < end:
        time.sleep(0.05)
    assert "no memory" in page.handles[1].shown[-1]["text/html"], "in the second output: the first holds the view"


def test_faults_found_at_the_start_stand_at_their_rows(opened, page, db, monkeypatch):
    def refuse(llm, wait):
        raise ConfigError([Fault("num_gpus", "9 GPUs are asked for, and this machine has 0")])

    monkeypatch.setattr(db, "apply", refuse)
    types(opened, num_gpus="9")
    hears(opened, "start", values=opened._values)
    assert page.told("checked")["faults"] == {"num_gpus": "9 GPUs are asked for, and this machine has 0"}
    assert page.told("phase") == {"phase": "editing", "trouble": ""}


def test_a_start_that_fails_says_why_and_can_be_tried_again(opened, page, db, monkeypatch, applied):
    works = db.apply

    def refuse(llm, wait):
        raise LaunchError("The cluster does not answer.", seen="timeout", todo="llmnb doctor")

    monkeypatch.setattr(db, "apply", refuse)
    types(opened)
    hears(opened, "start", values=opened._values)
    trouble = "The cluster does not answer (timeout). To do: llmnb doctor."
    assert page.told("phase") == {"phase": "editing", "trouble": trouble}
    monkeypatch.setattr(db, "apply", works)
    hears(opened, "start", values=opened._values)
    assert page.told("live")


def test_a_start_that_breaks_leaves_the_form(opened, page, db, monkeypatch):
    monkeypatch.setattr(db, "apply", lambda llm, wait: 1 / 0)
    types(opened)
    hears(opened, "start", values=opened._values)
    assert page.told("trouble")["words"].startswith("ZeroDivisionError")
    assert page.told("phase")["phase"] == "editing" and opened._phase == "editing"


def test_a_start_does_not_wait_for_a_preview(opened, page, applied, session):
    reading, go_on = threading.Event(), threading.Event()

    def slow(*_):
        reading.set()
        assert go_on.wait(20)
        return dict(ROWS)

    session.previews().rows = slow
    hears(opened, "edit", wait=False, values={**opened._values, "model_name_or_path": "gpt2"}, done=True)
    assert reading.wait(10)
    hears(opened, "start", wait=False, values=opened._values)
    hears(opened, "edit", wait=False, values={}, done=True)
    opened._starter.join(10)
    assert page.told("live") and opened._values["model_name_or_path"] == "gpt2"
    go_on.set()
    settled(opened)
    assert session._previews is None, "no process is left behind"


def test_a_second_panel_begins_with_what_was_typed_and_is_one_of_its_own(opened, session, db, page, applied):
    types(opened, lora_r="64")
    second = panel.Panel(session, db)
    second.display()
    hears(second, "ready")
    assert page.told("all")["values"]["lora_r"] == "64"
    types(second, lora_r="2")
    assert opened._values["lora_r"] == "64"
    hears(opened, "start", values=opened._values)
    assert second._phase == "editing"


# --- from the database ----------------------------------------------------------------------------------------


def test_settings_of_a_past_run_fill_the_form(opened, page, db):
    plan = panel_data.check({"model_name_or_path": "gpt2", "collection": "docs", "lora_r": "7"}, ["docs"]).plan
    version = db.store.models.add(plan.llm.spec(), plan.parcel.config)
    run = db.store.runs.create("gpt2", model="gpt2", version=version, config=plan.parcel.config)["_id"]
    hears(opened, "look")
    assert [r[0] for r in page.told("names")["runs"]] == [run]
    hears(opened, "load", run=run)
    told = page.told("values")
    assert told["values"]["lora_r"] == "7" and told["values"]["model_name_or_path"] == "gpt2"
    assert run in told["said"] and page.told("checked")["faults"] == {}
    hears(opened, "load", run="gone")
    assert "no run 'gone'" in page.told("trouble")["words"]


def test_a_database_that_goes_away_and_comes_back(opened, page, db, monkeypatch):
    def away(*_, **__):
        raise DatabaseError("The database does not answer.")

    with monkeypatch.context() as gone:
        gone.setattr(db.store, "rows", away)
        gone.setattr(db.store, "collections", away)
        hears(opened, "look")
        assert page.told("trouble")["words"] == "The database does not answer."
        types(opened, limit="10")
        assert page.told("rows")["trouble"] == "The database does not answer."
    types(opened, limit="10", lora_r="4")
    assert page.told("rows")["all"] == 10 and page.told("trouble") == {"words": ""}


def test_a_model_of_the_database_means_its_base_and_its_adapter(db, tmp_path):
    spec = ModelSpec("tuned", "gpt2")
    for identifier in ("tuned", "never"):
        db.store.models.add(replace(spec, identifier=identifier))
    (tmp_path / "adapter.bin").write_bytes(b"x")
    db.store.checkpoints.put("run-1", 20, tmp_path, kind="adapter", base="gpt2")
    db.store.models.point("tuned", 1, "run-1/20")
    db.store.models.ready("tuned", 1)
    found = panel_data.names(db.store)
    assert found["models"] == {"tuned": {"model_name_or_path": "gpt2", "adapter_id": "run-1/20"}}
    assert found["bases"] == [("gpt2", "base of tuned")] and found["adapters"] == ["run-1/20"]


def test_fields_offer_pairs_texts_and_chats(db):
    chat = [{"role": "user", "content": "hi"}]
    db.execute(Collection("mixed").insert_many([{"question": "a", "answer": "b", "n": 3, "talk": chat}]))
    assert panel_data.fields(db.store, "mixed") == [
        ("question,answer", "prompt and answer"),
        ("question", "text"),
        ("answer", "text"),
        ("talk", "chats"),
    ]


def test_preferences_are_offered_as_keys(db):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    db.execute(Collection("texts").insert_one({"prompt": "a", "chosen": "b", "rejected": "c"}))
    db.execute(Collection("chats").insert_one({"chosen": chat, "rejected": chat}))
    assert panel_data.fields(db.store, "texts")[0] == ("prompt,chosen,rejected", "two answers, for the method dpo")
    assert panel_data.fields(db.store, "chats")[0] == ("chosen,rejected", "two answers, for the method dpo")
    plan = panel_data.check({"model_name_or_path": "m", "collection": "texts", "method": "dpo"}, ["texts"]).plan
    assert panel_data.outlook(plan.parcel.config, 1, None, None).startswith("DPO")
    assert panel_data.seen({"method": "dpo", "lora_r": "4"}) == {"method": "dpo"}


def test_the_sample_is_of_the_training_fold_and_has_the_fields_of_the_key(db):
    plan = panel_data.check({"model_name_or_path": "m", "collection": "docs", "key": "text"}, ["docs"]).plan
    documents, found = panel_data.sample(db.store, plan.parcel.config)
    assert found == 180 and len(documents) == 180
    assert all(set(d) == {"_id", "text"} for d in documents)


def test_the_panel_loads_nothing_heavy():
    code = (
        "import sys, llmnb.notebook.panel, llmnb.launch.preview as p; q = p.PreviewProcess(); q.warm(); q.close();"
        "from llmnb.notebook import panel_data; panel_data.form_of();"
        "panel_data.check({'model_name_or_path': 'm', 'collection': 'c'}, ['c']).plan.python();"
        "print([m for m in ('torch', 'transformers', 'ray', 'plotly', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
