"""Inspecting from outside: a process of its own reads the documents; what crosses, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import uuid

import psutil
import pytest

import llmnb
from llmnb import LLM, Collection, Datalayer, LLMTrainer, connect
from llmnb.errors import ConfigError, DataError, ModelError, NotFound

PAIR = ("question", "reply")


@pytest.fixture
def db(store):
    return Datalayer(store)


@pytest.fixture
def mock_db(tmp_path):
    return connect(f"mongomock://{uuid.uuid4().hex}", home=tmp_path)


def filled(db, count=200):
    rows = [{"question": f"{i} and {i}?", "reply": f" {2 * i}", "lang": "en"} for i in range(count)]
    rows[0]["_fold"], rows[1]["_fold"] = "train", "valid"
    rows[5]["reply"], rows[5]["_fold"] = None, "train"  # by its _id one in twenty would be in the other fold
    rows += [{"question": "nobody", "reply": " reads", "_fold": "other", "lang": "en"}, {"lang": "fr"}]
    return db.execute(Collection("sums").insert_many(rows))


def test_a_selection_is_inspected_where_it_lies(db, tiny_llama):
    ids = filled(db)
    llm = LLM("sums", tiny_llama, trainer=LLMTrainer(select=Collection("sums").find({"lang": "en"}), key=PAIR))
    found = db.inspect(llm)
    assert [rows.name for rows in found.rows] == ["train", "valid"] and sum(rows.found for rows in found.rows) == 200
    assert found.ids("null") == [str(ids[5])] and found.ids("fold") == [str(ids[200])]
    row = found.row(ids[0])
    assert "".join(text for text, trained, _ in row.tokens if trained) == " 0</s>"
    assert db.execute(Collection("sums").count_documents(found.where("null"))) == 1
    assert not [p for p in psutil.Process().children() if "llmnb.launch.inspecting" in " ".join(p.cmdline())]
    with pytest.raises(NotFound):
        found.row("nowhere")


def test_a_trainer_and_a_folder_are_enough(mock_db, tiny_llama):
    filled(mock_db)
    trainer = LLMTrainer(select=Collection("sums").find(), key="reply", transform=lambda reply: {"text": reply * 2})
    found = llmnb.inspect(trainer, tiny_llama, db=mock_db)
    assert found.facts.kind == "text" and found.kinds[0] == "transform"
    assert "TypeError" in found.findings[0].says
    assert llmnb.inspect(LLM("m", tiny_llama, trainer=trainer)).facts.rows == found.facts.rows, "of the last database"
    other = LLMTrainer(
        select=Collection("sums").find({"lang": "fr"}), key=PAIR, eval_selects={"own": Collection("sums").find()}
    )
    with pytest.raises(ConfigError, match="model"):
        llmnb.inspect(other)


def test_bad_input_is_refused_in_words(mock_db, tiny_llama):
    filled(mock_db)
    with pytest.raises(DataError, match="sums"):
        llmnb.inspect(LLMTrainer(select=Collection("sun").find()), tiny_llama, db=mock_db)
    with pytest.raises(ConfigError, match="trainer"):
        mock_db.inspect(LLM("m", tiny_llama))
    with pytest.raises(ModelError):
        llmnb.inspect(LLMTrainer(select=Collection("sums").find(), key=PAIR), "/nowhere/at-all", db=mock_db)
    found = llmnb.inspect(
        LLMTrainer(select=Collection("sums").find(), key=("question", "replay")), tiny_llama, db=mock_db
    )
    assert not found.ok and "'reply'" in found.findings[0].todo, "as the training would refuse it, with near names"


def test_the_caller_needs_no_torch(tiny_llama):
    code = f"""
import sys, llmnb
db = llmnb.connect("mongomock://x")
db.execute(llmnb.Collection("t").insert_many([{{"text": f"row {{i}}"}} for i in range(20)]))
found = llmnb.inspect(llmnb.LLMTrainer(select=llmnb.Collection("t").find(), key="text"), {tiny_llama!r}, db=db)
assert found.rows[0].used, found
print([name for name in ("torch", "transformers", "tokenizers", "ray") if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
