"""Methods beyond plain LoRA: rsLoRA, DoRA, LoRA+, NEFTune, PiSSA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drill import chats, folder_of, train, weights
from ranks import carry_out
from transformers import TrainerCallback

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
        ({"lora_init": "gaussian"}, "must be 'default', 'pissa'"),
        ({"use_lora": False, "lora_init": "pissa"}, "lora_init.*is a kind of LoRA"),
        ({"lora_init": "pissa", "bits": 4}, "whole weights"),
        ({"lora_init": "pissa", "use_dora": True}, "both take a weight apart"),
    ],
)
def test_what_does_not_go_together_is_said_beforehand(settings, said):
    with pytest.raises(ConfigError, match=said):
        settle(LLMTrainer("t", **settings), ModelSpec())


@pytest.mark.parametrize(
    "way", [{"deepspeed": {"zero_optimization": {"stage": 3}}}, {"arguments": {"fsdp": "full_shard"}}]
)
def test_dora_needs_whole_weights(way):
    faults = faults_of(TrainConfig(use_dora=True, lora_init="pissa", **way), bits=None, gpus=0, workers=2)
    assert any(fault.option == "use_dora" and "DoRA" in str(fault) for fault in faults)
    assert any(fault.option == "lora_init" and "PiSSA" in str(fault) for fault in faults)


# --- PiSSA ----------------------------------------------------------------------------------------------------

PISSA = {"lora_init": "pissa", "lora_r": 4, "lora_alpha": 8}


def logits_of(model):
    ids = torch.arange(24).reshape(2, 12) + 7
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def base_of(family="llama"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder_of(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "lora_alpha": 5}])
def test_pissa_begins_as_the_base_with_the_principal_part_that_peft_finds(family, more):
    from peft import LoraConfig, get_peft_model

    from llmnb.engine.adapters import attach_lora
    from llmnb.engine.pissa import Principal

    settings = {**PISSA, **more}
    plain = logits_of(base_of(family))
    model = attach_lora(base_of(family), TrainConfig(**settings))
    principal = Principal(model, "pissa")
    assert torch.allclose(logits_of(model), plain, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), plain)
    options = dict(r=4, lora_alpha=settings["lora_alpha"], use_rslora=settings.get("use_rslora", False))
    conv = family == "gpt2"
    theirs = get_peft_model(
        base_of(family),
        LoraConfig(init_lora_weights="pissa", target_modules="all-linear", fan_in_fan_out=conv, **options),
    )
    for name, layer in principal.layers.items():
        other = theirs.get_submodule(name)
        mine = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.allclose(mine, other.lora_B["default"].weight @ other.lora_A["default"].weight, atol=1e-5), name


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "lora_alpha": 5}, {"lora_init": "pissa_niter_8"}])
def test_a_pissa_checkpoint_is_an_adapter_of_the_original_base(more, tmp_path):
    from llmnb.engine.adapters import load_adapter
    from llmnb.engine.merging import merge

    seen = []

    class Last(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen.append(logits_of(model))

    run = train(
        tmp_path / "run",
        documents=chats(),
        config={**PISSA, **more},
        max_steps=6,
        trainer_kwargs={"callbacks": [Last()]},
    )
    plain = train(tmp_path / "plain", documents=chats(), config={"lora_r": 4, "lora_alpha": 8}, max_steps=1)
    assert run.losses()[1] == pytest.approx(plain.losses()[1], abs=1e-5) and run.losses()[6] < run.losses()[1]
    told = json.loads((run.last / "adapter_config.json").read_text())
    assert told["r"] == 8 and told["init_lora_weights"] is True and run.saved[-1]["base"] == plain.saved[-1]["base"]
    loaded = logits_of(load_adapter(base_of(), run.last))
    assert torch.allclose(loaded, seen[0], atol=1e-5) and (loaded - logits_of(base_of())).abs().max() > 0.01
    report = merge(ModelSpec(model_name_or_path=str(folder_of())), run.last, tmp_path / "out")
    assert report["max_logit_gap"] < report["bound"] and report["moved"] > 0.01


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "with biases"])
def test_pissa_resumes_exactly_and_loads_its_best(kind, tmp_path):
    more = {"lora_init": kind} if kind != "with biases" else {"lora_bias": "all"}
    options = dict(
        base=folder_of("gpt2") if kind == "with biases" else None,
        documents=chats(),
        sets={"valid": chats(2)},
        config={**PISSA, **more, "lora_dropout": 0.1},
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
    )
    whole = train(tmp_path / "whole", **options)
    rest = train(tmp_path / "rest", resume=whole.saved[0]["folder"], **options)
    a, b = weights(whole.last), weights(rest.last)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert rest.losses() == {step: loss for step, loss in whole.losses().items() if step > 3}
    assert rest.series("eval_loss")[6] == whole.series("eval_loss")[6]


def test_pissa_begins_a_new_adapter_only(tmp_path):
    first = train(tmp_path / "first", max_steps=1).last
    with pytest.raises(ConfigError, match="goes on from"):
        train(tmp_path / "second", adapter=first, config=PISSA)


def test_pissa_on_two_ranks_and_dpo_from_it(tmp_path):
    task = dict(documents=16, max_steps=4, optim="adamw_torch", config=PISSA, save_strategy="steps", save_steps=4)
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    zero = {**PISSA, "deepspeed": {"zero_optimization": {"stage": 2}, **dict.fromkeys(auto, "auto")}}
    tasks = [
        {"name": "one", "ranks": 1, "per_device_train_batch_size": 4, **task},
        {"name": "two", "ranks": 2, "per_device_train_batch_size": 2, **task},
        {"name": "ZeRO-2", "ranks": 2, "per_device_train_batch_size": 2, **task, "config": zero},
    ]
    found = carry_out(tasks, tmp_path)
    assert not [result["error"] for result in found.values() if result["error"]]
    a = weights(Path(found["one"]["saved"][-1]))
    for way in ("two", "ZeRO-2"):
        assert found[way]["losses"] == pytest.approx(found["one"]["losses"], abs=2e-5)
        b = weights(Path(found[way]["saved"][-1]))
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
    pytest.importorskip("trl")
    documents = [{"_id": i, "prompt": "what? ", "chosen": "yes", "rejected": "no"} for i in range(4)]
    run = train(tmp_path / "dpo", documents=documents, config={**PISSA, "method": "dpo"}, learning_rate=1e-3)
    assert run.losses()[1] == pytest.approx(0.693147, abs=1e-4) and run.losses()[3] < run.losses()[1]
