"""The demo: documents of the standard library, and a base model made here."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmnb import Collection, demo
from llmnb.db import Datalayer
from llmnb.demo import extract, library, loading, newborn
from llmnb.errors import DataError

SCRIPT = Path(extract.__file__)


def _pythons():
    """This Python, and every other supported one that this machine has."""
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for minor in (10, 11, 12, 13):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            found.setdefault(f"3.{minor}", path)
    return found


PYTHONS = _pythons()


def _read(python):
    done = subprocess.run([python, "-I", "-S", str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- documents ----------------------------------------------------------------------------------------------


def test_at_least_five_thousand_documents_without_repeats():
    documents = demo.documents()
    assert len(documents) >= 5000
    assert len({d["_id"] for d in documents}) == len(documents)
    assert len({d["prompt"] for d in documents}) == len(documents)
    for d in documents:
        assert d["messages"] == [
            {"role": "user", "content": d["prompt"]},
            {"role": "assistant", "content": d["response"]},
        ]
        assert d["response"].startswith("`") and "\n" not in d["response"], d
        assert d["name"].split(".")[0] in sys.stdlib_module_names or d["module"] == "builtins", d["name"]


def test_documents_say_what_the_library_says():
    found = {d["_id"]: d for d in demo.documents()}
    assert found["what/textwrap.dedent"]["prompt"] == "What does `textwrap.dedent` do?"
    assert found["what/textwrap.dedent"]["response"] == (
        "`textwrap.dedent` is a function: Remove any common leading whitespace from every line in `text`."
    )
    assert found["takes/textwrap.dedent"]["response"] == "`textwrap.dedent` takes `text`."
    assert found["takes/shutil.copyfile"]["response"] == "`shutil.copyfile` takes `src, dst, *, follow_symlinks=True`."
    assert found["where/shutil.copytree"]["response"] == "`copytree` is a function in `shutil`."
    assert "where/os.open" not in found, "several modules have an `open`, so the question has no one answer"


def test_the_same_python_gives_the_same_documents():
    first, second = _read(sys.executable), _read(sys.executable)
    assert first == second
    signatures = [json.loads(line)["signature"] for line in first.splitlines()]
    assert not [s for s in signatures if re.search(r"0x[0-9a-f]{6}|<", s)]


@pytest.mark.parametrize("version", sorted(PYTHONS))
def test_every_supported_python_has_enough(version):
    entries = [json.loads(line) for line in _read(PYTHONS[version]).splitlines()]
    assert len(entries) > 4500
    assert len(library.documents(entries)) >= 5000
    by_name = {e["name"]: e for e in entries}
    for name in (*library.HELD_OUT, "os.path.join", "os.listdir", "len", "str.split", "math.sqrt"):
        assert by_name[name]["summary"], name


def test_reading_leaves_no_trace_in_this_process():
    before = set(sys.modules)
    library.entries.cache_clear()
    library.entries()
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("turtle", "mailbox", "nntplib", "imaplib")}


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return x.", "Return x."),
        ("Return the sum, e.g. 3. More here.", "Return the sum, e.g. 3."),
        ("range(stop) -> range object\nrange(start, stop)\n\nReturn an object.", "Return an object."),
        ("Line one\ngoes on. And more.", "Line one goes on."),
        ("", ""),
        (">>> 1 + 1\n2", ""),
        ("No full stop", "No full stop."),
    ],
)
def test_first_sentence(doc, sentence):
    assert extract.first_sentence(doc) == sentence


def test_a_python_without_docstrings_is_refused(monkeypatch):
    def stripped(*args, **kwargs):
        return subprocess.CompletedProcess(args, 0, b'{"name": "x"}\n', b"")

    library.entries.cache_clear()
    monkeypatch.setattr(library.subprocess, "run", stripped)
    with pytest.raises(DataError, match="too little documentation") as caught:
        library.entries()
    assert "1 documented things" in caught.value.seen
    library.entries.cache_clear()


def test_passages_are_plain_text_without_questions():
    passages = demo.passages()
    text = "\n".join(p["text"] for p in passages)
    assert len(text) > 500_000, len(text)
    assert "What does `" not in text and "is a function: " not in text.replace("This is a function: ", "")
    assert all(len(p["text"]) < 1500 for p in passages)


# -- in a database ------------------------------------------------------------------------------------------


def test_loading_twice_changes_nothing(store):
    db = Datalayer(store)
    first = demo.load_documents(db, limit=400)
    assert first["inserted"] == 400 and first["train"] + first["valid"] == 400
    assert 9 <= first["valid"] < 80
    second = demo.load_documents(db, limit=400)
    assert second == {**first, "inserted": 0, "present": 400}
    more = demo.load_documents(db, limit=500)
    assert more["inserted"] == 100 and more["train"] + more["valid"] == 500


def test_the_questions_are_never_trained_on(store):
    db = Datalayer(store)
    demo.load_documents(db, limit=1000)
    trained = [d for d in store.rows(Collection("stdlib").find(), fold="train")]
    asked = demo.questions()
    assert len(asked) == 3 and len({q["form"] for q in asked}) == 3
    for question in asked:
        assert question["prompt"] not in {d["prompt"] for d in trained}
        assert not [d["_id"] for d in trained if question["name"] in (d["name"],)]
        assert db.execute(Collection("stdlib").find_one({"_id": question["_id"]}))["_fold"] == "valid"
    assert tuple(q["name"] for q in asked) == loading.HELD_OUT


# -- the base model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of two steps, its home, and what was said while it was made."""
    home, said = tmp_path_factory.mktemp("demo"), []
    path = demo.base_model(home, said.append, steps=2)
    return path, home, said


def test_the_base_is_made_once(base):
    path, home, said = base
    assert path.is_relative_to(home / "cache")
    assert any(getattr(event, "data", {}).get("steps") == 2 for event in said)
    assert [event.values["loss"] for event in said if event.kind == "metric" and "loss" in event.values]
    stamp, again = (path / "model.safetensors").stat().st_mtime_ns, []
    assert demo.base_model(home, again.append, steps=2) == path
    assert again == [] and (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing half-made is left behind"
    assert not [p.name for p in path.iterdir() if p.suffix in (".pt", ".bin", ".pth") or "state" in p.name]


def test_a_busy_machine_stops_in_time_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(newborn, "LONGEST_S", 0.0)
    said = []
    path = demo.base_model(tmp_path, said.append, steps=50)
    assert (path / "config.json").is_file()
    warned = [event for event in said if getattr(event, "level", "") == "warning"]
    assert len(warned) == 1 and "of 50 steps" in warned[0].text and warned[0].data["done"] < 5


def test_another_recipe_is_another_base(base, monkeypatch):
    path, home, _ = base
    monkeypatch.setattr(newborn, "_make", lambda work, *_: _marked(work))
    assert demo.base_model(home, steps=3) != path


def _marked(work):
    folder = work / "kept"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_who_comes_second_takes_the_first_ones(tmp_path, monkeypatch):
    def slow(work, *_):
        folder = next(iter(_folders))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("first")
        return _marked(work)

    _folders = []
    monkeypatch.setattr(newborn, "_make", lambda work, *_: _marked(work))
    _folders.append(demo.base_model(tmp_path, steps=5))
    shutil.rmtree(_folders[0])
    monkeypatch.setattr(newborn, "_make", slow)
    path = demo.base_model(tmp_path, steps=5)
    assert (path / "config.json").read_text() == "first"


@pytest.mark.slow
def test_made_apart_it_is_the_same_and_loads_no_torch_here(tmp_path):
    code = "import sys; from llmnb import demo; p = demo.base_model(sys.argv[1], steps=2, apart=True); "
    code += "print(p, (p / 'config.json').is_file(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["True", "False"]
    assert str(demo.base_model(tmp_path, steps=2)) == done.stdout.split()[0]


def test_a_failure_apart_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="could not be made"):
        newborn._made_apart(tmp_path, tmp_path / "nothing", 5)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(newborn, "_make", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.base_model(tmp_path, steps=5)
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


def test_what_a_killed_process_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(newborn, "_make", lambda work, *_: _marked(work))
    old, fresh = tmp_path / "cache" / "demo" / "making-old", tmp_path / "cache" / "demo" / "making-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (1.0, 1.0))
    demo.base_model(tmp_path, steps=5)
    assert fresh.is_dir() and not old.exists()


def test_the_base_has_a_tokenizer_that_ends_turns(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base[0])
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != tokenizer.eos_token
    assert tokenizer.bos_token is None
    text = "`textwrap.dedent` is a function: Rémove\n  any…"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert 2000 <= len(tokenizer) <= 8192


def test_the_base_answers_and_knows_no_question(base):
    from llmnb import LLM

    answer = LLM("base", base[0]).predict("What does `textwrap.dedent` do?\n", max_new_tokens=8)
    assert isinstance(answer, str) and not answer.startswith("`textwrap.dedent` is a function")
