"""Rows that are read while they are trained: what a run that read all of them first does, in bounded memory."""

from __future__ import annotations

import threading
import time

import pytest
from drill import folder_of, pairs, texts, train

from llmnb.config import TrainConfig
from llmnb.errors import DataError

torch = pytest.importorskip("torch")

EACH = {"logging_steps": 1, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}


class Documents:
    """A selection in memory, which notes what is asked of it."""

    def __init__(self, documents, gone=(), wait=0.0):
        self.documents, self.gone, self.wait = documents, set(gone), wait
        self.asked: list[int] = []
        self.fails = None

    def __len__(self):
        return len(self.documents)

    def name(self, index):
        return str(self.documents[index]["_id"])

    def digest(self):
        return str(len(self))

    def fetch(self, indices, fields=None):
        if self.fails is not None and threading.current_thread().name == "llmnb-rows":
            raise self.fails
        time.sleep(self.wait)
        self.asked += indices
        return [None if i in self.gone else dict(self.documents[i]) for i in indices]


def drill(folder, documents, **more):
    return train(folder, documents=documents, **{**EACH, **more})


# --- the same as before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train_sampling_strategy": "sequential"},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
        {"config": {"padding_free": True}},
        {"dataloader_drop_last": True},
    ],
    ids=str,
)
def test_losses_are_those_of_a_run_that_read_all_rows_first(tmp_path, more):
    whole = drill(tmp_path / "whole", pairs(23), **more)
    stream = drill(tmp_path / "stream", Documents(pairs(23)), **more)
    assert stream.losses() == whole.losses() and len(whole.losses()) > 4
    assert stream.counts["streaming"] is True and stream.counts["rows"] == 23


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_is_exact_and_reads_nothing_that_it_passes_over(
    tmp_path, monkeypatch
):
    from llmnb.engine import streaming

    monkeypatch.setattr(streaming, "HEAD", 10)
    more = {"save_strategy": "steps", "save_steps": 40, "num_train_epochs": 1}
    documents = texts(150)
    whole = drill(tmp_path / "whole", Documents(documents), **more)
    source = Documents(documents)
    again = drill(tmp_path / "again", source, resume=whole.saved[0]["folder"], **more)
    assert {step: loss for step, loss in whole.losses().items() if step > 40} == again.losses()
    # Of the 80 that were trained before, 10 are judged again; the first 64 of the selection tell the fields.
    assert len(source.asked) == 64 + 10 + 70 and len(again.losses()) == 35


# --- bounded --------------------------------------------------------------------------------------------------


def test_the_first_step_does_not_wait_for_all_rows_and_few_of_them_wait_for_a_step(tmp_path):
    from llmnb.engine import streaming

    documents = Documents(texts(50_000))
    seen = {}

    def control():
        seen.setdefault("by the first step", len(documents.asked))
        return None

    run = drill(tmp_path, documents, max_steps=3, control=control)
    assert len(run.losses()) == 3
    most = 64 + streaming.HEAD + streaming.AHEAD_ROWS + 2 * streaming._MOST
    assert seen["by the first step"] < most and len(documents.asked) < most


def test_rows_that_wait_are_bounded_in_rows_and_in_tokens(monkeypatch):
    from tiny import make_tokenizer

    from llmnb.engine import streaming

    monkeypatch.setattr(streaming, "AHEAD_TOKENS", 20_000)
    monkeypatch.setattr(streaming, "_CHARS", 20_000)
    config = TrainConfig(key="text", max_seq_length=512)
    long = [{"_id": i, "text": "the cat sat on the mat " * 100} for i in range(600)]
    rows = streaming.Streamed(Documents(long), make_tokenizer(), config, blank=0, head=range(10))
    rows.begin(lambda: [[i] for i in range(600)])
    for index in range(100):
        assert len(rows[index]["input_ids"]) > 300
    time.sleep(0.3)
    assert rows.waiting <= 64 + 64, "one piece of the first size, and what came while the last of it waited"
    held = rows._ahead
    rows.close()
    assert not held._thread.is_alive()


# --- documents that give no row -------------------------------------------------------------------------------


def test_a_document_without_a_row_is_a_blank_one_and_is_counted_and_named(tmp_path):
    documents = texts(40)
    documents[7]["text"] = ""
    source = Documents(documents, gone=[11])
    more = {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    run = drill(tmp_path, source, config={"max_cut_share": 0.5}, **more)
    losses = run.losses()
    assert len(losses) == 40 and sum(loss == 0.0 for loss in losses.values()) == 2, "two steps of nothing but a blank"
    assert all(loss == loss for loss in run.series("grad_norm").values()), "no NaN"
    assert run.recounted["dropped"] == 2 and run.recounted["found"] == 40 and run.recounted["tokens"] > 0
    said = [note.text for note in run.notes if note.level == "warning"]
    assert any(
        "Of 40 documents read by the end of epoch 1" in text and "'text' is empty (_id 7)" in text for text in said
    )
    assert any("is no longer in the database (_id 11)" in text for text in said)


@pytest.mark.parametrize("packed", [False, True])
def test_blank_rows_among_others_change_nothing(tmp_path, packed):
    """A batch with a blank row has the loss of the batch without it."""
    documents = texts(12)
    documents[3]["text"] = " "
    more = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "per_device_train_batch_size": 4}
    config = {"padding_free": packed, "max_cut_share": 0.5}
    stream = drill(tmp_path / "a", Documents(documents), config=config, **more)
    # The other batch of four, and the first one of three.
    alone = drill(tmp_path / "b", documents[:3], config=config, **more)
    assert stream.losses()[1] == pytest.approx(alone.losses()[1], abs=1e-6)


def test_what_is_refused_of_a_whole_set_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(DataError, match="'txt'") as caught:
        drill(tmp_path, Documents(texts(30)), config={"key": "txt"})
    assert "the first 30 documents of 30" in str(caught.value)
    long = [
        {"_id": i, "prompt": "one", "response": "the cat sat on the mat " * (90 if i % 3 else 1)} for i in range(30)
    ]
    with pytest.raises(DataError, match="lose the end of their answer"):
        drill(tmp_path, Documents(long), config={"max_seq_length": 32})


def test_too_many_that_come_later_are_said_once(tmp_path, monkeypatch):
    from llmnb.engine import streaming

    monkeypatch.setattr(streaming, "HEAD", 20)
    documents = texts(200)
    for document in documents[40:120]:
        document["text"] = ""
    more = {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    run = drill(tmp_path, Documents(documents), **more)
    late = [note for note in run.notes if "Of what was read by now" in note.text]
    assert len(late) == 1 and late[0].level == "warning" and "max_cut_share=0.1" in late[0].text


# --- faults ---------------------------------------------------------------------------------------------------


def test_what_reading_raises_is_raised_in_the_training(tmp_path):
    source = Documents(texts(30))
    source.fails = DataError("The database is gone.")
    with pytest.raises(DataError, match="The database is gone"):
        drill(tmp_path, source)
    assert not [t for t in threading.enumerate() if t.name == "llmnb-rows"]


def test_a_slow_database_is_waited_for(tmp_path):
    whole = drill(tmp_path / "whole", texts(23))
    assert drill(tmp_path / "slow", Documents(texts(23), wait=0.7)).losses() == whole.losses()


def test_a_kill_is_heard_while_the_training_waits(tmp_path):
    source, begun = Documents(texts(23)), time.monotonic()
    letter = []

    def fetch(indices, fields=None):
        if threading.current_thread().name == "llmnb-rows":
            letter.append("kill")
            time.sleep(3.0)
        return [source.documents[i] for i in indices]

    source.fetch = fetch
    run = drill(tmp_path, source, control=lambda: letter[0] if letter else None)
    assert run.result.stopped and run.result.last_step == 0 and time.monotonic() - begun < 60


# --- two ranks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_read_different_rows_and_learn_what_one_does(tmp_path):
    from ranks import carry_out

    given = {
        "base": str(folder_of()),
        "documents": 35,
        "stream": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "max_steps": -1,
        "logging_steps": 1,
        "optim": "adamw_torch",
    }
    tasks = [
        {**given, "name": "one", "ranks": 1},
        {**given, "name": "two", "ranks": 2, "per_device_train_batch_size": 2},
    ]
    found = carry_out(tasks, tmp_path)
    one, two = found["one"], found["two"]
    assert two["error"] is None, two["error"]
    assert one["losses"].keys() == two["losses"].keys() and len(one["losses"]) == 18
    assert max(abs(one["losses"][s] - two["losses"][s]) for s in one["losses"]) < 1e-6
    # Rank 0 read its half of each epoch, and what both ranks judge before the first step.
    assert one["fetched"] == 2 * 35 + 70 and two["fetched"] == 2 * 18 + 70
    for name in ("found", "read", "cut", "dropped", "tokens", "trained_tokens"):
        assert two["recounted"][name] == one["recounted"][name], name
