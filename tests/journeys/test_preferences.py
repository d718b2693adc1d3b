"""Preferences, as a person walks it: answers that were compared → a run → its rewards in the database → a model that
prefers, is inspected, resumed, merged and talked to like any other."""

from __future__ import annotations

import pytest

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.launch import runner

pytest.importorskip("trl")


@pytest.fixture
def db(tmp_path):
    db = connect(f"mongomock://{tmp_path.name}", home=tmp_path / "home")
    yield db
    db.close()


def preferences(count: int = 24):
    return [
        {
            "prompt": f"question {i}: ",
            "chosen": "yes, my name is model.",
            "rejected": "no, red green blue.",
            "_fold": "valid" if i % 6 == 5 else "train",
        }
        for i in range(count)
    ]


def model(tiny_llama, tmp_path, **changes) -> LLM:
    settings = {
        "select": Collection("compared").find(),
        "method": "dpo",
        "output_dir": str(tmp_path / "out"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "use_cpu": True,
    }
    return LLM("preferring", tiny_llama, trainer=LLMTrainer(**{**settings, **changes}))


def test_a_preference_is_learned_and_kept(db, tiny_llama, tmp_path):
    bad = {"prompt": "question", "chosen": "yes", "rejected": None, "_fold": "train"}
    db.execute(Collection("compared").insert_many([*preferences(), bad]))
    llm = model(tiny_llama, tmp_path)
    found = db.inspect(llm)
    assert "null" in found.kinds and "conflict" not in found.kinds
    run = db.apply(llm)
    assert run.state == "done"
    counts = run.record["counts"]
    assert (counts["method"], counts["rows"], counts["dropped"]) == ("dpo", 20, 1)
    rewards = {m["step"]: m["rewards/accuracies"] for m in run.metrics() if "rewards/accuracies" in m}
    assert rewards[1] == 0.0 and rewards[8] == 1.0
    assert [m for m in run.metrics() if "eval_rewards/margins" in m][-1]["eval_rewards/margins"] > 0
    loaded = db.load("model", "preferring")
    assert loaded.predict("question 3: ", max_new_tokens=6) == llm.predict("question 3: ", max_new_tokens=6)
    longer = run.resume(max_steps=10)
    longer.wait()
    assert longer.state == "done" and max(m["step"] for m in longer.metrics()) == 10
    report = db.merge(f"{run.id}/8", tmp_path / "merged")
    assert report["max_logit_gap"] < report["bound"]


LINE = (
    "--collection compared --method dpo --dpo_beta 0.2 --key prompt,chosen,rejected --max_steps 2 --learning_rate 1e-3"
)


@pytest.mark.mongod
def test_the_command_and_the_magic_take_it(mongo_uri, tiny_llama, tmp_path, capsys, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    from llmnb.cli import main

    db = connect(mongo_uri, home=tmp_path / "home")
    db.execute(Collection("compared").insert_many(preferences(12)))
    where = ["--uri", mongo_uri, "--home", str(tmp_path / "home"), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *where, "--model", tiny_llama, *LINE.split()]) == 0, capsys.readouterr().err
    run = db.run(db.show("checkpoint")[-1])
    assert run.record["config"]["method"] == "dpo" and run.record["config"]["dpo_beta"] == 0.2
    assert any("rewards/margins" in point for point in run.metrics())

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    shell = InteractiveShell()
    shell.user_ns["db"] = db
    with capture_output() as said:
        shell.run_cell("%load_ext llmnb\nx = %llm_connect db")
        shell.run_cell(f"run = %llm_train --model {tiny_llama} {LINE} --start")
    assert "run" in shell.user_ns, said.stdout + said.stderr
    shell.user_ns["run"].wait()
    assert shell.user_ns["run"].state == "done"
    shell.run_cell("%unload_ext llmnb")
    runner.stop(tmp_path / "home", patience=2.0)
    db.close()
