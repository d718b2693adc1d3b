"""``db.merge`` and ``db.export``: in a process of its own, proved on the run's rows, whole folders or none."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from drill import folder_of
from tiny import make_model

from llmnb import LLM, Collection, LLMTrainer, connect, folders
from llmnb.engine.proof import MergeReport
from llmnb.errors import AdapterMismatch, ArtifactError, DatabaseError, ModelError, NotFound
from llmnb.launch.merging import MergeProcess, prepare

transformers = pytest.importorskip("transformers")


def trainer(**changes):
    settings = {
        "select": Collection("chats").find(),
        "key": "messages",
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    return LLMTrainer(**{**settings, **changes})


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    """A database with two LoRA runs, one of them with a transform, and one of all weights."""
    home = tmp_path_factory.mktemp("home")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = connect("mongomock://merging", home=home)
    said = [{"role": "user", "content": "what is your name?"}, {"role": "assistant", "content": "my name is model."}]
    folds = ["valid" if i < 3 else "train" for i in range(12)]
    found.execute(Collection("chats").insert_many([{"messages": said, "text": "a cat", "_fold": f} for f in folds]))
    found.execute(Collection("all").insert_many([{"text": f"the cat sat {i}", "_fold": "train"} for i in range(8)]))
    out = {"output_dir": str(home / "out")}
    base = str(folder_of())
    found.apply(LLM("chats", base, trainer=trainer(eval_strategy="steps", eval_steps=2, **out)))
    shout = {"key": "text", "transform": lambda text: {"text": text.upper()}, "select": Collection("all").find()}
    found.apply(LLM("loud", base, trainer=trainer(**out, **shout)))
    found.apply(LLM("whole", base, trainer=trainer(use_lora=False, learning_rate=1e-3, **out)))
    yield found
    found.close()


@pytest.fixture(scope="module")
def ids(db):
    """Experiments: chats, loud, whole."""
    return db.show("checkpoint")


def left(folder):
    """What lies beside a new folder, hidden things too."""
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_merge_is_proved_on_the_valid_fold_and_loads_anywhere(db, ids, tmp_path):
    said = []
    report = db.merge(f"{ids[0]}/4", tmp_path / "merged", say=said.append)
    assert isinstance(report, MergeReport) and report.folder == str(tmp_path / "merged")
    assert report.rows == 3 and report.rows_from == "3 rows of the valid fold of chats" in repr(report)
    assert report.dtype == "float32" and report.max_logit_gap <= report.bound and report["kl"] < 1e-6
    assert report.top_token_agreement == 1.0 and "same top token" in repr(report) and "100 %" in repr(report)
    assert report.perplexity_adapter == pytest.approx(report.perplexity_merged, rel=1e-4)
    assert report.perplexity_adapter < report.perplexity_base / 2, "it was trained"
    loss = db.named(f"{ids[0]}/4").metrics["eval_loss"]
    assert math.log(report.perplexity_merged) == pytest.approx(loss, rel=1e-4), "token-normalised, as eval_loss is"
    assert said[0] == "loading torch" and "asking the adapter, 3 rows" in said
    with pytest.raises(AttributeError):
        report.kl = 0.0

    written = tmp_path / "merged"
    assert left(tmp_path) == ["merged"]
    plain = json.loads((written / "merge_report.json").read_text())
    assert plain["kl"] == report.kl and "folder" not in plain
    page = (written / "README.md").read_text()
    assert "| same top token | 100 % |" in page and str(tmp_path) not in page
    tokenizer = transformers.AutoTokenizer.from_pretrained(written)
    assert "<|im_start|>" in tokenizer.chat_template
    _, info = transformers.AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {p.suffix for p in written.iterdir()} == {".json", ".md", ".safetensors", ".jinja"}


def test_without_a_valid_fold_or_a_transform_it_says_what_it_was_measured_on(db, ids, tmp_path):
    report = db.merge(ids[1], tmp_path / "a")
    assert report.rows_from == "5 sentences of our own (the run's transform is not at hand)"
    report = db.merge(ids[1], tmp_path / "b", transform=lambda text: {"text": text.upper()})
    assert report.rows_from == "8 rows of the train fold of all"


def test_a_base_that_moved_or_is_another_or_is_gone(db, ids, tmp_path):
    moved = shutil.copytree(folder_of(), tmp_path / "moved")
    assert db.merge(ids[0], tmp_path / "a", base=str(moved)).base == str(moved)
    other = make_model("llama", tmp_path / "other", seed=7)
    with pytest.raises(AdapterMismatch, match="another base"):
        db.merge(ids[0], tmp_path / "b", base=str(other))
    with pytest.raises(ModelError, match="is not on this machine"):
        db.merge(ids[0], tmp_path / "b", base=str(tmp_path / "nowhere"))
    assert left(tmp_path) == ["a", "moved", "other"]


def test_what_cannot_be_is_said_at_once(db, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(MergeProcess, "run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ModelError, match="nothing to merge") as caught:
        db.merge(f"{ids[2]}/4", tmp_path / "out")
    assert "db.export" in caught.value.todo
    with pytest.raises(NotFound, match="There is no checkpoint") as caught:
        db.merge(ids[0] + "x", tmp_path / "out")
    assert ids[0] in caught.value.todo
    with pytest.raises(NotFound) as caught:
        db.merge(f"{ids[0]}/3", tmp_path / "out")
    assert f"{ids[0]}/2" in caught.value.seen
    with pytest.raises(NotFound, match="There is no checkpoint"):
        db.export(f"{ids[0]}/last", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for folder, words in (("full", "not empty"), ("full/x", "is a file"), ("full/x/y", "cannot be written")):
        for act in (db.export, db.merge) if words != "cannot be written" else (db.export,):
            with pytest.raises(ArtifactError, match=words):
                act(ids[0], tmp_path / folder)
    assert left(tmp_path) == ["full"] and left(tmp_path / "full") == ["x"]


def test_a_merge_that_is_stopped_leaves_nothing(db, ids, tmp_path):
    process = MergeProcess()
    writing = threading.Event()
    caught = []

    def say(words):
        if words == "merging and writing":
            writing.set()

    def work():
        try:
            db.merge(ids[0], tmp_path / "out", say=say, process=process)
        except ModelError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert writing.wait(120)
    assert any(name.startswith(".out.part-") for name in left(tmp_path))
    process.stop()
    thread.join(20)
    assert "was stopped" in str(caught[0]) and left(tmp_path) == []


def test_a_merge_ends_with_whoever_asked(db, ids, tmp_path):
    """The caller is killed; its child ends, and nothing is left of the folder."""
    code = (
        "import pickle, sys; from llmnb.launch.merging import MergeProcess;"
        "MergeProcess().run(pickle.load(open(sys.argv[1], 'rb')), lambda words: print(words, flush=True))"
    )
    job = prepare(db.store, db.named(ids[0]), tmp_path / "new" / "out")
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    caller = subprocess.Popen([sys.executable, "-c", code, tmp_path / "job"], stdout=subprocess.PIPE, text=True)
    for line in caller.stdout:
        if line.startswith("asking the base"):
            caller.kill()
            break
    caller.wait(10)
    end = time.monotonic() + 20
    while time.monotonic() < end and left(tmp_path / "new"):
        time.sleep(0.1)
    assert left(tmp_path / "new") == []


@pytest.mark.bitsandbytes
def test_trained_on_four_bits_the_gap_is_recorded(db, tmp_path):
    run = db.apply(LLM("small", str(folder_of()), trainer=trainer(bits=4, output_dir=str(tmp_path / "run"))))
    report = db.merge(run.id, tmp_path / "out")
    assert report.dtype == "float32" and report.bits == 4 and report.max_logit_gap <= report.bound
    assert report.quantised["max_logit_gap"] > 10 * report.max_logit_gap, "rounding to 4 bits is seen"
    assert "adapter on the 4-bit base" in repr(report)


# --- export -------------------------------------------------------------------------------------------------


def test_an_exported_adapter_and_an_exported_model_load_without_us(db, ids, tmp_path):
    adapter, whole = db.export(f"{ids[0]}/2", tmp_path / "adapter"), db.export(ids[2], tmp_path / "whole")
    assert adapter == tmp_path / "adapter" and left(tmp_path) == ["adapter", "whole"]
    assert not [p for p in adapter.rglob("*") if p.name.startswith((".", "optimizer", "trainer_state"))]
    code = (
        "import sys; from peft import PeftModel;"
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T;"
        "base = A.from_pretrained(sys.argv[1]); PeftModel.from_pretrained(base, sys.argv[2]);"
        "T.from_pretrained(sys.argv[2]); A.from_pretrained(sys.argv[3]); T.from_pretrained(sys.argv[3])"
    )
    words = [sys.executable, "-c", code, str(folder_of()), str(adapter), str(whole)]
    subprocess.run(words, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    llm = LLM("out", str(folder_of()), adapter_id=adapter)
    same = LLM("in", str(folder_of()), adapter_id=db.load("checkpoint", f"{ids[0]}/2"))
    assert llm.predict("what is", max_new_tokens=4) == same.predict("what is", max_new_tokens=4)


PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import llmnb
except ImportError:
    pass
else:
    raise SystemExit("llmnb is here")
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
said = []
for prompt in prompts:
    ask = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1]:]
    said.append(tokenizer.decode(new, skip_special_tokens=True))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The Python of a fresh virtual environment that has this one's packages, but not llmnb."""
    import sysconfig

    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    linked = tmp_path_factory.mktemp("elsewhere-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("llmnb", "__editable__")) and not entry.name.endswith(".pth"):
            (linked / entry.name).symlink_to(entry)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(linked), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words):
        line = [str(folder / "bin" / "python"), "-W", "ignore", *words]
        done = subprocess.run(line, env=env, cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:].decode()
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_what_is_exported_says_the_same_in_plain_transformers_elsewhere(db, tmp_path, elsewhere):
    """Ten prompts, greedily, in an environment without llmnb: a merged adapter, and a model that was trained whole."""
    prompts = ["what is your name?", "hello", "who?", "the cat", "a b c", "1 2 3", "why", "say it", "not this", "and"]
    base = make_model("llama", tmp_path / "base")
    lora = trainer(max_steps=30, save_steps=30, output_dir=str(tmp_path / "run"))
    whole = trainer(max_steps=30, save_steps=30, use_lora=False, output_dir=str(tmp_path / "run"))
    folders_ = {}
    for name, settings in (("lora", lora), ("whole", whole)):
        run = db.apply(LLM(f"said-{name}", base, trainer=settings))
        out = tmp_path / name
        (db.merge if name == "lora" else db.export)(run.id, out)
        ours = db.load("model", f"said-{name}").predict(
            [[{"role": "user", "content": prompt}] for prompt in prompts], max_new_tokens=24
        )
        assert elsewhere("-c", PLAIN, str(out), json.dumps(prompts)) == ours
        folders_[name] = ours
    assert "my name is model" in " ".join(folders_["whole"]), "they say something that was trained"


def test_an_empty_folder_is_taken(db, ids, tmp_path):
    (tmp_path / "out").mkdir()
    db.export(ids[0], tmp_path / "out")
    assert "adapter_model.safetensors" in left(tmp_path / "out")


def test_a_full_disk_is_named_and_leaves_nothing(db, ids, tmp_path, monkeypatch):
    import llmnb.store.exporting as exporting

    def full(source, target):
        Path(target).write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting.shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match="No space left"):
        db.export(ids[0], tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ArtifactError, match="not enough room"):
        db.export(ids[0], tmp_path / "out")
    assert left(tmp_path) == []


def test_a_copy_that_was_damaged_is_refused(db, ids, tmp_path, monkeypatch):
    import llmnb.store.exporting as exporting

    monkeypatch.setattr(exporting.shutil, "copyfile", lambda source, target: Path(target).write_bytes(b"x"))
    with pytest.raises(ArtifactError, match="damaged"):
        db.export(ids[0], tmp_path / "out")
    assert left(tmp_path) == []


def test_a_database_that_is_away_is_said(db, ids, tmp_path, monkeypatch):
    def away(*_args, **_more):
        raise DatabaseError("The database does not answer.")

    monkeypatch.setattr(db.store.checkpoints, "record", away)
    for act in (db.merge, db.export):
        with pytest.raises(DatabaseError):
            act(ids[0], tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.mongod
def test_on_a_real_server_a_checkpoint_that_was_removed_is_named(mongo_uri, db, ids, tmp_path):
    server = connect(mongo_uri, home=tmp_path / "home")
    source = db.export(f"{ids[0]}/4", tmp_path / "source")
    saved = server.store.checkpoints.put("tickets-1", 4, source, base=str(folder_of()))
    job = prepare(server.store, saved, tmp_path / "out")
    assert job.probe is None and job.spec.model_name_or_path == str(folder_of()), "its run is not in this database"
    server.remove("checkpoint", "tickets-1", 4)
    for act in (server.merge, server.export):
        with pytest.raises(NotFound, match="no checkpoint"):
            act(saved, tmp_path / "out")
    server.close()
