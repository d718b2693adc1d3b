"""The ``llmnb`` command."""

import io
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from llmnb import Collection, connect
from llmnb.cli import doctor, main, paper, parsing, settings
from llmnb.errors import ConfigError
from llmnb.events import Metric, Note

COMMANDS = ["quickstart", "train", "runs", "watch", "stop", "resume", "reproduce", "chat"]
COMMANDS += ["data", "checkpoints", "evaluate", "merge", "export", "show", "db", "ray", "lab", "doctor"]
HEAVY = ("torch", "transformers", "ray", "pymongo", "plotly", "IPython", "rich", "numpy", "deepspeed")


# -- the line -----------------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, resource\n"
        "def cpu():\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    return used.ru_utime + used.ru_stime\n"
        "start = cpu()\n"
        "from llmnb.cli import main\n"
        "status = main(['--help'])\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "print('RESULT', status, heavy, cpu() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    result = done.stdout.splitlines()[-1].split(" ", 2)
    assert result[:2] == ["RESULT", "0"], done.stderr
    assert result[2].startswith("[] "), result
    assert float(result[2].split()[-1]) < 0.3
    for word in COMMANDS:
        assert f"\n    {word}" in done.stdout


@pytest.mark.parametrize("word", COMMANDS)
def test_every_command_has_help_in_sentences(word, capsys):
    assert main([word, "--help"]) == 0
    assert ". " in capsys.readouterr().out.replace(".\n", ". ")


def test_without_a_command_it_shows_help(capsys):
    assert main([]) == 2
    assert "quickstart" in capsys.readouterr().out


def test_version(capsys):
    import llmnb

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmnb {llmnb.__version__}\n"


def test_words_that_no_command_takes(capsys):
    assert main(["runs", "--colour"]) == 2
    assert "--colour" in capsys.readouterr().err
    assert main(["quickstart", "--steps", "0"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err


def test_every_fault_of_a_training_line_at_once_before_any_connection(capsys):
    line = [
        "train",
        "--uri",
        "mongodb://127.0.0.1:1/x",
        "--learning_rat",
        "1",
        "--max_steps",
        "--lora_r",
        "8",
        "--fp16",
    ]
    assert main(line) == 1
    said = capsys.readouterr().err
    for words in ("--learning_rat: is not an option — did you mean --learning_rate", "--max_steps: needs a value",
                  "--model: is needed", "--collection: is needed"):  # fmt: skip
        assert words in said
    assert "lora_r" not in said and "fp16" not in said and "Traceback" not in said


def test_wrong_values_are_said_before_any_connection(capsys):
    line = ["train", "--uri", "mongodb://127.0.0.1:1/x", "--model", "m", "--collection", "c", "--bits", "6"]
    assert main([*line, "--learning_rate", "-1"]) == 1
    said = capsys.readouterr().err
    assert "bits" in said and "4, 8" in said and "learning_rate" in said and "above 0" in said


def test_settings_take_their_types():
    words = "--learning_rate 2e-4 --fp16 --key prompt,response --lora-r=4 --bits none --evaluation_strategy steps"
    words += ' --model_kwargs {"dtype":"float32"} --lora_target_modules q_proj,v_proj'
    given = settings.named(words.split())
    model, trainer = settings.settings(given)
    assert model == {"model_kwargs": {"dtype": "float32"}}
    assert trainer == {
        "learning_rate": 2e-4,
        "fp16": True,
        "key": ("prompt", "response"),
        "lora_r": 4,
        "bits": None,
        "evaluation_strategy": "steps",
        "lora_target_modules": ["q_proj", "v_proj"],
    }


@pytest.mark.parametrize("words", [["text"], ["--a", "1", "2"], ["--a", "1", "--a", "2"]])
def test_stray_and_repeated_words(words):
    with pytest.raises(ConfigError):
        settings.named(words)


def test_python_objects_cannot_be_typed():
    with pytest.raises(ConfigError, match="takes a Python object"):
        settings.settings({"transform": "f"})


@pytest.mark.parametrize("filter", ["{lang", "[1]"])
def test_a_filter_that_is_no_object(filter):
    with pytest.raises(ConfigError, match="JSON"):
        settings.selection("c", filter)


def test_selection():
    assert settings.selection("c", '{"a": 1}', 5) == Collection("c").find({"a": 1}).limit(5)


def test_options_lists_every_option(capsys):
    from llmnb.trainer import LLMTrainer

    assert main(["train", "--options"]) == 0
    said = set(capsys.readouterr().out.split())
    assert LLMTrainer.names() - {"select", "transform", "ray_configs", "training_kwargs", "eval_selects"} <= said


# -- errors -------------------------------------------------------------------------------------------------


def test_errors_are_text_and_debug_shows_the_traceback(capsys):
    line = ["runs", "--uri", "mongodb://me:secret@127.0.0.1:1/x?serverSelectionTimeoutMS=200"]
    assert main(line) == 1
    said = capsys.readouterr().err
    assert said.startswith("llmnb: ") and "To do:" in said
    assert "Traceback" not in said and "secret" not in said
    assert main([*line, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--uri"], []])
def test_a_password_on_the_command_line_is_refused(option, monkeypatch, capsys):
    uri = "mongodb://me:secret@127.0.0.1:1/x"
    monkeypatch.setattr(sys, "argv", ["llmnb", "runs", *option, uri] if option else ["llmnb", "runs", f"--uri={uri}"])
    assert main() == 2
    said = capsys.readouterr().err
    assert "LLMNB_URI" in said and "secret" not in said


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    from llmnb.cli import running

    def interrupted(known):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "runs", interrupted)
    assert main(["runs"]) == 130
    assert "interrupted" in capsys.readouterr().err


# -- printing -----------------------------------------------------------------------------------------------


def _feed(follower, steps=8):
    follower(Note(text="", data={"steps": steps, "parameters": 10, "trainable": 2}))
    for step in range(1, steps + 1):
        values = {"loss": 5.0 - step / 10, "tokens_per_second": 1000.0 + step}
        follower(Metric(step=step, values=values, time=100.0 + step))
    follower(Metric(step=steps, values={"eval_loss": 4.0}, time=100.0 + steps))
    follower(Note(level="warning", text="careful"))


def test_progress_without_a_terminal_is_a_few_lines():
    out = io.StringIO()
    with paper.Follower("Training", out) as follower:
        _feed(follower)
    lines = out.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]
    assert "loss 4.800" in lines[0] and "1 002 tokens/s" in lines[0] and "about 6 s left" in lines[0]
    assert (follower.first_loss, follower.loss, follower.eval_loss) == (4.9, 4.2, 4.0)
    assert follower.warnings == ["careful"] and follower.counts["parameters"] == 10
    assert follower.rate == 1005.0


def test_progress_on_a_terminal_is_one_line_that_goes_away():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with paper.Follower("Training", out) as follower:
        _feed(follower)
        follower._bar.refresh()
        shown = out.getvalue()
    assert "step 8/8" in shown and "tokens/s" in shown and "loss 4.2" in shown
    assert out.getvalue().count("\n") <= 1


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (99, "99 s"), (190, "3 min 10 s"), (7500, "2 h 5 min"), (-3, "0 s")]
)
def test_about(value, text):
    assert paper.about(value) == text


def test_figures():
    assert paper.figure(2.0414) == "2.041" and paper.figure(None) == "" and paper.figure(float("nan")) == "nan"
    assert paper.figure(0.0001234) == "0.000123"
    assert paper.count(11722) == "11 722" and paper.size(1_300_000) == "1.3 MB" and paper.size(12) == "12 B"
    assert paper.one_line("a\n b  c", 20) == "a b c" and paper.one_line("abcdef", 4) == "abc…"


def test_table_leaves_empty_columns_out(capsys):
    paper.table(("name", "error", "n"), [("a", "", 1), ("bb", "", 20)])
    assert capsys.readouterr().out == "name   n\na      1\nbb    20\n"


# -- doctor -------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    """A machine with no package of ours installed."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)


def test_doctor_without_any_package_says_what_to_install(bare, tmp_path, capsys):
    assert main(["doctor", "--offline", "--home", str(tmp_path / "home")]) == 1
    said = capsys.readouterr().out
    for extra in ("train", "quant", "deepspeed", "ray", "notebook"):
        assert f"pip install 'llmnb[{extra}]'" in said
    assert "Training on this machine is not possible yet: torch, training." in said
    assert not (tmp_path / "home").exists(), "it looks, and changes nothing"


def test_doctor_finds_a_package_that_cannot_be_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_tried", lambda code, limit=0: (False, "OSError: libgomp.so.1"))
    found = {f.what: f for f in doctor.examine(home=str(tmp_path), offline=True)}
    for what in ("torch", "bitsandbytes", "DeepSpeed", "Ray"):
        assert found[what].state == "fault" and "libgomp.so.1" in found[what].seen and found[what].todo


def test_a_probe_that_hangs_ends():
    went, said = doctor._tried("import time; time.sleep(60)", limit=1.0)
    assert not went and "no answer within 1 s" in said


def test_a_probe_cannot_be_fooled_by_files_here(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise RuntimeError('shadow')")
    monkeypatch.chdir(tmp_path)
    assert doctor._tried("import json; print('fine')") == (True, "fine")


def test_doctor_says_that_no_server_answers(bare, tmp_path):
    uri = "mongodb://me:secret@127.0.0.1:1/x?serverSelectionTimeoutMS=200"
    found = {f.what: f for f in doctor.examine(uri, str(tmp_path), offline=True)}
    assert found["database"].state == "fault" and found["database"].todo
    assert "secret" not in repr(found)


def test_doctor_says_that_a_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    found = doctor._hub(False)
    assert found.state == "missing" and "127.0.0.1:1" in found.seen and not found.needed
    assert doctor._hub(True).state == "skipped"


def test_doctor_finds_a_hub(monkeypatch):
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to all
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert doctor._hub(False).state == "ok"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.mongod
def test_doctor_finds_the_database(bare, mongo_uri, tmp_path):
    found = {f.what: f for f in doctor.examine(mongo_uri, str(tmp_path), offline=True)}
    assert found["database"].state == "ok" and "MongoDB" in found["database"].seen
    assert found["mongod"].state == "ok"


@pytest.mark.slow
def test_doctor_of_this_machine(tmp_path, capsys):
    assert main(["doctor", "--offline", "--home", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "This machine can train." in said
    assert metadata.version("torch") in said and "mongod" in said


# -- a database ---------------------------------------------------------------------------------------------


@pytest.mark.mongod
def test_db_start_status_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LLMNB_URI", raising=False)
    home = ["--home", str(tmp_path / "home")]
    assert main(["db", "status", *home]) == 3
    assert "Not running" in capsys.readouterr().out
    assert not (tmp_path / "home").exists()
    try:
        assert main(["db", "start", *home]) == 0
        assert capsys.readouterr().out.startswith("Started: mongodb://")
        assert main(["db", "start", *home]) == 0
        assert capsys.readouterr().out.startswith("Already running")
        assert main(["db", "status", *home]) == 0
        password = (tmp_path / "home" / "mongod" / "password").read_text().strip()
        said = capsys.readouterr().out
        assert "process" in said and password not in said
    finally:
        assert main(["db", "stop", *home]) == 0
    assert "Stopped" in capsys.readouterr().out
    assert main(["db", "stop", *home]) == 0
    assert "None was running" in capsys.readouterr().out


@pytest.mark.mongod
def test_db_gc_says_what_it_removed(mongo_uri, tmp_path, capsys):
    db = connect(mongo_uri, home=tmp_path)
    file = tmp_path / "f.bin"
    file.write_bytes(os.urandom(1000))
    db.store.artifacts.put_file(file)
    assert main(["db", "gc", "--uri", mongo_uri, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would be removed" in said and "no record names them" in said


@pytest.mark.mongod
def test_an_empty_database(mongo_uri, tmp_path, capsys):
    where = ["--uri", mongo_uri, "--home", str(tmp_path)]
    assert main(["runs", *where]) == 0
    assert "No run yet" in capsys.readouterr().out
    assert main(["show", *where]) == 0
    assert capsys.readouterr().out.count("none") == 5
    assert main(["chat", "hello", *where]) == 1
    assert "There is no checkpoint" in capsys.readouterr().err
    assert main(["watch", *where]) == 1
    assert main(["show", "model", "nobody", *where]) == 1
    assert "nobody" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(mongod, tiny_llama, tmp_path_factory):
    """A database in which ``llmnb train`` has trained a tiny model; the line's own words, and where it is."""
    import uuid

    home = tmp_path_factory.mktemp("cli")
    uri = mongod.uri.replace("/llmnb?", f"/cli_{uuid.uuid4().hex[:8]}?")
    db = connect(uri, home=home)
    db.execute(Collection("sums").insert_many([{"_id": i, "q": f"{i}+1=", "a": f"{i + 1}"} for i in range(60)]))
    line = [sys.executable, "-m", "llmnb.cli", "train", "--home", str(home), "--model", tiny_llama]
    line += ["--collection", "sums", "--key", "q,a", "--identifier", "sums", "--filter", '{"_id": {"$lt": 50}}']
    line += [
        "--max_steps",
        "4",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--save_steps",
        "2",
        "--logging_steps",
    ]
    line += ["1", "--output_dir", str(home / "out"), "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
    env = {**os.environ, "LLMNB_URI": uri}
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, env=env)
    yield done, uri, home, db
    db.store.database.client.drop_database(db.store.name)
    db.close()


@pytest.mark.mongod
def test_train_prints_a_result_and_no_noise(trained):
    done, uri, _, db = trained
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout and "checkpoint" in done.stdout and "llmnb chat --model sums" in done.stdout
    assert len(done.stdout.splitlines()) <= 14
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 6, done.stderr
    password = uri.partition("llmnb:")[2].partition("@")[0]
    assert password and password not in done.stdout + done.stderr
    assert db.show("checkpoint", db.show("checkpoint")[-1]) == [2, 4]
    assert db.run().record["counts"]["found"] <= 50


@pytest.mark.mongod
def test_merge_export_and_remove(trained, tmp_path, capsys):
    _, uri, home, db = trained
    where = ["--uri", uri, "--home", str(home)]
    run = db.show("run")[-1]
    step = db.show("checkpoint", run)[-1]
    assert main(["merge", "latest", str(tmp_path / "merged"), *where]) == 0
    said = capsys.readouterr().out
    assert "same top token" in said and "perplexity" in said
    assert main(["merge", f"{run}/{step}", str(tmp_path / "merged"), *where]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", f"latest/{step}", str(tmp_path / "adapter"), *where]) == 0
    assert "verified" in capsys.readouterr().out and (tmp_path / "adapter" / "adapter_config.json").exists()
    assert main(["export", f"{run}x", str(tmp_path / "other"), *where]) == 1
    assert f"did you mean '{run}'" in capsys.readouterr().err
    assert main(["checkpoints", "--remove", "3", *where]) == 1
    assert "needs a run" in capsys.readouterr().err
    assert main(["checkpoints", run, "--remove", str(step), *where]) == 1
    assert "in use" in capsys.readouterr().err


@pytest.mark.mongod
def test_evaluate(trained, capsys):
    _, uri, home, db = trained
    where = ["--uri", uri, "--home", str(home)]
    run = db.show("run")[-1]
    assert main(["evaluate", "latest/2", run, "--metrics", "perplexity,token_accuracy", "--limit", "7", *where]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("Evaluation of 2 checkpoints of ") and said.err == "", said.err
    assert [line.split()[0] for line in lines[1:5]] == ["model", "base", f"{run}/2", f"{run}/4"]
    assert f"{run}/4, worst: " in said.out
    found = db.evaluation()
    assert found.id in lines[-1] and found.settings["limit"] == 7
    assert main(["show", "evaluation", *where]) == 0
    assert found.id in capsys.readouterr().out
    assert main(["show", "evaluation", found.id, *where]) == 0
    assert capsys.readouterr().out == said.out
    assert main(["evaluate", run, "--metrics", "perplexty", *where]) == 1
    assert "did you mean perplexity?" in capsys.readouterr().err
    assert main(["evaluate", run, "--filter", "{}", *where]) == 1
    assert "give --collection" in capsys.readouterr().err


@pytest.mark.mongod
def test_runs_watch_show(trained, tiny_llama, capsys):
    _, uri, home, db = trained
    where = ["--uri", uri, "--home", str(home)]
    run = db.show("run")[-1]
    assert main(["runs", *where]) == 0
    said = capsys.readouterr().out
    assert run in said and "done" in said and "sums" in said
    assert main(["runs", "--state", "failed", *where]) == 0
    assert "No run is failed" in capsys.readouterr().out
    assert main(["watch", *where]) == 0
    said = capsys.readouterr().out
    assert f"{run}, done" in said and "in 4 steps" in said
    for words in (["model"], ["model", "sums"], ["checkpoint"], ["checkpoint", run], ["run"], ["collection"], []):
        assert main(["show", *words, *where]) == 0
        assert "sums" in capsys.readouterr().out
    for words in ([], ["latest"], [run]):
        assert main(["checkpoints", *words, *where]) == 0
        assert capsys.readouterr().out.count(run) == 2
    assert main(["data", *where]) == 0
    assert "sums" in capsys.readouterr().out
    assert main(["data", "sums", *where]) == 0
    said = capsys.readouterr().out
    assert "_fold" in said and "0+1=" in said
    assert main(["data", "sums", "--model", tiny_llama, "--key", "q,a", *where]) == 0
    said = capsys.readouterr().out
    assert "rows of" in said and "read only <s>" in said
    assert main(["data", "sums", "--key", "q,a", *where]) == 1
    assert "--model M" in capsys.readouterr().err
    assert main(["data", "sum", *where]) == 1
    assert "did you mean 'sums'" in capsys.readouterr().err
    for more in ([], ["--now"]):
        assert main(["stop", run, *more, *where]) == 1
        assert "has ended already" in capsys.readouterr().err
    assert main(["resume", run, *where]) == 1
    assert "nothing is left to do" in capsys.readouterr().err
    assert main(["resume", run, "--learning_rate", "4", *where]) == 1
    assert "cannot change while a run goes on" in capsys.readouterr().err
    assert main(["resume", "--max_steps", "6", "--save_steps", "6", *where]) == 0
    said = capsys.readouterr().out
    assert f"{run}, done" in said and "in 6 steps" in said and db.show("run") == [run]
    assert main(["reproduce", *where]) == 0
    said = " ".join(capsys.readouterr().out.split())
    again = db.show("run")[-1]
    assert f"reproduces {run}. Changed since: the plan: that run was trained further" in said
    assert "the same loss at" in said and f"as run {run}" in said
    for kind, name in (("model", "sums-again"), ("checkpoint", again), ("run", again)):
        db.remove(kind, name)
    assert main(["watch", run[:-1] + "x", *where]) == 1
    assert run in capsys.readouterr().err, "the near name is offered"


@pytest.mark.mongod
def test_chat_asks_once_or_line_by_line(trained, capsys, monkeypatch):
    _, uri, home, db = trained
    where = ["--uri", uri, "--home", str(home)]
    expected = db.load("model", "sums").predict("7+1=", max_new_tokens=5)
    assert main(["chat", "7+1=", "--model", "sums", "--max_new_tokens", "5", *where]) == 0
    assert capsys.readouterr().out == expected + "\n"
    run = db.show("checkpoint")[-1]
    assert main(["chat", "7+1=", "--checkpoint", f"{run}/4", "--max_new_tokens", "5", "--base", *where]) == 0
    both = capsys.readouterr()
    assert both.out.startswith("base:\n") and f"\n{run}/4:\n" in both.out and f"{run}/4 on " in both.err
    drawn = ["--temperature", "0.5", "--min_new_tokens", "5", "--max_new_tokens", "9"]
    three = ["--compare", "base", f"{run}/2", *drawn, "--keep", "sum", "--save", "more", *where]
    assert main(["chat", "7+1=", "--checkpoint", f"{run}/4", *three]) == 0
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.endswith(":")] == ["base:", f"{run}/4:", f"{run}/2:"]
    assert "seed " in said.err and "1 document into more; its fold is " in said.err
    assert db.execute(Collection("more").find_one())["q"] == "7+1="
    assert main(["chat", "9+1=", "--history", "sum", "--max_new_tokens", "2", *where]) == 0
    assert [(c["name"], c["turns"]) for c in db.chats()] == [("sum", 2)]
    assert main(["chat", "x", "--keep", "sum", *where]) == 1
    assert "Another conversation is kept as 'sum'" in capsys.readouterr().err
    assert main(["chat", " ", *where]) == 1
    assert "is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("7+1=\n8+1=\n\nnever read\n"))
    assert main(["chat", "--model", "sums", "--max_new_tokens", "5", *where]) == 0
    assert capsys.readouterr().out.startswith(expected + "\n")
    assert main(["chat", "7+1=", "--model", "sums", "--max_new_token", "5", *where]) == 1
    assert "max_new_tokens" in capsys.readouterr().err


@pytest.mark.mongod
def test_a_training_that_fails_says_why_once(trained, capsys):
    _, uri, home, _ = trained
    line = ["train", "--uri", uri, "--home", str(home), "--collection", "sums", "--max_steps", "1"]
    assert main([*line, "--model", str(home / "nowhere"), "--output_dir", str(home / "out")]) == 1
    said = capsys.readouterr().err
    assert "nowhere" in said and "Traceback" not in said
    assert main([*line, "--model", "m", "--filter", '{"q": "no such"}']) == 1
    assert "empty" in capsys.readouterr().err


def test_parse_gives_what_the_commands_read():
    known = parsing.parse(["train", "--model", "m", "--collection", "c", "--lora_r", "4"])
    assert (known.module, known.function, known.more) == ("training", "train", ["--lora_r", "4"])
    assert json.dumps(vars(known), default=str)
