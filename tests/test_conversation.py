"""A conversation: as history, as documents to train on, and kept in the database."""

from __future__ import annotations

import time
import warnings

import pytest

from llmnb import Collection, connect
from llmnb.conversation import Conversation, Form, Reply, Turn
from llmnb.errors import ConfigError, DataError, InUse, NotFound


def reply(speaker, text, state="done", note=""):
    return Reply(speaker, speaker, text, note, state)


def talk(kind="messages", key=None, **form):
    """Two questions to the base and to one checkpoint."""
    turns = [
        Turn("hi", [reply("base", "b1"), reply("run/4", "t1")]),
        Turn("more", [reply("base", "b2"), reply("run/4", "t2", "stopped")]),
        Turn("bad", [reply("base", "", "failed", "gone"), reply("run/4", "", "failed", "gone")]),
    ]
    return Conversation(turns, Form(kind, key, **form))


def test_each_model_sees_its_own_answers():
    said = talk().messages("run/4")
    assert [m["content"] for m in said] == ["hi", "t1", "more", "t2"], "what failed is not part of it"
    assert [m["content"] for m in talk().messages("base", before=1)] == ["hi", "b1"]
    assert [m["content"] for m in talk().messages("other/9")] == ["hi", "b1", "more", "b2"], "one that comes later"
    assert [m["role"] for m in said] == ["user", "assistant"] * 2


def test_it_survives_json():
    before = talk("pair", ("q", "a"), collection="faq", template="Q {input}")
    after = Conversation.from_json(before.to_json())
    assert after == before
    before.turns[-1].replies[0].state = "answering"
    assert Conversation.from_json(before.to_json()).turns[-1].replies[0].state == "stopped"


def test_documents_are_of_the_kind_that_was_trained_on():
    (chat,), said = talk().documents()
    assert [m["content"] for m in chat["messages"]] == ["hi", "t1", "more", "t2"]
    assert said == ["1 question without an answer of it left out", "1 answer written only as far as it came"]
    (chat,), _ = talk(key="dialog").documents("base")
    assert [m["content"] for m in chat["dialog"]] == ["hi", "b1", "more", "b2"]
    pairs, _ = talk("pair", ("question", "answer")).documents()
    assert pairs == [{"question": "hi", "answer": "t1"}, {"question": "more", "answer": "t2"}]
    assert talk("pair").documents(key="in,out")[0][0] == {"in": "hi", "out": "t1"}
    assert talk("text", "body", template="{input}\n").documents()[0][0] == {"body": "hi\nt1"}


def test_what_cannot_be_saved_is_said():
    with pytest.raises(DataError, match="no answer"):
        Conversation().documents()
    with pytest.raises(DataError, match="no answer from other/1"):
        talk().documents("other/1")
    with pytest.raises(DataError, match="transform"):
        talk("pair", ("a", "b", "c"), transformed=True).documents()
    assert talk("pair", ("a", "b", "c"), transformed=True).documents(key="p,r")[0][0] == {"p": "hi", "r": "t1"}
    with pytest.raises(ConfigError, match="does not fit"):
        talk("pair", "one").documents()
    with pytest.raises(ConfigError, match="plain field"):
        talk("text", "inner.text").documents()


@pytest.mark.mongod
def test_kept_listed_opened_and_removed(store):
    from llmnb.db import Datalayer

    db = Datalayer(store)
    chat = talk()
    assert db.chats() == []
    db.keep_chat(chat, "mine")
    chat.turns.append(Turn("again", [reply("run/4", "t3")]))
    db.keep_chat(chat)
    with pytest.raises(InUse, match="mine") as caught:
        db.keep_chat(talk(), "mine")
    assert "--history mine" in str(caught.value)
    with pytest.raises(ConfigError, match="name"):
        db.keep_chat(talk(), " ")
    time.sleep(0.01)  # chats of the same millisecond have no order
    db.keep_chat(talk(), "other")
    listed = db.chats()
    assert [(c["name"], c["turns"]) for c in listed] == [("other", 3), ("mine", 4)]
    assert listed[1]["speakers"] == ["base", "run/4"] and listed[1]["created"] <= listed[1]["changed"]
    assert db.chat("mine") == chat and chat.name == "mine"
    with pytest.raises(NotFound, match="mine"):
        db.chat("mime")
    assert "llmnb.chats" not in db.store.collections()
    db.remove("chat", "mine")
    assert [c["name"] for c in db.chats()] == ["other"]
    with pytest.raises(NotFound):
        db.remove("chat", "mine")


def test_saving_writes_documents_with_folds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        db = connect("mongomock://saving_chats")
    saved = db.save_chat(talk(collection="tickets"))
    (document,) = list(db.execute(Collection("tickets").find()))
    assert [m["content"] for m in document["messages"]] == ["hi", "t1", "more", "t2"]
    assert saved.ids == [document["_id"]] and document["_fold"] in saved.folds
    assert str(saved).startswith(f"1 document into tickets; its fold is {document['_fold']}. 1 question without")
    saved = db.save_chat(talk("pair", ("q", "a")), "faq", speaker="base")
    assert sorted(d["a"] for d in db.execute(Collection("faq").find())) == ["b1", "b2"]
    assert str(saved).startswith("2 documents into faq; folds: ")
    with pytest.raises(ConfigError, match="collection"):
        db.save_chat(talk())
    db.keep_chat(talk(collection="tickets"), "kept")
    assert len(db.save_chat("kept").ids) == 1
    db.close()
