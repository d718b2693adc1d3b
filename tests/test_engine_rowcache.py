"""Rows that are kept: equal to made ones, found by content, and never trusted without proof."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import stat

import numpy as np
import pytest
from chat_families import WORDS, ZEPHYR, make_tokenizer

from llmnb.config import TrainConfig
from llmnb.engine import rowcache
from llmnb.engine.rowcache import READ, Shelf, key_of, rows_of
from llmnb.engine.rows import make_rows
from llmnb.errors import DataError
from llmnb.query import Collection

PAIR = ("prompt", "response")
HOW = {"prompt_template": "{input}", "context": None}


class Source:
    """Documents in memory that are told by content."""

    def __init__(self, documents, folder):
        self.documents, self.keeps = documents, folder
        self.read = self.skimmed = 0

    def __call__(self):
        raise AssertionError("a source that is told is not read otherwise")

    def fingerprint(self):
        self.skimmed += 1
        return str(abs(hash(repr(self.documents))))

    def told(self):
        self.read += 1
        return iter(list(self.documents)), lambda: str(abs(hash(repr(self.documents))))


def pairs(count=50):
    words = WORDS.split()
    made = [
        {"_id": f"d{i}", "prompt": words[i % 20], "response": " " + " ".join(words[i % 9 : i % 9 + i])}
        for i in range(1, count)
    ]
    return [*made, {"_id": "without", "prompt": "one"}]


def chats(count=40):
    words = WORDS.split()
    return [
        {"_id": i, "messages": [{"role": "user", "content": words[i % 20]}, {"role": "assistant", "content": words[i]}]}
        for i in range(count)
    ]


def preferences(count=40):
    words = WORDS.split()
    return [{"prompt": words[i], "chosen": f" {words[i + 1]}", "rejected": f" {words[i + 2]} no"} for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(ZEPHYR)


def same(one, other) -> bool:
    assert one.report == other.report and type(one) is type(other)
    sides = [getattr(rows, "sides", rows) for rows in (one, other)]
    assert all(np.array_equal(a, b) for a, b in zip(*(rows.parts() for rows in sides), strict=True))
    assert [*one] == [*other] and np.array_equal(one.lengths, other.lengths)
    return one.digest() == other.digest()


@pytest.mark.parametrize(
    ("documents", "settings"),
    [
        (pairs(), {"key": PAIR, "max_seq_length": 24, "max_cut_share": 1.0}),
        (pairs(), {"max_seq_length": 200}),  # the key is inferred, and said
        (chats(), {"key": "messages"}),
        (preferences(), {"method": "dpo"}),
    ],
    ids=["cut pairs", "inferred", "chats", "preferences"],
)
def test_kept_rows_are_those_that_would_be_made(documents, settings, tokenizer, tmp_path):
    source, config = Source(documents, tmp_path / "rows"), TrainConfig(**settings)
    first, kept = rows_of(source, tokenizer, config)
    assert not kept and (source.read, source.skimmed) == (1, 0)
    again, kept = rows_of(source, tokenizer, config)
    assert kept and (source.read, source.skimmed) == (1, 1)
    made = make_rows(documents, tokenizer, config)
    assert same(first, made) and same(again, made)
    assert again.report.notes  # there was something to say
    labels = again[0:3][0]["labels"]
    assert labels[0] == -100
    part = (again.chosen() if settings.get("method") == "dpo" else again.every(2)).digest()
    assert part == (made.chosen() if settings.get("method") == "dpo" else made.every(2)).digest()


def test_a_changed_document_is_another_content(tokenizer, tmp_path):
    documents = chats()
    source, config = Source(documents, tmp_path), TrainConfig(key="messages")
    rows_of(source, tokenizer, config)
    documents[7]["messages"][1]["content"] += "!"
    rows, kept = rows_of(source, tokenizer, config)
    assert not kept and same(rows, make_rows(documents, tokenizer, config))
    assert rows_of(source, tokenizer, config)[1]


def test_whatever_makes_other_rows_has_another_key(tokenizer):
    config = TrainConfig(key=PAIR)
    keys = {"plain": key_of(tokenizer, config, HOW)}
    for name, value in {
        "method": "dpo",
        "key": ("prompt", "answer"),
        "key_kind": "pair",
        "max_seq_length": 511,
        "train_on": "all",
        "chat_template": "{{ messages }}",
        "prompt_template": "{input} ",
        "max_cut_share": 0.2,
    }.items():
        keys[name] = key_of(tokenizer, dataclasses.replace(config, **{name: value}), HOW)
    keys["model's prompt"] = key_of(tokenizer, config, {**HOW, "prompt_template": "{input}\n"})
    keys["context"] = key_of(tokenizer, config, {**HOW, "context": 128})
    for name, change in {
        "token": lambda t: t.add_tokens(["<new>"]),
        "template": lambda t: setattr(t, "chat_template", t.chat_template + " "),
        "bos": lambda t: t.add_special_tokens({"bos_token": "<|zzz|>"}),
        "split": lambda t: setattr(t, "split_special_tokens", True),
    }.items():
        other = copy.deepcopy(tokenizer)
        change(other)
        keys[name] = key_of(other, config, HOW)
    assert None not in keys.values() and len(set(keys.values())) == len(keys)
    other = dataclasses.replace(config, lora_r=99, output_dir="elsewhere")
    assert key_of(copy.deepcopy(tokenizer), other, HOW) == keys["plain"]


def test_a_tokenizer_has_one_key_before_and_after_it_was_used(tokenizer):
    fresh = copy.deepcopy(tokenizer)
    fresh.backend_tokenizer.enable_truncation(3)
    before = key_of(fresh, TrainConfig(key=PAIR), HOW)
    make_rows(pairs(), fresh, TrainConfig(key=PAIR))
    assert key_of(fresh, TrainConfig(key=PAIR), HOW) == before


@pytest.mark.parametrize(
    ("documents", "settings"),
    [
        (pairs(), {"key": PAIR}),
        (chats(), {}),
        (chats(), {"chat_template": ZEPHYR.template}),
        (preferences(), {"method": "dpo"}),
    ],
)
def test_the_key_holds_every_setting_that_is_read(documents, settings, tokenizer):
    read = set()

    class Watched(TrainConfig):
        def __getattribute__(self, name):
            if name in TrainConfig.__dataclass_fields__:
                read.add(name)
            return super().__getattribute__(name)

    config = Watched(**settings)
    read.clear()
    make_rows(documents, tokenizer, config)
    assert read <= set(READ)


def test_new_sources_read_no_old_rows(tokenizer, monkeypatch):
    before = key_of(tokenizer, TrainConfig(key=PAIR), HOW)
    monkeypatch.setattr(rowcache, "_SOURCES", "of another version")
    assert key_of(tokenizer, TrainConfig(key=PAIR), HOW) not in (None, before)
    monkeypatch.setattr(rowcache, "_SOURCES", None)  # installed without sources
    assert key_of(tokenizer, TrainConfig(key=PAIR), HOW) is None


def test_what_may_give_other_rows_next_time_is_not_kept(tokenizer, tmp_path, monkeypatch):
    class Own(type(tokenizer)):
        pass

    config = TrainConfig(key="messages")
    own = copy.deepcopy(tokenizer)
    own.__class__ = Own
    assert key_of(own, config, HOW) is None
    for template, kept in {
        "{{ strftime_now('%d %b %Y') }}": True,
        '{% if strftime_now is defined %}{{ strftime_now("%Y") }}{% endif %}': True,
        "{{ strftime_now('%H:%M') }}": False,
        "{{ strftime_now(form) }}": False,
        "{{ [1, 2] | random }}": False,
        "{{ lipsum() }}": False,
    }.items():
        dated = dataclasses.replace(config, chat_template=template)
        assert (key_of(tokenizer, dated, HOW) is not None) == kept, template
        if kept:
            today = key_of(tokenizer, dated, HOW)
            with monkeypatch.context() as patched:
                patched.setattr(rowcache.time, "strftime", lambda form: "tomorrow")
                assert key_of(tokenizer, dated, HOW) != today

    class Read(Source):
        def __call__(self):
            return iter(self.documents)

    source = Read([{"text": "hello there"}] * 3, tmp_path)
    for settings, more in (({}, {"transform": lambda text: text}), ({"cache_rows": False}, {})):
        config = TrainConfig(key="text", **settings)
        assert [rows_of(source, tokenizer, config, **more)[1] for _ in range(2)] == [False, False]
    assert not list(tmp_path.iterdir()) and source.skimmed == 0


@pytest.mark.parametrize("at", [0, 9, 20, 40, 200, -1, -70, "short", "long", "empty"])
def test_a_damaged_file_is_made_anew(at, tokenizer, tmp_path):
    source, config = Source(chats(), tmp_path), TrainConfig(key="messages")
    made, _ = rows_of(source, tokenizer, config)
    (path,) = tmp_path.glob("*.rows")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if isinstance(at, int):
        damaged[at] ^= 0x41
    path.write_bytes({"short": whole[:-5], "long": whole + b"x", "empty": b""}.get(at, bytes(damaged)))
    rows, kept = rows_of(source, tokenizer, config)
    assert not kept and same(rows, made)
    assert path.read_bytes() == whole and rows_of(source, tokenizer, config)[1]


def test_a_refusal_is_not_kept(tokenizer, tmp_path):
    source, config = Source(pairs(), tmp_path), TrainConfig(key=PAIR, max_seq_length=8)
    for _ in range(2):
        with pytest.raises(DataError, match="max_cut_share"):
            rows_of(source, tokenizer, config)
    assert not list(tmp_path.glob("*.rows"))


def test_files_are_private_and_the_least_used_go_first(tokenizer, tmp_path):
    folder = tmp_path / "cache" / "rows"
    rows = make_rows(chats(), tokenizer, TrainConfig(key="messages"))
    shelf = Shelf(folder)
    assert shelf.put("a-1", rows)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "a-1.rows").stat().st_mode) == 0o600
    size = (folder / "a-1.rows").stat().st_size
    small = Shelf(folder, most=3 * size)
    for at, name in enumerate(("b-1", "c-1")):
        small.put(name, rows)
        os.utime(folder / f"{name}.rows", (at + 10, at + 10))
    os.utime(folder / "a-1.rows", (1, 1))
    (folder / ".part-left").write_bytes(b"x")
    os.utime(folder / ".part-left", (1, 1))
    assert small.get("a-1") is not None  # used now, so b is the oldest
    small.put("d-1", rows)
    assert sorted(path.name for path in folder.iterdir()) == ["a-1.rows", "c-1.rows", "d-1.rows"]
    assert not Shelf(folder, most=size - 1).put("e-1", rows) and not small.has("e")


def test_where_nothing_can_be_written_rows_are_made_all_the_same(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    source = Source(chats(), tmp_path / "file" / "rows")
    for _ in range(2):
        rows, kept = rows_of(source, tokenizer, TrainConfig(key="messages"))
        assert not kept and len(rows) == 40


def _write(folder, documents, barrier):
    barrier.wait()
    for _ in range(20):
        Shelf(folder).put("k-1", documents)


def test_two_processes_may_write_the_same(tokenizer, tmp_path):
    rows = make_rows(chats(), tokenizer, TrainConfig(key="messages"))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_write, args=(tmp_path, rows, barrier)) for _ in range(2)]
    for writer in writers:
        writer.start()
    barrier.wait()
    while any(writer.is_alive() for writer in writers):
        found = Shelf(tmp_path).get("k-1")
        assert found is None or found.digest() == rows.digest()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["k-1.rows"]


# -- documents in a database -----------------------------------------------------------------------------------
@pytest.fixture
def real(mongo_uri, tmp_path):
    from llmnb.store import open_store

    with open_store(mongo_uri, home=tmp_path / "home") as store:
        store.database["c"].insert_many(
            [{"_id": i, "text": f"number {i}", "n": i, **({"_fold": "train"} if i % 3 else {})} for i in range(300)]
        )
        yield store


@pytest.mark.mongod
@pytest.mark.parametrize(
    "select",
    [
        Collection("c").find(),
        Collection("c").find({"n": {"$gt": 5}}, ["text"]).sort("n", -1).skip(2).limit(200),
        Collection("c").find({}, {"_id": 0, "text": 1}),
        Collection("c").find({}, {"n": 0}),
        Collection("c").aggregate([{"$sort": {"n": -1}}, {"$project": {"_id": 0, "text": 1}}]),
    ],
    ids=["all", "part", "without _id", "without n", "aggregation"],
)
@pytest.mark.parametrize("fold", [None, "train", "valid"])
def test_documents_that_are_told_are_those_that_are_read(real, select, fold):
    source = real.source(select, fold)
    documents, told = source.told()
    assert list(documents) == list(real.rows(select, fold)) == list(source())
    assert told() == source.fingerprint()


@pytest.mark.mongod
def test_a_fingerprint_tells_content_order_fold_and_share(real):
    every = Collection("c").find()
    found = {
        "all": real.source(every).fingerprint(),
        "train": real.source(every, "train").fingerprint(),
        "valid": real.source(every.limit(300), "valid").fingerprint(),
        "order": real.source(every.sort("n", -1)).fingerprint(),
        "without _id": real.source(Collection("c").find({}, {"_id": 0})).fingerprint(),
    }
    real.settings.set_valid_share(0.5)
    found["share"] = real.source(every, "train").fingerprint()
    real.settings.set_valid_share(0.05)
    assert real.source(every, "train").fingerprint() == found["train"]
    real.database["c"].update_one({"_id": 7}, {"$set": {"text": "other"}})
    found["changed"] = real.source(every).fingerprint()
    assert len(set(found.values())) == len(found)


def test_documents_in_this_process_are_only_read(tmp_path):
    from llmnb.store import open_store

    with pytest.warns(UserWarning, match="mongomock"), open_store("mongomock://rowcache", home=tmp_path) as store:
        store.database["c"].insert_one({"text": "a"})
        source = store.source(Collection("c").find())
        assert not isinstance(source, rowcache.Told) and [d["text"] for d in source()] == ["a"]
