"""Base models: spellings, errors, quantisation, fingerprints."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from drill import folder_of
from tiny import FAMILIES, make_model

from llmnb.config import ModelSpec
from llmnb.engine.bases import ensure_pad, fingerprint, load_base, load_tokenizer, quantised_bits, translate_kwargs
from llmnb.errors import ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def spec(path=None, **fields):
    return ModelSpec(model_name_or_path=str(path or folder_of()), **fields)


def test_importing_the_engine_loads_no_torch():
    code = "import llmnb.engine, llmnb.engine.bases, llmnb.engine.hooks, sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# --- spellings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"torch_dtype": "float16"}, {"dtype": "float16"}),
        ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
        ({"use_flash_attention_2": False}, {}),
        ({"load_in_4bit": False, "load_in_8bit": False}, {}),
        ({"use_auth_token": "t"}, {"token": "t"}),
        ({"load_in_8bit": True}, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "load_in_8bit": False},
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
        ),
        ({"device_map": "auto", "dtype": "float32"}, {"device_map": "auto", "dtype": "float32"}),
    ],
)
def test_old_spellings(given, want):
    assert translate_kwargs(given) == want


@pytest.mark.parametrize(
    "given",
    [
        {"torch_dtype": "float16", "dtype": "float32"},
        {"load_in_4bit": True, "load_in_8bit": True},
        {"bnb_4bit_quant_type": "nf4"},
        {"use_flash_attention_2": True, "attn_implementation": "sdpa"},
    ],
)
def test_spellings_that_disagree(given):
    with pytest.raises(ModelError):
        translate_kwargs(given)


def test_kwargs_reach_the_model():
    model, _ = load_base(spec(model_kwargs={"torch_dtype": "bfloat16", "attn_implementation": "eager"}))
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert load_base(spec(folder_of(dtype="bfloat16")))[0].dtype == torch.float32 or torch.cuda.is_available()


def test_a_device_map_of_ones_own():
    model, _ = load_base(spec(model_kwargs={"device_map": {"": "cpu"}}))
    assert model.device.type == "cpu"


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 16, True, "4", 4.5])
def test_other_bits_raise(bits):
    with pytest.raises(ModelError, match="None, 4 or 8"):
        load_base(spec(), bits=bits)


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits):
    for asked in (dict(bits=bits), dict(model_kwargs={f"load_in_{bits}bit": True})):
        model, _ = load_base(spec(**asked))
        assert quantised_bits(model) == bits
        kinds = {type(module).__name__ for module in model.modules()}
        assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    if bits == 4:
        assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"


@pytest.mark.bitsandbytes
def test_a_quantization_config_of_ones_own_is_respected():
    own = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
    model, _ = load_base(spec(model_kwargs={"quantization_config": {**own, "quant_method": "bitsandbytes"}}))
    used = model.config.quantization_config
    assert used.bnb_4bit_quant_type == "fp4" and used.bnb_4bit_use_double_quant
    with pytest.raises(ModelError, match="bits=8"):
        load_base(spec(model_kwargs={"quantization_config": own}), bits=8)
    # as transformers itself writes it
    written = transformers.BitsAndBytesConfig(**own).to_dict()
    model, _ = load_base(spec(model_kwargs={"quantization_config": written}))
    assert model.config.quantization_config.bnb_4bit_quant_type == "fp4"


# --- errors -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelError) as caught:
        load_base(spec(tmp_path / "my-modle"))
    assert "my-modle" in str(caught.value) and "my-model" in caught.value.todo


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        load_base(spec(tmp_path))
    assert "notes.txt" in caught.value.seen


def test_a_hub_id_without_the_network():
    with pytest.raises(ModelError) as caught:
        load_base(spec("nobody/nothing-llmnb"))
    said = str(caught.value)
    assert "hub id nobody/nothing-llmnb" in said and "the folder" in said and "network" in caught.value.todo


@pytest.mark.parametrize("break_it", ["config", "weights", "tokenizer"])
def test_damaged_files(break_it, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of(), folder)
    name = {"config": "config.json", "weights": "model.safetensors", "tokenizer": "tokenizer.json"}[break_it]
    (folder / name).write_bytes(b"{ not json")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(spec(folder))


def test_no_name_and_no_dtype():
    with pytest.raises(ModelError, match="No base model"):
        load_base(ModelSpec())
    with pytest.raises(ModelError, match="bfloat16"):
        load_base(spec(model_kwargs={"dtype": "bfloat61"}))
    with pytest.raises(ModelError):
        load_base(spec(model_kwargs={"no_such_option": 1}))


def test_code_of_the_model_runs_only_when_allowed(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of(), folder)
    ran = tmp_path / "ran"
    (folder / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').write('x')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_base(spec(folder))
    assert not ran.exists()


# --- fingerprints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trap17_fingerprint_of_memory_and_folder(family, tmp_path):
    folder = folder_of(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    want = fingerprint(folder)
    assert len(want) == 32
    assert fingerprint(model) == want
    model.config._name_or_path = ""
    assert fingerprint(model) == want  # read from its tensors
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == want  # other dtype on disk
    assert fingerprint(model) == want


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_trap17_fingerprint_of_a_quantised_load(bits):
    model, _ = load_base(spec(bits=bits))
    assert fingerprint(model) == fingerprint(folder_of())


def test_trap17_other_weights_have_another_fingerprint(tmp_path):
    want = fingerprint(folder_of())
    assert fingerprint(folder_of(seed=1)) != want
    assert fingerprint(folder_of(num_hidden_layers=1)) != want
    assert fingerprint(folder_of("mistral")) != want  # same shapes and weights, another architecture
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) != want


def test_fingerprint_of_shards_and_pickles(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of())
    want = fingerprint(folder_of())
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "shards") == want
    shutil.copytree(folder_of(), tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    assert fingerprint(tmp_path / "old") == want
    (tmp_path / "old" / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="No weights"):
        fingerprint(tmp_path / "old")


def test_fingerprint_reads_little(tmp_path, monkeypatch):
    """A thirtieth of a larger model is more than it reads."""
    import io

    folder = make_model("llama", tmp_path, hidden_size=256, intermediate_size=1024)
    size = (folder / "model.safetensors").stat().st_size
    read = []
    real = open

    class Counted(io.FileIO):
        def read(self, n=-1):
            data = super().read(n)
            read.append(len(data))
            return data

    monkeypatch.setattr(
        "builtins.open", lambda f, *a, **k: Counted(f) if str(f).endswith("safetensors") else real(f, *a, **k)
    )
    fingerprint(folder)
    assert 0 < sum(read) < size / 30


# --- padding ------------------------------------------------------------------------------------------------


def test_trap13_pad_without_a_model():
    tokenizer = load_tokenizer(spec(folder_of(pad=False)))
    assert tokenizer.pad_token is None
    assert "</s>" in ensure_pad(tokenizer, None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert ensure_pad(tokenizer, None) is None


def test_trap13_a_new_row_is_the_mean_of_the_old():
    from llmnb.engine.bases import fit_vocabulary

    model, tokenizer = load_base(spec())
    before = model.get_input_embeddings().weight.detach().clone()
    assert fit_vocabulary(model, tokenizer) == 0  # the model has spare rows
    assert fit_vocabulary(model, tokenizer, rows=520) == 8
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[:512], before) and torch.allclose(after[512:], before.mean(0), atol=1e-7)
    assert model.get_output_embeddings().weight.shape[0] == 520 == model.config.vocab_size
