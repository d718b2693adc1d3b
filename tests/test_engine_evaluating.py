"""Evaluations: figures against other ways to compute them, adapters as if each were alone, rows and their documents."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from drill import chats, folder_of, texts, train
from drill import pairs as uneven
from tiny import make_tokenizer

from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine.evaluating import Asked, evaluate
from llmnb.errors import ConfigError, DataError, MissingPackage
from llmnb.evaluation.measures import Settings

torch = pytest.importorskip("torch")
sacrebleu = pytest.importorskip("sacrebleu")
pytest.importorskip("torchmetrics")

PAIR = TrainConfig(key=("prompt", "response"), prompt_template="Q {input} A ", max_seq_length=64)


def pairs(count):
    """Prompts of uneven length, and two responses that a tiny model can learn."""
    said = ("my name is model.", "red green")
    return [{**document, "response": said[at % 2]} for at, document in enumerate(uneven(count))]


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(model_name_or_path=str(folder_of()))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A checkpoint that has learned the responses of ``pairs``, and one of the same run that has learned less."""
    run = train(
        tmp_path_factory.mktemp("tuned"),
        documents=pairs(24),
        config={"key": ("prompt", "response"), "prompt_template": "Q {input} A ", "max_seq_length": 64},
        per_device_train_batch_size=8,
        max_steps=60,
        save_strategy="steps",
        save_steps=20,
        lr_scheduler_type="linear",
    )
    return {saved["step"]: str(saved["folder"]) for saved in run.saved}


def asked(spec, config=PAIR, **folders):
    return [Asked("base", None, spec, config), *(Asked(n, str(f), spec, config) for n, f in folders.items())]


def measured(who, documents, names=None, functions=None, **settings):
    return evaluate(who, documents, names, functions or {}, Settings(**{"max_new_tokens": 12, **settings}))


def by_transformers(folder, documents, config, adapter=None):
    """(summed loss, tokens, hits) of each row: the model's own loss, one row at a time, loaded anew."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmnb.engine.rows import make_rows

    tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    found = []
    for row in make_rows(documents, tokenizer, config)[:]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.inference_mode():
            out = model(input_ids=ids, labels=labels)
        at = labels[0, 1:] >= 0
        hits = int((out.logits[0, :-1].argmax(-1)[at] == labels[0, 1:][at]).sum())
        found.append((float(out.loss) * int(at.sum()), int(at.sum()), hits))
    return found


def test_perplexity_and_token_accuracy_are_those_of_the_models_own_loss(spec, tuned):
    documents = pairs(11)
    found = measured(asked(spec, run=tuned[60]), documents, ["perplexity", "token_accuracy"], batch_size=4)
    for name, adapter in (("base", None), ("run", tuned[60])):
        rows = by_transformers(spec.model_name_or_path, documents, PAIR, adapter)
        tokens = sum(row[1] for row in rows)
        assert math.log(found[name].metrics["perplexity"]) == pytest.approx(
            sum(row[0] for row in rows) / tokens, abs=1e-5
        )
        assert found[name].metrics["token_accuracy"] == sum(row[2] for row in rows) / tokens
        assert found[name].counts["trained"] == tokens and found[name].counts["rows"] == 11
    assert len({row[1] for row in rows}) > 1, "rows of one length would not tell a mean of means from the mean"


def test_a_training_is_seen(spec, tuned):
    found = measured(asked(spec, early=tuned[20], late=tuned[60]), pairs(12))
    base, early, late = found.models
    assert found.names == ["base", "early", "late"] and found.metrics[0] == "perplexity"
    assert late.metrics["perplexity"] < base.metrics["perplexity"] / 2
    assert late.metrics["perplexity"] < early.metrics["perplexity"] < base.metrics["perplexity"]
    for name in ("token_accuracy", "exact_match", "rougeL"):
        assert late.metrics[name] > base.metrics[name], name
        assert found.gain("late", name) == late.metrics[name] - base.metrics[name]
    assert found.gain("late", "perplexity") > 0 and found.best("perplexity") == "late"
    assert found.rows["kind"] == "pair" and found.rows["used"] == 12 and found.settings["dtype"] == "float32"
    assert found.rank_by == "rougeL" and found.versions["sacrebleu"] == sacrebleu.__version__


def test_a_swapped_adapter_measures_as_one_that_is_loaded_anew(spec, tuned):
    together = measured(asked(spec, a=tuned[60], b=tuned[20], c=tuned[40]), pairs(9))
    for name, step in (("c", 40), ("a", 60)):
        alone = evaluate([Asked(name, tuned[step], spec, PAIR)], pairs(9), None, {}, Settings(max_new_tokens=12))
        assert alone[name].metrics == together[name].metrics
        assert alone[name].worst == together[name].worst
    assert together["a"].metrics != together["b"].metrics


def test_answers_are_marked_as_the_libraries_mark_them(spec, tuned):
    documents = pairs(12)
    keep = {}

    def keeps(answer, reference, document):
        keep[document["_id"]] = answer
        assert document["response"] == reference
        return len(answer)

    names = ["exact_match", "rouge1", "bleu", "chrf", "keeps"]
    found = measured(asked(spec, run=tuned[20]), documents, names, {"keeps": keeps}, max_new_tokens=9)["run"]
    answers, references = [keep[d["_id"]] for d in documents], [d["response"] for d in documents]
    from llmnb.engine.generation import Answerer

    with Answerer(spec, tuned[20]) as answerer:
        prompts = [d["prompt"] for d in documents]
        assert answers == answerer.answer(prompts, max_new_tokens=9, prompt_template=PAIR.prompt_template)
    assert found.metrics["bleu"] == sacrebleu.corpus_bleu(answers, [references]).score
    assert found.metrics["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
    same = [a.strip() == r.strip() for a, r in zip(answers, references)]
    assert found.metrics["exact_match"] == sum(same) / 12
    assert 0 < found.metrics["rouge1"] < 1 and found.metrics["keeps"] == sum(map(len, answers)) / 12
    assert found.counts["answers"] == 12


def test_rouge_by_hand():
    from llmnb.engine.questions import Question
    from llmnb.engine.scores import Marker, words

    def rouge(answer, reference, name="rougeL"):
        return Marker([name], {}).mark([answer], [Question("1", {}, "", reference)])[0][name]

    assert rouge("The cat sat", "the cat, it sat!") == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert rouge("cat the", "the cat", "rouge1") == 1 and rouge("cat the", "the cat", "rouge2") == 0
    assert rouge("кот сидит", "Кот сидит.") == 1, "words are not Latin only"
    assert rouge("今天好", "今天很好") == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert rouge("", "the cat") == 0
    assert words("It's 3.5 A_b हिन्दी") == ["it", "s", "3", "5", "a", "b", "हिन्दी"]


def test_bleu_of_a_script_without_spaces_is_not_nothing():
    from llmnb.engine.questions import Question
    from llmnb.engine.scores import Marker

    marker = Marker(["bleu"], {})
    whole, each = marker.mark(["今天天气很好"], [Question("1", {}, "", "今天天气很好")])
    assert whole["bleu"] == pytest.approx(100) and each[0]["bleu"] == pytest.approx(100)
    assert "tok:char" in marker.told["bleu"]


def test_the_worst_row_is_the_worst(spec, tuned):
    documents = pairs(10)
    documents[3]["response"] = "yellow yellow system"
    found = measured(asked(spec, run=tuned[60]), documents, ["perplexity"], shown=3)
    rows = by_transformers(spec.model_name_or_path, documents, PAIR, tuned[60])
    order = sorted(range(10), key=lambda at: -rows[at][0] / rows[at][1])
    assert [e.id for e in found["run"].worst] == [str(at) for at in order[:3]] and order[0] == 3
    assert [e.id for e in found["run"].best] == [str(at) for at in order[::-1][:3]]
    assert found["run"].worst[0].reference == "yellow yellow system" and found["run"].worst[0].answer is None
    assert found["run"].worst[0].score == pytest.approx(math.exp(rows[3][0] / rows[3][1]), rel=1e-5)
    few = measured(asked(spec, run=tuned[60]), documents[:3], ["perplexity"], shown=3)["run"]
    assert len(few.worst) == 2 and len(few.best) == 1, "no row is both"


def test_chats_are_asked_for_their_last_answer(spec, tmp_path):
    run = train(tmp_path, documents=chats(16), max_steps=60, per_device_train_batch_size=4, learning_rate=1e-2)
    config = TrainConfig(key="messages", max_seq_length=128)
    found = measured(asked(spec, config, run=run.last), chats(4))
    assert found["run"].metrics["exact_match"] == 1.0 and found["base"].metrics["exact_match"] == 0.0
    example = found["run"].worst[0]
    assert example.prompt == "user: what is your name?" and example.answer == "my name is model."
    assert found.rows["kind"] == "messages"


def test_the_base_is_asked_in_the_form_of_the_run(tmp_path):
    """A base without a chat template, trained with one that was given."""
    from tiny import CHATML, make_model

    base = make_model("llama", tmp_path / "bare", tokenizer=make_tokenizer(chat_template=None))
    config = {"key": "messages", "chat_template": CHATML, "max_seq_length": 128}
    run = train(tmp_path / "run", base=base, documents=chats(8), config=config, max_steps=2)
    spec = ModelSpec(model_name_or_path=str(base))
    found = measured(asked(spec, TrainConfig(**config), run=run.last), chats(3))
    assert found["base"].counts == {**found["run"].counts, "cut": found["base"].counts["cut"]}
    assert not any("its own form" in note for note in found.notes)


def test_plain_text_has_no_answers(spec, tmp_path):
    run = train(tmp_path, documents=texts(12), max_steps=3)
    config = TrainConfig(key="text", max_seq_length=64)
    found = measured(asked(spec, config, run=run.last), texts(5))
    assert found.metrics == ("perplexity", "token_accuracy") and found.rank_by == "perplexity"
    assert found["run"].worst[0].answer is None and "answers" not in found["run"].counts
    with pytest.raises(ConfigError, match="plain text") as caught:
        measured(asked(spec, config), texts(5), ["perplexity", "exact_match", "f"], {"f": len})
    assert [fault.option for fault in caught.value.faults] == ["exact_match", "f"]


def test_rows_find_their_documents_when_some_give_none(spec):
    documents = [{"_id": f"d{i}", "prompt": d["prompt"], "response": d["response"]} for i, d in enumerate(pairs(9))]
    documents[2]["response"] = ""
    documents[4] = {"_id": "d4", "other": 1}
    documents[7]["prompt"] = "one two three " * 60
    found = measured(asked(spec), documents, ["perplexity"], shown=9)["base"]
    assert {e.id for e in (*found.worst, *found.best)} == {"d0", "d1", "d3", "d5", "d6", "d8"}
    for example in (*found.worst, *found.best):
        assert example.reference == documents[int(example.id[1:])]["response"]
    notes = measured(asked(spec), documents, ["perplexity"]).notes
    assert any("2 of 9" in n or "1 of 9" in n for n in notes), notes


def test_a_function_of_the_persons_own_that_fails_is_named(spec):
    def broken(answer, reference, document):
        return {}["x"] if document["_id"] == 4 else 1.0

    with pytest.raises(DataError, match="broken failed on the document with _id 4") as caught:
        measured(asked(spec), pairs(6), ["broken"], {"broken": broken})
    assert "KeyError" in caught.value.seen
    with pytest.raises(DataError, match="gave no number"):
        measured(asked(spec), pairs(2), ["said"], {"said": lambda a, r: "good"})


def test_answers_that_are_cut_or_have_no_room_are_counted(spec):
    config = replace(PAIR, max_seq_length=256)
    long = {"_id": "long", "prompt": "a " * 240, "response": "b"}
    found = measured(asked(spec, config), [*pairs(3), long], ["exact_match"], max_new_tokens=30, batch_size=2)
    assert found["base"].counts["cut"] == 4 and found["base"].counts["answers"] == 4
    assert "base: 4 answers cut at 30 new tokens" in found.notes
    assert any("1 answer had less room" in note for note in found.notes), found.notes
    alone = measured(asked(spec, config), pairs(3), ["exact_match"], max_new_tokens=30, batch_size=2)
    mine = {e.id: e.answer for e in (*found["base"].worst, *found["base"].best)}
    for example in (*alone["base"].worst, *alone["base"].best):
        assert mine[example.id] == example.answer, "a long neighbour takes no room from it"


def test_long_rows_are_read_in_parts(spec, tuned, monkeypatch):
    from llmnb.engine import reading

    who = asked(spec, run=tuned[60])
    whole = measured(who, pairs(6), ["perplexity", "token_accuracy"])
    used = []
    real = reading._Reader._long
    monkeypatch.setattr(reading, "_ELEMENTS", 512 * 20)
    monkeypatch.setattr(reading, "_PIECE", 3)
    monkeypatch.setattr(reading._Reader, "_long", lambda self, batch: used.append(1) or real(self, batch))
    parts = measured(who, pairs(6), ["perplexity", "token_accuracy"])
    assert used
    for name in ("base", "run"):
        assert parts[name].metrics == pytest.approx(whole[name].metrics, rel=1e-5)


def test_tokens_that_an_adapter_added_change_nothing_for_the_base(tmp_path, spec):
    run = train(
        tmp_path,
        documents=pairs(12),
        config={"key": ("prompt", "response")},
        spec={"tokenizer_kwargs": {"additional_special_tokens": [f"<new{i}>" for i in range(200)]}},
        max_steps=2,
    )
    config = TrainConfig(key=("prompt", "response"))
    alone = measured(asked(spec, config), pairs(5), ["perplexity", "exact_match"])["base"].metrics
    who = [Asked("run", str(run.last), spec, config), *asked(spec, config)]
    assert measured(who, pairs(5), ["perplexity", "exact_match"])["base"].metrics == pytest.approx(alone, rel=1e-6)


def test_a_whole_model_beside_an_adapter(spec, tuned, tmp_path):
    run = train(
        tmp_path,
        documents=pairs(12),
        config={"key": ("prompt", "response"), "use_lora": False, "prompt_template": PAIR.prompt_template},
        max_steps=2,
        learning_rate=1e-3,
    )
    found = measured(asked(spec, whole=run.last, run=tuned[60]), pairs(5), ["perplexity"])
    rows = by_transformers(str(run.last), pairs(5), PAIR)
    loss = sum(r[0] for r in rows) / sum(r[1] for r in rows)
    assert math.log(found["whole"].metrics["perplexity"]) == pytest.approx(loss, abs=1e-5)
    assert found["run"].metrics["perplexity"] < found["base"].metrics["perplexity"]


@pytest.mark.bitsandbytes
def test_a_quantised_base_is_measured_as_it_was_trained_on(spec, tuned):
    pytest.importorskip("bitsandbytes")
    four = replace(spec, bits=4)
    found = measured(asked(four, run=tuned[60]), pairs(5), ["perplexity"])
    plain = measured(asked(spec, run=tuned[60]), pairs(5), ["perplexity"])
    assert found.settings["bits"] == 4 and plain.settings["bits"] is None
    assert found["base"].metrics["perplexity"] != plain["base"].metrics["perplexity"]
    assert found["run"].metrics["perplexity"] < found["base"].metrics["perplexity"]


def test_without_the_optional_packages(spec, monkeypatch):
    import importlib.util

    from llmnb.engine import scores

    real = importlib.util.find_spec
    gone = ("sacrebleu", "torchmetrics")
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    found = measured(asked(spec), pairs(3))
    assert found.metrics == ("perplexity", "token_accuracy", "exact_match")
    assert any("llmnb[evaluate]" in note for note in found.notes) and "sacrebleu" not in found.versions
    with pytest.raises(MissingPackage, match="sacrebleu") as caught:
        measured(asked(spec), pairs(3), ["bleu"])
    assert "llmnb[evaluate]" in caught.value.todo
