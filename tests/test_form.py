"""The training form without any display: rows, what was typed, faults at their rows, and the lines that do the same."""

from __future__ import annotations

import shlex

import pytest

from llmnb import LLM, Collection, LLMTrainer, form, options
from llmnb.config import ModelSpec, TrainConfig
from llmnb.errors import ConfigError, Fault
from llmnb.notebook import arguments
from llmnb.notebook.plan import Plan

ROWS = {row.name: row for row in form.rows()}
LEAST = {"model_name_or_path": "facebook/opt-350m", "collection": "tickets"}


def frozen(values):
    plan = Plan(*form.settings(values), names={})
    return plan.llm.spec(), plan.parcel.config


# --- rows -----------------------------------------------------------------------------------------------------


def test_every_setting_has_one_row_or_a_reason_to_have_none():
    names = [row.name for row in form.rows()]
    assert len(names) == len(set(names))
    told = set(names) | form.NOT_ROWS
    known = {*TrainConfig.__dataclass_fields__, *ModelSpec.__dataclass_fields__, *options.training_arguments()}
    assert known - told == set()
    assert set(names) - known == {"collection", "filter", "limit", "ray_address"}


def test_every_row_can_be_shown():
    for row in form.rows():
        assert row.tab in form.TABS and row.label, row
        assert row.help or row.name.startswith("log_level"), f"{row.name} says no consequence"
        if row.kind == "yes":
            assert isinstance(row.default, bool), row
        if row.kind == "choice":
            assert row.default in row.choices and len(row.choices) > 1, row
        if row.needs:
            assert row.needs[0] in ROWS and row.needs[2], row


def test_a_form_without_any_change_gives_no_setting():
    every = {row.name: row.default for row in form.rows()}
    model, trainer = form.settings({**every, **LEAST})
    assert model == {"model_name_or_path": "facebook/opt-350m"}
    assert trainer == {"select": Collection("tickets").find()}


@pytest.mark.parametrize("preset", form.PRESETS, ids=lambda p: p.name)
def test_every_preset_can_be_trained_with(preset):
    assert preset.reason.endswith(".") and set(preset.values) <= set(ROWS)
    assert all(value != ROWS[name].default for name, value in preset.values.items()), "it says what it changes"
    frozen({**LEAST, **preset.values})


# --- what was typed -------------------------------------------------------------------------------------------


def test_what_was_typed_becomes_settings():
    spec, config = frozen(
        {
            **LEAST,
            "key": "prompt, response",
            "filter": '{"lang": "en"}',
            "limit": "100",
            "learning_rate": "2e-4",
            "use_lora": True,
            "lora_target_modules": "q_proj,v_proj",
            "gradient_checkpointing": "true",
            "deepspeed": '{"zero_optimization": {"stage": 2}}',
            "prompt_template": "Q: {input}\\n",
            "bits": "",
            "adapter_id": "run-1/20",
        }
    )
    assert config.select == Collection("tickets").find({"lang": "en"}).limit(100)
    assert config.key == ("prompt", "response") and config.lora_target_modules == ("q_proj", "v_proj")
    assert config.arguments == {"learning_rate": 2e-4, "gradient_checkpointing": True}
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    assert spec.adapter_id == "run-1/20"
    assert "Q: {input}\n" in (spec.prompt_template, config.prompt_template)


def test_an_empty_form_says_what_is_needed():
    with pytest.raises(ConfigError) as caught:
        form.settings({"limit": "many"})
    at, rest = form.by_row(caught.value.faults)
    assert set(at) == {"model_name_or_path", "collection", "limit"} and rest == []
    assert at["limit"] == "must be a whole number from 1, not 'many': leave it empty for all"


@pytest.mark.parametrize(
    ("typed", "row", "words"),
    [
        ({"learning_rate": "0"}, "learning_rate", "above 0"),
        ({"learning_rate": "fast"}, "learning_rate", "must be float"),
        ({"lora_r": "1.5"}, "lora_r", "whole number"),
        ({"bits": "4", "use_lora": False}, "bits", "use_lora=True"),
        ({"filter": "lang = en"}, "filter", "is not a MongoDB filter"),
        ({"prompt_template": "Q:"}, "prompt_template", "{input}"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "eval_strategy"),
    ],
)
def test_a_fault_stands_at_its_row(typed, row, words):
    with pytest.raises(ConfigError) as caught:
        frozen({**LEAST, **typed})
    at, rest = form.by_row(caught.value.faults)
    assert set(at) == {row} and words in at[row] and rest == []


def test_faults_of_other_names_find_their_row_too():
    faults = [Fault("select", "is empty"), Fault("--evaluation_strategy", "no"), Fault("training_kwargs['x']", "no")]
    at, rest = form.by_row([*faults, Fault("eval_strategy", "never", "say so")])
    assert at == {"collection": "is empty", "eval_strategy": "no; never: say so"}
    assert rest == ["training_kwargs['x'] no"]


# --- the lines that do the same -------------------------------------------------------------------------------

MUCH = {
    **LEAST,
    "identifier": "it's mine",
    "key": "prompt,response",
    "filter": '{"lang": {"$in": ["en", "d e"]}}',
    "limit": "7",
    "prompt_template": "Q: {input}\\nA: ",
    "lora_r": "32",
    "lora_dropout": "0",
    "lora_target_modules": "q_proj,v_proj",
    "learning_rate": "2e-4",
    "num_train_epochs": "2",
    "warmup_steps": "0.03",
    "bits": "4",
    "padding_free": True,
    "cache_rows": False,
    "log_to_db": False,
    "deepspeed": '{"zero_optimization": {"stage": 2}}',
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "gradient_checkpointing": "false",
}


@pytest.mark.parametrize("values", [LEAST, MUCH, *({**LEAST, **p.values} for p in form.PRESETS)])
def test_the_python_text_gives_the_same_config(values):
    plan = Plan(*form.settings(values), names={})
    scope = {"db": type("Db", (), {"apply": staticmethod(lambda llm, wait: llm)})}
    exec(plan.python(), scope)
    assert isinstance(scope["llm"], LLM) and isinstance(scope["trainer"], LLMTrainer)
    assert scope["llm"].spec() == plan.llm.spec()
    assert scope["trainer"].freeze(scope["llm"].spec()).config == plan.parcel.config


@pytest.mark.parametrize("values", [LEAST, MUCH, *({**LEAST, **p.values} for p in form.PRESETS)])
def test_the_magic_line_gives_the_same_config(values):
    line = form.line(values)
    assert line.startswith("%llm_train --model facebook/opt-350m --collection tickets") and "\n" not in line
    words = shlex.split(arguments.expanded(line, {}))
    assert words[-1] == "--start"
    given = arguments.named(words[1:-1])
    place = {name: given.pop(name, None) for name in ("collection", "filter", "limit")}
    model, trainer = arguments.settings(given, {})
    limit = int(place["limit"]) if place["limit"] else None
    trainer["select"] = form.selection(place["collection"], place["filter"], limit)
    plan = Plan(model, trainer, names={})
    assert (plan.llm.spec(), plan.parcel.config) == frozen(values)


@pytest.mark.parametrize("values", [LEAST, MUCH, *({**LEAST, **p.values} for p in form.PRESETS)])
def test_a_recorded_training_fills_the_form_again(values):
    spec, config = frozen(values)
    again, left = form.filled(ModelSpec.from_json(spec.to_json()), TrainConfig.from_json(config.to_json()))
    assert left == []
    assert frozen(again) == (spec, config)


def test_what_the_form_cannot_say_is_named():
    select = Collection("tickets").find({}, {"text": 1}).sort("text", 1)
    config = LLMTrainer(select=select, transform=lambda text: {"text": text}, key="text").freeze().config
    _, left = form.filled(ModelSpec(model_name_or_path="m"), config)
    assert left == ["transform", "aggregation, projection, sort or skip"]


# --- how long -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "found", "workers", "expected"),
    [
        ({}, 100, 1, 39),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, 100, 1, 4),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 1}, 10, 2, 8),
        ({"max_steps": 7}, 100, 4, 7),
    ],
)
def test_the_steps_are_those_of_the_trainer(settings, found, workers, expected):
    assert form.steps(LLMTrainer(**settings).freeze().config, found, workers) == expected


SAMPLE = {"used": 100, "tokens": 10_000, "longest": 200}
SHAPE = {"total": 1_000_000_000, "trained": 5_000_000, "layers": 24, "hidden": 2048, "vocabulary": 32_000, "width": 2}


def told(shape=SHAPE, pace=1e13, **settings):
    return form.forecast(LLMTrainer(**settings).freeze().config, 1000, SAMPLE, shape, pace)


def test_a_forecast_counts_the_tokens_of_all_epochs():
    assert (told().steps, told().tokens) == (375, 300_000)
    assert told(max_steps=10).tokens == 10 * 8 * 100
    assert told(num_gpus=2, num_train_epochs=1).steps == 63
    assert told(shape=None).memory is None and told(pace=None).seconds is None


def test_a_forecast_of_time_follows_the_weights_and_the_tokens():
    assert told().seconds == pytest.approx(4 * 1e9 * 300_000 / (1e13 * 0.4))
    whole = {**SHAPE, "trained": SHAPE["total"]}
    assert told(whole, use_lora=False).seconds == pytest.approx(1.5 * told().seconds)
    assert told(gradient_checkpointing=True).seconds == pytest.approx(1.5 * told().seconds)
    tiny = {**SHAPE, "total": 1000, "trained": 10}
    assert told(tiny).seconds > 5, "a step takes its time, however small the model is"


def test_a_forecast_of_dpo_has_two_answers_and_a_reference():
    preferring = told(method="dpo")
    assert preferring.seconds == pytest.approx(1.5 * told().seconds) and preferring.memory > told().memory
    whole = {**SHAPE, "trained": SHAPE["total"]}
    copy = told(whole, use_lora=False, method="dpo").memory - told(whole, use_lora=False).memory
    assert copy > whole["total"] * whole["width"]


def test_the_method_is_a_row_and_what_needs_it_says_so():
    rows = {row.name: row for row in form.rows()}
    assert rows["method"].choices == ("sft", "dpo") and rows["method"].default == "sft" and rows["method"].help
    assert rows["dpo_beta"].needs[:2] == rows["dpo_loss_type"].needs[:2] == ("method", "dpo")
    _, config = frozen({**LEAST, "method": "dpo", "dpo_beta": "0.2", "key": "prompt,chosen,rejected"})
    assert (config.method, config.dpo_beta, config.key) == ("dpo", 0.2, ("prompt", "chosen", "rejected"))


def test_a_forecast_of_memory_knows_what_saves_it():
    whole = {**SHAPE, "trained": SHAPE["total"]}
    lora, full = told().memory, told(whole, use_lora=False).memory
    assert full - lora == pytest.approx(12 * SHAPE["total"], rel=0.05), "gradients and Adam's two moments"
    assert told({**SHAPE, "width": 0.55}).memory == pytest.approx(lora - 1.45e9, rel=0.01)
    assert told(gradient_checkpointing=True).memory < lora and told(per_device_train_batch_size=1).memory < lora
