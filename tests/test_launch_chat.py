"""The chat's process: base and adapters side by side, stop keeps what came, nothing outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.config import ModelSpec
from llmnb.errors import DataError, ModelError
from llmnb.launch.chat import ChatProcess


@pytest.fixture(scope="module")
def tuned(tiny_llama, tmp_path_factory):
    """(folder of an adapter, what it answers, what the base answers)."""
    tmp = tmp_path_factory.mktemp("tuned")
    db = connect(f"mongomock://{tmp.name}", home=tmp / "home")
    db.execute(Collection("sums").insert_many([{"text": f"{i}+1={i + 1}", "_fold": "train"} for i in range(32)]))
    trainer = LLMTrainer(
        "t",
        select=Collection("sums").find(),
        key="text",
        output_dir=str(tmp / "out"),
        learning_rate=2e-2,
        num_train_epochs=4,
        max_seq_length=32,
        save_steps=1000,
        use_cpu=True,
    )
    llm, base = LLM("sums", tiny_llama, trainer=trainer), LLM("base", tiny_llama)
    db.apply(llm)
    answers = [model.predict("7+1=", max_new_tokens=8) for model in (llm, base)]
    assert answers[0] != answers[1]
    folder = llm.checkpoint.path
    for model in (llm, base):
        model.close()
    return folder, *answers


@pytest.fixture(scope="module")
def chat(tiny_llama, tmp_path_factory):
    """One for all tests here, beside a library that prints when it is imported."""
    noisy = tmp_path_factory.mktemp("noisy")
    (noisy / "sitecustomize.py").write_text("import sys; print('hello from a library'); sys.stdout.flush()\n")
    with ChatProcess(ModelSpec(model_name_or_path=tiny_llama)) as chat:
        assert chat.pid is None and not chat.alive
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{noisy}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
            assert list(chat.ask("hello", max_new_tokens=2))
        yield chat


def test_base_and_adapter_answer_side_by_side_from_one_process(chat, tuned):
    folder, with_adapter, without = tuned
    assert "".join(chat.ask("7+1=", adapter=folder, max_new_tokens=8)) == with_adapter
    pid = chat.pid
    assert "".join(chat.ask("7+1=", adapter=None, max_new_tokens=8)) == without
    assert "".join(chat.ask("7+1=", adapter=folder, max_new_tokens=8)) == with_adapter
    assert chat.pid == pid
    messages = [{"role": "user", "content": "7+1="}]
    assert isinstance("".join(chat.ask(messages, adapter=folder, max_new_tokens=4)), str)


def test_an_adapter_is_read_before_it_is_asked_and_a_bad_one_harms_nothing(chat, tuned, tmp_path):
    folder, with_adapter, without = tuned
    for prepared, asked, wanted in ((folder, folder, with_adapter), (folder, None, without), (tmp_path, None, without)):
        chat.prepare(prepared)
        assert "".join(chat.ask("7+1=", adapter=asked, max_new_tokens=8)) == wanted
    closed = ChatProcess(ModelSpec(model_name_or_path="nowhere"))
    closed.prepare(folder)
    assert not closed.alive, "no process is started for it"


def test_an_error_is_raised_here_and_the_process_lives_on(chat, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        list(chat.ask("hello", adapter=tmp_path / "nowhere"))
    pid = chat.pid
    assert list(chat.ask("hello", max_new_tokens=3))
    assert chat.pid == pid


def test_a_base_that_is_not_there(tmp_path):
    nowhere = ModelSpec(model_name_or_path=str(tmp_path / "no-base"))
    with ChatProcess(nowhere) as other, pytest.raises(ModelError, match="no-base"):
        list(other.ask("hello"))


def test_stop_keeps_what_came(chat):
    came = []
    begun = time.monotonic()
    for piece in chat.ask("hello", max_new_tokens=400, min_new_tokens=400):
        came.append(piece)
        if len(came) == 2:
            chat.stop()
    assert len(came) >= 2
    whole = "".join(chat.ask("hello", max_new_tokens=400, min_new_tokens=400))
    assert whole.startswith("".join(came)) and len("".join(came)) < len(whole)
    stream = chat.ask("hello", max_new_tokens=400, min_new_tokens=400)
    next(stream)
    stream.close()  # as a KeyboardInterrupt in the caller's loop does
    assert list(chat.ask("7+1=", max_new_tokens=2)) is not None
    assert time.monotonic() - begun < 60


def test_what_an_answer_tells(chat):
    answer = chat.ask("hello", max_new_tokens=6, min_new_tokens=6)
    assert "".join(answer) and answer.told["tokens"] == 6 and answer.told["cut"] and answer.told["seconds"] > 0
    answer = chat.ask("hello", max_new_tokens=200, min_new_tokens=200)
    next(answer)
    answer.stop()
    rest = list(answer)
    assert 1 <= answer.told["tokens"] < 200 and len(rest) < 200 and not answer.told["cut"]
    never = chat.ask("hello", max_new_tokens=4)
    never.stop()
    assert list(never) == []
    with pytest.raises(DataError, match="256"):
        list(chat.ask("hello " * 400))
    answer = chat.ask("hello " * 60, max_new_tokens=4000)
    assert list(answer) and "lowered" in answer.told["notes"][0]


def test_memory_that_does_not_suffice_is_said_and_the_process_lives_on(tmp_path):
    from tiny import make_model

    wide = make_model("llama", tmp_path / "wide", intermediate_size=100_000, num_hidden_layers=1)  # 100 MB for a prompt
    with ChatProcess(ModelSpec(model_name_or_path=str(wide))) as chat:
        assert list(chat.ask("hello", max_new_tokens=2))
        process = psutil.Process(chat.pid)
        before = process.rlimit(psutil.RLIMIT_AS)
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 48 * 2**20, before[1]))
        with pytest.raises(ModelError, match="memory did not suffice") as caught:
            list(chat.ask("the cat sat " * 40, max_new_tokens=4))
        assert "smaller model" in str(caught.value)
        assert list(chat.ask("hello", max_new_tokens=2)) and chat.pid == process.pid


def test_after_a_while_without_a_question_the_memory_is_given_back(tiny_llama):
    ended = []
    with ChatProcess(ModelSpec(model_name_or_path=tiny_llama), idle=0.5, ended=lambda: ended.append(1)) as chat:
        stream = chat.ask("hello", max_new_tokens=4, min_new_tokens=4)
        next(stream)
        time.sleep(1.5)
        assert chat.alive, "an answer that is read slowly is not idleness"
        list(stream)
        pid, end = chat.pid, time.monotonic() + 20
        while not ended:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert ended == [1] and not chat.alive and not psutil.pid_exists(pid)
        assert list(chat.ask("hello", max_new_tokens=2))


def test_a_process_that_dies_is_said_and_replaced_and_close_ends_it(chat):
    stream = chat.ask("hello", max_new_tokens=400, min_new_tokens=400)
    next(stream)
    os.kill(chat.pid, 9)
    with pytest.raises(ModelError, match="ended"):
        list(stream)
    assert list(chat.ask("hello", max_new_tokens=2))
    pid = chat.pid
    chat.close()
    assert not psutil.pid_exists(pid) and not chat.alive


@pytest.mark.parametrize("busy", [True, False], ids=["in an answer", "idle"])
def test_it_dies_with_its_parent_also_by_kill_9(tiny_llama, busy):
    code = (
        "import sys; from llmnb.launch.chat import ChatProcess; from llmnb.config import ModelSpec\n"
        "chat = ChatProcess(ModelSpec(model_name_or_path=sys.argv[1]))\n"
        "stream = chat.ask('hello', max_new_tokens=400 if sys.argv[2] == 'True' else 1)\n"
        "next(stream, '')\n"
        "print(chat.pid, 'torch' in sys.modules, flush=True); import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tiny_llama, str(busy)], stdout=subprocess.PIPE, text=True)
    pid, torch_here = parent.stdout.readline().split()
    assert torch_here == "False"
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the chat outlives its parent"
        time.sleep(0.1)
