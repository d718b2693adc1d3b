"""Chats with tools: the functions beside the messages are trained with, asked with, and written as TRL writes them."""

from __future__ import annotations

import json

import pytest
from chat_families import CHATML, make_tokenizer
from test_engine_trl import by_trl, by_us, padded, trained_apart

from llmnb.config import TrainConfig
from llmnb.engine.questions import questions
from llmnb.engine.rows import make_rows
from llmnb.engine.samples import Messages
from llmnb.engine.templates import chat_ids
from llmnb.llm import _prompts

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "sky",
            "description": "the colour of the sky",
            "parameters": {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]},
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": {"hour": 9}}}
CHAT = [
    {"role": "user", "content": "why is the sky blue?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "blue", "tool_call_id": "1"},
    {"role": "assistant", "content": "because light scatters"},
]


@pytest.fixture
def tokenizer():
    from trl import chat_template_utils

    return padded(CHATML, make_tokenizer(CHATML, template=chat_template_utils.qwen2_5_chat_template))


def row_of(tokenizer, **document):
    rows = make_rows([document], tokenizer, TrainConfig(key="messages", max_seq_length=2048))
    return rows[0]["input_ids"], rows[0]["labels"]


def test_tools_and_calls_have_trls_ids_and_mask(tokenizer, tmp_path):
    plain = [{k: v for k, v in message.items() if v is not None} for message in CHAT]
    (theirs,) = by_trl(tokenizer, [{"messages": plain, "tools": json.dumps(TOOLS)}], tmp_path, assistant_only_loss=True)
    (ours,) = by_us(tokenizer, [{"messages": CHAT, "tools": TOOLS}], "messages")
    more, less = trained_apart(ours, theirs, tokenizer)
    assert (more.strip(), less) == ("", ""), "but for line ends, which asking has sent or nobody asks for"
    text = tokenizer.decode(ours[0])
    assert "the colour of the sky" in text and '"arguments": {"hour": 9}' in text
    trained = tokenizer.decode([i for i, label in zip(*ours, strict=True) if label != -100])
    assert '"name": "sky"' in trained and "because light scatters" in trained and "colour" not in trained


def test_tools_may_be_the_text_of_a_list_and_arguments_that_of_an_object(tokenizer):
    calls = [{**CALL, "function": {"name": "sky", "arguments": '{"hour": 9}'}}]
    written = [CHAT[0], {**CHAT[1], "tool_calls": calls}, *CHAT[2:]]
    assert row_of(tokenizer, messages=written, tools=json.dumps(TOOLS)) == row_of(tokenizer, messages=CHAT, tools=TOOLS)
    assert row_of(tokenizer, messages=CHAT) != row_of(tokenizer, messages=CHAT, tools=TOOLS)


def test_trap12_with_tools_it_is_asked_as_it_was_trained(tokenizer):
    ids, labels = row_of(tokenizer, messages=CHAT, tools=TOOLS)
    ((asked,), single) = _prompts({"messages": CHAT[:1], "tools": TOOLS})
    assert single and isinstance(asked, Messages)
    begin = chat_ids(asked, tokenizer)
    assert ids[: len(begin)] == begin and set(labels[: len(begin)]) == {-100}
    config = TrainConfig(key="messages", max_seq_length=2048)
    documents = [{"_id": 1, "messages": CHAT, "tools": TOOLS}]
    made = questions(documents, tokenizer, config, prompt_template="{input}", transform=None, context=None)
    prompt = chat_ids(made.asked[0].prompt, tokenizer)
    assert ids[: len(prompt)] == prompt, "and evaluated"


def test_a_transform_may_give_tools(tokenizer):
    config = TrainConfig(key=("ask", "say"), max_seq_length=2048)

    def chat(ask, say):
        return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}], "tools": TOOLS}

    rows = make_rows([{"ask": "why?", "say": "so"}], tokenizer, config, transform=chat)
    assert "the colour of the sky" in tokenizer.decode(rows[0]["input_ids"])


@pytest.mark.parametrize(
    ("tools", "says"),
    [("[{", "no JSON"), (3, "not a list"), (["sky"], "no function's schema"), ({"a": 1}, "not a list")],
)
def test_tools_that_cannot_be_read_leave_the_document_out_with_a_reason(tokenizer, tools, says):
    documents = [
        {"_id": "bad", "messages": CHAT, "tools": tools},
        *({"messages": CHAT, "tools": TOOLS} for _ in range(20)),
    ]
    report = make_rows(documents, tokenizer, TrainConfig(key="messages", max_seq_length=2048)).report
    assert report.dropped_ids == ("bad",) and any(says in note for note in report.notes)
