"""LLMTrainer: names, synonyms, checks; TrainConfig's JSON."""

import pickle

import pytest

from llmnb import Collection, LLMTrainer, LLMTrainingConfiguration
from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConfigError
from llmnb.options import check, parse, training_arguments


def test_every_option_of_training_arguments_is_known_with_its_type():
    from dataclasses import fields

    from transformers import TrainingArguments

    real = {f.name for f in fields(TrainingArguments) if f.init}
    assert set(training_arguments()) == real
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    for option in training_arguments().values():
        if option.default is not None:
            assert option.default == defaults[option.name], option.name
        assert option.types, option.name


def test_reading_options_loads_no_transformers():
    import subprocess
    import sys

    code = "import sys; from llmnb.options import training_arguments as t; t(); print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_unknown_options_are_all_named_with_near_names():
    with pytest.raises(ConfigError) as error:
        LLMTrainer(learning_rat=1, lora_rank=2)
    assert "learning_rate" in str(error.value) and "lora_rank" in str(error.value)
    with pytest.raises(ConfigError, match="eval_strategy"):
        LLMTrainer().eval_stratgy = "steps"


def test_all_faults_are_reported_together():
    trainer = LLMTrainer(learning_rate="2e-4", bits=6, lora_r=0, eval_strategy="stps", select=3, key=7)
    with pytest.raises(ConfigError) as error:
        trainer.freeze()
    named = {f.option for f in error.value.faults}
    assert named == {"learning_rate", "bits", "lora_r", "eval_strategy", "select", "key"}


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"overwrite_output_dir": True}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"per_gpu_train_batch_size": 2}, {"per_device_train_batch_size": 2}),
    ],
)
def test_older_names_keep_their_meaning(old, today):
    assert dict(LLMTrainer(**old).freeze().config.arguments) == today


def test_max_length_and_X_are_synonyms():
    config = LLMTrainingConfiguration(max_length=64, X="text").freeze().config
    assert (config.max_seq_length, config.key) == (64, "text")


def test_what_cannot_be_honoured_raises():
    for settings in (
        {"save_safetensors": False},
        {"use_ipex": True},
        {"resume_from_checkpoint": "x"},
        {"load_best_model_at_end": True},
        {"fp16": True, "bf16": True},
        {"bits": 4, "use_lora": False},
        {"training_kwargs": {"model": 1}},
        {"training_kwargs": {"calbacks": []}},
        {"ray_configs": {"datasets": {}}},
        {"early_stopping_patience": 2},
        {"max_steps": 0},
        {"prompt_template": "no place"},
        {"hub_token": "hf_secret"},
    ):
        with pytest.raises(ConfigError):
            LLMTrainer(**settings).freeze()


def test_attributes_may_be_set_and_read():
    trainer = LLMTrainer()
    assert trainer.lora_r == 8 and trainer.num_train_epochs == 3.0 and trainer.eval_strategy == "no"
    trainer.lora_r = 16
    trainer.evaluation_strategy = "epoch"
    assert trainer.eval_strategy == trainer.evaluation_strategy == "epoch"
    assert trainer.freeze().config.lora_r == 16
    with pytest.raises(AttributeError, match="lora_r"):
        _ = trainer.lora_rr


def test_bits_of_model_and_trainer():
    with pytest.raises(ConfigError, match="model says 4"):
        LLMTrainer(bits=8).freeze(ModelSpec(bits=4))
    assert LLMTrainer().freeze(ModelSpec(bits=4)).config.bits == 4
    for wrong in (6, True, "4"):
        with pytest.raises(ConfigError, match="use 4, 8 or None"):
            LLMTrainer(bits=wrong).freeze()


def test_a_frozen_config_makes_the_round_trip_and_never_changes():
    trainer = LLMTrainer(
        select=Collection("d").find({"n": {"$gt": 1}}).limit(3),
        eval_selects={"hard": Collection("v").find()},
        key=("prompt", "response"),
        learning_rate=2e-4,
        lr_scheduler_kwargs={"a": [1, 2]},
        deepspeed={"zero_optimization": {"stage": 2}},
    )
    config = trainer.freeze().config
    assert TrainConfig.from_json(config.to_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert LLMTrainer.from_config(config).freeze().config == config
    with pytest.raises(TypeError):
        config.arguments["learning_rate"] = 1
    with pytest.raises(AttributeError):
        config.lora_r = 3
    trainer.lora_r = 99
    assert config.lora_r == 8


def test_a_transform_is_recorded_as_source_and_travels_beside():
    def shout(text):
        return {"text": text.upper()}

    parcel = LLMTrainer(transform=shout).freeze()
    assert "text.upper()" in parcel.config.transform and parcel.transform is shout


def test_typed_text_becomes_values():
    assert parse("learning_rate", "2e-4") == 2e-4
    assert parse("load_best_model_at_end", "true") is True
    assert parse("eval_steps", "none") is None
    assert parse("lr_scheduler_kwargs", '{"a": 1}') == {"a": 1}
    assert parse("optim", "adamw_torch") == "adamw_torch"
    assert check("eval_strategy", parse("eval_strategy", "no")) == ("no", None)


def test_repr_hides_the_cluster_address():
    assert "secret" not in repr(LLMTrainer(ray_address="ray://secret@host"))


def test_no_token_is_taken_where_it_would_be_stored():
    from llmnb import LLM

    for kwargs in ({"model_kwargs": {"token": "hf_secret"}}, {"tokenizer_kwargs": {"use_auth_token": "hf_secret"}}):
        with pytest.raises(ConfigError, match="HF_TOKEN") as error:
            LLM("x", "owner/name", **kwargs)
        assert "hf_secret" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        LLMTrainer(hub_token="hf_secret").freeze()
    assert "hf_secret" not in str(error.value)
