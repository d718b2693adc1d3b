"""Evaluations: as a value, kept in a database, and ``db.evaluate`` through a process of its own."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
import warnings

import pytest
from drill import folder_of
from tiny import make_model

import llmnb
from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import ConfigError, DataError, LlmnbError, ModelError, NotFound
from llmnb.evaluation import Evaluation, Example, Scores
from llmnb.evaluation.measures import Settings, chosen, figure, gap, ranking, takes_document
from llmnb.launch.evaluating import EvaluationProcess, prepare


def example(id="1", score=0.5, answer="an <b>answer</b>"):
    return Example(id, score, "what?\nnow", "the right one", answer, {"rougeL": score})


def value(**changes):
    base = Scores("base", {"perplexity": 80.0, "rougeL": 0.25, "exact_match": 0.0}, {"rows": 4, "trained": 1200})
    tuned = Scores(
        "run/4",
        {"perplexity": 12.5, "rougeL": 0.75, "exact_match": 0.5},
        {"rows": 4, "trained": 1200},
        1.5,
        (example("7", 1.0),),
        (example("3", 0.0),),
    )
    given = {
        "models": (base, tuned),
        "metrics": ("perplexity", "rougeL", "exact_match"),
        "base": "tiny",
        "rows": {
            "words": "4 documents of the valid fold of faq",
            "select": {"op": "find", "filter": {"a": {"$gt": 1}}},
        },
        "rank_by": "rougeL",
        "notes": ("run/4: 1 answer cut at 12 new tokens",),
    }
    return Evaluation(**{**given, **changes})


# --- the value ----------------------------------------------------------------------------------------------


def test_it_says_the_difference_to_the_base():
    found = value()
    shown = repr(found).splitlines()
    assert shown[0] == "Evaluation of 1 checkpoint of tiny on 4 documents of the valid fold of faq, 1,200 tokens"
    assert shown[1].split() == ["model", "perplexity", "rougeL", "exact", "match"]
    assert shown[3].split() == ["run/4", "12.5", "(−67.5)", "0.750", "(+0.500)", "50.0", "%", "(+50.0)"]
    assert "run/4, worst: 3, rougeL 0.000" in repr(found) and "run/4, best: 7, rougeL 1.000" in repr(found)
    assert "    answer     an <b>answer</b>" in shown
    assert found.gain("run/4", "perplexity") == 67.5 and found.gain("run/4", "rougeL") == 0.5
    assert found.best("perplexity") == found.best("rougeL") == "run/4"
    with pytest.raises(NotFound, match="evaluated model"):
        found["run/5"]
    with pytest.raises(NotFound, match="metric"):
        found.gain("run/4", "rouge")


def test_no_path_of_this_machine_is_shown():
    found = value(base="/home/me/models/tiny")
    assert "/home/me" not in repr(found) + found._repr_html_() and " of tiny on " in repr(found)
    assert " of org/tiny on " in repr(value(base="org/tiny"))


def test_html_is_escaped():
    page = value(notes=("<i>",))._repr_html_()
    assert "an &lt;b&gt;answer&lt;/b&gt;" in page and "&lt;i&gt;" in page
    assert "<b>" not in page and "<i>" not in page and page.count("<details>") == 1


def test_figures():
    assert figure("exact_match", 0.375) == "37.5 %" and figure("bleu", 23.14) == "23.1"
    assert figure("perplexity", 12345.6) == "1.235e+04" and figure("rouge1", math.nan) == "NaN"
    assert figure("mine", 3.0) == "3" and figure("rouge1", None) == ""
    assert gap("bleu", 1.0, 1.0) == "±0" and gap("mine", math.inf, 1.0) == "" and gap("bleu", 20.0, 21.0) == "−1.0"


def test_metrics_are_checked_all_at_once():
    def mine(answer, reference):
        return 0.0

    assert chosen(None) == (None, {})
    assert chosen("rouge, bleu")[0] == ("rouge1", "rouge2", "rougeL", "bleu")
    names, functions = chosen(["perplexity", mine])
    assert names == ("perplexity", "mine") and functions == {"mine": mine}
    assert chosen(mine)[0] == ("mine",) and chosen("ROUGEL")[0] == ("rougeL",)
    with pytest.raises(ConfigError) as caught:
        chosen(["rougeT", "blue", 3, lambda answer: 1, type("bleu", (), {"__call__": lambda *_: 1})()])
    said = str(caught.value)
    assert len(caught.value.faults) == 5 and "did you mean rouge" in said and "did you mean bleu?" in said
    assert "f(answer, reference)" in said and "two metrics are called bleu" in said
    with pytest.raises(ConfigError, match="holds nothing"):
        chosen([])
    assert takes_document(lambda a, r, d: 1) and not takes_document(lambda a, r: 1) and takes_document(lambda *a: 1)


def test_settings_are_checked_all_at_once():
    assert Settings.checked({"shown": 0}).max_new_tokens == 128
    with pytest.raises(ConfigError) as caught:
        Settings.checked({"max_new_token": 3, "batch_size": 0, "shown": True})
    assert len(caught.value.faults) == 3 and "did you mean max_new_tokens?" in str(caught.value)


def test_what_rows_are_ranked_by():
    assert ranking(["perplexity", "exact_match", "rougeL"], [], None) == "rougeL"
    assert ranking(["perplexity", "rougeL", "mine"], ["mine"], None) == "mine"
    assert ranking(["perplexity", "rougeL"], [], "perplexity") == "perplexity"
    with pytest.raises(ConfigError, match="did you mean rougeL"):
        ranking(["perplexity", "rougeL"], [], "rougeT")


# --- kept ---------------------------------------------------------------------------------------------------


def test_it_is_kept_and_found_again(store):
    nan = Scores("run/8", {"perplexity": math.nan, "rougeL": 0.0, "exact_match": 0.0})
    first = store.evaluations.add(value().to_json())
    second = store.evaluations.add(value(models=(*value().models, nan)).to_json())
    assert first["id"] < second["id"] and first["created"] > 1e9
    found = Evaluation.from_json(store.evaluations.get(first["id"]))
    assert found == value(id=first["id"], created=first["created"])
    assert found["run/4"].worst[0] == example("3", 0.0) and found.rows["select"]["filter"] == {"a": {"$gt": 1}}
    newest = Evaluation.from_json(store.evaluations.get())
    assert newest.id == second["id"] and math.isnan(newest["run/8"].metrics["perplexity"])
    listed = [Evaluation.from_json(record) for record in store.evaluations.list()]
    assert [e.id for e in listed] == [second["id"], first["id"]]
    assert listed[1]["run/4"].metrics == value()["run/4"].metrics and listed[1]["run/4"].worst == ()
    store.evaluations.remove(first["id"])
    with pytest.raises(NotFound, match="There is no evaluation") as caught:
        store.evaluations.remove(first["id"])
    assert second["id"] in caught.value.seen


# --- measured -----------------------------------------------------------------------------------------------


def trainer(home, **changes):
    settings = {
        "select": Collection("faq").find(),
        "key": ("prompt", "response"),
        "max_steps": 20,
        "save_steps": 10,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "output_dir": str(home / "out"),
    }
    return LLMTrainer(**{**settings, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def db(home):
    """A database with a LoRA run on pairs, one with a transform, one on another base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = connect("mongomock://evaluation", home=home)
    said = ("my name is model.", "red green")
    documents = [
        {"_id": i, "prompt": f"{('what', 'which')[i % 2]} {i}? ", "response": said[i % 2], "more": i}
        | {"_fold": "valid" if i < 6 else "train"}
        for i in range(24)
    ]
    found.execute(Collection("faq").insert_many(documents))
    base = str(folder_of())
    found.apply(LLM("pairs", base, trainer=trainer(home)))
    shout = {"key": "prompt", "transform": lambda text: {"text": text.upper()}, "max_steps": 2, "save_steps": 2}
    found.apply(LLM("loud", base, trainer=trainer(home, **shout)))
    other = str(make_model("llama", home / "other", seed=7))
    found.apply(LLM("other", other, trainer=trainer(home, max_steps=1, save_steps=1)))
    yield found
    found.close()


@pytest.fixture(scope="module")
def ids(db):
    """Experiments: pairs, loud, other."""
    return db.show("checkpoint")


def fast(metrics=("perplexity",), **more):
    return {"metrics": metrics, "max_new_tokens": 8, **more}


def test_checkpoints_are_measured_against_the_base(db, ids):
    said = []
    found = db.evaluate([f"{ids[0]}/10", ids[0], "base"], say=said.append, max_new_tokens=8)
    assert found.names == ["base", f"{ids[0]}/10", f"{ids[0]}/20"]
    assert found.rows["words"] == "6 documents of the valid fold of faq" and found.rows["fold"] == "valid"
    assert found.rows["used"] == 6 and found.rows["select"]["collection"] == "faq" and len(found.rows["digest"]) == 32
    assert found.gain(ids[0] + "/20", "perplexity") > found.gain(ids[0] + "/10", "perplexity") > 0
    assert found[f"{ids[0]}/20"].metrics["token_accuracy"] > found["base"].metrics["token_accuracy"]
    assert said[0] == "loading torch" and "base: loading" in said and f"{ids[0]}/20: 0 of 6 answers" in said
    assert found.settings["limit"] == 200 and found.settings["max_new_tokens"] == 8
    assert db.evaluation() == db.evaluation(found.id) == found
    assert db.evaluations()[0].id == found.id and db.evaluations()[0]["base"].metrics == found["base"].metrics
    loss = db.named(f"{ids[0]}/20").metrics.get("eval_loss")
    assert loss is None or math.log(found[f"{ids[0]}/20"].metrics["perplexity"]) == pytest.approx(loss, rel=1e-4)
    db.remove("evaluation", found.id)
    with pytest.raises(NotFound):
        db.evaluation(found.id)


def test_a_selection_a_limit_and_a_function_of_ones_own(db, ids):
    def asked_for(answer, reference, document):
        return document["more"]

    run = db.run(ids[0])
    found = db.evaluate(run, Collection("faq").find({"_id": {"$gte": 4}}).sort("_id"), **fast([asked_for], limit=5))
    assert found.rows["words"] == "the first 5 documents of faq, as selected" and found.rows["used"] == 5
    assert "3 of the 5 documents are of the train fold" in found.notes
    assert found["base"].metrics == {"asked_for": (4 + 5 + 6 + 7 + 8) / 5}
    assert found.rank_by == "asked_for" and found[f"{ids[0]}/20"].worst[0].id == "4"
    again = llmnb.evaluate(db.checkpoints(ids[0])[-1], "faq", "perplexity", db=db, limit=24)
    assert again.rows["used"] == 24 and again.metrics == ("perplexity",)


def test_of_many_documents_a_sample_that_is_always_the_same(db, ids):
    def sampled(limit, select=None):
        job = prepare(db.store, [db.named(ids[0])], select, (None, {}), Settings(), limit=limit)
        return [document["_id"] for document in job.documents], job.rows["words"]

    many = [{"_id": f"{'ab'[i >= 500]}/{i:04d}", "prompt": "p", "response": "r"} for i in range(1000)]
    db.execute(Collection("many").insert_many(many))
    chosen, words = sampled(100, Collection("many").find())
    assert words == "100 of 1,000 documents of many, as selected" and chosen == sorted(chosen)
    assert 30 < sum(name.startswith("a") for name in chosen) < 70, "not the first ones, which are of one kind"
    assert sampled(100, Collection("many").find())[0] == chosen
    assert set(sampled(50, Collection("many").find())[0]) < set(chosen), "fewer are some of the same"
    assert sampled(3, Collection("many").find().sort("_id"))[0] == [m["_id"] for m in many[:3]]
    assert sampled(2)[1] == "2 of 6 documents of the valid fold of faq"
    assert sampled(9) == (list(range(6)), "6 documents of the valid fold of faq")


def test_a_function_that_raises_names_the_document(db, ids):
    def broken(answer, reference, document):
        return 1 / (document["_id"] - 3)

    before = len(db.evaluations())
    with pytest.raises(DataError, match="broken failed on the document with _id 3"):
        db.evaluate(ids[0], **fast([broken]))
    assert len(db.evaluations()) == before


def test_what_cannot_be_is_said_at_once(db, ids, monkeypatch):
    monkeypatch.setattr(EvaluationProcess, "run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ModelError, match="different bases") as caught:
        db.evaluate([ids[0], ids[2]])
    assert ids[0] in caught.value.seen and ids[2] in caught.value.seen
    with pytest.raises(DataError, match="went through a transform"):
        db.evaluate(ids[1])
    with pytest.raises(DataError, match="'faqs' is empty") as caught:
        db.evaluate(ids[0], Collection("faqs").find())
    assert caught.value.todo == "did you mean 'faq'?"
    with pytest.raises(DataError, match="is empty") as caught:
        db.evaluate(ids[0], Collection("faq").find({"_id": 99}))
    assert caught.value.todo == "change the filter"
    for wrong, words in (
        ({"metrics": "blue"}, "did you mean bleu"),
        ({"limit": 0}, "limit"),
        ({"select": 3}, "does not give documents"),
        ({"select": Collection("faq").count_documents()}, "does not give documents"),
        ({"batchsize": 3}, "did you mean batch_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            db.evaluate(ids[0], **wrong)
    for nothing in ([], "base", None, [3]):
        with pytest.raises(ConfigError, match="checkpoint"):
            db.evaluate(nothing)
    with pytest.raises(NotFound) as caught:
        db.evaluate(ids[0] + "x")
    assert ids[0] in caught.value.todo


def test_a_transform_that_is_given_again(db, ids):
    found = db.evaluate(ids[1], transform=lambda text: {"text": text.upper()}, shown=9)
    assert found.metrics == ("perplexity", "token_accuracy")
    texts = {e.reference for e in (*found["base"].worst, *found["base"].best)}
    assert texts == {f"{('WHAT', 'WHICH')[i % 2]} {i}? " for i in range(6)}
    with pytest.raises(ConfigError, match="plain text"):
        db.evaluate(ids[1], metrics="exact_match", transform=lambda text: {"text": text.upper()})


def test_runs_of_another_form_are_told_apart(db, ids):
    found = db.evaluate([ids[0], ids[1]], **fast(), transform=lambda text: {"text": text.upper()})
    assert any(ids[1] in note and "own form" in note for note in found.notes)


def test_a_base_that_moved_or_is_gone(db, ids, home, tmp_path):
    base = folder_of()
    moved = shutil.copytree(base, tmp_path / "moved")
    assert db.evaluate(ids[0], **fast(), base=str(moved)).base == str(moved)
    with pytest.raises(ModelError, match="another base"):
        db.evaluate(ids[0], **fast(), base=str(home / "other"))
    with pytest.raises(ModelError, match="is not on this machine") as caught:
        db.evaluate(ids[0], **fast(), base=str(tmp_path / "nowhere"))
    assert "base='…'" in caught.value.todo


def test_a_run_that_was_removed_needs_a_selection(db, ids, home):
    db.apply(LLM("gone", str(folder_of()), trainer=trainer(home, max_steps=1, save_steps=1)))
    gone = db.show("checkpoint")[-1]
    db.remove("run", gone)
    with pytest.raises(DataError, match="was removed") as caught:
        db.evaluate(gone)
    assert "select=" in caught.value.todo
    found = db.evaluate(gone, "faq", **fast(limit=3))
    assert any("was removed" in note for note in found.notes) and found.rows["kind"] == "pair"


def test_an_evaluation_can_be_stopped(db, ids):
    process = EvaluationProcess()
    before = len(db.evaluations())
    caught = []

    def work():
        try:
            db.evaluate(ids[0], process=process, say=lambda words: started.set())
        except LlmnbError as error:
            caught.append(error)

    started = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    process.stop()
    thread.join(20)
    assert str(caught[0]).startswith("The evaluation was stopped.") and len(db.evaluations()) == before
    assert process._process.poll() is not None


def test_it_needs_a_database():
    code = "import llmnb\ntry: llmnb.evaluate('x')\nexcept llmnb.errors.LlmnbError as e: print(e.what)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "An evaluation needs a database."


def test_the_caller_loads_no_torch(db, ids):
    code = (
        "import sys, llmnb.launch.evaluating, llmnb.measuring;"
        "print([m for m in ('torch', 'transformers', 'sacrebleu', 'torchmetrics') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
