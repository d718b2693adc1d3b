"""Known shapes of public data sets, read as what the trainer has: pairs and chats. Pure; knows no tokenizer.

Sources: https://github.com/tatsu-lab/stanford_alpaca#data-release (three fields, ``input`` may be empty) and
https://huggingface.co/docs/trl/dataset_formats (``from`` and ``value``, as ShareGPT exports them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ALPACA", "alpaca_note", "alpaca_pair", "as_messages", "is_sharegpt", "sharegpt_note"]

ALPACA = ("instruction", "input", "output")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


def alpaca_pair(instruction: Any, more: Any, output: Any) -> tuple[Any, Any]:
    """The prompt and the response: the input, where there is one, follows the instruction after an empty line."""
    if isinstance(instruction, str) and isinstance(more, str) and more.strip():
        return f"{instruction}\n\n{more}", output
    return instruction, output


def alpaca_note() -> str:
    """What was made of the three fields, for the person."""
    return (
        "instruction, input and output were read as Alpaca's: the prompt is the instruction, an empty line and "
        "the input; the response is the output"
    )


def is_sharegpt(value: Any) -> bool:
    """True for a list of messages with ``from`` and ``value``."""
    return (
        isinstance(value, (list, Sequence))
        and not isinstance(value, (str, bytes))
        and bool(value)
        and all(
            isinstance(item, (dict, Mapping)) and "from" in item and "value" in item and "role" not in item
            for item in value
        )
    )


def as_messages(value: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | str:
    """The same chat with ``role`` and ``content``, or the reason why it cannot be one."""
    out = []
    for at, message in enumerate(value):
        said = message["from"]
        role = _ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            return f"message {at} is from {said!r}, which is none of {', '.join(_ROLES)}"
        out.append(
            {"role": role, "content": message["value"]} | ({"weight": message["weight"]} if "weight" in message else {})
        )
    return out


def sharegpt_note(key: str) -> str:
    """What was made of the messages, for the person."""
    return f"{key!r} has from and value, as ShareGPT's: human was read as user, gpt as assistant"
