"""To a hub: the real client, a server on loopback; a card that says how, and nothing that should have stayed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from drill import folder_of
from hub import Hub

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import ArtifactError, ConfigError
from llmnb.launch.cards import base_for_others, model_card

TOKEN = "hf_" + "secretsecret" * 3


@pytest.fixture(scope="module")
def hub():
    found = Hub(TOKEN)
    yield found
    found.close()


@pytest.fixture
def pushed(mongo_uri, tmp_path, hub):
    """A trained run, and ``llmnb push`` in a process of its own: the client reads its settings when it is imported."""
    db = connect(mongo_uri, home=tmp_path / "home")
    db.execute(Collection("hush_hush").insert_many([{"text": f"the cat sat {i}", "_fold": "train"} for i in range(20)]))
    trainer = LLMTrainer(
        select=Collection("hush_hush").find({"_fold": "train"}),
        key="text",
        max_steps=2,
        save_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        output_dir=str(tmp_path / "out"),
    )
    run = db.apply(LLM("said", str(folder_of()), trainer=trainer))

    def push(*words, token=TOKEN, **more):
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": token,
            "HF_HOME": str(tmp_path / "hf"),
            "LLMNB_URI": mongo_uri,
            **more,
        }
        line = [sys.executable, "-m", "llmnb.cli", "push", "latest", *words, "--home", str(tmp_path / "home")]
        hub.files.clear()
        return subprocess.run(line, env={**env, **more}, capture_output=True, text=True, check=False)

    yield db, run, push
    db.close()


@pytest.mark.mongod
def test_an_adapter_goes_up_with_its_card_and_nothing_else(pushed, hub, tmp_path):
    _, run, push = pushed
    done = push("me/said")
    assert done.returncode == 1 and "--base" in done.stderr and hub.files == {}, "its base is a folder of this machine"
    done = push("me/said", "--base", "them/tiny-llama")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/said" in done.stdout and hub.made[-1]["private"] is True
    card = hub.files["README.md"].decode()
    assert 'base_model: "them/tiny-llama"' in card and 'library_name: "peft"' in card and "seed | 42" in card
    counts = run.record["counts"]
    assert counts["rows_digest"] in card and f"{counts['rows']:,} of kind text" in card and "lora_r 8" in card
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "them/tiny-llama"
    everything = b"\n".join(hub.files.values())
    for word in ("hush_hush", str(tmp_path), str(folder_of()), TOKEN):
        assert word.encode() not in everything, word
    assert "optimizer.pt" not in hub.files and TOKEN not in done.stdout + done.stderr


@pytest.mark.mongod
def test_a_merged_model_goes_up_with_its_proof(pushed, hub, tmp_path):
    db, run, push = pushed
    db.merge(run.id, tmp_path / "merged")
    done = push("me/whole", "--merged", str(tmp_path / "merged"), "--base", "them/tiny-llama", "--public")
    assert done.returncode == 0, done.stderr
    card = hub.files["README.md"].decode()
    assert 'library_name: "transformers"' in card and "same top token" in card
    assert "What the merge was measured on" in card
    assert "model.safetensors" in hub.files and hub.made[-1]["private"] is False
    text = b"\n".join(v for k, v in hub.files.items() if not k.endswith(".safetensors"))
    assert str(tmp_path).encode() not in text and str(folder_of()).encode() not in text
    with pytest.raises(ArtifactError, match="no model that a merge wrote"):
        db.push(run.id, "me/whole", folder=tmp_path, base="them/tiny-llama")


@pytest.mark.mongod
def test_what_the_hub_refuses_is_said_with_a_way_out(pushed, hub):
    _, _, push = pushed
    wrong = push("me/said", "--base", "them/tiny-llama", token="hf_" + "wrongwrong" * 3)
    assert wrong.returncode == 1 and "log in" in wrong.stderr and "wrongwrong" not in wrong.stderr
    nobody = push("me/said", "--base", "them/tiny-llama", HF_ENDPOINT="http://127.0.0.1:9")
    assert nobody.returncode == 1 and "not reached" in nobody.stderr
    offline = push("me/said", "--base", "them/tiny-llama", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE" in offline.stderr
    name = push("no name at all", "--base", "them/tiny-llama")
    assert name.returncode == 1 and "owner/name" in name.stderr


def test_a_card_of_a_removed_run_still_says_what_it_is(store):
    from llmnb import Checkpoint

    whole = Checkpoint("e", 3, "d", kind="model", base="/a/folder/base", base_fingerprint="f")
    assert base_for_others(whole, None) == "base", "a whole model needs no base to be used"
    assert "after 3 steps" in model_card(store, whole, "me/it", "base")
    with pytest.raises(ConfigError, match="folder of this machine"):
        base_for_others(Checkpoint("e", 3, "d", base="/a/folder"), None)
