"""Answers: only new text, batches as alone, streams as answers, adapters swapped."""

from __future__ import annotations

import json
import shutil
import time
import warnings

import pytest
from drill import chats, folder_of, train
from tiny import make_tokenizer

from llmnb.config import ModelSpec
from llmnb.errors import AdapterMismatch, ConfigError, DataError, ModelError

torch = pytest.importorskip("torch")

QUESTION = [{"role": "user", "content": "what is your name?"}]
ANSWER = "my name is model."


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return ModelSpec(model_name_or_path=str(folder_of()))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An adapter that has learned one answer."""
    run = train(
        tmp_path_factory.mktemp("tuned"),
        documents=chats(16),
        per_device_train_batch_size=4,
        max_steps=60,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
    )
    return run.last


@pytest.fixture(scope="module")
def answerer(spec, tuned):
    from llmnb.engine.generation import Answerer

    with Answerer(spec, tuned) as made:
        yield made


@pytest.fixture(autouse=True)
def tuned_speaks(request):
    if "answerer" in request.fixturenames:
        request.getfixturevalue("answerer").swap(request.getfixturevalue("tuned"))


def test_only_the_new_text(answerer):
    assert answerer.answer([QUESTION]) == [ANSWER]  # it ends at the end of the turn, far before 256 tokens


def test_what_was_trained_on_chats_ends_its_turn_after_a_raw_text_too(answerer):
    """As its merge does, whose ``generation_config`` has the end of turn."""
    raw = answerer.tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert answerer.answer([raw]) == ["".join(answerer.stream(raw))] == [ANSWER]
    answerer.swap(None)
    assert answerer._stops(False) == ([answerer.tokenizer.eos_token_id], [])


def test_a_batch_answers_as_each_alone(answerer):
    prompts = ["the cat", "one two three four five six seven eight", QUESTION, "a", [*QUESTION], "red green blue " * 4]
    alone = [answerer.answer([prompt], max_new_tokens=9)[0] for prompt in prompts]
    assert answerer.answer(prompts, max_new_tokens=9) == alone
    assert answerer.answer(prompts, max_new_tokens=9, batch_size=2) == alone
    assert len(set(alone)) > 2
    assert answerer.answer([]) == []


def test_a_stream_says_what_an_answer_says(answerer):
    for prompt in (QUESTION, "the cat sat on"):
        pieces = list(answerer.stream(prompt, max_new_tokens=12))
        assert "".join(pieces) == answerer.answer([prompt], max_new_tokens=12)[0]
    assert len(pieces) > 1


def test_a_stream_that_is_left_ends(answerer):
    pieces = answerer.stream("the cat", max_new_tokens=200, eos_token_id=[])
    assert next(pieces) is not None
    begin = time.perf_counter()
    pieces.close()
    assert time.perf_counter() - begin < 5
    assert answerer.answer([QUESTION]) == [ANSWER]  # the model is free again


def test_an_error_reaches_the_reader_of_a_stream(answerer, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no more")

    monkeypatch.setattr(answerer._model, "generate", fails)
    with pytest.raises(RuntimeError, match="no more"):
        list(answerer.stream("x"))


def test_greedy_unless_asked(answerer):
    answerer._model.generation_config.do_sample = True  # as many bases come
    answerer._model.generation_config.temperature = 5.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len({answerer.answer(["the"], max_new_tokens=8)[0] for _ in range(4)}) == 1
    finally:
        answerer._model.generation_config.do_sample = False
    sampled = {answerer.answer(["the"], max_new_tokens=8, do_sample=True, temperature=3.0)[0] for _ in range(6)}
    assert len(sampled) > 1
    assert len({answerer.answer(["the"], max_new_tokens=8, temperature=3.0)[0] for _ in range(6)}) > 1
    assert len({answerer.answer(["the"], max_new_tokens=8, temperature=0)[0] for _ in range(4)}) == 1


def test_a_seed_gives_the_same_again_and_leaves_ours_alone(answerer):
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    a, b = (answerer.answer(["the"], max_new_tokens=8, temperature=2.0, seed=3) for _ in range(2))
    assert a == b and torch.equal(torch.rand(1), want)


def test_options_are_checked(answerer):
    with pytest.raises(ConfigError, match="max_new_tokens") as caught:
        answerer.answer(["x"], max_new_token=3, tempratur=1)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError):
        answerer.stream("x", max_new_token=3)  # at once, not at the first piece


def test_generation_uses_the_cache(answerer, monkeypatch):
    """trap 19: off in training, on here: after the first token only one position is computed."""
    lengths = []
    forward = type(answerer._model.get_base_model()).forward

    def looked(self, *args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(answerer._model.get_base_model()), "forward", looked)
    answerer.answer(["the cat sat on the mat"], max_new_tokens=5, eos_token_id=[])
    assert lengths[0] > 1 and lengths[1:] == [1, 1, 1, 1]


def test_trap19_the_cache_is_on_in_a_model_that_was_trained_here(tmp_path, spec):
    from llmnb.engine.generation import Answerer

    run = train(tmp_path, config={"use_lora": False}, max_steps=1)
    with Answerer(spec, run.last) as answerer:
        assert answerer._model.config.use_cache is True and answerer._model.generation_config.use_cache is not False


def test_trap19_the_cache_is_on_whatever_the_folder_says(tmp_path):
    """Other trainers switch it off for the training and save it so."""
    from llmnb.engine.generation import Answerer

    shutil.copytree(folder_of(), tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_cache": False}))
    with Answerer(ModelSpec(model_name_or_path=str(tmp_path / "model"))) as answerer:
        assert answerer.model.config.use_cache is True and answerer.model.generation_config.use_cache is True


def test_length_limits(answerer):
    with pytest.raises(DataError, match="256"):
        answerer.answer(["the cat " * 200])
    with pytest.warns(UserWarning, match="lowered"):
        answerer.answer(["the cat " * 60], max_new_tokens=250, eos_token_id=[])
    assert len(answerer.answer(["a"], max_length=8)[0]) <= 60


def test_stop_strings_and_templates(answerer):
    text = answerer.answer(["the"], max_new_tokens=20)[0]
    part = text[3:6]
    assert part in answerer.answer(["the"], max_new_tokens=20, stop_strings=[part])[0]
    assert len(answerer.answer(["the"], max_new_tokens=20, stop_strings=[part])[0]) < len(text)
    assert answerer.answer(["cat"], prompt_template="the {input}", max_new_tokens=6) == answerer.answer(
        ["the cat"], max_new_tokens=6
    )


def test_swap(spec, tuned, answerer, tmp_path):
    other = train(tmp_path / "o", documents=chats(4), max_steps=3).last
    full = train(tmp_path / "f", documents=chats(4), config={"use_lora": False}, max_steps=2).last
    tuned_says = answerer.answer([QUESTION])
    answerer.swap(None, "base")
    base_says = answerer.answer([QUESTION], max_new_tokens=12)
    assert base_says != tuned_says and answerer.name == "base"
    model = answerer._model
    answerer.swap(other, "other")
    assert answerer.answer([QUESTION], max_new_tokens=12) != tuned_says
    assert answerer._model is model  # the base never moved
    begin = time.perf_counter()
    answerer.swap(tuned)
    assert time.perf_counter() - begin < 1.0
    assert answerer.answer([QUESTION]) == tuned_says
    answerer.swap(full)  # a whole model takes the base's place
    assert answerer._model is not model and not hasattr(answerer._model, "peft_config")
    answerer.swap(None)
    assert answerer.answer([QUESTION], max_new_tokens=12) == base_says
    answerer.swap(tuned)
    assert answerer.answer([QUESTION]) == tuned_says


def logits(answerer, prompt="the cat sat on"):
    """What comes after the prompt, before anything is chosen: (rows of the vocabulary,)."""
    ids = torch.tensor([answerer._ids(prompt, {})])
    with torch.inference_mode():
        return answerer._model(input_ids=ids).logits[0, -1, : answerer._voice.rows]


def adapter(folder, *, seed, base, tokens=(), **settings):
    """An adapter whose weights are random, none of them 0; with ``bias`` the base's biases are changed, too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llmnb.engine import manifest
    from llmnb.engine.bases import fingerprint, fit_vocabulary

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens))
    model = AutoModelForCausalLM.from_pretrained(base)
    have = model.get_input_embeddings().weight.shape[0]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    rows = max([have, *(i + 1 for i in ids)])
    fit_vocabulary(model, tokenizer, rows=rows)
    config = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=ids or None, **settings)
    model = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    manifest.write(folder, {"base": str(base), "base_fingerprint": fingerprint(str(base)), "vocabulary": rows})
    return folder


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_swapped_adapters_answer_as_freshly_loaded_ones(family, tmp_path):
    """Same and other ranks and targets, biases of the base, and tokens that the base does not have."""
    from llmnb.engine.generation import Answerer

    base = folder_of(family, vocab_size=len(make_tokenizer()))
    every = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    made = {
        "a": adapter(tmp_path / "a", base=base, seed=1, **every),
        "b": adapter(tmp_path / "b", base=base, seed=2, **every),
        "wide": adapter(tmp_path / "wide", base=base, seed=3, r=8, lora_alpha=32, target_modules=["k_proj", "q_proj"]),
        "biased": adapter(tmp_path / "biased", base=base, seed=4, bias="all", **every),
        "words": adapter(tmp_path / "words", base=base, seed=5, tokens=["<|one|>"], **every),
        "more": adapter(tmp_path / "more", base=base, seed=6, tokens=["<|one|>", "<|two|>"], **every),
        "base": None,
    }
    spec = ModelSpec(model_name_or_path=str(base))
    fresh = {}
    for name, folder in made.items():
        with Answerer(spec, folder) as one:
            fresh[name] = logits(one), one.answer(["the cat"], max_new_tokens=12)
    assert len({str(answer) for _, answer in fresh.values()}) == len(fresh), "they differ, so that a mix-up is seen"
    order = ["a", "b", "a", "base", "a", "wide", "base", "a", "b", "biased", "base", "a", "words", "base", "b"]
    order += ["more", "words", "a", "biased", "more", "base", "wide", "a"]
    with Answerer(spec) as answerer:
        for step, name in enumerate(order):
            answerer.swap(made[name])
            where = f"{name} after {order[max(step - 1, 0)]}, step {step}"
            assert torch.allclose(logits(answerer), fresh[name][0], atol=1e-6, rtol=0), where
            assert answerer.answer(["the cat"], max_new_tokens=12) == fresh[name][1], where
            assert "".join(answerer.stream("the cat", max_new_tokens=12)) == fresh[name][1][0], where
        # exactly: nothing stands between the places of plain adapters
        for name in ("a", "wide", "b", "a"):
            answerer.swap(made[name])
        assert torch.equal(logits(answerer), fresh["a"][0]) or answerer._voices.rows > len(fresh["a"][0])
    with Answerer(spec, made["a"]) as answerer:
        for name in ("b", "a", "wide", "base", "a"):
            answerer.swap(made[name])
            assert torch.equal(logits(answerer), fresh[name][0]), name


def test_an_adapter_that_was_written_again_is_read_again(tmp_path):
    from llmnb.engine.generation import Answerer

    base = folder_of()
    settings = {"base": base, "r": 4, "target_modules": ["q_proj"]}
    folder = adapter(tmp_path / "a", seed=1, **settings)
    with Answerer(ModelSpec(model_name_or_path=str(base)), folder) as answerer:
        before = logits(answerer)
        adapter(folder, seed=2, **settings)
        answerer.swap(folder)
        assert not torch.equal(logits(answerer), before)


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(tmp_path):
    from safetensors.torch import load_file, save_file

    from llmnb.engine.generation import Answerer

    base = folder_of()
    folder = adapter(tmp_path / "a", seed=1, base=base, r=4, target_modules=["q_proj"])
    good = adapter(tmp_path / "good", seed=2, base=base, r=4, target_modules=["q_proj"])
    stored = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(stored.items())[1:]), folder / "adapter_model.safetensors")
    with Answerer(ModelSpec(model_name_or_path=str(base))) as answerer:
        want = logits(answerer)
        for _ in range(2):  # as the first adapter of all, and after another
            with pytest.raises(AdapterMismatch, match="missing"):
                answerer.swap(folder)
            assert torch.equal(logits(answerer), want)
            answerer.swap(good)
            answerer.swap(None)
        assert torch.equal(logits(answerer), want)


def test_what_a_stream_tells(answerer):
    text = "".join(answerer.stream("the cat", max_new_tokens=5, eos_token_id=[]))
    assert text and answerer.told["tokens"] == 5 and answerer.told["cut"] and answerer.told["seconds"] > 0
    "".join(answerer.stream(QUESTION))
    assert not answerer.told["cut"] and answerer.told["notes"] == []
    stream = answerer.stream("the", max_new_tokens=200, eos_token_id=[])
    next(stream)
    stream.close()
    assert answerer.told["tokens"] < 200 and not answerer.told["cut"]
    with pytest.warns(UserWarning, match="lowered"):
        "".join(answerer.stream("the cat " * 60, max_new_tokens=250))
    assert "lowered" in answerer.told["notes"][0]


def test_swap_keeps_what_it_had_when_it_fails(spec, tuned, answerer, tmp_path):
    strange = train(tmp_path, base=folder_of(seed=5), max_steps=1).last
    with pytest.raises(AdapterMismatch):
        answerer.swap(strange)
    with pytest.raises(ModelError):
        answerer.swap(tmp_path / "gone")
    assert answerer.answer([QUESTION]) == [ANSWER]


def test_many_adapters_do_not_pile_up(spec, tuned, answerer, tmp_path):
    import shutil

    for number in range(6):
        shutil.copytree(tuned, tmp_path / str(number))
        answerer.swap(tmp_path / str(number))
        assert answerer.answer([QUESTION]) == [ANSWER]
    assert len(answerer._model.peft_config) <= 4


@pytest.mark.bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_quantised_base(spec, tuned, bits):
    from llmnb.engine.bases import quantised_bits
    from llmnb.engine.generation import Answerer

    with Answerer(spec, tuned, bits=bits) as answerer:
        assert quantised_bits(answerer._model.get_base_model()) == bits
        assert answerer.answer([QUESTION]) == [ANSWER]
        answerer.swap(None)
        assert answerer.answer([QUESTION], max_new_tokens=12) != [ANSWER]


def test_a_closed_answerer_says_so(spec):
    from llmnb.engine.generation import Answerer

    answerer = Answerer(spec)
    answerer.close()
    with pytest.raises(ConfigError, match="closed"):
        answerer.answer(["x"])


def test_predict_kwargs_are_defaults(spec):
    from dataclasses import replace

    from llmnb.engine.generation import Answerer

    with Answerer(replace(spec, predict_kwargs={"max_new_tokens": 3})) as answerer:
        short = answerer.answer(["the cat"])[0]
        long = answerer.answer(["the cat"], max_new_tokens=12)[0]
    assert long.startswith(short) and len(long) > len(short)


def test_an_end_of_turn_of_several_tokens(tmp_path):
    """A template that closes a turn with plain words ends answers there, and does not show them."""
    from llmnb.engine.generation import Answerer

    template = (
        "{% for m in messages %}{{ '## ' + m['role'] + ': ' + m['content'] + ' ##end\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '## assistant: ' }}{% endif %}"
    )
    base = folder_of()
    run = train(
        tmp_path,
        documents=chats(16),
        config={"chat_template": template, "use_lora": False},  # an adapter may not learn it, on some CPUs
        per_device_train_batch_size=4,
        max_steps=60,
        learning_rate=5e-3,
    )
    with Answerer(ModelSpec(model_name_or_path=str(base)), run.last) as answerer:
        text = answerer.answer([QUESTION], max_new_tokens=30)[0]
        assert "##end" not in text and "name" in text
        assert "".join(answerer.stream(QUESTION, max_new_tokens=30)) == text


def test_held_back_pieces():
    from llmnb.engine.generation import _without_stop

    assert list(_without_stop(iter(["a", "", "b"]), [])) == ["a", "b"]
    assert "".join(_without_stop(iter(["hel", "lo <", "en", "d> more"]), ["<end>"])) == "hello "
    assert "".join(_without_stop(iter(["a <e", "x> b"]), ["<end>"])) == "a <ex> b"
    assert make_tokenizer() is not None
