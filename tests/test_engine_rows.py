"""Documents to rows: what is trained on, what is counted, and what is refused."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
from chat_families import CHATML, LLAMA3, WORDS, ZEPHYR, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine import pieces
from llmnb.engine.encoding import Encoder
from llmnb.engine.rows import Collator, infer_key, make_rows, prompt_ids
from llmnb.errors import ConfigError, DataError

PAIR = ("prompt", "response")
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(ZEPHYR)


def rows_of(documents, tokenizer, *, transform=None, prompt_template="{input}", context=None, **settings):
    config = TrainConfig(**settings)
    return make_rows(
        documents, tokenizer, config, transform=transform, prompt_template=prompt_template, context=context
    )


def trained(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def texts(n, words=5):
    return [{"_id": f"d{i}", "text": " ".join(WORDS.split()[i % 7 : i % 7 + words])} for i in range(n)]


# -- kinds ----------------------------------------------------------------------------------------------------------
def test_text_rows_train_every_token_and_end_with_eos(tokenizer):
    row = rows_of([{"text": "hello there"}], tokenizer, key="text")[0]
    ids = tokenizer("hello there")["input_ids"]
    assert row["input_ids"] == [*ids, tokenizer.eos_token_id]
    assert row["labels"] == [-100, *ids[1:], tokenizer.eos_token_id]


def test_eos_is_put_once_also_when_the_text_ends_with_it(tokenizer):
    for text in ("hello", "hello</s>", "hello</s></s>"):
        for documents, key in (([{"a": text}], "a"), ([{"a": "why?", "b": text}], ("a", "b"))):
            ids = rows_of(documents, tokenizer, key=key)[0]["input_ids"]
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id


def test_pair_rows_train_the_response_and_its_stop(tokenizer):
    documents = [{"prompt": "what is your name?", "response": " model."}]
    rows = rows_of(documents, tokenizer, key=PAIR)
    assert trained(rows[0], tokenizer) == " model.</s>"
    assert tokenizer.decode(rows[0]["input_ids"]) == "<s>what is your name? model.</s>"
    assert rows.report.kind == "pair"
    everything = rows_of(documents, tokenizer, key=PAIR, train_on="all")[0]
    assert everything["labels"] == [-100, *everything["input_ids"][1:]]


def test_prompt_template_is_put_around_the_prompts_of_pairs(tokenizer):
    documents = [{"prompt": 'why {"a": {x}}', "response": "yes"}]
    template = 'user: {input} {"json": {}}\nassistant: '
    row = rows_of(documents, tokenizer, key=PAIR, prompt_template=template)[0]
    assert tokenizer.decode(row["input_ids"]) == ('<s>user: why {"a": {x}} {"json": {}}\nassistant: yes</s>')
    asked = prompt_ids('why {"a": {x}}', tokenizer, template)
    assert row["input_ids"][: len(asked)] == asked
    config = TrainConfig(key=PAIR, prompt_template=template)
    own = make_rows(documents, tokenizer, config, prompt_template="no {input}")[0]
    assert own == row, "the config's own template wins"
    with pytest.raises(ConfigError, match="prompt_template"):
        rows_of(documents, tokenizer, key=PAIR, prompt_template="no place")


def test_a_prompt_template_without_effect_is_said(tokenizer):
    report = rows_of(texts(3), tokenizer, key="text", prompt_template="user: {input}").report
    assert any("prompt_template is not used" in note for note in report.notes)


@pytest.mark.parametrize(
    ("key", "function", "want"),
    [
        ("a", lambda a: {"text": a + " there"}, "hello there</s>"),
        ("a", lambda a: {"a": a + " there"}, "hello there</s>"),
        ("a", lambda a: a + " there", "hello there</s>"),
        (("a",), lambda a: {"text": a + " there"}, "hello there</s>"),
        (("a", "b"), lambda a, b: {"text": a + b}, "hello why</s>"),
        (("a", "b", "c"), lambda a, b, c: {"text": f"{a}{b} {c}"}, "hello why 3</s>"),
        (("a", "b"), lambda a, b: {"prompt": a, "response": b}, " why</s>"),
        (("a", "b"), lambda a, b: {"prompt": a, "completion": b}, " why</s>"),
        ("a", lambda a: {"prompt": a, "response": " yes"}, " yes</s>"),
        ("a", lambda a: {"messages": [{"role": "user", "content": a}, *CHAT[1:]]}, "there</s>"),
        ("messages", lambda m: {"messages": [*m, {"role": "assistant", "content": "no"}]}, "no</s>"),
        ("messages", lambda m: {"text": m[0]["content"]}, "hello</s>"),
        ("d.e", lambda e: {"text": e}, "thanks</s>"),
        (None, lambda m: {"text": m[0]["content"]}, "hello</s>"),
    ],
)  # fmt: skip
def test_transform_runs_for_every_kind_of_key(tokenizer, key, function, want):
    document = {"a": "hello", "b": " why", "c": 3, "d": {"e": "thanks"}}
    document["messages"] = [{"role": "user", "content": "hello"}]
    assert trained(rows_of([document], tokenizer, key=key, transform=function)[0], tokenizer) == want


def test_a_transform_that_fails_names_the_document_and_keeps_the_cause(tokenizer):
    documents = [{"_id": "one", "a": "1"}, {"_id": "two", "a": "x"}]
    with pytest.raises(DataError, match=r"_id two[\s\S]*ValueError") as caught:
        rows_of(documents, tokenizer, key="a", transform=lambda a: {"text": str(int(a))})
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_transform_that_gives_nothing_usable_says_what_is_wanted(tokenizer):
    for function, gave in ((lambda a: {"txt": a}, "gave txt"), (lambda a: None, "gave NoneType")):
        with pytest.raises(DataError, match=gave):
            rows_of([{"a": "hello"}], tokenizer, key="a", transform=function)


def test_key_kind_decides_and_faults_come_together(tokenizer):
    documents = [{"a": "hello", "b": " why"}]
    both = lambda a, b: {"text": a, "prompt": a, "response": b}  # noqa: E731
    assert rows_of(documents, tokenizer, key=("a", "b"), transform=both, key_kind="text").report.kind == "text"
    assert rows_of(documents, tokenizer, key=("a", "b"), transform=both).report.kind == "pair"
    with pytest.raises(ConfigError, match="a pair needs two columns"):
        rows_of(documents, tokenizer, key="a", key_kind="pair")
    with pytest.raises(ConfigError, match="3 columns need a transform"):
        rows_of(documents, tokenizer, key=("a", "b", "c"))
    with pytest.raises(ConfigError, match="key_kind"):
        rows_of(documents, tokenizer, key="a", key_kind="poem")


def test_train_on_answers_of_texts_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="train_on"):
        rows_of(texts(3), tokenizer, key="text", train_on="answers")
    with pytest.raises(ConfigError, match="train_on"):
        rows_of(texts(3), tokenizer, key="text", train_on="everything")


# -- inferring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "want"),
    [
        ({"_id": 1, "_fold": "train", "text": "a"}, ("text", "text")),
        ({"text": "a", "label": "b"}, ("text", "text")),
        ({"prompt": "a", "response": "b"}, (("prompt", "response"), "pair")),
        ({"instruction": "a", "input": "", "output": "b"}, (("instruction", "input", "output"), "pair")),
        ({"instruction": "a", "output": "b"}, (("instruction", "output"), "pair")),
        ({"conversations": [{"from": "human", "value": "a"}], "id": "b"}, ("conversations", "messages")),
        ({"question": "a", "answer": "b", "n": 1}, (("question", "answer"), "pair")),
        ({"messages": CHAT, "text": "a"}, ("messages", "messages")),
        ({"conversation": CHAT, "source": "b"}, ("conversation", "messages")),
        ({"poem": "a", "year": 1}, ("poem", "text")),
    ],
)
def test_infer_key(document, want):
    assert infer_key([document]) == want
    assert infer_key([document, {"_id": 2, next(k for k in document if k[0] != "_"): None}]) == want


def test_infer_key_gives_up_with_the_fields_there_are():
    with pytest.raises(DataError, match="left, right"):
        infer_key([{"left": "a", "right": "b"}])
    with pytest.raises(DataError, match="no documents"):
        infer_key([])


def test_an_inferred_key_is_said_with_what_it_leaves_out(tokenizer):
    documents = [{"question": "why?", "source": "x", "answer": " yes"}]
    report = rows_of(documents, tokenizer).report
    assert report.key == ("question", "answer")
    assert "('question', 'answer') was chosen" in report.notes[0]
    assert "not used: source" in report.notes[0]


def test_alpacas_three_fields_are_a_prompt_and_its_response(tokenizer):
    three = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say yes.", "input": " ", "output": "yes"},
        {"instruction": "Say no.", "output": "no"},
    ]
    pairs = [
        {"prompt": "Add.\n\n1 2", "response": "3"},
        {"prompt": "Say yes.", "response": "yes"},
        {"prompt": "Say no.", "response": "no"},
    ]
    found = rows_of(three, tokenizer)
    assert found.report.kind == "pair" and "Alpaca" in found.report.notes[0]
    assert found[:] == rows_of(pairs, tokenizer)[:]
    given = rows_of(three, tokenizer, key=("instruction", "input", "output"))
    assert given[:] == found[:] and "Alpaca" in given.report.notes[0]
    with pytest.raises(ConfigError, match="needs one column"):
        rows_of(three, tokenizer, key=("instruction", "input", "output"), key_kind="text")


def test_sharegpts_messages_are_read_as_chats(tokenizer):
    theirs = [{"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "yes"}]}]
    ours = [{"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "yes"}]}]
    found = rows_of(theirs, tokenizer)
    assert found[:] == rows_of(ours, tokenizer)[:]
    assert (found.report.key, found.report.kind) == ("conversations", "messages")
    assert "ShareGPT" in found.report.notes[0]


def test_a_field_of_chats_needs_not_be_called_messages(tokenizer):
    assert rows_of([{"talk": CHAT}], tokenizer, key="talk").report.kind == "messages"


# -- the traps ------------------------------------------------------------------------------------------------------
def test_trap04_padding_that_is_eos_keeps_the_label_of_the_real_eos():
    tokenizer = make_tokenizer(ZEPHYR, pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = rows_of([{"text": "hello"}, {"text": "hello there, what is your name?"}], tokenizer, key="text")
    batch = Collator(tokenizer)(rows[:])
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(batch, (2, max(rows.lengths)))
    for at, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][at, :length].tolist() == row["input_ids"]
        assert batch["labels"][at, length - 1] == tokenizer.eos_token_id
        assert batch["attention_mask"][at].tolist() == [1] * length + [0] * (max(rows.lengths) - length)
        assert (batch["labels"][at, length:] == -100).all()
        assert (batch["input_ids"][at, length:] == tokenizer.pad_token_id).all()


def test_trap04_the_last_label_of_a_row_is_its_stop_token(tokenizer):
    pairs = [{"prompt": "why?", "response": " yes"}, {"prompt": "a", "response": "</s>"}]
    chats = [{"messages": CHAT}]
    for rows in (rows_of(texts(5), tokenizer), rows_of(pairs, tokenizer), rows_of(chats, tokenizer)):
        for row in rows:
            assert [label for label in row["labels"] if label != -100][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("prompt", "response", "split"),
    [
        ("why?", " yes", False),
        ("why ", "yes", True),  # " yes" is one token
        ("why\n\n", "yes", True),  # alone "\n\n" is one token, before a word it is two
        ("he", "llo", True),
        ("why  ", "  yes", False),
        ("", "yes", None),
    ],
)
def test_trap07_the_prompts_ids_are_a_prefix_or_the_row_is_reported(tokenizer, prompt, response, split):
    documents = [{"_id": "seam", "prompt": prompt, "response": response}]
    if split is None:
        with pytest.raises(DataError, match="'prompt' is empty"):
            rows_of(documents, tokenizer, key=PAIR)
        return
    rows = rows_of(documents, tokenizer, key=PAIR)
    ids, asked = rows[0]["input_ids"], prompt_ids(prompt, tokenizer)
    assert ids[: len(asked)] == asked
    assert rows[0]["labels"][: len(asked)] == [-100] * len(asked)
    assert trained(rows[0], tokenizer) == response + "</s>"
    together = [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    assert (ids != together) is split
    assert rows.report.split == int(split)
    assert any("tokenised apart" in note and "seam" in note for note in rows.report.notes) is split


def test_trap08_truncation_is_counted_and_named(tokenizer):
    documents = [*texts(8), {"_id": "long", "text": WORDS}]
    rows = rows_of(documents, tokenizer, key="text", max_seq_length=40)
    report = rows.report
    assert (report.found, report.used, report.cut, report.dropped, report.limit) == (9, 9, 1, 0, 40)
    assert report.cut_ids == ("long",)
    assert any("1 of 9 rows have more than 40 tokens" in note and "long" in note for note in report.notes)
    assert len(rows[8]["input_ids"]) == 40
    assert tokenizer.eos_token_id not in rows[8]["input_ids"], "a text that was cut does not stop there"
    assert report.tokens == sum(len(row["input_ids"]) for row in rows)
    assert report.trained_tokens == sum(label != -100 for row in rows for label in row["labels"])


def test_trap08_a_row_left_without_a_label_is_dropped_and_counted(tokenizer):
    good = [{"_id": f"g{i}", "prompt": "why?", "response": " yes"} for i in range(19)]
    documents = [*good, {"_id": "bad", "prompt": WORDS, "response": " no"}]
    rows = rows_of(documents, tokenizer, key=PAIR, max_seq_length=30)
    assert (len(rows), rows.report.dropped, rows.report.dropped_ids, rows.report.cut) == (19, 1, ("bad",), 0)
    assert any("no token carries loss" in note and "bad" in note for note in rows.report.notes)


def test_trap08_too_many_such_rows_refuse_to_start_and_say_why(tokenizer):
    good = [{"prompt": "why?", "response": " yes"}] * 8
    documents = [*good, *[{"_id": f"bad{i}", "prompt": WORDS, "response": " no"} for i in range(2)]]
    with pytest.raises(DataError, match=r"2 of 10[\s\S]*20%[\s\S]*max_cut_share=0.1[\s\S]*bad0[\s\S]*max_seq_length"):
        rows_of(documents, tokenizer, key=PAIR, max_seq_length=30)
    assert len(rows_of(documents, tokenizer, key=PAIR, max_seq_length=30, max_cut_share=0.2)) == 8


def test_trap09_all_labels_masked_is_caught_before_the_first_step(tokenizer):
    cases = [
        ([{"prompt": WORDS, "response": " no"}] * 3, {"key": PAIR, "max_seq_length": 20}),
        ([{"messages": CHAT[:1]}] * 3, {"key": "messages"}),
        ([{"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}] * 3, {"key": "messages"}),
        ([{"text": "hello"}] * 3, {"key": "text", "max_seq_length": 1}),
    ]
    for documents, settings_ in cases:
        with pytest.raises(DataError, match=r"None of the 3 train documents .* no token of them carries loss"):
            rows_of(documents, tokenizer, max_cut_share=1, **settings_)


def test_the_models_context_bounds_the_rows_and_it_is_said(tokenizer):
    rows = rows_of([{"text": WORDS}], tokenizer, key="text", max_seq_length=512, context=16)
    assert rows.lengths.tolist() == [16]
    assert any("the model takes 16 tokens" in note for note in rows.report.notes)


# -- what cannot be read --------------------------------------------------------------------------------------------
def test_a_few_unreadable_documents_are_counted_and_named(tokenizer):
    bad = [
        {"_id": "gone", "other": 1},
        {"_id": "empty", "text": "  \n"},
        {"_id": "number", "text": 3},
        {"_id": "null", "text": None},
        {"_id": "dict", "text": {"a": 1}},
    ]
    report = rows_of([*texts(60), *bad], tokenizer, key="text").report
    assert (report.found, report.used, report.skipped, report.dropped) == (65, 60, 5, 5)
    assert report.dropped_ids == ("gone", "empty", "number", "null", "dict")
    said = "\n".join(report.notes)
    for reason in ("no field 'text' (_id gone)", "is empty (_id empty)", "of type int, not a string (_id number)",
                   "'text' is null", "'text' is a dict"):  # fmt: skip
        assert reason in said


def test_many_unreadable_documents_refuse_to_start(tokenizer):
    with pytest.raises(DataError, match=r"5 of 15 [\s\S]*no field 'text'"):
        rows_of([*texts(10), *[{"other": "a"}] * 5], tokenizer, key="text")


def test_mixed_shapes_are_an_error(tokenizer):
    with pytest.raises(DataError, match="'text' is a list, not a string"):
        rows_of([*texts(5), *[{"text": CHAT}] * 5], tokenizer, key="text")
    switch = lambda a: {"text": a} if a == "hello" else {"prompt": a, "response": "b"}  # noqa: E731
    with pytest.raises(DataError, match="is of kind pair, where text was expected"):
        rows_of([{"a": "hello"}, {"a": "why"}], tokenizer, key="a", transform=switch)


def test_a_key_that_no_document_has_names_the_fields_and_near_ones(tokenizer):
    with pytest.raises(DataError, match=r"field 'txt'[\s\S]*text[\s\S]*did you mean 'txt' → 'text'"):
        rows_of(texts(20), tokenizer, key="txt")
    with pytest.raises(DataError, match=r"'respons'[\s\S]*response"):
        rows_of([{"prompt": "a", "response": "b"}], tokenizer, key=("prompt", "respons"))


def test_an_empty_selection(tokenizer):
    with pytest.raises(DataError, match="No document was selected for the valid rows"):
        make_rows(iter([]), tokenizer, TrainConfig(), name="valid")


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("hello", "is of type str, not a list of messages"),
        ({"role": "user", "content": "a"}, "is a dict, not a list"),
        ([], "is empty"),
        (["hello"], "message 0 .* not a dict with role and content"),
        ([{"role": "user", "content": {"a": 1}}], "content of message 0 .* is a dict, not a string; only text"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "message 1 .* is a list"),
        ([{"content": "a"}], "has no role"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "answer in message 1 .* is empty"),
        ([CHAT[0], {"role": "assistant", "content": None}], "content of message 1 .* is null"),
        ([{"from": "a bird", "value": "a"}], "message 0 is from 'a bird', which is none of human"),
        ([{"from": "human", "value": "a"}], "no token of them carries loss|assistant"),
        ([CHAT[0], {**CHAT[1], "weight": 2}], "weight"),
    ],
)
def test_chats_of_another_shape_say_what_is_wrong(tokenizer, messages, why):
    with pytest.raises(DataError, match=why):
        rows_of([{"messages": messages}], tokenizer, key="messages")


def test_pairs_that_touch_are_said(tokenizer):
    assert "touch" in rows_of([{"prompt": "why", "response": "yes"}], tokenizer, key=PAIR).report.notes[-1]
    assert not rows_of([{"prompt": "why", "response": " yes"}], tokenizer, key=PAIR).report.notes


# -- the rows themselves --------------------------------------------------------------------------------------------
def test_rows_are_a_sequence_that_pickles_and_is_small(tokenizer):
    rows = rows_of(texts(2500), tokenizer, key="text")
    assert len(rows) == 2500 and rows.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert rows[-1] == rows[2499] and rows[1:3] == [rows[1], rows[2]]
    with pytest.raises(IndexError):
        rows[2500]
    assert pickle.loads(pickle.dumps(rows))[7] == rows[7]
    assert len(pickle.dumps(rows)) < rows.report.tokens * 5 + 2500 * 16 + 4000
    assert rows.ids(3).dtype == np.int32 and rows.labels(3).tolist() == rows[3]["labels"]
    data = rows.report.to_dict()
    assert data["used"] == 2500 and data["notes"] == []


def test_documents_are_read_once_and_in_pieces(tokenizer):
    alive = []

    class Counted(dict):
        number = 0

        def __init__(self, **fields):
            super().__init__(**fields)
            Counted.number += 1

        def __del__(self):
            Counted.number -= 1

    def stream():
        for i in range(6000):
            if i % 500 == 0:
                alive.append(Counted.number)
            yield Counted(_id=i, text="hello there")

    assert len(rows_of(stream(), tokenizer, key="text")) == 6000
    assert max(alive) <= 128, "documents are let go as soon as they are read"


def test_a_config_that_went_through_json_gives_the_same_rows(tokenizer):
    config = TrainConfig(key=PAIR)
    documents = [{"prompt": "why?", "response": " yes"}]
    again = TrainConfig.from_json(config.to_json())
    assert make_rows(documents, tokenizer, again)[0] == make_rows(documents, tokenizer, config)[0]
    assert ModelSpec().prompt_template == "{input}"


def test_truncation_and_padding_of_a_saved_tokenizer_are_switched_off():
    tokenizer = make_tokenizer(ZEPHYR)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    fresh = rows_of([{"text": WORDS}], make_tokenizer(ZEPHYR), key="text")
    assert rows_of([{"text": WORDS}], tokenizer, key="text")[:] == fresh[:]


def test_very_long_texts_are_cut_before_they_are_tokenised_with_the_same_ids(tokenizer):
    encoder = Encoder(tokenizer)
    long = [(WORDS + " ") * 40, "a" * 9000, "\n" * 9000, WORDS + " " * 9000]
    for text, ids in zip(long, encoder.heads(long, 8), strict=True):
        assert ids[:9] == encoder.ids(text)[:9]
    assert len(encoder.heads(long[:1], 8)[0]) < len(encoder.ids(long[0]))


def test_a_python_tokenizer_works_too():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = CHATML.template
    chat = rows_of([{"messages": CHAT}], tokenizer, key="messages")[0]
    assert trained(chat, tokenizer) == "there<|im_end|>"
    pair = rows_of([{"prompt": "why?", "response": " é"}], tokenizer, key=PAIR)[0]
    assert trained(pair, tokenizer) == " é</s>"
    assert rows_of([{"text": "why"}], tokenizer, key="text")[0]["input_ids"].count(tokenizer.eos_token_id) == 1


def test_gpt2_like_tokenizers_have_no_bos_and_no_second_eos():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    row = rows_of([{"text": "hello"}], tokenizer, key="text")[0]
    assert row["input_ids"] == [*tokenizer("hello")["input_ids"], tokenizer.eos_token_id]


def test_a_tokenizer_without_eos_says_so():
    tokenizer = make_tokenizer(LLAMA3)
    tokenizer.eos_token = None
    rows = rows_of([{"text": "hello"}], tokenizer, key="text")
    assert any("no EOS" in note for note in rows.report.notes)


TEXT = st.text(st.sampled_from("ab \n\té🙂<s>/|?"), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(prompt=TEXT, response=TEXT)
def test_any_pair_begins_as_it_is_asked_and_trains_its_response(prompt, response):
    tokenizer = make_tokenizer(ZEPHYR)
    row = rows_of([{"prompt": prompt, "response": response}], tokenizer, key=PAIR)[0]
    asked = prompt_ids(prompt, tokenizer)
    assert row["input_ids"][: len(asked)] == asked
    assert trained(row, tokenizer) == response.removesuffix("</s>") + "</s>"
    assert row["labels"][len(asked) :] == row["input_ids"][len(asked) :]


# -- pieces ---------------------------------------------------------------------------------------------------------
def faulty(kind, count=200):
    """Documents of which some cannot be read, some lose their end, and some have no row."""
    words = WORDS.split()
    for i in range(count):
        text, more = words[i % 20], " ".join(words[i % 11 :][: i % 9 + 1])
        chat = [{"role": "user", "content": text * (20 if i % 31 == 3 else 1)}, {"role": "assistant", "content": more}]
        held = {
            "pair": {"prompt": text * (20 if i % 31 == 3 else 1), "response": more if i % 13 else ""},
            "messages": {"messages": chat if i % 13 else chat[:1]},
            "dpo": {
                "prompt": text,
                "chosen": " ".join([more] * (9 if i % 31 == 3 else 1)),
                "rejected": more[:-1] if i % 13 else more,
            },
        }[kind]
        yield {"_id": f"d{i}", **(held if i % 17 else {"other": 1})}


@pytest.mark.parametrize("kind", ["pair", "messages", "dpo"])
def test_what_is_counted_does_not_depend_on_what_runs_beside_it(kind, tokenizer, monkeypatch):
    settings = {"max_seq_length": 24, "max_cut_share": 1.0, "method": "dpo" if kind == "dpo" else "sft"}
    settings |= {"key": PAIR} if kind == "pair" else {"key": "messages"} if kind == "messages" else {}
    monkeypatch.setattr(pieces, "_PIECE_ROWS", 7)
    beside = rows_of(faulty(kind), tokenizer, **settings)
    done = []

    def one_after_another(found, encode):
        for piece in found:
            yield piece, encode(piece.kind, piece.samples) if piece.samples else None
            done.append(len(piece.samples))

    monkeypatch.setattr("llmnb.engine.rows.ahead", one_after_another)
    alone = rows_of(faulty(kind), tokenizer, **settings)
    assert len(done) > 20 and beside.report == alone.report and beside.digest() == alone.digest()
    assert alone.report.dropped and alone.report.cut and alone.report.skipped
    monkeypatch.setattr(pieces, "_PIECE_ROWS", 1000)
    whole = rows_of(faulty(kind), tokenizer, **settings)
    assert whole.digest() == alone.digest() and whole.report.notes == alone.report.notes


def test_what_fails_while_tokenising_is_raised_and_leaves_no_thread(tokenizer, monkeypatch):
    def fail(self, texts, limit):
        raise RuntimeError("no more")

    monkeypatch.setattr(Encoder, "heads", fail)
    with pytest.raises(RuntimeError, match="no more"):
        rows_of(texts(5), tokenizer, key="text")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenising")]


def test_documents_without_a_row_are_read_in_pieces_too(tokenizer):
    with pytest.raises(DataError, match="has the field 'text'"):
        rows_of(({"_id": i, "other": "x"} for i in range(2500)), tokenizer, key="text")
