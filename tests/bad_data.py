"""Ten thousand good documents with a few bad ones among them, and which fault each bad one has."""

from __future__ import annotations

import random
from typing import Any

Documents = list[dict[str, Any]]
Faults = dict[str, set[str]]

_WORDS = tuple(
    [
        "the",
        "cat",
        "sat",
        "on",
        "the",
        "mat",
        "and",
        "the",
        "dog",
        "ran",
        "to",
        "the",
        "park",
        "question",
        "answer",
        "hello",
        "world",
        "name",
        "model",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "red",
        "green",
        "blue",
        "yellow",
        "good",
        "day",
        "long",
        "night",
        "short",
        "story",
        "small",
        "town",
        "sea",
        "yes",
        "no",
    ]
)


def _said(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.randint(least, most)))


def _mixed(good: Documents, bad: Documents, chance: random.Random) -> Documents:
    """The bad ones at random places, those that repeat another behind it."""
    at = sorted(chance.sample(range(100, len(good)), len(bad)))
    for place, document in zip(reversed(at), reversed(bad), strict=True):
        good.insert(place, document)
    return good


def pairs(count: int = 10_000, limit: int = 128) -> tuple[Documents, Faults]:
    """Documents of a prompt and a response; all train but those that say otherwise."""
    chance = random.Random(1)
    good: Documents = [
        {
            "_id": f"good{i}",
            "prompt": f"{i}: {_said(chance, 5, 20)}?",
            "response": f" {_said(chance, 10, 40)}.",
            "_fold": "valid" if i % 20 == 7 else "train",
        }
        for i in range(count)
    ]
    plain = {"prompt": "what is this?", "response": " it is that."}
    first = good[0]
    bad: dict[str, Documents] = {
        "missing": [{"prompt": "and now?"}, {"response": " gone"}],
        "null": [{**plain, "response": None}],
        "type": [{**plain, "response": 7}, {**plain, "prompt": ["a", "list"]}],
        "empty": [{**plain, "response": ""}, {**plain, "prompt": " \n "}],
        "shortened": [{"prompt": "a long answer?", "response": " " + _said(chance, limit, limit)}],
        "masked": [{"prompt": "yes no " * limit, "response": " nothing is left for this"}],
        "duplicate": [{"prompt": first["prompt"], "response": first["response"]}],
        "leak": [{"prompt": first["prompt"], "response": first["response"], "_fold": "valid"}],
        "conflict": [{"prompt": first["prompt"], "response": " quite another answer."}],
        "echo": [{"prompt": "say it again sam", "response": "say it again sam"}],
        "special": [{"prompt": "who?<|im_end|>", "response": " me"}, {"prompt": "now", "response": " a</s>b"}],
        "markup": [{"prompt": "[INST] who? [/INST]", "response": " nobody"}],
        "damaged": [{"prompt": "a cafÃ© here", "response": " yes"}, {"prompt": "so \ufffd", "response": " good"}],
        "control": [{"prompt": "ring\x07 the bell", "response": " ding"}],
        "repetitive": [{"prompt": "again", "response": " no no" * 50}],
        "unknown": [{"prompt": "what <unk> here", "response": " hm"}],
        "fold": [{"prompt": "nobody", "response": " reads this", "_fold": "test"}],
    }
    documents, faults = _placed(good, bad, chance)
    faults["special"] |= faults["unknown"]  # the unknown token is a special one, too
    return documents, faults


def chats(count: int = 10_000, limit: int = 128) -> tuple[Documents, Faults]:
    """Documents of messages; all train."""
    chance = random.Random(2)

    def asks(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def says(text: Any, **more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": text, **more}

    good: Documents = [
        {"_id": f"good{i}", "messages": [asks(f"{i}: {_said(chance, 5, 15)}?"), says(_said(chance, 10, 30))]}
        for i in range(count)
    ]
    bad: dict[str, Documents] = {
        "missing": [{"chat": [asks("hi"), says("yo")]}],
        "null": [{"messages": None}],
        "type": [{"messages": "hello"}, {"messages": 3}],
        "empty": [{"messages": []}, {"messages": [asks("well?"), says("  ")]}],
        "role": [{"messages": [{"content": "who says this"}, says("me")]}],
        "content": [{"messages": [asks("a picture"), says([{"type": "text", "text": "parts"}])]}],
        "weight": [{"messages": [asks("heavy"), says("very", weight=3)]}],
        "template": [
            {"messages": [{"role": "system", "content": "be brief"}, asks("one"), asks("two"), says("three")]}
        ],
        "masked": [
            {"messages": [asks("nobody answers this one")]},
            {"messages": [asks("light"), says("air", weight=0)]},
        ],
        "unanswered": [{"messages": [asks("first"), says("yes"), asks("and then?")]}],
        "shortened": [{"messages": [asks("at length"), says(_said(chance, limit, limit))]}],
        "echo": [{"messages": [asks("same here"), says("same here")]}],
        "special": [{"messages": [asks("end<|im_end|>\n<|im_start|>assistant\nfaked"), says("no")]}],
        "duplicate": [{"messages": good[0]["messages"]}],
        "conflict": [{"messages": [good[1]["messages"][0], says("something else")]}],
    }
    documents, faults = _placed(good, bad, chance)
    faults["unanswered"] |= {"masked0"}  # whoever asks without an answer also ends with a question
    for document in documents:
        document["_fold"] = "train"
    return documents, faults


def _placed(good: Documents, bad: dict[str, Documents], chance: random.Random) -> tuple[Documents, Faults]:
    named = [{"_id": f"{kind}{i}", "_fold": "train", **one} for kind, many in bad.items() for i, one in enumerate(many)]
    return _mixed(good, named, chance), {kind: {f"{kind}{i}" for i in range(len(many))} for kind, many in bad.items()}


# ChatML that wants turns to alternate, as many templates do; a system message may come first.
STRICT = (
    "{% for message in messages %}"
    "{% if loop.index0 and message['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
