"""DPO: rows of preferences, the loss against a hand computation and against TRL's own trainer, and a run's habits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drill import PIECES, folder_of, pairs, train, weights
from ranks import carry_out

from llmnb import LLMTrainer
from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine.preferences import COLUMNS, PreferenceReader
from llmnb.engine.rows import NO_LOSS, chat_ids, make_rows, prompt_ids
from llmnb.errors import ConfigError, DataError, ModelError
from llmnb.launch.sharing import faults_of
from llmnb.trainer import settle

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("deepspeed")

DPO = {"method": "dpo"}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def preferences(count: int = 12) -> list[dict]:
    """The same question with a good and a bad answer, of uneven length."""
    return [
        {
            "_id": i,
            "prompt": f"{PIECES[i % 5]} what is your name? ",
            "chosen": "my name is model" + "." * (1 + i % 3),
            "rejected": ("red green", "no", "one two three four")[i % 3],
        }
        for i in range(count)
    ]


def as_chats(documents: list[dict]) -> list[dict]:
    return [
        {
            "_id": d["_id"],
            "chosen": [{"role": "user", "content": d["prompt"]}, {"role": "assistant", "content": d["chosen"]}],
            "rejected": [{"role": "user", "content": d["prompt"]}, {"role": "assistant", "content": d["rejected"]}],
        }
        for d in documents
    ]


def tokenizer_of():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder_of())


# --- rows -----------------------------------------------------------------------------------------------------


def rows_of(documents, **config):
    return make_rows(documents, tokenizer_of(), TrainConfig(**{"method": "dpo", "max_seq_length": 128, **config}))


def test_both_answers_are_rows_as_every_training_makes_them():
    tokenizer, documents = tokenizer_of(), preferences()
    rows = rows_of(documents, prompt_template="Q: {input}\nA:")
    for side, answer in (("", "chosen"), ("rejected_", "rejected")):
        plain = make_rows(
            [{"prompt": d["prompt"], "response": d[answer]} for d in documents],
            tokenizer,
            TrainConfig(key=("prompt", "response"), prompt_template="Q: {input}\nA:"),
        )
        for pair, row in zip(rows, plain, strict=True):
            assert pair["input_ids" if not side else "rejected_ids"] == row["input_ids"]
            assert pair[side + "labels"] == row["labels"]
            asked = prompt_ids(documents[0]["prompt"], tokenizer, "Q: {input}\nA:")
            assert row["input_ids"][0] == tokenizer.bos_token_id and row["input_ids"][-1] == tokenizer.eos_token_id
    assert rows[0]["input_ids"][: len(asked)] == rows[0]["rejected_ids"][: len(asked)] == asked
    assert rows.report.used == 12 and rows.report.kind == "pair" and rows.report.key == ("prompt", "chosen", "rejected")
    assert rows.report.tokens == int(rows.sides.lengths.sum())


def test_chats_in_all_their_forms_give_the_same_rows():
    documents = preferences(3)
    implicit = as_chats(documents)
    explicit = [{"prompt": d["chosen"][:1], "chosen": d["chosen"][1:], "rejected": d["rejected"][1:]} for d in implicit]
    twice = [{**d, "prompt": plain["prompt"]} for d, plain in zip(implicit, documents)]  # as UltraFeedback has it
    texts = [
        {"prompt": d["chosen"][:1], "chosen": p["chosen"], "rejected": p["rejected"]}
        for d, p in zip(implicit, documents)
    ]
    sharegpt = [
        {
            side: [{"from": m["role"].replace("assistant", "gpt"), "value": m["content"]} for m in d[side]]
            for side in ("chosen", "rejected")
        }
        for d in implicit
    ]
    forms = [list(rows_of(form)) for form in (implicit, explicit, twice, texts, sharegpt)]
    assert all(form == forms[0] for form in forms[1:])
    tokenizer = tokenizer_of()
    asked = chat_ids(implicit[0]["chosen"][:1], tokenizer)
    row = forms[0][0]
    assert row["input_ids"][: len(asked)] == asked and set(row["labels"][: len(asked)]) == {NO_LOSS}
    said = tokenizer.decode([label for label in row["rejected_labels"] if label != NO_LOSS])
    assert said == documents[0]["rejected"] + "<|im_end|>"


def test_answers_before_the_question_carry_no_loss():
    before = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no."}]
    (document,) = as_chats(preferences(1))
    document = {**document, **{side: before + document[side] for side in ("chosen", "rejected")}}
    row = rows_of([document])[0]
    said = tokenizer_of().decode([label for label in row["labels"] if label != NO_LOSS])
    assert said == "my name is model.<|im_end|>"


def test_bad_documents_are_counted_once_each():
    good = preferences(30)
    bad = [
        {"_id": "null", **good[0], "prompt": None},
        {**good[0], "_id": "same", "rejected": good[0]["chosen"]},
        {**good[0], "_id": "empty", "rejected": " "},
        {**good[0], "_id": "number", "chosen": 3},
        {"_id": "lacking", "prompt": "a", "chosen": "b"},
        {"_id": "chat", **as_chats(good[:1])[0], "prompt": "what?"},
        {**good[0], "_id": "long", "prompt": "the cat sat " * 60},
    ]
    bad[0]["_id"], bad[5]["_id"] = "null", "chat"
    rows = rows_of(good + bad, max_cut_share=0.5, key=("prompt", "chosen", "rejected"))
    report, told = rows.report, " | ".join(rows.report.notes)
    assert (report.found, report.used, report.dropped, len(rows)) == (37, 30, 7, 30)
    for name in ("null", "same", "empty", "number", "lacking", "chat", "long"):
        assert name in told, name
    with pytest.raises(DataError, match="7 of 37"):
        rows_of(good + bad, key=("prompt", "chosen", "rejected"))


def test_what_is_cut_is_counted_once_for_both_answers():
    documents = [{**d, "chosen": d["chosen"] * 40, "rejected": d["rejected"] * 60} for d in preferences(2)]
    rows = rows_of(documents + preferences(38), max_seq_length=64)
    assert rows.report.cut == 2 and max(rows.sides.lengths) == 64
    assert any(note.startswith("2 of 40 rows have more than 64 tokens") for note in rows.report.notes)
    same = {**documents[0], "_id": "late", "rejected": documents[0]["chosen"] + " but not here"}
    rows = rows_of([same, *preferences(38)], max_seq_length=64)
    assert rows.report.dropped == 1 and any("the same in the 64 tokens" in note for note in rows.report.notes)


def test_the_fields_are_found_or_asked_for():
    asked = [{"question": d["prompt"], "chosen": d["chosen"], "rejected": d["rejected"]} for d in preferences(3)]
    assert rows_of(asked).report.key == ("question", "chosen", "rejected")
    with pytest.raises(DataError, match="which fields"):
        rows_of(pairs())
    with pytest.raises(ConfigError, match="does not go with method='dpo'"):
        rows_of(preferences(), key_kind="pair")
    made = make_rows(
        pairs(),
        tokenizer_of(),
        TrainConfig(method="dpo", key=("prompt", "response")),
        transform=lambda prompt, response: {"prompt": prompt, "chosen": response, "rejected": "no"},
    )
    assert len(made) == 12
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    chats = [{**as_chats(preferences(1))[0], "tools": tools}]
    reader = PreferenceReader(
        ("chosen", "rejected", "tools"), None, lambda c, r, t: dict(zip(COLUMNS[1:], (c, r)), tools=t), chats
    )
    sample = reader.read(chats[0])
    assert sample.value.tools == sample.rejected.tools == tools


def test_an_evaluation_asks_for_the_answer_that_was_chosen():
    from llmnb.engine.questions import questions

    bad = {"_id": "bad", "chosen": "b", "rejected": 3}
    options = {"prompt_template": "{input}", "transform": None, "context": 256}
    for documents, kind in ((preferences(5), "pair"), (as_chats(preferences(5)), "messages")):
        found = questions([bad, *documents], tokenizer_of(), TrainConfig(method="dpo"), **options)
        assert found.kind == kind and [one.id for one in found.asked] == list("01234")
        assert [one.reference for one in found.asked] == [d["chosen"] for d in preferences(5)]
        pairs = rows_of(documents)
        assert [found.rows.ids(at).tolist() for at in range(5)] == [row["input_ids"] for row in pairs]
        assert [found.rows.labels(at).tolist() for at in range(5)] == [row["labels"] for row in pairs]
        assert found.rows.report.tokens == int(found.rows.lengths.sum()) < pairs.report.tokens


# --- loss -----------------------------------------------------------------------------------------------------


def log_probabilities(model, batch):
    """Sum over the answer, (2 × pairs,): written out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (each * (labels != NO_LOSS)).sum(1)


def moved_adapter(tmp_path):
    """A LoRA adapter that is far from its base."""
    return train(tmp_path / "sft", documents=pairs(), max_steps=6, config={"lora_r": 4}).last


def test_the_loss_and_the_rewards_are_those_of_the_paper_and_of_trl(tmp_path):
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from llmnb.engine.adapters import load_adapter
    from llmnb.engine.dpo import TOLD, PairLoss
    from llmnb.engine.preferences import PairCollator

    adapter, tokenizer, rows = moved_adapter(tmp_path), tokenizer_of(), rows_of(preferences(6))
    batch = PairCollator(tokenizer)(list(rows))
    model = load_adapter(AutoModelForCausalLM.from_pretrained(folder_of()), adapter, trainable=True)
    with torch.no_grad():
        chosen, rejected = log_probabilities(model, batch).chunk(2)
        with model.disable_adapter():
            base_chosen, base_rejected = log_probabilities(model, batch).chunk(2)
    margins = 0.3 * ((chosen - base_chosen) - (rejected - base_rejected))
    assert margins.abs().max() > 0.05
    loss, told = PairLoss(model, None, beta=0.3, kind="sigmoid", device="cpu")(model, batch, torch.enable_grad)
    told = dict(zip(TOLD, told))
    assert float(loss) == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-5)
    assert told["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert told["rewards/chosen"] == pytest.approx(float(0.3 * (chosen - base_chosen).mean()), abs=1e-5)
    assert told["rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert told["logps/rejected"] == pytest.approx(float(rejected.mean()), abs=1e-4)

    # The same pairs and ids, through TRL's own trainer; its reference is given as a model of its own.
    data = []
    for row in rows:
        head = next(at for at, label in enumerate(row["labels"]) if label != NO_LOSS)
        ids = row["input_ids"]
        data.append({"prompt_ids": ids[:head], "chosen_ids": ids[head:], "rejected_ids": row["rejected_ids"][head:]})
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder_of()), adapter, is_trainable=True)
    theirs = _TrlTrainer(DPOTrainer)(
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(folder_of()),
        args=DPOConfig(
            str(tmp_path / "trl"),
            beta=0.3,
            per_device_train_batch_size=6,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    theirs.train()
    entry = theirs.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(loss), abs=1e-5)
    for name in TOLD:
        assert entry[name] == pytest.approx(told[name], abs=1e-4), name


def _TrlTrainer(kind):
    """TRL's trainer on ids that are ready: it would tokenise texts again."""

    class Ready(kind):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    return Ready


@pytest.mark.parametrize(
    "kind", ["hinge", "ipo", "apo_zero", "apo_down", "bco_pair", "nca_pair", "sppo_hard", "sigmoid_norm"]
)
def test_every_loss_type_trains(kind, tmp_path):
    run = train(tmp_path, documents=preferences(), config={**DPO, "dpo_loss_type": kind}, max_steps=4)
    assert all(loss == loss for loss in run.losses().values()) and run.series("rewards/margins")[4] > 0


def test_accumulation_weighs_pairs_and_not_batches(tmp_path):
    options = dict(
        documents=preferences(5), config=DPO, num_train_epochs=1, max_steps=-1, train_sampling_strategy="sequential"
    )
    small = train(tmp_path / "a", per_device_train_batch_size=2, gradient_accumulation_steps=3, **options)
    large = train(tmp_path / "b", per_device_train_batch_size=5, **options)
    assert small.losses() == pytest.approx(large.losses(), abs=1e-6)
    a, b = weights(small.last), weights(large.last)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    for name in ("rewards/chosen", "logps/chosen"):
        assert small.series(name) == pytest.approx(large.series(name), abs=1e-4)


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_run_learns_the_preference_and_its_checkpoint_loads(use_lora, tmp_path):
    from llmnb.engine.generation import Answerer

    run = train(
        tmp_path,
        documents=preferences(),
        sets={"valid": preferences(4)},
        config={**DPO, "use_lora": use_lora},
        max_steps=16,
        learning_rate=1e-2 if use_lora else 1e-3,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="steps",
        save_steps=8,
        metric_for_best_model="rewards/accuracies",
        load_best_model_at_end=True,
    )
    assert run.losses()[1] == pytest.approx(0.693147, abs=1e-5) and run.series("rewards/margins")[1] == 0.0
    assert run.series("rewards/accuracies")[1] == 0.0 and run.series("rewards/accuracies")[16] == 1.0
    assert run.series("eval_rewards/accuracies")[16] == 1.0 and run.series("eval_loss")[16] < 0.3
    assert run.counts["method"] == "dpo" and run.counts["rows"] == 12 and run.counts["kind"] == "pair"
    assert run.saved[-1]["metrics"]["eval_rewards/accuracies"] == 1.0
    assert not any("ref" in name for name in run.saved[-1]["files"])
    with Answerer(ModelSpec(model_name_or_path=str(folder_of())), run.last) as answerer:
        assert answerer.answer(["the cat sat what is your name? "], max_new_tokens=8)[0].startswith("my name")
    words = [note.text for note in run.notes if "DPO compares" in note.text]
    assert words and ("adapter off" in words[0]) == use_lora


@pytest.mark.parametrize("use_lora", [True, False])
def test_resume_is_exact(use_lora, tmp_path):
    options = dict(
        documents=preferences(),
        config={**DPO, "use_lora": use_lora, "lora_dropout": 0.1},
        learning_rate=1e-3,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        logging_steps=2,
    )
    whole = train(tmp_path / "whole", **options)
    rest = train(tmp_path / "rest", resume=whole.saved[0]["folder"], **options)
    a, b = weights(whole.last), weights(rest.last)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        told = {step: value for step, value in whole.series(name).items() if step > 3}
        assert told and rest.series(name) == told, name


def test_an_adapter_that_is_trained_further_is_what_dpo_compares_with(tmp_path):
    adapter = moved_adapter(tmp_path)
    options = dict(documents=preferences(), config={**DPO, "lora_r": 4}, adapter=adapter, max_steps=4)
    options |= dict(save_strategy="steps", save_steps=2)
    run = train(tmp_path / "dpo", **options)
    assert run.losses()[1] == pytest.approx(0.693147, abs=1e-5) and run.losses()[4] < 0.69
    saved = weights(run.last)
    assert saved.keys() == weights(adapter).keys() and not any((run.last / "ref").glob("*"))
    assert json.loads((run.last / "llmnb.json").read_text())["kind"] == "adapter"
    rest = train(tmp_path / "rest", resume=run.saved[0]["folder"], **options)
    again = weights(rest.last)
    assert all(torch.equal(again[name], saved[name]) for name in saved)


@pytest.mark.bitsandbytes
def test_dpo_on_a_base_of_four_bits(tmp_path):
    run = train(tmp_path, documents=preferences(), config={**DPO, "bits": 4}, max_steps=8)
    assert run.losses()[1] == pytest.approx(0.693147, abs=1e-4) and run.losses()[8] < 0.4
    assert run.counts["bits"] == 4


def test_recomputing_changes_nothing(tmp_path):
    plain = train(tmp_path / "a", documents=preferences(), config=DPO)
    again = train(tmp_path / "b", documents=preferences(), config=DPO, gradient_checkpointing=True)
    assert again.losses() == pytest.approx(plain.losses(), abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "qwen3", "gemma", "gpt_neox", "mistral"])
def test_probabilities_are_those_of_the_model_in_every_family(family, tmp_path):
    run = train(tmp_path, base=folder_of(family), documents=preferences(4), config=DPO, max_steps=2)
    assert run.losses()[1] == pytest.approx(0.693147, abs=1e-4)


def test_stop_keeps_what_was_done(tmp_path):
    seen = []

    def control():
        seen.append(1)
        return "stop" if len(seen) > 3 else None

    run = train(tmp_path, documents=preferences(), config=DPO, max_steps=50, control=control)
    assert run.result.stopped and run.last.is_dir() and run.result.last_step < 10


def test_an_adapter_on_the_output_layer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="output layer"):
        train(tmp_path, documents=preferences(), config={**DPO, "lora_target_modules": ["q_proj", "lm_head"]})


def test_a_model_of_which_trl_would_compute_other_probabilities_is_refused(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ModelError, match="other probabilities"):
        train(tmp_path, documents=preferences(), config=DPO)


# --- settings and several workers -----------------------------------------------------------------------------


def test_two_ranks_learn_what_one_learns(tmp_path):
    """21 pairs, 8 in a step: blank ones fill the last window, and one rank's batch has nothing else."""
    task = dict(
        documents=preferences(21),
        sets={"valid": preferences(5)},
        gradient_accumulation_steps=2,
        max_steps=7,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    tasks = []
    for kind, use_lora, rate in (("LoRA", True, 1e-2), ("full", False, 1e-3)):
        more = {**task, "learning_rate": rate, "config": {**DPO, "use_lora": use_lora}}
        tasks.append({"name": f"one {kind}", "ranks": 1, "per_device_train_batch_size": 4, **more})
        more["per_device_train_batch_size"] = 2
        zero = {**more["config"], "deepspeed": {"zero_optimization": {"stage": 2}, **dict.fromkeys(AUTO, "auto")}}
        tasks.append({"name": f"ZeRO-2 {kind}", "ranks": 2, **more, "config": zero})
        tasks.append({"name": f"FSDP {kind}", "ranks": 2, **more, "fsdp": True})
        tasks.append({"name": f"two {kind}", "ranks": 2, **more})
        half = str(tmp_path / f"two {kind}" / "checkpoints" / "checkpoint-3")
        tasks.append({**tasks[-1], "name": f"again {kind}", "resume": half})
    found = carry_out([dict(task) for task in tasks], tmp_path)
    assert not [result["error"] for result in found.values() if result["error"]]
    for kind in ("LoRA", "full"):
        one, two, again = (found[f"{name} {kind}"] for name in ("one", "two", "again"))
        a = weights(Path(one["saved"][-1]))
        for way in ("two", "ZeRO-2", "FSDP"):
            several = found[f"{way} {kind}"]
            for what in ("losses", "evals", "margins"):
                assert several[what] == pytest.approx(one[what], abs=2e-5), (way, kind, what)
            b = weights(Path(several["saved"][-1]))
            assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-4) for name in a), way
        for what in ("losses", "evals", "margins"):
            assert again[what] == {step: value for step, value in two[what].items() if int(step) > 3}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dpo_beta": 0.5}, "no effect without method='dpo'"),
        ({"method": "ppo"}, "must be 'sft' or 'dpo'"),
        ({**DPO, "dpo_beta": 0}, "must be a number above 0"),
        ({**DPO, "dpo_loss_type": "exo_pair"}, "dpo_loss_type"),
        ({**DPO, "key": ("a", "b", "c", "d")}, "does not name the prompt"),
        ({**DPO, "key": "messages"}, "does not name the prompt"),
        ({**DPO, "key_kind": "pair"}, "key_kind"),
        ({**DPO, "train_on": "all"}, "only answers"),
        ({**DPO, "padding_free": True}, "padding_free"),
        ({**DPO, "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({**DPO, "lora_bias": "all"}, "lora_bias"),
        ({**DPO, "training_kwargs": {"compute_metrics": len}}, "compute_metrics"),
    ],
)
def test_what_does_not_go_with_dpo_is_said_beforehand(settings, said):
    with pytest.raises(ConfigError, match=said):
        settle(LLMTrainer("t", **settings), ModelSpec())


def test_a_classifier_and_shared_weights_are_refused():
    with pytest.raises(ConfigError, match="trains language models"):
        settle(LLMTrainer("t", method="dpo"), ModelSpec(task="text-classification"))
    one = {"arguments": {"fsdp": True, "fsdp_config": {"version": 1}}}
    for way, said in (({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO stage 3"), (one, "FSDP 1")):
        faults = faults_of(TrainConfig(method="dpo", **way), bits=None, gpus=4, workers=2)
        assert any(fault.option == "method" and said in str(fault) for fault in faults)


def test_settings_come_back_from_the_record():
    parcel = settle(LLMTrainer("t", method="dpo", dpo_beta=0.3, dpo_loss_type="ipo"), ModelSpec())
    assert TrainConfig.from_json(parcel.config.to_json()) == parcel.config
