"""Chats to ids: the answers are found in every family's template, and training begins as answering does."""

from __future__ import annotations

import pytest
from chat_families import CHATML, FAMILIES, GEMMA, LLAMA3, MISTRAL, PHI, ZEPHYR, Family, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import LLMTrainer
from llmnb.chat_templates import PRESETS
from llmnb.config import TrainConfig
from llmnb.engine.rows import make_rows
from llmnb.engine.templates import ChatTemplate, begins_as_trained, chat_ids, prompt_ids
from llmnb.errors import ConfigError, DataError

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [
    {"role": "user", "content": "hello there, what is your name?"},
    {"role": "assistant", "content": "my name is model."},
    {"role": "user", "content": "why is the sky blue?"},
    {"role": "assistant", "content": "because light scatters\nthanks"},
]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def row_of(messages, tokenizer, **settings):
    rows = make_rows([{"messages": messages}], tokenizer, TrainConfig(key="messages", max_seq_length=2048, **settings))
    return rows[0]["input_ids"], rows[0]["labels"], rows.report


def by_hand(family: Family, messages, tokenizer):
    """Ids and labels from the pieces that a person wrote down, each tokenised alone."""
    ids, labels = [], []
    for text, trained in family.pieces(messages):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += piece
        labels += piece if trained else [-100] * len(piece)
    if family.adds_bos and ids[0] != tokenizer.bos_token_id:
        ids, labels = [tokenizer.bos_token_id, *ids], [-100, *labels]
    return ids, labels


def no_space(text):
    return "".join(text.split())


def chats_of(family: Family):
    return [CHAT[:2], CHAT, *([[SYSTEM, *CHAT[:2]], [SYSTEM, *CHAT]] if family.system else [])]


@by_family
def test_trap06_masks_equal_masks_written_by_hand(family):
    tokenizer = make_tokenizer(family)
    assert "generation %}" not in tokenizer.chat_template
    for messages in chats_of(family):
        ids, labels, _ = row_of(messages, tokenizer)
        want_ids, want_labels = by_hand(family, messages, tokenizer)
        assert ids == want_ids
        assert labels == want_labels


@by_family
def test_trap05_every_answer_is_trained_to_end_its_turn(family):
    tokenizer = make_tokenizer(family)
    stop = tokenizer.convert_tokens_to_ids(family.stop)
    for messages in chats_of(family):
        _, labels, _ = row_of(messages, tokenizer)
        answers = sum(message["role"] == "assistant" for message in messages)
        assert labels.count(stop) == answers
        assert [label for label in labels if label != -100][-1] == stop


@by_family
def test_trap12_what_the_chat_sends_is_how_the_training_row_begins(family):
    tokenizer = make_tokenizer(family)
    for messages in chats_of(family):
        ids, labels, report = row_of(messages, tokenizer)
        asked = chat_ids(messages[:-1], tokenizer)
        assert ids[: len(asked)] == asked
        assert labels[len(asked)] != -100, "the answer begins where the prompt ends"
        assert not any("opens an answer otherwise" in note for note in report.notes)


@by_family
@pytest.mark.parametrize("answer", ["\n\nwhy", "  spaces", "\nyes", " x", "42\n", "é ü 漢字 🙂"])
def test_trap12_also_for_answers_that_a_token_would_glue_to_the_prompt(family, answer):
    tokenizer = make_tokenizer(family)
    messages = [*CHAT[:2], say("user", "what?\n"), say("assistant", answer), *CHAT[2:]]
    ids, labels, _ = row_of(messages, tokenizer)
    for turn in (1, 3, 5):
        asked = chat_ids(messages[:turn], tokenizer)
        assert ids[: len(asked)] == asked
    want = "".join(text for text, trained in family.pieces(messages) if trained)
    got = tokenizer.decode([label for label in labels if label != -100])
    assert no_space(got) == no_space(want)  # some templates trim, and some tokens swallow the space behind them


@by_family
def test_trap03_one_bos_in_training_ids_and_in_chat_ids(family):
    tokenizer = make_tokenizer(family)
    bos = tokenizer.bos_token_id
    expected = 0 if bos is None or not (family.adds_bos or family.head) else 1
    for messages in chats_of(family):
        assert row_of(messages, tokenizer)[0].count(bos) == expected
        assert chat_ids(messages[:-1], tokenizer).count(bos) == expected
    if expected:
        assert chat_ids(CHAT[:1], tokenizer)[0] == bos


@by_family
def test_trap03_one_bos_in_prompt_ids_and_text_rows(family):
    tokenizer = make_tokenizer(family)
    bos, written = tokenizer.bos_token_id, family.bos or ""
    for text in ("hello", written + "hello", written * 2 + "hello"):
        expected = int(family.adds_bos or (bool(written) and text.startswith(written)))
        assert prompt_ids(text, tokenizer).count(bos) == expected
        config = TrainConfig(key="text")
        ids = make_rows([{"text": text}], tokenizer, config)[0]["input_ids"]
        assert ids.count(bos) == expected
        pair = make_rows([{"p": text, "r": " thanks"}], tokenizer, TrainConfig(key=("p", "r")))[0]["input_ids"]
        assert pair.count(bos) == expected
        assert pair[: len(prompt_ids(text, tokenizer))] == prompt_ids(text, tokenizer)


def test_a_template_without_bos_is_given_the_tokenizers_and_it_is_said():
    _, _, report = row_of(CHAT, make_tokenizer(ZEPHYR))
    assert any("writes no BOS" in note for note in report.notes)


def sent(messages, tokenizer):
    """What transformers, TRL and servers make of a chat that waits for an answer."""
    return tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"]


@by_family
def test_trap03_the_saved_template_alone_gives_the_trained_ids(family):
    """Its BOS included, and not twice, for whoever has no ``llmnb``; and a training from what was saved has one BOS."""
    tokenizer = make_tokenizer(family)
    saved = begins_as_trained(tokenizer)
    assert (saved is tokenizer) is (family is not ZEPHYR), "only what lacks the BOS is changed"
    assert tokenizer.chat_template == family.template, "a copy is changed"
    for messages in chats_of(family):
        *trained, report = row_of(messages, tokenizer)
        asked = chat_ids(messages[:-1], tokenizer)
        assert asked == chat_ids(messages[:-1], saved) == trained[0][: len(asked)]
        assert row_of(messages, saved)[:2] == tuple(trained)
        if not any("tokenised apart" in note for note in report.notes):
            assert sent(messages[:-1], saved) == asked
        ask = messages[: 1 + (messages[0] is SYSTEM)]
        assert sent(ask, saved) == chat_ids(ask, tokenizer)
    assert begins_as_trained(saved) is saved


TWICE = "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + ZEPHYR.template
NAMED = {"default": ZEPHYR.template, "tool_use": "{{ bos_token }}" + ZEPHYR.template}


def test_a_bos_is_written_where_it_can_be_and_nowhere_else():
    indented = begins_as_trained(make_tokenizer(ZEPHYR, template="  " + ZEPHYR.template))
    assert sent(CHAT[:1], indented) == chat_ids(CHAT[:1], make_tokenizer(ZEPHYR))
    sometimes = make_tokenizer(ZEPHYR, template=TWICE)
    assert begins_as_trained(sometimes) is sometimes, "there would be two in a chat with a system message"
    bare = make_tokenizer(ZEPHYR, template=None)
    assert begins_as_trained(bare) is bare
    named = begins_as_trained(make_tokenizer(ZEPHYR, template=NAMED))
    assert named.chat_template == {"default": NAMED["tool_use"], "tool_use": NAMED["tool_use"]}


MARKED = CHATML.template.replace(
    "m['content'] + '<|im_end|>' + '\n' }}",
    "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


def test_trap06_marks_of_the_template_are_followed():
    tokenizer = make_tokenizer(CHATML, template=MARKED)
    want = by_hand(CHATML, CHAT, tokenizer)
    assert row_of(CHAT, tokenizer)[:2] == want
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert [int(label != -100) for label in want[1]] == theirs["assistant_masks"]


def test_trap06_a_template_that_marks_only_the_last_answer_trains_only_that():
    template = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
    tokenizer = make_tokenizer(CHATML, template=template)
    _, labels, _ = row_of(CHAT, tokenizer)
    assert tokenizer.decode([x for x in labels if x != -100]) == "because light scatters\nthanks<|im_end|>"


def test_trap05_marks_that_leave_out_the_end_of_turn_are_made_to_reach_it():
    template = MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    tokenizer = make_tokenizer(CHATML, template=template)
    assert row_of(CHAT, tokenizer)[:2] == by_hand(CHATML, CHAT, tokenizer)


def test_words_of_the_template_inside_a_message_do_not_move_the_masks():
    tokenizer = make_tokenizer(CHATML)
    trick = "why<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    messages = [say("user", trick), say("assistant", "no"), say("user", "why"), say("assistant", trick + "ok")]
    _, labels, _ = row_of(messages, tokenizer)
    assert tokenizer.decode([x for x in labels if x != -100]) == f"no<|im_end|>{trick}ok<|im_end|>"


def test_an_answer_of_weight_0_carries_no_loss():
    tokenizer = make_tokenizer(LLAMA3)
    messages = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    _, labels, _ = row_of(messages, tokenizer)
    assert tokenizer.decode([x for x in labels if x != -100]) == "because light scatters\nthanks<|eot_id|>"


def test_train_on_all_trains_everything_but_the_first_token():
    ids, labels, _ = row_of(CHAT, make_tokenizer(GEMMA), train_on="all")
    assert labels == [-100, *ids[1:]]


def test_two_answers_in_a_row_and_an_answer_first():
    tokenizer = make_tokenizer(CHATML)
    messages = [say("assistant", "hello"), say("assistant", "there"), say("user", "why"), say("assistant", "yes")]
    assert row_of(messages, tokenizer)[:2] == by_hand(CHATML, messages, tokenizer)


QWEN = (  # adds an empty thought to the last answer, and takes thoughts out of earlier ones
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ c }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_adds_and_removes_thoughts():
    tokenizer = make_tokenizer(CHATML, template=QWEN)
    ids, labels, _ = row_of(CHAT, tokenizer)
    trained = tokenizer.decode([x for x in labels if x != -100])
    thought = "<think>\n\n</think>\n\n"
    assert trained == f"my name is model.<|im_end|>{thought}because light scatters\nthanks<|im_end|>"
    assert ids[: len(chat_ids(CHAT[:3], tokenizer))] == chat_ids(CHAT[:3], tokenizer)
    thinking = [CHAT[0], say("assistant", "<think>\nhm\n</think>\n\nyes"), *CHAT[2:]]
    _, labels, _ = row_of(thinking, tokenizer)
    assert tokenizer.decode([x for x in labels if x != -100]).startswith("yes<|im_end|><think>")


def test_a_prompt_that_opens_otherwise_than_rows_are_written_is_said():
    template = CHATML.template.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    _, labels, report = row_of(CHAT, make_tokenizer(CHATML, template=template))
    assert labels.count(2) == 2
    assert any("opens an answer otherwise" in note for note in report.notes)


def test_a_template_without_an_end_of_turn_is_closed_with_eos():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(ZEPHYR, template=template)
    ids, labels, report = row_of(CHAT[:2], tokenizer)
    assert tokenizer.decode([x for x in labels if x != -100]) == " my name is model.</s>"
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert any("no end of turn" in note for note in report.notes)


def test_no_template_at_all_names_the_ways_out():
    tokenizer = make_tokenizer(CHATML, template=None)
    with pytest.raises(DataError, match=r"no chat template[\s\S]*chat_template=[\s\S]*transform="):
        row_of(CHAT, tokenizer)
    ids, labels, _ = row_of(CHAT, tokenizer, chat_template=CHATML.template)
    assert (ids, labels) == by_hand(CHATML, CHAT, tokenizer)
    asked = chat_ids(CHAT[:3], tokenizer, CHATML.template)
    assert ids[: len(asked)] == asked


def test_a_given_template_wins_over_the_tokenizers_and_it_is_said():
    tokenizer = make_tokenizer(CHATML, template="{{ 'never' }}")
    ids, labels, report = row_of(CHAT, tokenizer, chat_template=CHATML.template)
    assert (ids, labels) == by_hand(CHATML, CHAT, tokenizer)
    assert any("own is not used" in note for note in report.notes)


def test_a_system_message_that_the_template_refuses_is_named():
    good = [{"_id": f"g{i}", "messages": CHAT} for i in range(20)]
    documents = [*good, {"_id": "bad", "messages": [SYSTEM, *CHAT]}]
    rows = make_rows(documents, make_tokenizer(GEMMA), TrainConfig(key="messages"))
    assert (rows.report.used, rows.report.skipped, rows.report.dropped_ids) == (20, 1, ("bad",))
    assert any("takes no system message" in note and "bad" in note for note in rows.report.notes)
    with pytest.raises(DataError, match=r"takes no system message \(System role not supported"):
        make_rows(documents[-1:], make_tokenizer(GEMMA), TrainConfig(key="messages"))
    with pytest.raises(DataError, match="roles must alternate"):
        make_rows([{"messages": [CHAT[0], *CHAT]}], make_tokenizer(MISTRAL), TrainConfig(key="messages"))


def test_chat_ids_that_the_template_refuses():
    with pytest.raises(DataError, match="System role not supported"):
        chat_ids([SYSTEM, CHAT[0]], make_tokenizer(GEMMA))


def test_the_opener_and_the_closer_are_learned():
    learned = {family.name: ChatTemplate(make_tokenizer(family)) for family in FAMILIES}
    assert {name: template.closer for name, template in learned.items()} == {f.name: f.stop for f in FAMILIES}
    assert learned["mistral"].opener == "[/INST]"
    assert learned["phi"].opener == "<|end|>\n<|assistant|>\n"


class Plain:
    """A fast tokenizer that is not asked for offsets, as the Python tokenizers are."""

    is_fast = False

    def __init__(self, tokenizer):
        self._it = tokenizer

    def __getattr__(self, name):
        return getattr(self._it, name)

    def __call__(self, *args, **kwargs):
        return self._it(*args, **kwargs)


@by_family
def test_tokenizers_without_offsets_give_the_same_rows(family):
    fast = make_tokenizer(family)
    for messages in (*chats_of(family), [say("user", "why\n"), say("assistant", "\n\nyes é"), *CHAT]):
        assert row_of(messages, Plain(fast))[:2] == row_of(messages, fast)[:2]


WORDS = ["hello", "why", "a", "assistant", ":", "42", "é", "🙂", " ", "  ", "\n", "\n\n", "\t"]
TRICKS = ["</s>", "[/INST]", "<start_of_turn>model\n", "<|im_end|>", "<|im_start|>", "<|assistant|>\n", "<|end|>"]
FRAGMENTS = st.sampled_from(WORDS + TRICKS)
CONTENT = st.lists(FRAGMENTS, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    contents=st.lists(CONTENT, min_size=2, max_size=8).filter(lambda c: len(c) % 2 == 0),
)
def test_any_chat_is_masked_as_written_and_begins_as_it_is_asked(family, contents):
    tokenizer = make_tokenizer(family)
    messages = [say("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(contents)]
    ids, labels, _ = row_of(messages, tokenizer)
    for turn in range(1, len(messages), 2):
        asked = chat_ids(messages[:turn], tokenizer)
        assert ids[: len(asked)] == asked
    trimmed = [say(m["role"], m["content"].strip() if family in (LLAMA3, GEMMA) else m["content"]) for m in messages]
    want = "".join(text for text, trained in family.pieces(trimmed) if trained)
    got = tokenizer.decode([label for label in labels if label != -100])
    assert no_space(got) == no_space(want)
    if family is not PHI:
        assert got == want


@by_family
def test_presets_write_what_their_families_write(family):
    """As the pieces that a person wrote down; Phi's own one ends with an EOS more, which no answer needs."""
    preset = PRESETS[{"phi": "phi3"}.get(family.name, family.name)]
    tokenizer = make_tokenizer(family, template=None)
    for messages in (CHAT[:2], CHAT):
        ids, labels, _ = row_of(messages, tokenizer, chat_template=preset)
        want = by_hand(family, messages, tokenizer)
        shorter = len(want[0]) - len(ids)
        assert shorter == (family is PHI) and (ids, labels) == tuple(part[: len(ids)] for part in want)
        asked = chat_ids(messages[:-1], tokenizer, preset)
        assert ids[: len(asked)] == asked, "and it is asked as it was trained"
    ids, _, report = row_of([SYSTEM, *CHAT[:2]], tokenizer, chat_template=preset)
    assert "be brief" in tokenizer.decode(ids) and report.used == 1, "a system message finds a place in each"


def test_a_preset_is_given_by_its_name_and_recorded_as_a_template():
    assert LLMTrainer(chat_template="zephyr").freeze().config.chat_template == PRESETS["zephyr"]
    assert LLMTrainer(chat_template="{{ messages }}").freeze().config.chat_template == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"neither a Jinja template[\s\S]*zephyr"):
        LLMTrainer(chat_template="zefyr").freeze()


def test_an_end_of_turn_that_is_no_token_is_said():
    bare = make_tokenizer(ZEPHYR, template=None)
    _, _, report = row_of(CHAT, bare, chat_template=PRESETS["chatml"])
    assert any("'<|im_end|>', which is no token" in note and "zephyr" in note for note in report.notes)
    _, labels, report = row_of(CHAT, bare, chat_template=PRESETS["zephyr"])
    assert not any("no token of this tokenizer" in note for note in report.notes)
    assert bare.eos_token_id in labels
