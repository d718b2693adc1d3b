"""LoRA: it moves, it hits what it should, in the right dtype; padding and added tokens; checkpointing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from drill import chats, folder_of, texts, train, weights
from tiny import make_model, make_tokenizer

from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import AdapterMismatch, ModelError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LINEAR = {"llama": 14, "gpt2": 8, "opt": 12, "gpt_neox": 8, "phi": 12}
QUANTISED = pytest.mark.bitsandbytes


class Look(transformers.TrainerCallback):
    """Looks at the model at the end of training."""

    def __init__(self, look):
        self.look = look

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.seen = self.look(model)


def base_model(family="llama"):
    from llmnb.engine import bases

    return bases.load_base(ModelSpec(model_name_or_path=str(folder_of(family))), training=True)[0]


# --- it moves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("checkpointing", "reentrant"),
    [
        (None, False),
        ("gradient_checkpointing", True),
        ("activation_checkpointing", True),
        ("activation_checkpointing", False),
    ],
)
def test_trap14_lora_moves_after_one_step(family, checkpointing, reentrant, tmp_path):
    more = {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
    run = train(tmp_path, base=folder_of(family), max_steps=1, **more)
    moved = {name: float(tensor.norm()) for name, tensor in weights(run.last).items() if "lora_B" in name}
    assert len(moved) == LINEAR[family]
    assert all(norm > 0 for norm in moved.values()), moved


@QUANTISED
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap14_lora_moves_on_a_quantised_base(bits, checkpointing, tmp_path):
    run = train(tmp_path, config={"bits": bits}, max_steps=1, activation_checkpointing=checkpointing)
    moved = [float(tensor.norm()) for name, tensor in weights(run.last).items() if "lora_B" in name]
    assert len(moved) == 14 and all(norm > 0 for norm in moved)
    assert run.counts["bits"] == bits
    assert run.counts["parameters"] == train(tmp_path / "b", max_steps=1).counts["parameters"]


def test_checkpointing_changes_no_loss(tmp_path):
    plain = train(tmp_path / "a").losses()
    saving = train(tmp_path / "b", activation_checkpointing=True).losses()
    assert all(abs(plain[step] - saving[step]) < 1e-5 for step in plain)


# --- what it hits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(LINEAR))
def test_trap15_all_linear_leaves_the_head_alone(family, tmp_path):
    run = train(tmp_path, base=folder_of(family), max_steps=1)
    names = {name.split(".lora_")[0] for name in weights(run.last) if ".lora_" in name}
    assert len(names) == LINEAR[family] == run.counts["modules"]
    assert not any("lm_head" in name or "embed_out" in name for name in names)
    (note,) = [n for n in run.notes if "LoRA changes" in n.text]
    assert str(LINEAR[family]) in note.text


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        ("q_porj", "q_proj"),
        (["q_proj", "vproj"], "v_proj"),
        (["nothing_like_it"], "down_proj"),
        ([], "all-linear"),
        ("zzz.*", "all-linear"),
    ],
)
def test_trap15_targets_that_match_nothing_raise(targets, hint):
    from llmnb.engine.adapters import attach_lora

    with pytest.raises(ModelError) as caught:
        attach_lora(base_model(), TrainConfig(lora_target_modules=targets))
    said = str(caught.value)
    assert hint in said and "q_proj (×2)" in said and "lm_head" not in said


@pytest.mark.parametrize(
    ("targets", "count"),
    [("q_proj", 2), (("q_proj", "v_proj"), 4), ("q_proj, v_proj", 4), (r".*layers\.0\..*_proj", 7), ("all-linear", 14)],
)
def test_trap15_targets_that_match(targets, count):
    from llmnb.engine.adapters import attach_lora, lora_modules

    assert len(lora_modules(attach_lora(base_model(), TrainConfig(lora_target_modules=targets)))) == count


def test_trap15_conv1d_of_gpt2(tmp_path):
    """GPT-2 holds its weights as (in, out); LoRA on them learns and survives saving."""
    run = train(tmp_path, base=folder_of("gpt2"), config={"lora_target_modules": ["c_attn"]}, max_steps=2)
    shapes = {tuple(t.shape) for n, t in weights(run.last).items() if "lora_B" in n}
    assert shapes == {(192, 8)}
    assert json.loads((run.last / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_trap15_conv1d_is_among_the_modules_named():
    from llmnb.engine.adapters import attach_lora

    with pytest.raises(ModelError) as caught:
        attach_lora(base_model("gpt2"), TrainConfig(lora_target_modules=["c_atn"]))
    assert "c_attn (×2)" in str(caught.value) and "c_atn → c_attn" in caught.value.todo


def test_a_wrong_lora_option_is_a_model_error():
    from llmnb.engine.adapters import attach_lora

    with pytest.raises(ModelError):
        attach_lora(base_model(), TrainConfig(lora_bias="some"))


# --- dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "bits", "dtype"),
    [
        (False, None, None),
        (True, None, None),
        (True, None, "bfloat16"),
        pytest.param(True, 4, None, marks=QUANTISED),
        pytest.param(True, 8, None, marks=QUANTISED),
        pytest.param(True, 4, "bfloat16", marks=QUANTISED),
    ],
)
def test_trap16_trained_weights_are_float32(lora, bits, dtype, tmp_path):
    # The file holds bfloat16, which from_pretrained would take over.
    base = folder_of(dtype="bfloat16")
    look = Look(lambda model: {p.dtype for p in model.parameters() if p.requires_grad})
    run = train(
        tmp_path,
        base=base,
        max_steps=1,
        spec={"model_kwargs": {"dtype": dtype} if dtype else {}},
        config={"use_lora": lora, "bits": bits},
        trainer_kwargs={"callbacks": [look]},
    )
    assert look.seen == {torch.float32}
    assert run.counts["trained_dtype"] == "float32"
    assert {t.dtype for t in weights(run.last).values()} == {torch.float32}


def test_trap16_sixteen_bits_are_refused_unless_named():
    from llmnb.engine.adapters import attach_lora, check_dtypes

    model = base_model()
    with pytest.raises(ModelError, match="float32"):
        check_dtypes(model.to(torch.bfloat16))
    assert check_dtypes(model, allow=torch.bfloat16) == "bfloat16"
    wrapped = attach_lora(base_model(), TrainConfig())
    next(p for p in wrapped.parameters() if p.requires_grad).data = torch.zeros(8, 64, dtype=torch.float16)
    with pytest.raises(ModelError, match="float16: 1 tensors"):
        check_dtypes(wrapped)
    with pytest.raises(ModelError, match="Nothing"):
        check_dtypes(base_model().requires_grad_(False))


def test_full_training_in_a_named_dtype(tmp_path):
    run = train(tmp_path, spec={"model_kwargs": {"torch_dtype": "bfloat16"}}, config={"use_lora": False}, max_steps=1)
    assert run.counts["trained_dtype"] == "bfloat16"


# --- padding and added tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_trap13_no_pad_token(eos, lora, tmp_path):
    """With an EOS it serves; without one a token is added, and its row is the same wherever the base is loaded."""
    from llmnb.engine.bases import load_tokenizer
    from llmnb.engine.generation import Answerer
    from llmnb.engine.merging import merge

    size = len(make_tokenizer(pad=False, eos=eos))
    base = folder_of(pad=False, eos=eos, vocab_size=size)  # no spare rows
    look = Look(lambda model: model.get_input_embeddings().weight.detach().clone())
    run = train(
        tmp_path / "run",
        base=base,
        documents=texts(9),
        per_device_train_batch_size=4,
        config={"use_lora": lora},
        trainer_kwargs={"callbacks": [look]},
    )
    grown = 0 if eos else 1
    assert look.seen.shape[0] == size + grown
    assert any("padding" in note.text.lower() for note in run.notes)
    assert all(loss == loss for loss in run.losses().values())
    spec = ModelSpec(model_name_or_path=str(base))
    assert load_tokenizer(spec, run.last).pad_token_id is not None
    with Answerer(spec, run.last) as answerer:
        reloaded = answerer._model.get_input_embeddings().weight.detach()
        assert torch.equal(reloaded, look.seen)
        first = answerer.answer(["the cat", "one two three four"], max_new_tokens=6)
    if not lora:
        assert weights(run.last)["model.embed_tokens.weight"].shape[0] == size + grown
        return
    assert not any("embed" in name for name in weights(run.last))  # nothing was stored that the base has
    merge(spec, run.last, tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert torch.equal(merged["model.embed_tokens.weight"], look.seen)
    assert merged["lm_head.weight"].shape[0] == size + grown
    with Answerer(replace(spec, model_name_or_path=str(tmp_path / "merged"))) as answerer:
        assert answerer.answer(["the cat", "one two three four"], max_new_tokens=6) == first


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2's head is tied to its embeddings
def test_trap13_added_tokens_are_trained_and_come_back(family, tmp_path):
    from llmnb.engine.generation import Answerer
    from llmnb.engine.merging import merge

    base = folder_of(family, vocab_size=len(make_tokenizer()))
    spec = {"tokenizer_kwargs": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|new|>", "<|other|>"]}}
    documents = [{"text": "<|new|> the cat <|other|>"} for _ in range(6)]
    run = train(tmp_path / "run", base=base, documents=documents, spec=spec, max_steps=3)
    stored = weights(run.last)
    assert any(("token" in name and "embed" in name) or "trainable_tokens" in name for name in stored), list(stored)
    full = ModelSpec(model_name_or_path=str(base))
    with Answerer(full, run.last) as answerer:
        first = answerer.answer(["<|new|> the"], max_new_tokens=5)
        rows = answerer._model.get_input_embeddings().weight.shape[0]
    assert rows == len(make_tokenizer()) + 2
    report = merge(full, run.last, tmp_path / "merged")
    assert report["max_logit_gap"] < 1e-4
    with Answerer(replace(full, model_name_or_path=str(tmp_path / "merged"))) as answerer:
        assert answerer.answer(["<|new|> the"], max_new_tokens=5) == first
        embeddings = answerer._model.get_input_embeddings().weight
        assert not torch.equal(embeddings[-1], embeddings[-2])  # they were trained, each to its own


# --- adapters that were trained -----------------------------------------------------------------------------


def test_missing_and_unexpected_keys_fail(tmp_path):
    from safetensors.torch import save_file

    from llmnb.engine.adapters import load_adapter

    run = train(tmp_path / "run", max_steps=1)
    stored = weights(run.last)
    gone = next(name for name in stored if "lora_B" in name)
    save_file({n: t for n, t in stored.items() if n != gone}, run.last / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match="1 weights are missing"):
        load_adapter(base_model(), run.last)
    save_file(
        {**stored, "base_model.model.model.layers.9.x.lora_A.weight": stored[gone].clone()},
        run.last / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterMismatch, match="1 belong nowhere"):
        load_adapter(base_model(), run.last)
    save_file({**stored, gone: torch.zeros(3, 3)}, run.last / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch):
        load_adapter(base_model(), run.last)
    (run.last / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_adapter(base_model(), run.last)


def test_a_folder_that_is_no_adapter(tmp_path):
    from llmnb.engine.adapters import find_adapter

    with pytest.raises(ModelError, match="neither"):
        find_adapter(tmp_path)
    with pytest.raises(ModelError, match="no adapter folder"):
        find_adapter(tmp_path / "gone")
    with pytest.raises(ModelError, match="hub id"):
        find_adapter("nobody/nothing-llmnb")


def test_another_base_is_refused(tmp_path):
    run = train(tmp_path / "run", documents=chats(), max_steps=1)
    other = make_model("llama", tmp_path / "other", seed=3)
    with pytest.raises(AdapterMismatch, match="another base"):
        train(tmp_path / "again", base=other, adapter=run.last)
