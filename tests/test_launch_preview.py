"""The preview's process: rows as a training makes them, a model's shape, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal

import numpy as np
import psutil
import pytest

from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine.looking import tokens_of
from llmnb.errors import LlmnbError, ModelError
from llmnb.launch.preview import PreviewProcess

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo 漢🙂"}]


@pytest.fixture(scope="module")
def preview():
    found = PreviewProcess()
    yield found
    found.close()


@pytest.fixture
def spec(tiny_llama):
    return ModelSpec(model_name_or_path=tiny_llama)


def text_of(row, trained=None):
    return "".join(text for text, marked, _ in row["tokens"] if trained is None or marked is trained)


def test_a_chat_shows_what_is_trained(preview, spec):
    documents = [{"_id": object(), "messages": CHAT, "n": 1}]
    answer = preview.rows(spec, TrainConfig(key="messages"), documents)
    (row,) = answer["rows"]
    assert text_of(row, True) == "yo 漢🙂<|im_end|>"
    assert "user\nhi" in text_of(row, False)
    assert row["length"] == answer["longest"] == answer["tokens"] and (row["before"], row["after"]) == (0, 0)
    assert [text for text, _, special in row["tokens"] if special].count("<|im_end|>") == 2


def test_what_is_cut_is_counted_and_three_rows_are_shown(preview, spec):
    documents = [{"text": "word " * (3 if i % 2 else 50)} for i in range(10)]
    answer = preview.rows(spec, TrainConfig(key="text", max_seq_length=40), documents)
    assert (answer["found"], answer["cut"], answer["limit"], len(answer["rows"])) == (10, 5, 40, 3)
    assert not any("were cut" in note for note in answer["notes"]), "it is said in a sentence of its own"


def test_of_a_preference_both_answers_are_shown(preview, spec):
    documents = [{"prompt": "hi ", "chosen": "yes", "rejected": f"no {i}"} for i in range(5)]
    answer = preview.rows(spec, TrainConfig(method="dpo"), documents)
    assert [row["side"] for row in answer["rows"]] == ["chosen", "rejected"] * 3
    assert text_of(answer["rows"][3], True).startswith("no 1") and answer["used"] == 5


class Letters:
    """A tokenizer whose ids are letters."""

    all_special_ids = (0,)

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)


class OneRow:
    def __init__(self, prompt, answer):
        self._ids = np.array([ord(c) for c in prompt + answer])
        self._labels = np.where(np.arange(len(self._ids)) < len(prompt), -100, self._ids)

    def ids(self, index):
        return self._ids

    def labels(self, index):
        return self._labels


def test_a_long_row_is_shown_near_its_first_trained_token():
    row = tokens_of(Letters(), OneRow("p" * 3000, "answer" + "x" * 900), 0)
    assert row["length"] == 3906 and row["trained"] == 906
    assert (row["before"], row["after"], len(row["tokens"])) == (2800, 706, 400)
    assert text_of(row, True).startswith("answer") and set(text_of(row, False)) == {"p"}
    short = tokens_of(Letters(), OneRow("p" * 10, "answer"), 0)
    assert (short["before"], short["after"]) == (0, 0) and text_of(short) == "p" * 10 + "answer"


def test_a_wrong_key_says_which_there_are(preview, spec):
    with pytest.raises(LlmnbError, match="has the field 'txt'") as caught:
        preview.rows(spec, TrainConfig(key="txt"), [{"text": "a"}])
    assert "'txt' → 'text'" in caught.value.todo


def test_a_date_is_no_text(preview, spec):
    import datetime as dt

    with pytest.raises(LlmnbError, match="can be trained on"):
        preview.rows(spec, TrainConfig(key="text"), [{"text": dt.datetime(2026, 1, 1)}])


def test_the_shape_is_that_of_the_model_that_is_trained(preview, spec):
    from llmnb.engine import adapters, bases

    config = TrainConfig(lora_r=4)
    told = preview.shape(spec, config)
    model, _ = bases.load_base(spec)
    trained, total = adapters.count_parameters(adapters.attach_lora(model, config))
    assert (told["shape"]["trained"], told["shape"]["total"]) == (trained, total)
    assert told["pace"] > 1e8 and told["room"] > 1e8
    whole = preview.shape(spec, TrainConfig(use_lora=False))["shape"]
    assert whole["trained"] == whole["total"] == total - trained


def test_a_model_that_is_not_there(preview):
    with pytest.raises(LlmnbError, match="no-such"):
        preview.rows(ModelSpec(model_name_or_path="/no-such"), TrainConfig(key="text"), [{"text": "a"}])


def test_a_killed_process_is_replaced_and_a_closed_one_is_gone(spec):
    with_text = TrainConfig(key="text"), [{"text": "abc"}]
    preview = PreviewProcess()
    preview.warm()
    os.kill(preview._process.pid, signal.SIGKILL)
    preview._process.wait()
    try:
        assert preview.rows(spec, *with_text)["used"] == 1
        child = psutil.Process(preview._process.pid)
        assert "llmnb.launch.preview" in " ".join(child.cmdline())
        child.suspend()
        child.kill()
        with pytest.raises(ModelError, match="has ended"):
            preview.rows(spec, *with_text)
    finally:
        preview.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
