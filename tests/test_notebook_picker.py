"""The checkpoint picker without a browser: what the page is told, and what its clicks do."""

from __future__ import annotations

import json
import threading
import time
import warnings
from pathlib import Path

import pytest

pytest.importorskip("anywidget")

import llmnb.notebook.picker as picker
from llmnb import connect
from llmnb.config import ModelSpec
from llmnb.engine.proof import MergeReport
from llmnb.errors import DatabaseError, ModelError, NotFound
from llmnb.evaluation import Evaluation, Example, Scores
from llmnb.launch.evaluating import EvaluationProcess
from llmnb.launch.merging import MergeProcess
from llmnb.notebook import picker_data
from llmnb.notebook.session import Session

REPORT = MergeReport(
    folder="/x",
    base="b",
    base_fingerprint="f",
    dtype="bfloat16",
    modules=4,
    size=1_000_000,
    rows_from="24 rows of the valid fold of tickets",
    rows=24,
    tokens=1200,
    trained_tokens=800,
    max_logit_gap=0.0125,
    mean_logit_gap=0.002,
    bound=1.2,
    max_logit=12.0,
    kl=1.5e-5,
    top_token_agreement=0.99967,
    perplexity_base=40.0,
    perplexity_adapter=6.51,
    perplexity_merged=6.52,
    moved=9.0,
)


@pytest.fixture
def db(request, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        database = connect(f"mongomock://{request.node.name[:40]}", home=tmp_path / "home")
    yield database
    database.close()


def save(db, experiment, step, folder, **fields):
    """A checkpoint, as a worker would have left it."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"%d" % step)
    return db.store.checkpoints.put(experiment, step, folder, base="gpt2", **fields)


@pytest.fixture
def three(db, tmp_path):
    """Two checkpoints of tickets, of which the model answers with the second, and a whole model of mail."""
    save(db, "run-1-tickets", 100, tmp_path / "w", metrics={"eval_loss": 1.9})
    save(db, "run-1-tickets", 1400, tmp_path / "w", metrics={"eval_loss": 1.8}, best=True)
    save(db, "run-2-mail", 50, tmp_path / "w", kind="model")
    version = db.store.models.add(ModelSpec(identifier="tickets", model_name_or_path="gpt2"))
    db.store.models.point("tickets", version, "run-1-tickets/1400")
    return ["run-2-mail/50", "run-1-tickets/1400", "run-1-tickets/100"]


class Page:
    """A stand-in for the browser: every message to it."""

    def __init__(self):
        self.messages = []

    def told(self, kind):
        """The newest content of a kind, or None."""
        found = [m["content"] for m in self.messages if m["kind"] == kind]
        return found[-1] if found else None


@pytest.fixture
def page(monkeypatch):
    found = Page()
    monkeypatch.setattr(picker.PickerTable, "send", lambda self, m, buffers=None: found.messages.append(m))
    return found


@pytest.fixture
def session(db):
    found = Session(type("Shell", (), {"user_ns": {}})())
    found._database = db
    yield found
    found.close()


def opened(session, db, experiment=None, chat=None):
    found = picker.Picker(session, db, experiment, chat)
    hears(found, "ready")
    return settled(found)


def hears(found, kind, **more):
    found._heard(found.widget, {"kind": kind, **more}, [])


def settled(found):
    """Waits until the picker has nothing left to do."""
    end = time.monotonic() + 20
    while time.monotonic() < end and (found._busy or found._looker):
        time.sleep(0.01)
    assert found._busy is None and found._looker is None
    return found


def test_rows_are_newest_first_with_what_holds_them(session, db, page, three):
    opened(session, db)
    rows = page.told("list")["rows"]
    assert [row["name"] for row in rows] == three
    assert [row["loss"] for row in rows] == ["", "1.800", "1.900"]
    assert [row["step"] for row in rows] == ["50", "1\u202f400", "100"]
    assert [row["best"] for row in rows] == [False, True, False] and rows[0]["whole"]
    assert rows[1]["held"] == "the model tickets v1 answers with it" and rows[2]["held"] == ""
    json.dumps(page.messages)
    assert "mongo" not in json.dumps(page.messages)


def test_one_experiment_and_one_that_has_none_yet(session, db, page, three, tmp_path):
    found = opened(session, db, "run-1-tickets")
    assert [row["name"] for row in page.told("list")["rows"]] == three[1:]
    early = opened(session, db, "run-9-new")
    assert page.told("list")["rows"] == []
    save(db, "run-9-new", 10, tmp_path / "w")
    early.refresh()
    settled(early)
    assert [row["name"] for row in page.told("list")["rows"]] == ["run-9-new/10"], "while it trains"
    settled(found)


def test_a_page_that_is_loaded_again_gets_what_it_showed(session, db, page, three):
    found = opened(session, db)
    hears(found, "choose", names=[three[2]], filter="run-1-tickets")
    hears(found, "chat", names=[three[2]])
    settled(found)
    hears(found, "ready")
    told = page.told("all")
    assert told["chosen"] == [three[2]] and told["filter"] == "run-1-tickets"
    assert len(told["list"]["rows"]) == 3
    assert told["doing"]["result"]["lines"][0][1] == f"%%llm_chat --checkpoint {three[2]}"


def test_nothing_changed_is_said_briefly(session, db, page, three):
    found = opened(session, db)
    before = len(page.messages)
    hears(found, "look")
    settled(found)
    assert [m["kind"] for m in page.messages[before:]] == ["now", "same"]
    assert page.told("now")["busy"] is None, "a page that takes something to be done hears that it is not"


def test_chat_and_compare_reach_the_chat(session, db, page, three):
    asked = []
    found = opened(session, db, chat=asked.append)
    hears(found, "chat", names=["base", three[1]])
    settled(found)
    assert asked == [["base", three[1]]] and page.told("doing") == {
        "busy": None,
        "result": None,
        "now": page.told("doing")["now"],
    }
    db.remove("checkpoint", "run-1-tickets", 100)
    hears(found, "chat", names=[three[2]])
    settled(found)
    assert "There is no checkpoint" in page.told("doing")["result"]["fault"] and len(asked) == 1


def test_a_merge_shows_its_steps_and_its_proof(session, db, page, three, monkeypatch):
    seen = []

    def merge(name, folder, say, process):
        seen.append((name, folder, threading.current_thread() is threading.main_thread()))
        say("loading the base")
        return REPORT

    monkeypatch.setattr(db, "merge", merge)
    found = opened(session, db)
    hears(found, "merge", names=[three[2]], folder="merged/x")
    settled(found)
    assert seen == [(three[2], "merged/x", False)]
    steps = [m["content"]["busy"] for m in page.messages if m["kind"] == "doing" and m["content"]["busy"]]
    assert steps[0]["words"] == f"Merging {three[2]}" and steps[-1]["now"] == "loading the base" and steps[-1]["stops"]
    result = page.told("doing")["result"]
    assert result["head"] == f"Merged {three[2]} into merged/x (1.0 MB): it says what the adapter says."
    lines = dict(result["lines"])
    assert lines["same top token"] == "99.96 %" and lines["KL divergence"] == "1.5e-05 nats"
    assert lines["measured on"].startswith("24 rows of the valid fold of tickets: 1200 tokens")


EVALUATION = Evaluation(
    models=(
        Scores("base", {"perplexity": 80.0, "rougeL": 0.25}, {"rows": 4, "trained": 1200}),
        Scores(
            "run-1-tickets/100",
            {"perplexity": 12.5, "rougeL": 0.75},
            {"rows": 4, "trained": 1200},
            best=(Example("7", 1.0, "what?", "a cat", "a <b>cat</b>"),),
            worst=(Example("3", 0.0, "who?", "a dog", "the sea"),),
        ),
    ),
    metrics=("perplexity", "rougeL"),
    base="/home/me/models/gpt2",
    rows={"words": "4 documents of the valid fold of faq"},
    rank_by="rougeL",
    notes=("run-1-tickets/100: 1 answer cut at 128 new tokens",),
    id="20261128-014139-345",
)


def test_an_evaluation_shows_its_steps_and_its_table(session, db, page, three, monkeypatch):
    seen = []

    def evaluate(names, say, process):
        seen.append((names, isinstance(process, EvaluationProcess)))
        say("base: reading 4 rows")
        return EVALUATION

    monkeypatch.setattr(db, "evaluate", evaluate)
    found = opened(session, db)
    hears(found, "evaluate", names=[three[2], three[1]])
    settled(found)
    assert seen == [([three[2], three[1]], True)]
    steps = [m["content"]["busy"] for m in page.messages if m["kind"] == "doing" and m["content"]["busy"]]
    assert steps[0]["words"] == f"Evaluating {three[2]}, {three[1]}" and steps[0]["stops"] == ""
    assert steps[-1]["now"] == "base: reading 4 rows" and steps[-1]["stops"] == "Stop evaluating"
    result = page.told("doing")["result"]
    assert result["head"] == "Evaluated run-1-tickets/100 against the base gpt2."
    assert result["table"]["columns"] == ["model", "perplexity", "rougeL"]
    assert result["table"]["rows"][1] == ["run-1-tickets/100", "12.5 (−67.5)", "0.750 (+0.500)"]
    lines = dict(result["lines"])
    assert lines["measured on"] == "4 documents of the valid fold of faq, 1,200 tokens"
    assert lines["kept as"] == EVALUATION.id and "answer cut" in lines["note"]
    (example,) = result["examples"]
    assert example["name"] == "run-1-tickets/100"
    assert example["shown"][0] == [
        "worst: 3, rougeL 0.000",
        [("prompt", "who?"), ("reference", "a dog"), ("answer", "the sea")],
    ]
    assert json.loads(json.dumps(result))["examples"][0]["shown"][1][0] == "best: 7, rougeL 1.000"


def test_one_thing_at_a_time_and_a_merge_can_be_stopped(session, db, page, three, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(MergeProcess, "stop", lambda self: stopped.set())

    def merge(name, folder, say, process):
        assert stopped.wait(20)
        raise ModelError("The merge was stopped.")

    monkeypatch.setattr(db, "merge", merge)
    found = opened(session, db)
    hears(found, "merge", names=[three[2]], folder="x")
    hears(found, "remove", names=[three[0]])
    end = time.monotonic() + 10
    while found._process is None and time.monotonic() < end:
        time.sleep(0.01)
    hears(found, "stop")
    settled(found)
    assert page.told("doing")["result"]["fault"] == "The merge was stopped."
    assert len(page.told("list")["rows"]) == 3, "the second press was not acted on"


def test_export_writes_a_folder_and_refuses_one_in_use(session, db, page, three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = opened(session, db)
    for _ in range(2):
        hears(found, "export", names=[three[2]], folder="exported/x")
        settled(found)
    assert Path("exported/x/adapter_model.safetensors").read_bytes() == b"100"
    results = [m["content"]["result"] for m in page.messages if m["kind"] == "doing" and m["content"]["result"]]
    assert results[0]["head"] == f"Exported {three[2]} to exported/x." and "is not empty" in results[1]["fault"]
    hears(found, "export", names=[three[2]], folder="  ")
    settled(found)
    assert "folder" in page.told("doing")["result"]["fault"]


def test_remove_says_who_holds_a_checkpoint(session, db, page, three):
    found = opened(session, db)
    hears(found, "choose", names=[three[1], three[2]], filter="")
    hears(found, "remove", names=[three[1]])
    settled(found)
    assert "in use (model tickets/1)" in page.told("doing")["result"]["fault"]
    hears(found, "remove", names=[three[2]])
    settled(found)
    assert page.told("doing")["result"]["head"] == f"Removed {three[2]}."
    assert [row["name"] for row in page.told("list")["rows"]] == three[:2]
    hears(found, "ready")
    assert page.told("all")["chosen"] == [three[1]], "what was removed is no longer selected"


def test_a_database_that_is_away_is_said_and_the_rows_stay(session, db, page, three, monkeypatch):
    found = opened(session, db)

    def away(*_):
        raise DatabaseError("Nobody answers.")

    monkeypatch.setattr(db, "show", away)
    hears(found, "look")
    settled(found)
    assert "trying again" in page.told("list")["trouble"] and len(page.told("list")["rows"]) == 3
    monkeypatch.undo()
    page_now = page.messages
    monkeypatch.setattr(picker.PickerTable, "send", lambda self, m, buffers=None: page_now.append(m))
    hears(found, "look")
    settled(found)
    assert page.told("list")["trouble"] == ""


def test_what_breaks_is_shown_and_the_picker_goes_on(session, db, page, three, monkeypatch):
    monkeypatch.setattr(db, "export", lambda *_: 1 / 0)
    found = opened(session, db)
    hears(found, "export", names=[three[2]], folder="x")
    settled(found)
    assert page.told("doing")["result"]["fault"] == "ZeroDivisionError: division by zero"
    for message in ("nonsense", {"kind": "what"}, {"kind": "choose"}, None):
        found._heard(found.widget, message, [])


def test_without_a_chat_the_line_is_shown():
    assert picker_data.asked(["base", "a/1"])["lines"][0][1] == "%%llm_chat --checkpoint a/1 --compare base"
    assert picker_data.asked(["a/1", "b/2"])["lines"][0][1] == "%%llm_chat --checkpoint a/1 --compare b/2"


def test_a_chat_comes_below_the_picker_and_is_kept(session, db, page, three, monkeypatch):
    import ipywidgets

    import llmnb.notebook.chatbox as chatbox

    made = []

    class Box:
        def __init__(self, session, database, names):
            self.widget, self.chosen = ipywidgets.VBox(), [names]
            made.append(self)

        def choose(self, names):
            self.chosen.append(names)

    monkeypatch.setattr(chatbox, "ChatBox", Box)
    view = picker.PickerView(session, db)
    for names in ([three[1]], ["base", three[2]]):
        hears(view.picker, "chat", names=names)
        settled(view.picker)
    (box,) = made
    assert box.chosen == [[three[1]], ["base", three[2]]] and view.widget.children[1] is box.widget


def test_unloading_ends_a_merge(session, db, page, three, monkeypatch):
    stopped = threading.Event()
    monkeypatch.setattr(MergeProcess, "stop", lambda self: stopped.set())
    monkeypatch.setattr(db, "merge", lambda *_, **more: stopped.wait(20))
    found = opened(session, db)
    hears(found, "merge", names=[three[2]], folder="x")
    end = time.monotonic() + 10
    while found._process is None and time.monotonic() < end:
        time.sleep(0.01)
    session.close()
    assert stopped.is_set()
    found._worker.join(20)


def test_closed_it_says_nothing_more(session, db, page, three):
    found = opened(session, db)
    found.close()
    before = len(page.messages)
    found.refresh()
    hears(found, "ready")
    settled(found)
    assert len(page.messages) == before


def test_the_saved_file_has_a_table(session, db, page, three, monkeypatch):
    class Handle:
        def __init__(self, first):
            self.shown = [first]

        def update(self, data, raw=False):
            self.shown.append(data)

    handles = []

    def display(first, display_id=False, raw=False):
        handles.append(Handle(first))
        return handles[-1]

    monkeypatch.setattr(picker, "display", display)
    found = picker.Picker(session, db)
    found.display()
    settled(found)
    kept = handles[1]
    assert "1.900" in kept.shown[0]["text/plain"] and "llmnb-kept" in kept.shown[0]["text/html"]
    db.remove("checkpoint", "run-1-tickets", 100)
    found.refresh()
    settled(found)
    assert "1.900" not in kept.shown[-1]["text/plain"] and "1.800" in kept.shown[-1]["text/html"]


def test_a_list_shows_its_table_once_beside_the_picker(db, three, capsys):
    listed = picker_data.found(db, None)
    assert [str(c) for c in picker_data.Listed(listed)] == three
    shown = picker_data.Listed(listed, seen=True)
    shown._ipython_display_()
    assert capsys.readouterr().out == ""
    shown._ipython_display_()
    assert "run-1-tickets" in capsys.readouterr().out and "best" in repr(shown)
    with pytest.raises(NotFound, match="no experiment"):
        picker_data.found(db, "run-1-ticket")


def test_only_the_newest_are_shown_and_the_rest_counted(db, three, monkeypatch):
    monkeypatch.setattr(picker_data, "SHOWN", 2)
    rows, more = picker_data.rows(db, None)
    assert [row["name"] for row in rows] == three[:2] and more == 1
