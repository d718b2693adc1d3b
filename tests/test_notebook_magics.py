"""The magics in a shell of their own: what they say and return, how they fail, and that unloading leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest

pytest.importorskip("IPython")

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from llmnb import Collection, connect
from llmnb.errors import ConfigError, NotFound
from llmnb.events import CheckpointSaved, Metric, StateChanged
from llmnb.launch.run import Run
from llmnb.notebook import load, unload
from llmnb.notebook.magics import NAMES


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("LLMNB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMNB_URI", raising=False)
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    found = InteractiveShell(config=config)
    load(found)
    yield found
    unload(found)


@pytest.fixture
def db(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        database = connect(f"mongomock://{request.node.name[:40]}")
    yield database
    database.close()


@pytest.fixture
def ready(shell, db):
    """A shell that is connected to a database with documents."""
    db.execute(Collection("docs").insert_many([{"text": f"{i}+1={i + 1}", "n": i} for i in range(40)]))
    shell.user_ns["db"] = db
    run(shell, "x = %llm_connect db")
    return shell


def run(shell, code):
    """Runs a cell as a person does: (everything it printed, its result)."""
    with capture_output() as said:
        result = shell.run_cell(code, store_history=False)
    shown = "".join(str(o.data.get("text/plain", "")) for o in said.outputs)
    return said.stdout + said.stderr + shown, result


def a_run(db, state="done", losses=(3.0, 2.0), identifier="tickets"):
    """A run with a short life, as a worker would have left it."""
    record = db.store.runs.create(identifier, model=identifier, version=1, config={}, counts={"steps": len(losses)})
    events = [Metric(seq=i, step=i, values={"loss": x}) for i, x in enumerate(losses, start=1)]
    events.append(CheckpointSaved(seq=len(events) + 1, step=2, digest="d", size=10, best=True))
    events.append(StateChanged(seq=len(events) + 1, state=state))
    db.store.events.append(record["_id"], events)
    path = {"done": ("starting", "running", "done"), "failed": ("starting", "failed"), "queued": ()}[state]
    for frm, to in zip(("queued", *path), path):
        assert db.store.runs.transition(record["_id"], frm, to)
    return record["_id"]


# --- loading and unloading ----------------------------------------------------------------------------------


def test_loading_is_fast_and_imports_nothing_heavy():
    code = """
        import sys, time
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        before = time.process_time()
        shell.run_line_magic("load_ext", "llmnb")
        spent = time.process_time() - before
        heavy = {"torch", "transformers", "ray", "pymongo", "plotly", "anywidget", "ipywidgets"} & set(sys.modules)
        assert not heavy, heavy
        assert spent < 0.3, spent
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_unloading_restores_everything(shell):
    before = [name for name in shell.magics_manager.magics["line"] if name.startswith("llm_")]
    assert set(NAMES) == set(before)
    matchers = len(shell.Completer.custom_matchers)
    unload(shell)
    assert not [n for kind in ("line", "cell") for n in shell.magics_manager.magics[kind] if n.startswith("llm_")]
    assert len(shell.Completer.custom_matchers) == matchers - 1
    assert shell.custom_exceptions == ()
    unload(shell)
    load(shell)
    load(shell)
    assert len(shell.Completer.custom_matchers) == matchers


def test_unloading_ends_the_thread_and_the_processes_and_nothing_else(ready, db):
    before = set(threading.enumerate())
    first = a_run(db, "queued")
    session = ready._llmnb_loaded.session
    session.poller().watch(db.run(first), Quiet(), db.store.runs.find_lost)
    closed = []
    session._chats = session._previews = Closing(closed)
    assert set(threading.enumerate()) - before
    unload(ready)
    assert not set(threading.enumerate()) - before and len(closed) == 2
    assert db.run(first).state == "queued", "what trains goes on"
    assert "docs" in db.store.collections(), "the person's database stays open"
    said, result = run(ready, "%llm_runs")
    assert not result.success and "not found" in said


class Quiet:
    """A view that shows nothing."""

    def show(self, *_):
        pass

    def close(self):
        pass


class Closing:
    """Something that notes that it was closed."""

    def __init__(self, closed):
        self.close = lambda: closed.append(self)


def test_a_magic_that_was_there_before_comes_back(shell):
    unload(shell)
    shell.register_magic_function(lambda line: "mine", "line", "llm_help")
    load(shell)
    assert shell.run_line_magic("llm_help", "") != "mine"
    unload(shell)
    assert shell.run_line_magic("llm_help", "") == "mine"


def test_the_error_hook_is_chained_and_given_back(shell):
    unload(shell)
    seen = []
    shell.set_custom_exc((ZeroDivisionError,), lambda shell, kind, value, trace, tb_offset=None: seen.append(kind))
    before = (shell.custom_exceptions, shell.CustomTB)
    load(shell)
    run(shell, "1/0")
    assert seen == [ZeroDivisionError]
    said, _ = run(shell, "%llm_connect nowhere")
    assert "use %tb" in said and "neither a URI nor a variable" in said
    unload(shell)
    assert (shell.custom_exceptions, shell.CustomTB) == before


def test_a_hook_that_somebody_set_later_is_left_alone(shell):
    shell.set_custom_exc((ZeroDivisionError,), lambda *args, **kwargs: None)
    theirs = shell.CustomTB
    unload(shell)
    assert shell.CustomTB is theirs


# --- errors -------------------------------------------------------------------------------------------------


def test_an_error_of_a_magic_is_short_and_tb_shows_it_whole(shell):
    said, result = run(shell, "%llm_train --learnin_rate 1")
    assert isinstance(result.error_in_exec, ConfigError), "a runner of notebooks must see the failure"
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 3 and "use %tb" in lines[0] and "ConfigError: 1 setting is wrong" in lines[1]
    assert "did you mean --learning_rate" in lines[2]
    whole, _ = run(shell, "%tb")
    assert "Traceback" in whole and "arguments.py" in whole


def test_the_same_error_from_python_keeps_its_traceback(shell):
    said, _ = run(shell, "from llmnb import LLMTrainer\nLLMTrainer(learnin_rate=1)")
    assert "Traceback" in said and "trainer.py" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("%llm_runs --limt 3", "1 setting is wrong:\n  - --limt: is not understood — did you mean --limit?"),
        ("%llm_runs --limit many", "--limit"),
        ("%llm_stop", "required"),
        ("%llm_train --key 'text", "close the quote"),
        ("%llm_train --model a --key", "--key VALUE"),
        ("%llm_train --key a --key b", "given twice"),
        ("%llm_train --key a stray", "belongs to no option"),
        ("%llm_train --key a", "--model: is needed"),
        ("%llm_train --model a --key text", "--collection: is needed"),
        ("%llm_train --model a --filter '{}'", "give --collection, too"),
        ("%llm_train --model a --collection c --filter '[1'", "is not a MongoDB filter"),
        ("%llm_train --model a --collection c --select s", "both say which documents"),
        ("%llm_train --llm nothing", "no LLM variable"),
        ("%llm_train --model a --collection c --bits 6", "use 4, 8 or None"),
        ("%llm_train --model a --collection c --learning_rate fast --eval_strategy never", "2 settings are wrong"),
        ("%llm_connect no-uri", "neither a URI nor a variable"),
        ("%%llm_chat\n  ", "has no prompt"),
        ("%llm_chat", "has no prompt"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_do(shell, line, words):
    said, result = run(shell, line)
    assert isinstance(result.error_in_exec, (ConfigError, NotFound)), said
    assert words in said


# --- help and completion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_magic_has_help(shell, name):
    said, result = run(shell, f"%{name} --help")
    assert result.error_in_exec is None and name in said and "--help" in said
    assert name in str(run(shell, "%llm_help")[0])
    assert "::" in getattr(shell.magics_manager.magics["line"][name], "__doc__", ""), "%name? shows usage, too"


def test_help_of_train_names_every_option(shell):
    from llmnb import LLMTrainer

    said, _ = run(shell, "%llm_train --help")
    assert set(LLMTrainer.names()) <= set(said.split())


def test_help_says_first_what_to_type_first(shell):
    said, _ = run(shell, "%llm_help")
    lines = said[said.index("first:") :].splitlines()
    typed = [line[7:].split("  ")[0].strip() for line in lines[:3]]
    assert typed == ["db = %llm_connect", "%llm_data", "%llm_train --model M --collection C --start"]
    assert "[RUN] [OTHERS …]" in said, "what may be left out, or given several times"
    assert len(lines) < 25 and max(map(len, lines)) < 170, "one screen"
    shell.kernel = object()  # as in a notebook, where the panel can be shown
    try:
        page = shell.run_line_magic("llm_help", "")._repr_html_()
    finally:
        del shell.kernel
    assert page.index("db = %llm_connect") < page.index("the panel: choose model") < page.index("<table")


def test_train_alone_in_a_terminal_says_what_to_type(ready):
    said, result = run(ready, "%llm_train")
    assert result.success and "--collection docs --start" in said and "docs (40 documents)" in said


def complete(shell, line):
    return shell.Completer.complete(line_buffer=line, cursor_pos=len(line))[1]


def test_completion_of_options_choices_and_names(ready, db):
    unload(ready)
    load(ready)
    run(ready, "x = %llm_connect db")
    first = a_run(db)
    assert complete(ready, "%llm_train --learn") == ["--learning_rate"]
    assert set(complete(ready, "run = %llm_train --model x --eval_strategy ")) == {"no", "steps", "epoch"}
    assert complete(ready, "%llm_train --collection d") == ["docs"]
    assert complete(ready, "%llm_data ")[0] == "docs"
    assert first in complete(ready, "%llm_watch ")
    assert first in complete(ready, "%llm_resume ") and complete(ready, "%llm_resume --max") == ["--max_steps"]
    assert complete(ready, "%%llm_chat --comp") == ["--compare"]
    assert complete(ready, "%llm_train --compl") == []


def test_completion_of_every_name_in_the_database(ready, db):
    from llmnb.config import ModelSpec

    first = a_run(db)
    db.store.models.ready("tickets", db.store.models.add(ModelSpec("tickets", "org/base")))
    db.store.models.add(ModelSpec("unborn", "org/other"))
    for magic in ("llm_watch", "llm_stop", "llm_resume"):
        assert first in complete(ready, f"run = %{magic} ")
    assert complete(ready, f"%llm_resume {first[:6]}") == [first]
    assert complete(ready, "%llm_resume --max_steps 9 " + first[:3]) == [first], "the number is no run"
    assert first not in complete(ready, f"%llm_watch {first} ")
    assert complete(ready, "run = %llm_train --model o") == ["org/base"]
    assert complete(ready, "%llm_train --model_name_or_path ") == ["org/base"]
    assert complete(ready, "%llm_train --identifier ") == ["tickets", "unborn"]
    assert complete(ready, "%llm_train --collection docs --key ") == ["n", "text"]
    assert complete(ready, "%llm_runs --state s") == ["starting", "stopped", "stopping"]
    assert complete(ready, "%llm_checkpoints ") == ["--export", "--help", "--merge", "--remove"]


def test_completion_of_checkpoints(ready, db, tmp_path):
    first = a_run(db)
    (tmp_path / "adapter_config.json").write_text("{}")
    for step in (10, 20):
        db.store.checkpoints.put(first, step, tmp_path, base="b", kind="adapter")
    names = {first, f"{first}/10", f"{first}/20"}
    assert set(complete(ready, "%%llm_chat --checkpoint ")) == names
    assert set(complete(ready, "%llm_train --model m --adapter_id ")) == names
    assert "base" in complete(ready, "%%llm_chat --compare ")
    assert names <= set(complete(ready, "found = %llm_evaluate "))
    assert {first, f"{first}/20"} == names & set(complete(ready, f"%llm_evaluate {first}/10 ")), "more than one"
    assert complete(ready, f"%llm_evaluate {first} --metrics perp") == ["perplexity"]
    assert "bleu" in complete(ready, f"%llm_evaluate {first} --metrics perplexity ")
    assert complete(ready, f"t = %llm_checkpoints {first[:8]}") == [first]
    assert set(complete(ready, f"%llm_checkpoints {first}/")) == names - {first}, "steps, once one is begun"
    assert not names & set(complete(ready, f"%llm_checkpoints {first}/10 --merge ")), "a folder comes there"


def test_completion_of_variables(ready):
    run(
        ready,
        "from llmnb import LLM, Collection\nllm = LLM('mine', '/m')\nrows = Collection('docs').find()\n"
        "zero = {'zero_optimization': {'stage': 2}}\ndef shout(text): return text",
    )
    assert complete(ready, "%llm_train --llm ") == ["llm"]
    assert complete(ready, "%llm_train --model m --select ") == ["rows"]
    assert complete(ready, "%llm_train --deepspeed ") == ["zero"]
    assert complete(ready, "%llm_resume --transform ") == ["shout"]
    assert complete(ready, "db = %llm_connect ") == ["db", "x"]


def test_completion_in_a_cell_of_several_lines(ready, db):
    first = a_run(db)
    code = "x = 1\nrun = %llm_watch "
    found = [c.text for c in ready.Completer.completions(code, len(code))]
    assert first in found


def test_completion_opens_no_database(shell, tmp_path):
    assert complete(shell, "%llm_watch --") == ["--help"]
    complete(shell, "%llm_data ")
    assert not (tmp_path / "home").exists()


# --- connecting and looking ---------------------------------------------------------------------------------


def test_connect_takes_a_variable_and_returns_the_database(shell, db):
    shell.user_ns["db"] = db
    _, result = run(shell, "y = %llm_connect db")
    assert shell.user_ns["y"] is db and result.success


def test_connect_takes_a_uri(shell):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, result = run(shell, "y = %llm_connect mongomock://by_uri")
    assert result.success and shell.user_ns["y"].store.name == "by_uri"


def test_data_lists_collections_and_looks_into_one(ready):
    said, result = run(ready, "t = %llm_data")
    assert ("docs", "40") in list(ready.user_ns["t"])
    said, _ = run(ready, 't = %llm_data docs --filter \'{"n": {"$lt": 10}}\' --rows 2')
    table = ready.user_ns["t"]
    assert "docs: 10 documents" in table.caption and "train" in table.caption
    columns = {row[0]: row for row in table}
    assert columns["text"][1] == "str" and columns["text"][3] == "0+1=1" and columns["n"][1] == "int"
    said, result = run(ready, "%llm_data dosc")
    assert isinstance(result.error_in_exec, NotFound) and "'docs'" in said


def test_data_is_inspected_as_a_model_reads_it(ready, tiny_llama):
    said, _ = run(ready, f"t = %llm_data docs --model {tiny_llama} --key text --max_seq_length 4")
    found = ready.user_ns["t"]
    assert sum(rows.found for rows in found.rows) == 40 and found.facts.limit == 4 and "cut" in found.kinds
    said, _ = run(ready, f"t = %llm_data docs --model {tiny_llama} --key text --row {found.shown[0].id}")
    assert repr(ready.user_ns["t"]).startswith(f"train, _id {found.shown[0].id}: ")
    for line in ("docs --key text", "docs --row 3"):
        said, result = run(ready, f"%llm_data {line}")
        assert isinstance(result.error_in_exec, ConfigError) and "--model NAME" in said


def test_text_of_documents_is_escaped(ready, db):
    db.execute(Collection("evil").insert_many([{"text": "<script>alert(1)</script>"}]))
    run(ready, "t = %llm_data evil")
    page = ready.user_ns["t"]._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_runs_are_listed_newest_first(ready, db):
    first = a_run(db)
    time.sleep(0.005)  # ids sort by the millisecond
    second = a_run(db, "failed", identifier="mail")
    db.store.runs.update(second, error={"type": "DataError", "what": "The selection is empty.", "traceback": "…"})
    run(ready, "t = %llm_runs")
    rows = list(ready.user_ns["t"])
    assert (
        [row[0] for row in rows] == [second, first]
        and rows[0][3] == "failed"
        and rows[0][6] == "The selection is empty."
    )
    run(ready, "t = %llm_runs --state done")
    assert [row[0] for row in ready.user_ns["t"]] == [first]


def test_watch_in_a_terminal_says_the_curve_in_words(ready, db):
    first = a_run(db)
    said, _ = run(ready, f"r = %llm_watch {first}")
    assert ready.user_ns["r"].id == first
    assert "tickets v1" in said and "done" in said and "step 2 / 2" in said
    run(ready, "r = %llm_watch")
    assert ready.user_ns["r"].id == first, "the newest"
    said, result = run(ready, "%llm_watch nope")
    assert isinstance(result.error_in_exec, NotFound)


def test_stop_writes_one_letter(ready, db):
    record = db.store.runs.create("x", model="x", version=1, config={})
    db.store.runs.transition(record["_id"], "queued", "starting")
    db.store.runs.transition(record["_id"], "starting", "running")
    said, _ = run(ready, f"%llm_stop {record['_id']}")
    assert "Stopping" in said and db.store.runs.control(record["_id"]) == "stop", said


def test_stop_now_ends_it_at_once(ready, db):
    waiting = db.store.runs.create("x", model="x", version=1, config={})["_id"]
    said, _ = run(ready, f"%llm_stop {waiting} --now")
    assert f"{waiting}: stopped" in said and db.store.runs.get(waiting)["reason"] == "stopped before it began", said


def test_other_runs_are_named_behind_the_first(ready, db):
    first, second = a_run(db), a_run(db)
    run(ready, f"r = %llm_watch {first} {second}")
    assert ready.user_ns["r"].id == first
    _, result = run(ready, f"%llm_watch {first} nope")
    assert isinstance(result.error_in_exec, NotFound)


def test_resume_hands_over_what_was_typed_and_watches(ready, db, monkeypatch):
    first = a_run(db)
    asked = []
    monkeypatch.setattr(Run, "resume", lambda self, **words: asked.append((self.id, words)) or self)
    run(ready, "def shout(text): return text\nr = %llm_resume --num_train_epochs 5 --save_steps 10 --transform shout")
    (id, words) = asked.pop()
    assert id == first and ready.user_ns["r"].id == first, "the newest, when none is named"
    shout = ready.user_ns["shout"]
    given = {"num_train_epochs": 5.0, "save_steps": 10, "transform": shout, "wait": False, "changed_data": False}
    assert words == given
    run(ready, f"%llm_resume {first} --changed_data --lora_r 4")
    assert asked.pop() == (first, {"lora_r": 4, "wait": False, "changed_data": True})
    _, result = run(ready, "%llm_resume nope")
    assert isinstance(result.error_in_exec, NotFound)


def test_no_checkpoints_is_said(ready):
    run(ready, "t = %llm_checkpoints")
    assert "no checkpoints yet" in repr(ready.user_ns["t"])
    _, result = run(ready, "%llm_checkpoints nope")
    assert isinstance(result.error_in_exec, NotFound)


def test_checkpoints_are_returned_exported_and_removed(ready, db, tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "adapter_model.safetensors").write_bytes(b"x")
    for step in (100, 200):
        db.store.checkpoints.put("run-1", step, tmp_path / "w", base="gpt2", metrics={"eval_loss": 2.0})
    said, result = run(ready, "%llm_checkpoints run-1")
    assert [c.step for c in result.result] == [200, 100] and said.count("2.000") == 2, "one table in a terminal"
    said, result = run(ready, f"%llm_checkpoints run-1/100 --export {tmp_path}/out")
    assert result.result == tmp_path / "out" and (tmp_path / "out" / "adapter_model.safetensors").exists()
    asked = []
    monkeypatch.setattr(db, "merge", lambda name, folder: asked.append((name, folder)) or "proof")
    said, result = run(ready, "%llm_checkpoints run-1 --merge out/m")
    assert result.result == "proof" and asked == [("run-1", "out/m")]
    said, result = run(ready, "%llm_checkpoints run-1/100 --remove")
    assert "Removed run-1/100." in said and db.show("checkpoint", "run-1") == [200]
    for line, words in (
        ("run-1 --remove", "needs a checkpoint"),
        ("--merge x", "needs a checkpoint"),
        ("run-1/200 --merge x --export y", "one at a time"),
        ("run-1/100 --export y", "There is no checkpoint"),
        ("run-2", "did you mean 'run-1'"),
    ):
        said, result = run(ready, f"%llm_checkpoints {line}")
        assert words in said and not result.success


def test_evaluate_says_its_words_to_the_database(ready, db, monkeypatch):
    asked = []
    monkeypatch.setattr(db, "evaluate", lambda *names, **words: asked.append((*names, words)) or "the table")
    said, result = run(ready, "%llm_evaluate run-1 run-2/4 --metrics perplexity,ROUGE --limit 5 --rank_by rougeL")
    assert result.result == "the table", said
    words = {"metrics": ["perplexity", "ROUGE"], "rank_by": "rougeL", "limit": 5, "base": None}
    assert asked.pop() == (["run-1", "run-2/4"], words)
    run(ready, "def mine(answer, reference): return 1.0\ndef shout(text): return {'text': text}\nbleu = print")
    line = "--metrics bleu mine --collection docs --filter '{\"n\": 1}' --transform shout --max_new_tokens 9"
    said, result = run(ready, f"%llm_evaluate {line}")
    names, words = asked.pop()
    assert names == "latest" and words["select"] == Collection("docs").find({"n": 1}) and words["max_new_tokens"] == 9
    assert words["metrics"] == ["bleu", ready.user_ns["mine"]] and words["transform"] is ready.user_ns["shout"]
    for wrong, why in (
        ("--filter '{}'", "give --collection"),
        ("--transform shou", "did you mean shout"),
        ("--metric bleu", "did you mean --metrics"),
        ("--limit none", "limit"),
    ):
        said, result = run(ready, f"%llm_evaluate run-1 {wrong}")
        assert why in said and not result.success
    assert not asked


# --- training -----------------------------------------------------------------------------------------------


PLAN = (
    '--model /models/tiny --collection docs --filter \'{"n":{"$lt":9}}\' --limit 5 '
    "--learning_rate 2e-4 --lora-r=16 --fp16"
)


def test_without_start_the_plan_is_shown_and_nothing_starts(ready, db):
    said, result = run(ready, f"%llm_train {PLAN}")
    assert result.success, said
    assert "Nothing was started" in said and "--start" in said
    assert "learning_rate" in said and "0.0002" in said and "num_train_epochs" in said
    assert "Collection('docs').find({'n': {'$lt': 9}}).limit(5)" in said
    assert db.store.runs.list() == []


def test_the_python_lines_make_the_same_training(ready):
    said, _ = run(ready, f"%llm_train {PLAN} --identifier tiny --prompt_template 'Q: {{input}}' --key text")
    code = said[said.index("from llmnb import") :].rsplit("\n", 2)[0]
    names: dict = {}
    exec(code.replace("run = db.apply(llm, wait=False)", ""), names)
    parcel = names["trainer"].freeze(names["llm"].spec())
    assert names["llm"].identifier == "tiny" and names["llm"].spec().prompt_template == "Q: {input}"
    assert parcel.config.lora_r == 16 and parcel.config.arguments["learning_rate"] == 2e-4
    assert (
        parcel.config.arguments["fp16"] is True and parcel.config.select.limit_to == 5 and parcel.config.key == "text"
    )


def test_objects_are_taken_by_name_and_words_are_not(ready):
    run(
        ready,
        "from llmnb import Collection\ndef shout(text):\n    return {'text': text.upper()}\n"
        "mine = Collection('docs').find()\ntext = 'a variable that must not be looked up'",
    )
    said, result = run(ready, "%llm_train --model m --select mine --transform shout --key text")
    assert result.success, said
    assert "transform=shout" in said and "select=mine" in said and "key='text'" in said


def test_variables_are_expanded_and_json_is_not(ready):
    run(ready, "path = '/models/tiny'\nrate = 3e-4")
    said, result = run(
        ready,
        "%llm_train --model {path} --collection docs --learning_rate $rate --lr_scheduler_kwargs '{\"num_cycles\":2}'",
    )
    assert result.success, said
    assert "'/models/tiny'" in said and "learning_rate=0.0003" in said and "{'num_cycles': 2}" in said


def test_an_llm_is_taken_by_name(ready):
    run(
        ready,
        "from llmnb import LLM, LLMTrainer, Collection\n"
        "llm = LLM('mine', '/models/tiny', trainer=LLMTrainer(select=Collection('docs').find(), lora_r=4))",
    )
    said, result = run(ready, "%llm_train --llm llm --learning_rate 1e-3")
    assert result.success, said
    assert "llm.trainer.learning_rate = 0.001" in said and "db.apply(llm, wait=False)" in said
    said, result = run(ready, "%llm_train --llm lm")
    assert "did you mean 'llm'?" in said


def test_start_hands_the_model_to_the_database_and_returns_the_run(ready, db, monkeypatch):
    handed = []
    first = a_run(db)

    def apply(llm, wait):
        handed.append((llm, wait))
        return db.run(first)

    monkeypatch.setattr(db, "apply", apply)
    said, result = run(ready, f"run = %llm_train {PLAN} --start")
    assert result.success, said
    assert ready.user_ns["run"].id == first
    llm, wait = handed[0]
    assert wait is False and llm.identifier == "tiny" and llm.trainer.learning_rate == 2e-4 and llm.trainer.lora_r == 16


# --- in a terminal ------------------------------------------------------------------------------------------


def test_everything_has_words_in_a_real_terminal(tmp_path):
    """IPython itself, typed into: help, panel, run view, checkpoints, errors, unloading."""
    typed = [
        "%load_ext llmnb",
        "db = %llm_connect mongomock://terminal",
        "%llm_help",
        "from llmnb import Collection",
        "n = db.execute(Collection('docs').insert_many([{'text': 'a'}]))",
        "%llm_train",
        "record = db.store.runs.create('tickets', model='tickets', version=1, config={})",
        "%llm_watch",
        "%llm_runs",
        "%llm_checkpoints",
        "%llm_watch nope",
        "%unload_ext llmnb",
        "%llm_help",
        "exit",
    ]
    line = [sys.executable, "-m", "IPython", "--simple-prompt", "--colors=NoColor", "--no-banner"]
    env = {**os.environ, "IPYTHONDIR": str(tmp_path), "TERM": "dumb"}
    done = subprocess.run(
        line, input="\n".join(typed) + "\n", env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    said = done.stdout + done.stderr
    for words in (
        "first: db = %llm_connect",
        "%llm_train --model facebook/opt-350m --collection docs --start",
        "tickets v1",
        "There are no checkpoints yet.",
        "no run 'nope'",
        "use %tb",
        "Line magic function `%llm_help` not found",
    ):
        assert words in said, f"{words!r} is not in:\n{said}"
    assert "object at 0x" not in said and "Traceback" not in said, said
