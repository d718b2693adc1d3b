"""Any transformers pipeline as a model; TextClassification is trained."""

import pytest
from tiny import make_tokenizer

from llmnb import Collection, LLMTrainer, Pipeline, TextClassification, connect
from llmnb.errors import ConfigError, DataError, ModelError


@pytest.fixture
def db(tmp_path):
    db = connect(f"mongomock://{tmp_path.name}", home=tmp_path / "home")
    yield db
    db.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama without any classification head."""
    from tiny import make_model

    return str(make_model("llama", tmp_path_factory.mktemp("cls") / "base"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    import torch
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


MOODS = [("a good day", "good"), ("a long night", "bad"), ("red and blue", "colour")]


def insert(db, count=30):
    rows = [
        {"text": f"{MOODS[i % 3][0]} {i}", "mood": MOODS[i % 3][1], "_fold": "valid" if i >= 24 else "train"}
        for i in range(count)
    ]
    db.execute(Collection("moods").insert_many(rows))


def trainer(tmp_path, **changes):
    settings = {
        "select": Collection("moods").find(),
        "key": ("text", "mood"),
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "use_cpu": True,
    }
    return LLMTrainer(**{**settings, **changes})


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_classifier_learns_and_loads(db, base, tmp_path, use_lora):
    insert(db)
    model = TextClassification("moods", base, trainer=trainer(tmp_path, use_lora=use_lora))
    run = db.apply(model)
    assert [m for m in run.metrics() if "eval_accuracy" in m][-1]["eval_accuracy"] == 1.0
    for text, mood in MOODS:
        assert model.predict(f"{text} 7")["label"] == mood
    loaded = db.load("model", "moods")
    assert isinstance(loaded, TextClassification)
    both = ["a good day 7", "red and blue 7"]
    assert [o["label"] for o in loaded.predict(both)] == ["good", "colour"]
    assert loaded.predict(both)[0]["score"] == pytest.approx(model.predict(both)[0]["score"], abs=1e-6)


def test_num_labels_is_honoured(db, base, tmp_path):
    insert(db)
    model = TextClassification(
        "moods", base, model_kwargs={"num_labels": 5}, trainer=trainer(tmp_path, num_train_epochs=1, use_lora=False)
    )
    db.apply(model)
    assert len(model.predict("a good day", top_k=None)) == 5
    few = TextClassification("moods", base, model_kwargs={"num_labels": 2}, trainer=trainer(tmp_path))
    with pytest.raises(DataError, match="num_labels is 2"):
        db.apply(few)


def test_accumulation_weighs_every_row_the_same(db, base, tmp_path):
    insert(db)
    losses = []
    for batch, accumulate in ((8, 1), (1, 8)):
        settings = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "logging_steps": 1,
            "use_lora": False,
        }
        run = db.apply(TextClassification("moods", base, trainer=trainer(tmp_path, **settings)))
        losses.append([m["loss"] for m in run.metrics() if "loss" in m])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_bad_labels_are_named(db, base, tmp_path):
    insert(db)
    with pytest.raises(DataError, match="mood"):
        db.apply(TextClassification("moods", base, trainer=trainer(tmp_path, key=("text", "mod"))))
    with pytest.raises(ConfigError, match="pair"):
        db.apply(TextClassification("moods", base, trainer=trainer(tmp_path, key="text")))


def shout(text):
    return text.upper()


def top(answers):
    return answers[0]["token_str"]


def test_any_pipeline_with_types_of_ones_own(db, bert):
    model = Pipeline("filler", "fill-mask", bert, preprocess=lambda x: f"a {x} <mask>", postprocess=top)
    assert isinstance(model.predict("good"), str)
    assert len(model.predict(["good", "long"])) == 2
    db.apply(model)
    loaded = db.load("model", "filler")
    with pytest.raises(ModelError, match="preprocess function of your own"):
        loaded.predict("good")
    loaded.preprocess, loaded.postprocess = (lambda x: f"a {x} <mask>"), top
    assert loaded.predict("good") == model.predict("good")


def test_a_pipeline_that_cannot_be(bert, tmp_path):
    with pytest.raises(ModelError, match="did you mean 'fill-mask'"):
        Pipeline("x", "fil-mask", bert).predict("a")
    with pytest.raises(ModelError, match="nowhere"):
        Pipeline("x", "fill-mask", str(tmp_path / "nowhere")).predict("a")
    with pytest.raises(ConfigError, match="cannot be trained"):
        Pipeline("x", "fill-mask", bert, trainer=LLMTrainer())
