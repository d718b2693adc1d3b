"""The chat cell: who answers, what is sent, what is shown, and what happens when one stops it."""

from __future__ import annotations

from typing import ClassVar

import pytest

pytest.importorskip("IPython")

import llmnb.launch.chat
import llmnb.notebook.chat as chat
from llmnb.checkpoint import Checkpoint
from llmnb.config import ModelSpec
from llmnb.errors import ModelError, NotFound
from llmnb.notebook.chat import Answers, Chats, Speaker, speakers

SPEC = ModelSpec(identifier="tickets", model_name_or_path="/models/tiny", predict_kwargs={"max_new_tokens": 9})


class Process:
    """A chat process without a process."""

    made: ClassVar[list] = []

    def __init__(self, spec):
        self.spec, self.asked, self.stopped, self.closed = spec, [], 0, False
        Process.made.append(self)

    def ask(self, question, *, adapter=None, **sampling):
        self.asked.append((question, adapter, sampling))
        yield from ("base " if adapter is None else "tuned ", "<b>&", " end")

    def stop(self):
        self.stopped += 1

    def close(self):
        self.closed = True


@pytest.fixture
def processes(monkeypatch):
    Process.made = []
    monkeypatch.setattr(llmnb.launch.chat, "ChatProcess", Process)
    return Process.made


@pytest.fixture
def shown(monkeypatch):
    """Everything the output was updated to."""
    bundles = []

    class Handle:
        def update(self, bundle, raw=False):
            bundles.append(bundle)

    def display(bundle, raw=False, display_id=False):
        bundles.append(bundle)
        return Handle()

    monkeypatch.setattr(chat, "display", display)
    monkeypatch.setattr(chat, "_EVERY", 0.0)
    return bundles


class Base:
    """As much of a database as a chat asks for."""

    def __init__(self, *, kind="adapter", best=True, config=None, counts=None, experiments=("r1", "r2"), spec=SPEC):
        self.config, self.counts, self.experiments, self.spec = config or {}, counts or {}, list(experiments), spec
        self.checkpoint = Checkpoint("r2", 40, "d", kind=kind, base="/models/tiny", best=best, path="/cache/r2-40")
        self.store = self
        self.runs = self.models = self
        self.loaded = []

    def show(self, kind):
        return self.experiments

    def load(self, kind, name):
        self.loaded.append(name)
        return self.checkpoint

    def answering(self, run):
        return self.checkpoint

    def get(self, name, version=None):
        if self.spec is None:
            raise NotFound("run", name)
        if version is not None:
            return {"spec": self.spec.to_json()}
        return {"model": "tickets", "version": 1, "config": self.config, "counts": self.counts}


# --- who answers ----------------------------------------------------------------------------------------------


def test_without_a_name_the_newest_run_answers():
    (only,) = speakers(Base(), None, None, None)
    assert only.head == "tickets step 40 (best)" and only.adapter == "/cache/r2-40"
    assert only.spec == SPEC and not only.chat


def test_a_named_checkpoint_is_loaded_by_that_name():
    base = Base()
    speakers(base, "r1/20", None, None)
    assert base.loaded == ["r1/20"]


def test_comparing_puts_the_base_first_in_the_same_process():
    first, second = speakers(Base(), None, "base", None)
    assert (first.head, first.adapter) == ("base", None) and second.adapter and first.spec == second.spec


def test_a_whole_model_has_a_process_of_its_own():
    first, second = speakers(Base(kind="model", best=False), None, "base", None)
    assert second.spec.model_name_or_path == "/cache/r2-40" and second.adapter is None
    assert first.spec.model_name_or_path == "/models/tiny" and "best" not in second.head


@pytest.mark.parametrize(
    ("config", "counts", "form", "chats"),
    [
        ({"key_kind": "messages"}, {}, None, True),
        ({}, {"kind": "messages"}, None, True),
        ({"key_kind": "pair"}, {}, None, False),
        ({"key_kind": "messages"}, {}, "text", False),
        ({}, {}, "chat", True),
    ],
)
def test_prompts_go_the_way_the_model_was_trained(config, counts, form, chats):
    (only,) = speakers(Base(config=config, counts=counts), None, None, form)
    assert only.chat is chats


def test_the_trainers_prompt_template_and_bits_are_used():
    (only,) = speakers(Base(config={"prompt_template": "Q: {input}\n", "bits": 4}), None, None, None)
    assert only.spec.prompt_template == "Q: {input}\n" and only.spec.bits == 4


def test_a_checkpoint_whose_run_is_gone_still_answers():
    (only,) = speakers(Base(spec=None), None, None, None)
    assert only.spec.model_name_or_path == "/models/tiny"


def test_no_checkpoint_at_all_is_said():
    with pytest.raises(NotFound, match="no checkpoint") as caught:
        speakers(Base(experiments=()), None, None, None)
    assert "train first" in str(caught.value)


# --- what is asked and shown ------------------------------------------------------------------------------------


def both(chats_form=False):
    return [Speaker("base", SPEC, None, chats_form), Speaker("tuned", SPEC, "/cache/a", chats_form)]


def test_both_columns_stream_escaped_from_one_process(processes, shown):
    chats = Chats()
    Answers("hello", both(), {"temperature": 0.5}).stream(chats, both(), {"temperature": 0.5})
    (process,) = processes
    assert process.asked == [
        ("hello", None, {"max_new_tokens": 9, "temperature": 0.5}),
        ("hello", "/cache/a", {"max_new_tokens": 9, "temperature": 0.5}),
    ]
    last = shown[-1]
    assert "base <b>& end" in last["text/plain"] and "tuned <b>& end" in last["text/plain"]
    assert "<b>" not in last["text/html"] and "base &lt;b&gt;&amp; end" in last["text/html"]
    assert "temperature 0.5" in last["text/html"]
    assert any("base" in b["text/plain"] and "end" not in b["text/plain"] for b in shown), "it came piece by piece"
    assert "loading the model" in shown[0]["text/plain"]


def test_a_chat_goes_as_messages(processes, shown):
    Answers("hi", both(True)[:1], {}).stream(Chats(), both(True)[:1], {})
    assert processes[0].asked[0][0] == [{"role": "user", "content": "hi"}]


def test_an_interrupt_stops_the_answer_and_says_so(processes, shown, monkeypatch):
    def ask(self, question, **sampling):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Process, "ask", ask)
    Answers("hi", both(), {}).stream(Chats(), both(), {})
    assert processes[0].stopped == 1
    assert "[base] stopped\nhalf" in shown[-1]["text/plain"] and "[tuned] not asked" in shown[-1]["text/plain"]


def test_a_failure_is_shown_in_its_column_and_raised(processes, shown, monkeypatch):
    def ask(self, question, **sampling):
        raise ModelError("It is gone.")
        yield

    monkeypatch.setattr(Process, "ask", ask)
    with pytest.raises(ModelError):
        Answers("hi", both(), {}).stream(Chats(), both(), {})
    assert "[base] failed" in shown[-1]["text/plain"]


def test_the_process_stays_for_the_next_question_and_ends_when_closed(processes, shown):
    chats = Chats()
    for _ in range(2):
        Answers("hi", both(), {}).stream(chats, both(), {})
    assert len(processes) == len(chats) == 1
    chats.close()
    assert processes[0].closed and len(chats) == 0


def test_an_empty_answer_is_said(processes, shown, monkeypatch):
    monkeypatch.setattr(Process, "ask", lambda self, question, **sampling: iter(["\n", " \n"]))
    Answers("hi", both()[:1], {}).stream(Chats(), both()[:1], {})
    assert "nothing but white space" in shown[-1]["text/plain"]
