"""The chat: who answers, what is sent, what is shown, and what happens when one stops it or goes on."""

from __future__ import annotations

import time
import uuid
import warnings
from typing import ClassVar

import pytest

pytest.importorskip("IPython")

import llmnb.launch.chat
import llmnb.notebook.chat as chat
import llmnb.notebook.sampling as sampling
import llmnb.notebook.speakers as speakers
from llmnb import Collection, connect
from llmnb.config import ModelSpec
from llmnb.conversation import Conversation, Form, Reply, Turn
from llmnb.errors import ConfigError, DataError, InUse, ModelError, NotFound
from llmnb.notebook.chatbox import ChatBox
from llmnb.notebook.session import Session

EVIL = "<b>&<script>alert(1)</script>"


class Answer:
    """An answer without a model."""

    def __init__(self, pieces):
        self.pieces, self.stopped, self.told = pieces, False, {}

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if self.stopped:
                return
        self.told = {"tokens": 12, "seconds": 2.0, "cut": False, "notes": []}

    def stop(self):
        self.stopped = True


class Process:
    """A chat process without a process."""

    made: ClassVar[list] = []
    pieces: ClassVar[list] = [" answers ", EVIL, " end"]

    def __init__(self, spec, ended=None):
        self.spec, self.ended, self.asked, self.answers, self.alive = spec, ended, [], [], False
        Process.made.append(self)

    def ask(self, question, *, adapter=None, **sampling):
        self.alive = True
        self.asked.append((question, adapter, sampling))
        first = "base" if adapter is None else "tuned"
        self.answers.append(Answer([first, *self.pieces]))
        return self.answers[-1]

    def close(self):
        self.alive = False


@pytest.fixture
def processes(monkeypatch):
    Process.made = []
    monkeypatch.setattr(Process, "pieces", list(Process.pieces))
    monkeypatch.setattr(llmnb.launch.chat, "ChatProcess", Process)
    return Process.made


@pytest.fixture
def db(tmp_path):
    """A database with a run of three checkpoints, the second of them the best; and the run of a whole model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        db = connect(f"mongomock://chat_{uuid.uuid4().hex[:8]}", home=tmp_path / "home")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    spec = ModelSpec("whole", "/models/tiny", predict_kwargs={"max_new_tokens": 9})
    add(db, spec, folder, {10: False}, kind="model")
    add(db, ModelSpec("tickets", "/models/tiny", predict_kwargs={"max_new_tokens": 9}), folder, {20: 0, 40: 1, 60: 0})
    yield db
    db.close()


def add(db, spec, folder, steps, kind="adapter", **config):
    from llmnb.config import TrainConfig

    config = {"select": Collection("docs").find(), "key": "messages", "key_kind": "messages", **config}
    version = db.store.models.add(spec, TrainConfig(**config))
    run = db.store.runs.create(
        spec.identifier, model=spec.identifier, version=version, config=TrainConfig(**config).to_json()
    )["_id"]
    for step, best in steps.items():
        (folder / "weights").write_text(f"{run} {step}")
        metrics = {"eval_loss": 2 - step / 100}
        db.store.checkpoints.put(run, step, folder, kind=kind, base="/models/tiny", best=bool(best), metrics=metrics)
        if best:
            db.store.models.point(spec.identifier, version, f"{run}/{step}")
    time.sleep(0.005)
    return run


def newest_run(db):
    return db.show("checkpoint")[-1]


# --- who answers ----------------------------------------------------------------------------------------------


def test_without_a_name_the_newest_runs_model_answers(db):
    run = newest_run(db)
    assert speakers.named(db, None) == [f"{run}/40"], "with the best step, as the model does"
    who = speakers.speaker(db, f"{run}/40")
    assert (who.head, who.spec.model_name_or_path, who.chat) == ("tickets step 40 (best)", "/models/tiny", True)
    assert who.adapter and who.form == Form("messages", "messages", "docs")


def test_columns_by_name(db):
    run = newest_run(db)
    assert speakers.named(db, run, ["base"]) == ["base", f"{run}/60"]
    assert speakers.named(db, f"{run}/20", ["base", f"{run}/20", run]) == ["base", f"{run}/20", f"{run}/60"]
    with pytest.raises(NotFound, match="checkpoint"):
        speakers.named(db, f"{run}/9")
    with pytest.raises(ConfigError, match="at most 4"):
        speakers.named(db, None, ["base", f"{run}/20", f"{run}/60", db.show("checkpoint")[0]])


def test_the_base_is_that_of_those_beside_it_in_the_same_process(db):
    run = newest_run(db)
    base, tuned = (speakers.speaker(db, name, ["base", f"{run}/20"]) for name in ("base", f"{run}/20"))
    assert (base.head, base.adapter) == ("base", None) and base.spec == tuned.spec and tuned.adapter


def test_a_whole_model_has_a_process_of_its_own(db):
    whole = db.show("checkpoint")[0]
    who = speakers.speaker(db, f"{whole}/10")
    assert who.adapter is None and who.spec.model_name_or_path.startswith(str(db.store.home))
    assert speakers.speaker(db, "base", [f"{whole}/10"]).spec.model_name_or_path == "/models/tiny"


@pytest.mark.parametrize(
    ("kind", "form", "chats"),
    [("messages", None, True), ("pair", None, False), ("messages", "text", False), ("text", "chat", True)],
)
def test_prompts_go_the_way_the_model_was_trained(db, tmp_path, kind, form, chats):
    run = add(
        db, ModelSpec("m", "/models/tiny"), tmp_path / "weights", {5: 1}, key_kind=kind, prompt_template="Q{input}"
    )
    who = speakers.speaker(db, run, form=form)
    assert who.chat is chats and who.spec.prompt_template == "Q{input}"


def test_a_checkpoint_whose_run_is_gone_still_answers(db):
    run = newest_run(db)
    db.store.runs._table.delete({"_id": run})
    who = speakers.speaker(db, f"{run}/40")
    assert who.spec.model_name_or_path == "/models/tiny" and speakers.named(db, None) == [f"{run}/60"]


def test_everyone_can_be_chosen_newest_first(db):
    run = newest_run(db)
    names = speakers.choices(db)
    assert [name for name, *_ in names[:3]] == ["base", f"{run}/60", f"{run}/40"] and len(names) == 5
    assert names[2][1] == "tickets step 40 (best, eval 1.600)" and names[2][2].startswith("tickets · ")


def test_no_checkpoint_at_all_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        db = connect("mongomock://chat_empty")
    with pytest.raises(NotFound, match="no checkpoint") as caught:
        speakers.named(db, None)
    assert "train first" in str(caught.value)


# --- settings -------------------------------------------------------------------------------------------------


def test_settings_that_were_typed():
    found = sampling.sampling_of({"max_new_tokens": "40", "temperature": " 0.7", "top_p": "", "seed": "3"})
    assert found == {"max_new_tokens": 40, "temperature": 0.7, "seed": 3} and sampling.sampled(found)
    assert sampling.sampling_words(found) == "max new tokens 40 · temperature 0.7 · seed 3"
    assert sampling.sampling_words({"max_new_tokens": 4, "seed": 3, "temperature": 0.0}) == (
        "greedy · max new tokens 4 · temperature 0.0"
    )
    with pytest.raises(ConfigError) as caught:
        sampling.sampling_of({"max_new_tokens": "0", "temperature": "nan", "top_p": "2", "seed": "x"})
    assert len(caught.value.faults) == 4


# --- in a page ------------------------------------------------------------------------------------------------


class Page:
    """What the page would hear, and a session for its box."""

    def __init__(self, db, **more):
        self.session = Session(None)
        self.session._database = db
        self.box = ChatBox(self.session, db, **more)
        self.heard = []
        self.box.widget.send = lambda message, buffers=None: self.heard.append(message)

    def says(self, kind, **content):
        self.box._heard(self.box.widget, {"kind": kind, **content}, [])
        return self

    def settle(self, patience=20):
        end = time.monotonic() + patience
        while not self.box._done.is_set() or not self.box._errands.idle:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self

    @property
    def state(self):
        return next(m["content"] for m in reversed(self.heard) if m["kind"] in ("state", "all"))

    @property
    def turns(self):
        return next(m["content"]["turns"] for m in reversed(self.heard) if m["kind"] == "all")


@pytest.fixture
def make(db, processes):
    return lambda **more: Page(db, **more)


def test_a_ready_page_gets_everything_and_again_after_a_reload(db, make):
    run = newest_run(db)
    page = make(speakers=["base", f"{run}/40"]).says("ready").settle()
    page.says("ask", text="hello").settle().says("draft", text="half a").says("ready").settle()
    (turn,) = page.turns
    assert turn["prompt"] == "hello" and turn["sampling"] == "greedy"
    assert [r["head"] for r in turn["replies"]] == ["base", "tickets step 40 (best)"]
    assert turn["replies"][1]["text"] == f"tuned answers {EVIL} end"
    assert turn["replies"][0]["note"].startswith("6.0 tokens/s · 12 tokens · ")
    assert [m for m in page.heard if m["kind"] == "all"][-1]["content"]["draft"] == "half a"
    assert page.state["phase"] == "idle" and page.state["collection"] == "docs" and not page.state["alone"]


def test_without_a_page_that_listens_everything_is_said_again(make, monkeypatch):
    monkeypatch.setattr("llmnb.notebook.chatbox._UNHEARD", 0.0)
    page = make()
    page.box.ask("hello")
    page.settle()
    assert not [m for m in page.heard if m["kind"] == "reply"], "a page that comes later would not know the turn"
    assert page.turns[0]["replies"][0]["state"] == "done"


def test_the_history_goes_along_where_a_model_was_trained_on_chats(db, make, processes):
    run = newest_run(db)
    page = make(speakers=[f"{run}/40", f"{run}/20"])
    for text in ("one", "two"):
        page.says("ask", text=text).settle()
    (process,) = processes
    question, _, sampling = process.asked[2]
    assert [m["content"] for m in question] == ["one", f"tuned answers {EVIL} end", "two"]
    assert sampling == {"max_new_tokens": 9}
    page.says("choose", names=["base"]).settle().says("ask", text="three").settle()
    assert [m["content"] for m in process.asked[-1][0]][::2] == ["one", "two", "three"]
    page.says("new").says("ask", text="four").settle()
    assert len(process.asked[-1][0]) == 1


def test_equal_settings_are_drawn_with_one_seed(db, make, processes):
    run = newest_run(db)
    page = make(speakers=["base", f"{run}/40"], sampling={"top_k": 5}).says("sampling", values={"temperature": "0.8"})
    page.says("ask", text="x").settle()
    first, second = (sampling for _, _, sampling in processes[0].asked)
    assert first == second and first["seed"] >= 0 and first["top_k"] == 5
    assert f"seed {first['seed']}" in page.turns[0]["sampling"]
    page.says("sampling", values={"temperature": "hot", "seed": "-1"}).says("ask", text="y")
    assert (
        set(page.state["faults"]) == {"temperature", "seed"} and "temperature: cannot be hot" in page.state["trouble"]
    )
    assert len(page.turns) == 1


def test_an_empty_question_and_one_too_many(make, monkeypatch):
    page = make()
    with pytest.raises(ConfigError, match="is empty"):
        page.box.ask("  \n")
    held = []

    def ask(self, question, **more):
        held.append(Answer(["a", "b", "c"]))
        while not page.box._stopping:
            time.sleep(0.01)
        return held[-1]

    monkeypatch.setattr(Process, "ask", ask)
    page.says("ask", text="slow")
    page.says("ask", text="another")
    assert "press Stop" in page.state["trouble"]
    with pytest.raises(DataError, match="still being given"):
        page.box.new()
    page.says("stop").settle()
    reply = page.turns[0]["replies"][0]
    assert reply["state"] == "stopped" and reply["text"] == "a" and reply["note"].startswith("stopped")


def test_a_stop_keeps_what_came_and_asks_nobody_else(db, make, monkeypatch):
    page = make(speakers=["base", newest_run(db)])
    monkeypatch.setattr(Process, "pieces", [" x"] * 3)
    real = Process.ask

    def ask(self, question, **more):
        found = real(self, question, **more)
        page.box.stop()
        return found

    monkeypatch.setattr(Process, "ask", ask)
    page.says("ask", text="hello").settle()
    first, second = page.turns[0]["replies"]
    assert (first["state"], first["text"]) == ("stopped", "base") and second["note"] == "not asked"


def test_one_that_fails_says_so_and_the_others_answer(db, make, monkeypatch):
    run = newest_run(db)
    page = make(speakers=["base", f"{run}/20", f"{run}/40"])
    db.store.checkpoints.remove(run, 20)
    page.box.ask("hello")
    with pytest.raises(NotFound):
        page.box.wait()
    base, gone, tuned = page.settle().turns[0]["replies"]
    assert base["state"] == tuned["state"] == "done" and gone["state"] == "failed"
    assert "There is no checkpoint" in gone["note"]
    lost = ModelError("There is no folder /models/tiny.", seen="tried it", todo="check the path")
    monkeypatch.setattr(Process, "pieces", [lost])
    page.says("ask", text="again").settle()
    note = page.turns[1]["replies"][0]["note"]
    assert "The base model of this chat cannot be loaded: /models/tiny" in note and "To do: put the model back" in note
    assert page.box.chat.messages("base") == page.box.chat.messages("base", 1), "what failed is not history"


def test_an_interrupt_of_the_cell_stops_and_the_cell_goes_on(make, monkeypatch):
    page = make()
    waits = []

    def wait(timeout):
        waits.append(timeout)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return True

    def ask(self, question, **more):
        while not page.box._stopping:
            time.sleep(0.01)
        return Answer(["half", "rest"])

    monkeypatch.setattr(Process, "ask", ask)
    page.box.ask("hello")
    monkeypatch.setattr(page.box._done, "wait", wait)
    page.box.wait()
    page.settle()
    assert page.turns[0]["replies"][0]["state"] == "stopped" and not page.state["blocking"]


def test_save_keep_open_and_release_from_the_page(db, make, processes):
    page = make().says("ready").settle().says("ask", text="hello").settle()
    page.says("save", collection="", speaker="").settle()
    assert page.state["said"].startswith("1 document into docs; its fold is ")
    (document,) = list(db.execute(Collection("docs").find()))
    assert [m["role"] for m in document["messages"]] == ["user", "assistant"]
    page.says("keep", on=True, name="mine").settle().says("ask", text="more").settle()
    end = time.monotonic() + 5
    while db.chats()[0]["turns"] < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert page.state["keep"] == "mine"
    page.says("new").settle().says("keep", on=True, name="mine").settle()
    assert "Another conversation is kept as 'mine'" in page.state["trouble"] and page.state["keep"] == ""
    page.says("look").settle().says("open", name="mine").settle()
    assert [t["prompt"] for t in page.turns] == ["hello", "more"] and page.state["kept"] == ["mine"]
    page.says("keep", on=False).settle()
    assert "stays in the database" in page.state["said"]
    assert page.state["memory"] and processes[0].alive
    page.says("release").settle()
    assert not page.state["memory"] and "memory is free" in page.state["said"]
    processes[0].ended()
    page.says("open", name="nobody").settle()
    assert "There is no kept chat 'nobody'" in page.state["trouble"]


def test_choosing(make):
    page = make()
    with pytest.raises(ConfigError):
        page.box.choose([])
    with pytest.raises(ConfigError):
        page.box.choose(["a/1", "a/2", "a/3", "a/4", "a/5"])
    page.says("choose", names=["nobody/1"]).settle()
    assert page.state["chosen"] == ["nobody/1"]
    page.says("ask", text="x").settle()
    assert page.turns[0]["replies"][0]["state"] == "failed"


def test_a_run_by_its_id_answers_with_its_best_step_once_it_has_one(db, make, processes, tmp_path):
    page = make(speakers=["later"]).says("ready").settle()
    assert page.state["chosen"] == ["later"] and not page.state["empty"]
    page.box.choose([newest_run(db)])
    page.settle()
    assert page.state["chosen"] == [f"{newest_run(db)}/40"] and page.heard[-1]["kind"] in ("state", "focus")
    for experiment in db.show("checkpoint"):
        for step in db.show("checkpoint", experiment):
            db.store.checkpoints._table.delete({"experiment": experiment, "step": step})
    page.box.refresh()
    assert page.settle().state["empty"]
    page.says("ask", text="anyone?").settle()
    assert page.turns[0]["replies"][0]["state"] == "failed"


def test_the_still_is_escaped():
    reply = Reply("base", "<i>base</i>", EVIL, "1 s", "done")
    talk = Conversation([Turn("<u>hi</u>", [reply], "greedy")])
    html = chat.page(talk)
    assert "<script" not in html and "<i>" not in html and "<u>" not in html and "&lt;script&gt;" in html
    assert chat.plain(talk) == f"> <u>hi</u>\n\n[<i>base</i>] 1 s\n{EVIL}"


def test_two_bases_stay_in_memory_at_most(db, processes):
    chats = chat.Chats()
    for name in ("a", "b", "c"):
        list(chats.ask(speakers.Speaker("base", "base", ModelSpec(model_name_or_path=name), None), "x", {}))
    assert [p.alive for p in processes] == [False, True, True] and len(chats) == 2
    chats.close()
    assert len(chats) == 0


# --- in a terminal --------------------------------------------------------------------------------------------


@pytest.fixture
def shell(db, processes, tmp_path, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    from llmnb.notebook import load, unload

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    found = InteractiveShell(config=config)
    load(found)
    found.user_ns["db"] = db
    run(found, "x = %llm_connect db")
    yield found
    unload(found)


def run(shell, code):
    from IPython.utils.capture import capture_output

    with capture_output() as said:
        result = shell.run_cell(code)
    return said.stdout, result.error_in_exec


def test_answers_in_a_terminal_are_plain_text(shell, db, processes):
    said, error = run(shell, "%%llm_chat --compare base --seed 4 --temperature 0.5\nhello")
    assert error is None and f"[base]\nbase answers {EVIL} end\n" in said and "[tickets step 40 (best)]\ntuned" in said
    assert processes[0].asked[0][2] == {"max_new_tokens": 9, "seed": 4, "temperature": 0.5}
    said, error = run(shell, "%llm_chat --save faq")
    assert error is None and said.startswith("1 document into faq; its fold is ")
    (document,) = list(db.execute(Collection("faq").find()))
    assert document["messages"][1]["content"].startswith("tuned"), "what was trained comes before the base"


def test_a_kept_chat_goes_on(shell, db, processes):
    run(shell, "%%llm_chat --keep mine\nhello")
    said, error = run(shell, "%%llm_chat --history mine\nmore")
    assert error is None and [m["content"] for m in processes[0].asked[1][0]][::2] == ["hello", "more"]
    assert db.chats()[0]["turns"] == 2, "it stays kept"
    _, error = run(shell, "%%llm_chat --keep mine\nanother")
    assert isinstance(error, InUse) and len(processes[0].asked) == 2, "before anything was asked"
    said, error = run(shell, "%llm_chat --save --history mine")
    assert error is None and said.startswith("1 document into docs")


def test_an_interrupt_in_a_terminal(shell, monkeypatch):
    monkeypatch.setattr(Process, "pieces", [" half", KeyboardInterrupt()])
    said, error = run(shell, "%%llm_chat --compare base\nhello")
    assert error is None and "base half\nstopped" in said and "tickets" not in said


def test_nothing_to_save_is_said(shell):
    _, error = run(shell, "%llm_chat --save")
    assert isinstance(error, ConfigError) and "ask first" in str(error)
