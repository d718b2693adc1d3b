"""What an inspection finds: every sort of fault, in which documents; what it shows; and what stops a training."""

from __future__ import annotations

import json
import re

import bad_data
import pytest
from tiny import CHATML, make_tokenizer

from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine.inspecting import inspect_rows
from llmnb.engine.rows import make_rows
from llmnb.errors import DataError
from llmnb.inspection import Inspection
from llmnb.inspection.report import plain

PAIR = ("prompt", "response")


@pytest.fixture(scope="module")
def spec(tiny_llama):
    return ModelSpec(model_name_or_path=tiny_llama)


def folds(documents):
    return {fold: [d for d in documents if d.get("_fold", "train") == fold] for fold in ("train", "valid")}


def inspected(documents, spec, *, show=(), outside=(), **settings):
    return Inspection(inspect_rows(folds(documents), spec, TrainConfig(**settings), show=show, outside=outside))


def found(inspection):
    """Which documents have which fault."""
    return {kind: set(inspection.ids(kind)) for kind in inspection.kinds if kind != "refused"}


def test_every_fault_of_ten_thousand_pairs_is_found_and_named(spec):
    documents, faults = bad_data.pairs()
    outside = [d["_id"] for d in documents if d["_fold"] == "test"]
    inspection = inspected(documents, spec, key=PAIR, max_seq_length=128, outside=outside)
    assert len(documents) > 10_000 and found(inspection) == faults and len(faults) == 17
    assert inspection.ok, "a few bad rows among ten thousand do not stop a training"
    train, valid = inspection.rows
    assert (train.found + valid.found + 1, valid.name) == (len(documents), "valid")
    assert sum(train.histogram) == train.used and train.dropped == sum(
        len(faults[kind]) for kind in ("missing", "null", "type", "empty", "masked")
    )


def test_every_fault_of_ten_thousand_chats_is_found_and_named(spec):
    documents, faults = bad_data.chats()
    inspection = inspected(
        documents, spec, key="messages", key_kind="messages", max_seq_length=128, chat_template=bad_data.STRICT
    )
    assert found(inspection) == faults and len(set(faults) | set(bad_data.pairs(200)[1])) >= 20
    says = {finding.kind: finding.says for finding in inspection.findings}
    assert "roles must alternate" in says["template"]
    assert "message N" in says["role"], "one sort of fault is one finding, at whatever message it stands"


def test_a_bos_at_the_start_and_an_eos_at_the_end_of_a_text_are_no_fault(spec, tokenizer):
    """A row has one of each in any case; anywhere else the model reads them as a command."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    assert bos and eos
    texts = {"bare": ("ask", "say"), "written": (f"{bos}ask", f"say{eos}"), "inside": (f"ask{eos} more", "say")}
    documents = [{"_id": name, "prompt": ask, "response": f"{name} {say}"} for name, (ask, say) in texts.items()]
    assert inspected(documents, spec, key=PAIR, max_seq_length=64).ids("special") == ["inside"]
    chats = [
        {
            "_id": d["_id"],
            "messages": [{"role": "user", "content": d["prompt"]}, {"role": "assistant", "content": d["response"]}],
        }
        for d in documents
    ]
    assert inspected(chats, spec, key="messages", max_seq_length=64).ids("special") == ["inside"]


def test_it_makes_the_rows_of_a_training(spec):
    documents, _ = bad_data.pairs(300)
    inspection = inspected(documents, spec, key=PAIR, max_seq_length=128)
    from llmnb.engine import bases

    rows = make_rows(folds(documents)["train"], bases.load_tokenizer(spec), TrainConfig(key=PAIR, max_seq_length=128))
    train = inspection.rows[0]
    report = rows.report
    assert (train.found, train.used, train.dropped, train.cut) == (
        report.found,
        report.used,
        report.dropped,
        report.cut,
    )
    assert (train.tokens, train.trained_tokens) == (report.tokens, report.trained_tokens)


def test_rows_are_shown_with_what_carries_loss(spec):
    documents = [
        {"_id": i, "messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i}"}]}
        for i in range(30)
    ]
    inspection = inspected(documents, spec, key="messages")
    assert [row.id for row in inspection.shown] == ["0", "1", "2"]
    row = inspection.row(2)
    assert "".join(text for text, trained, _ in row.tokens if trained) == "say 2<|im_end|>"
    assert "trained   say 2<|im_end|>" in repr(row) and "<|im_start|>user⏎" in repr(row)
    assert [r.id for r in inspected(documents, spec, key="messages", show=["17"]).shown] == ["17"]


def long_pairs(share):
    return [{"_id": i, "prompt": f"{i}?", "response": " yes" * (200 if i < share * 100 else 3)} for i in range(100)]


def test_trap08_answers_that_are_cut_stop_a_training_above_a_tenth(spec, tokenizer):
    few = inspected(long_pairs(0.1), spec, key=PAIR, max_seq_length=64)
    assert few.ok and len(few.ids("shortened")) == 10
    many = inspected(long_pairs(0.11), spec, key=PAIR, max_seq_length=64)
    refusal = many.findings[0]
    assert not many.ok and refusal.stops and re.search(r"11 of 100 .*lose the end of their answer", refusal.says)
    config = TrainConfig(key=PAIR, max_seq_length=64)
    with pytest.raises(DataError, match=r"11 of 100[\s\S]*lose the end[\s\S]*max_seq_length[\s\S]*max_cut_share=1"):
        make_rows(long_pairs(0.11), tokenizer, config)
    allowed = TrainConfig(key=PAIR, max_seq_length=64, max_cut_share=1.0)
    assert make_rows(long_pairs(0.11), tokenizer, allowed).report.cut == 11
    texts = [{"text": d["response"]} for d in long_pairs(1)]
    assert make_rows(texts, tokenizer, TrainConfig(key="text", max_seq_length=64)).report.cut == 100, (
        "a text may be read in part: it has no answer to lose"
    )


@pytest.fixture
def tokenizer(spec):
    from llmnb.engine import bases

    return bases.load_tokenizer(spec)


def test_trap09_all_labels_masked_stops_a_training(spec):
    documents = [{"_id": i, "messages": [{"role": "user", "content": "and?"}]} for i in range(20)]
    inspection = inspected(documents, spec, key="messages")
    assert not inspection.ok and "no token of them carries loss" in inspection.findings[0].says
    assert len(inspection.ids("masked")) == 20 and inspection.rows[0].used == 0


def test_trap05_answers_without_a_stop_token_stop_a_training():
    bare = make_tokenizer(eos=False, chat_template=CHATML.replace("<|im_end|>", ""))
    rows = [{"prompt": f"{i}", "response": " yes"} for i in range(20)]
    with pytest.raises(DataError, match=r"20 of 20[\s\S]*no stop token[\s\S]*eos_token"):
        make_rows(rows, bare, TrainConfig(key=PAIR))
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 20
    with pytest.raises(DataError, match="no stop token"):
        make_rows(chats, bare, TrainConfig(key="messages"))
    assert len(make_rows(rows, bare, TrainConfig(key=PAIR, max_cut_share=1.0))) == 20
    assert len(make_rows([{"text": "a b"}], bare, TrainConfig(key="text"))) == 1, "a text needs none"


def test_trap03_two_bos_stop_a_training():
    from tokenizers import processors

    twice = make_tokenizer()
    twice.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", twice.bos_token_id)]
    )
    rows = [{"text": f"the cat {i}"} for i in range(20)]
    with pytest.raises(DataError, match=r"20 of 20[\s\S]*two BOS"):
        make_rows(rows, twice, TrainConfig(key="text"))


def test_a_transform_that_fails_is_a_fault_of_its_documents(spec):
    def halves(text):
        return {"prompt": text[:3], "response": " " + text.upper()[3:]}

    documents = [{"_id": i, "text": "abc def" if i % 10 else None} for i in range(100)]
    facts = inspect_rows({"train": documents}, spec, TrainConfig(key="text"), transform=halves)
    assert {finding.kind: finding.number for finding in facts.findings} == {"transform": 10, "duplicate": 89}


def test_an_inspection_survives_json_and_hides_no_script(spec):
    documents = [{"_id": f"<b>{i}", "text": f"<script>alert({i})</script>\x00"} for i in range(30)]
    inspection = inspected(documents, spec, key="text")
    again = Inspection.from_dict(json.loads(json.dumps(plain(inspection.facts))))
    assert again.facts == inspection.facts and repr(again) == repr(inspection)
    page = inspection._repr_html_()
    assert "<script" not in page and "<b>" not in page and "_id &lt;b&gt;0" in page
    assert "data:image/svg+xml" in page and "<svg" not in page and "color-mix" not in page, (
        "JupyterLab would take it out"
    )
    assert "control characters" in repr(inspection) and "_id <b>0, <b>1" in repr(inspection)


def test_documents_can_be_selected_by_their_fault(spec):
    inspection = inspected([{"_id": i, "text": "a b"} for i in range(3)], spec, key="text")
    assert inspection.where("duplicate") == {"_id": {"$in": [1, 2]}}
    mixed = inspected([{"_id": 1, "text": "a"}, {"_id": "x", "text": "a"}], spec, key="text")
    with pytest.raises(DataError, match="several types"):
        mixed.where("duplicate")
    with pytest.raises(Exception, match="duplicate"):
        inspection.ids("duplicates")
