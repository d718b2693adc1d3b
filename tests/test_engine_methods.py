"""Methods beyond plain LoRA: rsLoRA, DoRA, LoRA+, NEFTune."""

from __future__ import annotations

import json

import pytest
from drill import chats, folder_of, train, weights

from llmnb import LLMTrainer
from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConfigError
from llmnb.launch.sharing import faults_of
from llmnb.trainer import settle

torch = pytest.importorskip("torch")


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    from llmnb.engine.adapters import attach_lora, load_adapter

    base = AutoModelForCausalLM.from_pretrained(folder_of())
    model = attach_lora(base, TrainConfig(lora_r=16, lora_alpha=8, use_rslora=True))
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    assert layer.scaling["default"] == pytest.approx(8 / 4)
    run = train(tmp_path, config={"use_rslora": True, "lora_r": 16, "lora_alpha": 8}, max_steps=2)
    assert json.loads((run.last / "adapter_config.json").read_text())["use_rslora"] is True
    again = load_adapter(AutoModelForCausalLM.from_pretrained(folder_of()), run.last)
    assert next(m for m in again.modules() if isinstance(m, LoraLayer)).scaling["default"] == pytest.approx(2.0)


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=pytest.mark.bitsandbytes)])
def test_dora_trains_the_size_of_each_weight_and_is_merged_as_it_is(bits, tmp_path):
    from llmnb.engine.merging import merge

    run = train(tmp_path / "run", documents=chats(), config={"use_dora": True, "bits": bits}, max_steps=6)
    first = train(tmp_path / "first", documents=chats(), config={"use_dora": True, "bits": bits}, max_steps=1)
    sizes = {name: value for name, value in weights(run.last).items() if "magnitude" in name}
    assert len(sizes) == run.counts["modules"] > 0 and run.counts["trained_dtype"] == "float32"
    before = weights(first.last)
    assert all(not torch.equal(before[name], value) for name, value in sizes.items())
    assert run.losses()[6] < run.losses()[1]
    report = merge(ModelSpec(model_name_or_path=str(folder_of())), run.last, tmp_path / "out")
    assert report["max_logit_gap"] < report["bound"] and report["moved"] > 0.01


def test_loraplus_moves_b_so_many_times_further(tmp_path):
    options = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "weight_decay": 0.0, "warmup_steps": 0}
    plain = weights(train(tmp_path / "plain", **options).last)
    plus = weights(train(tmp_path / "plus", config={"loraplus_lr_ratio": 8.0}, **options).last)
    assert plain.keys() == plus.keys()
    for name, value in plain.items():
        further = 8.0 if "lora_B" in name else 1.0  # in the first step A has no gradient: B is 0
        assert value.abs().max() > 0 and torch.allclose(plus[name], further * value, rtol=1e-5, atol=1e-8), name


def test_loraplus_resumes_exactly(tmp_path):
    options = dict(config={"loraplus_lr_ratio": 16.0}, max_steps=6, save_strategy="steps", weight_decay=0.1)
    whole = train(tmp_path / "whole", save_steps=3, **options)
    rest = train(tmp_path / "rest", save_steps=3, resume=whole.saved[0]["folder"], **options)
    a, b = weights(whole.last), weights(rest.last)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rest.losses() == {step: loss for step, loss in whole.losses().items() if step > 3}


def test_loraplus_and_an_optimizer_that_groups_weights_itself(tmp_path, monkeypatch):
    from llmnb.engine.loop import Loop

    grouping = (torch.optim.SGD, {"params": [], "lr": 0.1})  # as transformers answers for GaLore
    monkeypatch.setattr(Loop, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: grouping))
    with pytest.raises(ConfigError, match="does not go with"):
        train(tmp_path, config={"loraplus_lr_ratio": 4.0}, max_steps=1)


def test_neftune_is_noise_in_training_only_and_packs_are_padded(tmp_path):
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    sets = {"valid": chats(2)}
    plain = train(tmp_path / "plain", documents=chats(), sets=sets, **options)
    noisy = train(
        tmp_path / "noisy",
        documents=chats(),
        sets=sets,
        config={"padding_free": True},
        neftune_noise_alpha=5.0,
        **options,
    )
    assert noisy.losses()[1] != plain.losses()[1]
    assert noisy.series("eval_loss")[1] == plain.series("eval_loss")[1]
    assert any("padding_free is off: NEFTune" in note.text for note in noisy.notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_lora": False, "use_dora": True}, "use_dora.*is a kind of LoRA"),
        ({"use_lora": False, "loraplus_lr_ratio": 16}, "loraplus_lr_ratio.*is a kind of LoRA"),
        ({"loraplus_lr_ratio": 0.5}, "must be a number from 1"),
        ({"loraplus_lr_ratio": 16, "training_kwargs": {"optimizers": (None, None)}}, "sets the optimizer up"),
        ({"use_rslora": "yes"}, "must be True or False"),
    ],
)
def test_what_does_not_go_together_is_said_beforehand(settings, said):
    with pytest.raises(ConfigError, match=said):
        settle(LLMTrainer("t", **settings), ModelSpec())


@pytest.mark.parametrize(
    "way", [{"deepspeed": {"zero_optimization": {"stage": 3}}}, {"arguments": {"fsdp": "full_shard"}}]
)
def test_dora_needs_whole_weights(way):
    faults = faults_of(TrainConfig(use_dora=True, **way), bits=None, gpus=0, workers=2)
    assert any(fault.option == "use_dora" and "DoRA" in str(fault) for fault in faults)
