"""What a look at the rows wants to know beyond their counts; ``make_rows`` tells it while documents stream by.

Everything here is asked once per document, between two calls of the tokenizer, so it costs a small part of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from .counts import Count, Counts
from .samples import Sample

__all__ = ["CONTENT", "Seen", "Watch"]

# What a text may hold that a person did not mean, by the name of the finding.
CONTENT = (
    "duplicate",
    "leak",
    "conflict",
    "echo",
    "unanswered",
    "special",
    "markup",
    "damaged",
    "control",
    "repetitive",
    "unknown",
)
# Marks of chat formats. Where the tokenizer has no such token they are read as plain letters.
_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|endoftext|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "[INST]",
    "[/INST]",
    "<s>",
    "</s>",
)
# UTF-8 that was read as Windows' Latin: "Ã©" for "é", "â€™" for an apostrophe. And the character for unreadable ones.
_MOJIBAKE = re.compile(
    "\ufffd|[ÃÂ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€[\u0080-\u00bf\u2018-\u203a\u0152-\u0178™]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_MANY, _FEW = 64, 0.1  # a row of so many tokens of which so few are different repeats itself


@dataclass
class Seen:
    """What was read so far, by hash, over all sets of rows: eight bytes and a name for each document."""

    samples: dict[int, str] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)


class Watch:
    """Looks at every document and every row of one set.

    Args:
        tokenizer: its added tokens are looked for in texts.
        seen: shared by all sets, those that train first.
        trains: the set is trained on, so that a repetition is a duplicate; else it is a leak.
        kept: how many _ids of each finding are kept.

    Attributes:
        counts: of ``make_rows``, set by it.
        refusal: why a training would refuse these rows, set by it.
        found: findings about what texts hold, by name.
        names: the _id of each row, in order.
        lengths: tokens of each row before anything was cut off.
        reports_of: for a duplicate or a leak, the _id that it repeats.
    """

    counts: Counts

    def __init__(self, tokenizer: Any, seen: Seen, trains: bool, kept: int) -> None:
        self.seen, self.trains, self.kept = seen, trains, kept
        self.refusal: DataError | None = None
        self.found = {name: Count(kept=kept) for name in CONTENT}
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.repeats: dict[str, str] = {}
        self._own: dict[int, str] = {}
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if len(str(token).strip()) > 1}
        self._specials = _by_first(added)
        self._marks = _by_first(set(_MARKS) - added)
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        unknown = tokenizer.unk_token_id
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._unknown = None if unknown in others else unknown

    def samples(self, piece: Sequence[tuple[str, Sample]]) -> None:
        """A piece of the documents that could be read."""
        for name, sample in piece:
            self._sample(name, sample)

    def row(self, name: str, ids: Sequence[int], length: int) -> None:
        """A row as it is trained: its ids after cutting, its length before."""
        self.names.append(name)
        self.lengths.append(length)
        if len(ids) >= _MANY and len(set(ids)) < len(ids) * _FEW:
            self.found["repetitive"].add(name)
        if self._unknown is not None and self._unknown in ids:
            self.found["unknown"].add(name)

    def _sample(self, name: str, sample: Sample) -> None:
        if sample.kind == "text":
            texts: tuple[str, ...] = (sample.value,)
            key, prompt = hash(sample.value), None
        elif sample.kind == "pair":
            texts = sample.value
            key, prompt = hash(sample.value), hash(texts[0])
            if texts[0].strip() == texts[1].strip():
                self.found["echo"].add(name)
        else:
            texts, key, prompt = self._chat(name, sample.value)
        if sample.rejected is not None:
            # Other answers to the same prompt are what a preference is made of.
            more = _said(sample.rejected)
            texts, key, prompt = (*texts, *more), hash((key, more)), None
        self._repetition(name, key, prompt)
        self._content(name, texts, sample.kind)

    def _chat(self, name: str, messages: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], int, int | None]:
        said = tuple((message["role"], message.get("content") or "") for message in messages)
        last = said[-1]
        if last[0] == "user":
            self.found["unanswered"].add(name)
        elif last[0] == "assistant" and len(said) > 1 and said[-2][1].strip() == last[1].strip() != "":
            self.found["echo"].add(name)
        prompt = hash(said[:-1]) if last[0] == "assistant" and len(said) > 1 else None
        return tuple(content for _, content in said), hash(said), prompt

    def _repetition(self, name: str, key: int, prompt: int | None) -> None:
        first = self.seen.samples.get(key)
        if first is not None:
            self.repeats[name] = first
            self.found["duplicate" if self.trains or key in self._own else "leak"].add(name)
        else:
            self.seen.samples[key] = name
            if not self.trains:
                self._own[key] = name
        if prompt is not None and first is None and self.seen.prompts.setdefault(prompt, key) != key:
            self.found["conflict"].add(name)

    def _content(self, name: str, texts: Sequence[str], kind: str) -> None:
        found = self.found
        whole = "\n".join(texts)  # nothing that is looked for reaches over the end of a line
        # A text may be written with its own marks on purpose; what stands in a question or an answer may not.
        inside = kind != "text" and _holds(whole, self._specials)
        if inside and any(_holds(self._bare(text), self._specials) for text in texts):
            found["special"].add(name)
        if _holds(whole, self._marks):
            found["markup"].add(name)
        if not whole.isascii() and _MOJIBAKE.search(whole):
            found["damaged"].add(name)
        if _CONTROL.search(whole):
            found["control"].add(name)

    def _bare(self, text: str) -> str:
        """Without a BOS at its start and an EOS at its end, of which a row has one in any case."""
        if self._bos:
            text = text.removeprefix(self._bos)
        return text.removesuffix(self._eos) if self._eos else text


def _said(value: Sequence[Any]) -> tuple[str, ...]:
    return tuple(part if isinstance(part, str) else part.get("content") or "" for part in value)


def _by_first(words: set[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for word in words:
        out.setdefault(word[0], []).append(word)
    return out


def _holds(text: str, words: dict[str, list[str]]) -> bool:
    for first, those in words.items():
        if first in text:
            for word in those:
                if word in text:
                    return True
    return False
