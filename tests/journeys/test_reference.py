"""The two documents that describe the system this product grew from, snippet by snippet.

Rewritten only in imports, the connect call, the model (tiny) and the data (the demo's). Snippets that need a GPU
run on CPU workers here, as the product promises.
"""

from __future__ import annotations

import pytest

from llmnb import LLM, Collection, Document, LLMTrainer, LLMTrainingConfiguration, connect, demo
from llmnb.launch import runner


@pytest.fixture(params=["mongomock", pytest.param("mongod", marks=pytest.mark.mongod)])
def db(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the documents write to "output/…"
    uri = f"mongomock://{tmp_path.name}" if request.param == "mongomock" else request.getfixturevalue("mongo_uri")
    db = connect(uri, home=tmp_path / "home")
    yield db
    db.close()


@pytest.fixture(scope="module")
def texts():
    rows = demo.documents()[:48]
    return [{"text": f"{row['prompt']}\n{row['response']}"} for row in rows]


def insert(db, texts):
    train_documents = [Document({"text": example["text"], "_fold": "train"}) for example in texts[:40]]
    eval_documents = [Document({"text": example["text"], "_fold": "valid"}) for example in texts[40:]]
    db.execute(Collection("datas").insert_many(train_documents))
    db.execute(Collection("datas").insert_many(eval_documents))


# -- Build A Trainable LLM -----------------------------------------------------------------------------------------


def build_trainer(**changes):
    key = "text"
    select = Collection("datas").find()
    transform = None
    training_kwargs = {}
    return LLMTrainer(
        identifier="llm-finetune-trainer",
        output_dir="output/finetune",
        overwrite_output_dir=True,
        num_train_epochs=3,
        save_total_limit=3,
        logging_steps=10,
        evaluation_strategy="steps",
        save_steps=100,
        eval_steps=100,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        max_seq_length=512,
        key=key,
        select=select,
        transform=transform,
        training_kwargs=training_kwargs,
        **changes,
    )


def train_and_load(db, trainer, model_name, model_kwargs=None, tokenizer_kwargs=None):
    llm = LLM(
        identifier="llm",
        model_name_or_path=model_name,
        trainer=trainer,
        model_kwargs=model_kwargs or {},
        tokenizer_kwargs=tokenizer_kwargs or {},
    )
    db.apply(llm)
    return llm


def test_lora_then_load_the_model_directly(db, texts, tiny_llama):
    insert(db, texts)
    trainer = build_trainer(max_steps=4)
    trainer.use_lora = True
    trained = train_and_load(db, trainer, tiny_llama)
    llm = db.load("model", "llm")
    assert llm.predict("textwrap.", max_new_tokens=5) == trained.predict("textwrap.", max_new_tokens=5)


@pytest.mark.bitsandbytes
def test_qlora_then_load_a_specified_checkpoint(db, texts, tiny_llama):
    insert(db, texts)
    trainer = build_trainer(max_steps=2)
    trainer.use_lora = True
    trainer.bits = 4
    train_and_load(db, trainer, tiny_llama)
    experiment_id = db.show("checkpoint")[-1]
    version = None  # None means the last checkpoint
    checkpoint = db.load("checkpoint", experiment_id, version=version)
    assert checkpoint.step == 2
    llm = LLM(
        identifier="llm",
        model_name_or_path=tiny_llama,
        adapter_id=checkpoint,
        model_kwargs=dict(load_in_4bit=True),
    )
    assert isinstance(llm.predict("textwrap.", max_new_tokens=5), str)


@pytest.fixture
def on_mongod(mongo_uri, tmp_path, monkeypatch):
    """A database that Ray's workers can reach; its cluster ends with the test."""
    monkeypatch.chdir(tmp_path)
    db = connect(mongo_uri, home=tmp_path / "home")
    yield db
    db.close()
    runner.stop(tmp_path / "home", patience=2.0)


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.bitsandbytes
def test_deepspeed_then_multi_gpus(on_mongod, texts, tiny_llama):
    db = on_mongod
    insert(db, texts)
    deepspeed = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {
            "stage": 2,
        },
    }
    trainer = build_trainer(max_steps=2)
    trainer.use_lora = True
    trainer.bits = 4
    trainer.deepspeed = deepspeed
    train_and_load(db, trainer, tiny_llama)
    counts = db.run("latest").record["counts"]
    assert (counts["ranks"], counts["bits"], counts["steps"]) == (1, 4, 2)

    trainer = build_trainer(max_steps=2)
    trainer.use_lora = True
    trainer.bits = 4
    trainer.num_gpus = 2
    trained = train_and_load(db, trainer, tiny_llama)
    run = db.run("latest")
    counts = run.record["counts"]
    assert (counts["ranks"], counts["bits"], counts["steps"]) == (2, 4, 2)
    assert "2 workers train on the CPU" in " ".join(e.text for e in run.events() if e.kind == "note")
    llm = db.load("model", "llm")
    assert llm.predict("textwrap.", max_new_tokens=5) == trained.predict("textwrap.", max_new_tokens=5)


# -- Transformers ---------------------------------------------------------------------------------------------------


def test_predict_one(tiny_llama):
    llm = LLM(model_name_or_path=tiny_llama)
    assert isinstance(llm.predict_one("What are we having for dinner?", max_new_tokens=4), str)


@pytest.mark.bitsandbytes
def test_the_training_script(db, texts, tiny_llama):
    insert(db, texts)
    trainer = LLMTrainer(
        select=Collection("datas").find(),
        identifier="llm-finetune-training-config",
        output_dir="output/llm-finetune",
        overwrite_output_dir=True,
        num_train_epochs=1,
        save_total_limit=5,
        logging_steps=10,
        evaluation_strategy="steps",
        fp16=True,
        eval_steps=100,
        save_steps=100,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=4,
        max_length=512,
        use_lora=True,
    )
    llm = LLM(
        identifier="llm-finetune",
        bits=4,
        model_name_or_path=tiny_llama,
        trainer=trainer,
    )
    db.apply(llm)
    prompt = "### Human: Who are you? ### Assistant: "
    # Automatically load lora model for prediction, default use the latest checkpoint
    assert isinstance(llm.predict(prompt, max_new_tokens=10, do_sample=True), str)
    # fp16 on a machine without a GPU: it says so, and what was used instead
    run = db.run("latest")
    said = " ".join(e.text for e in run.events() if e.kind == "note")
    assert "fp16" in said and "float32" in said
    assert run.record["counts"]["steps"] == 10
    again = db.load("model", "llm-finetune")
    assert again.predict(prompt, max_new_tokens=10) == llm.predict(prompt, max_new_tokens=10)


def test_fit_with_a_training_configuration(db, texts, tiny_llama):
    insert(db, texts)
    llm = LLM(identifier="llm-finetune", model_name_or_path=tiny_llama)
    training_configuration = LLMTrainingConfiguration(
        identifier="llm-finetune-training-config", output_dir="output/llm-finetune", max_steps=2
    )
    llm.fit(
        X="text",
        select=Collection("datas").find(),
        configuration=training_configuration,
        db=db,
    )
    assert db.show("checkpoint", db.show("checkpoint")[-1]) == [2]


@pytest.mark.ray
@pytest.mark.mongod
@pytest.mark.slow
def test_fit_on_ray_with_ray_configs(on_mongod, texts, tiny_llama, tmp_path):
    from ray.train import RunConfig, ScalingConfig

    db = on_mongod
    insert(db, texts)
    llm = LLM(identifier="llm-finetune", model_name_or_path=tiny_llama)
    base_config = LLMTrainingConfiguration(
        identifier="llm-finetune-training-config", output_dir="output/llm-finetune", max_steps=2
    )
    scaling_config = ScalingConfig(
        num_workers=2,  # Number of GPUs you need
        use_gpu=True,
    )
    run_config = RunConfig(
        storage_path=str(tmp_path / "llm-finetune"),
        name="llm-finetune-test100",
    )
    ray_configs = {
        "scaling_config": scaling_config,
        "run_config": run_config,
    }
    llm.fit(
        X="text",
        select=Collection("datas").find(),
        configuration=base_config,
        db=db,
        on_ray=True,
        ray_configs=ray_configs,
    )
    run = db.run("latest")
    assert run.record["counts"]["ranks"] == 2
    assert (tmp_path / "llm-finetune" / "llm-finetune-test100").is_dir()
    assert db.show("checkpoint", db.show("checkpoint")[-1]) == [2]
    assert isinstance(llm.predict("textwrap.", max_new_tokens=5), str)
