"""Merging: into full precision, proved equal, refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from drill import chats, folder_of, texts, train, weights
from tiny import make_model

from llmnb.config import ModelSpec
from llmnb.errors import AdapterMismatch, ArtifactError, ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "the cat sat on the mat and the dog ran"


def logits(folder, adapter=None):
    from peft import PeftModel

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tuned"), documents=chats(), max_steps=8).last


def spec(**fields):
    return ModelSpec(**{"model_name_or_path": str(folder_of()), **fields})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
def test_trap17_merged_is_the_adapter_and_not_the_base(family, tmp_path):
    from llmnb.engine.merging import merge

    run = train(tmp_path / "run", base=folder_of(family), documents=texts(), max_steps=6)
    report = merge(spec(model_name_or_path=str(folder_of(family))), run.last, tmp_path / "out")
    base, adapter = logits(folder_of(family)), logits(folder_of(family), run.last)
    merged = logits(tmp_path / "out")
    assert (merged - adapter).abs().max() < report["bound"] < 1e-3
    assert (merged - base).abs().max() > 0.01 < report["moved"]
    assert report["max_logit_gap"] < report["bound"] and report["mean_logit_gap"] <= report["max_logit_gap"]
    assert report["top_token_agreement"] == 1.0 and report["tokens"] > 20
    card = json.loads((tmp_path / "out" / "llmnb.json").read_text())
    assert card["kind"] == "model" and card["merged"]["max_logit_gap"] == report["max_logit_gap"]
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("asked", [{"bits": 4}, {"bits": 8}, {"model_kwargs": {"load_in_4bit": True}}])
def test_trap17_never_into_a_quantised_base(asked, tuned, tmp_path):
    """Trained on 4 bits, merged into 32: the weights are the base's own plus the update, not rounded ones."""
    from llmnb.engine.merging import merge

    run = train(tmp_path / "run", documents=chats(), config={"bits": 4}, max_steps=4)
    report = merge(spec(**asked), run.last, tmp_path / "out")
    assert report["dtype"] == "float32" and report["max_logit_gap"] < report["bound"]
    merged, base = weights(tmp_path / "out"), weights(folder_of())
    assert merged.keys() == base.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = merged[name] - base[name]
    assert torch.linalg.matrix_rank(delta, rtol=1e-3) <= 8  # a LoRA update of rank 8, and no rounding of the base
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.bitsandbytes
def test_trap17_a_base_that_is_only_there_quantised_is_refused(tuned, tmp_path):
    from llmnb.engine.bases import fingerprint, load_base
    from llmnb.engine.merging import merge

    model, tokenizer = load_base(spec(), bits=4)
    model.save_pretrained(tmp_path / "q")
    tokenizer.save_pretrained(tmp_path / "q")
    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    card = json.loads((adapter / "llmnb.json").read_text())
    (adapter / "llmnb.json").write_text(json.dumps({**card, "base_fingerprint": fingerprint(tmp_path / "q")}))
    with pytest.raises(ModelError, match="quantised"):
        merge(spec(model_name_or_path=str(tmp_path / "q")), adapter, tmp_path / "out")


def test_trap17_a_wrong_base_is_refused(tuned, tmp_path):
    from llmnb.engine.merging import merge

    other = make_model("llama", tmp_path / "other", seed=9)  # same shapes: only the fingerprint knows
    with pytest.raises(AdapterMismatch, match="another base"):
        merge(spec(model_name_or_path=str(other)), tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # the same weights in another folder are the same base
    shutil.copytree(folder_of(), tmp_path / "moved")
    merge(spec(model_name_or_path=str(tmp_path / "moved")), tuned, tmp_path / "out")


def test_trap17_a_merge_that_says_something_else_fails(tuned, tmp_path, monkeypatch):
    from llmnb.engine import merging

    real = merging._reload

    def damaged(*args):
        model = real(*args)
        with torch.no_grad():
            model.lm_head.weight[3] += 1.0
        return model

    monkeypatch.setattr(merging, "_reload", damaged)
    with pytest.raises(ModelError, match="does not say"):
        merging.merge(spec(), tuned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing is left under the name, or beside it"


def test_trap17_keys_that_are_missing_fail(tuned, tmp_path):
    from safetensors.torch import save_file

    from llmnb.engine.merging import merge

    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    stored = weights(adapter)
    stored.pop(next(iter(stored)))
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match="missing"):
        merge(spec(), adapter, tmp_path / "out")


def test_sixteen_bit_base_stays_sixteen_bit(tmp_path):
    from llmnb.engine.merging import merge

    base = folder_of(dtype="bfloat16")
    run = train(tmp_path / "run", base=base, documents=chats(), max_steps=6)
    report = merge(spec(model_name_or_path=str(base)), run.last, tmp_path / "out")
    assert report["dtype"] == "bfloat16" and 0 < report["max_logit_gap"] < report["bound"]
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_what_cannot_be_merged(tuned, tmp_path):
    from llmnb.engine.merging import merge

    full = train(tmp_path / "full", config={"use_lora": False}, max_steps=1).last
    with pytest.raises(ModelError, match="whole model"):
        merge(spec(), full, tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("x")
    with pytest.raises(ArtifactError, match="not empty"):
        merge(spec(), tuned, tmp_path / "used")


def test_an_adapter_from_elsewhere_merges(tuned, tmp_path):
    from llmnb.engine.merging import merge

    adapter = tmp_path / "adapter"
    shutil.copytree(tuned, adapter)
    (adapter / "llmnb.json").unlink()
    assert merge(replace(spec(), bits=4), adapter, tmp_path / "out")["top_token_agreement"] == 1.0
