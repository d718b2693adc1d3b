"""Text to token ids, by one rule for training and for answering.

The rule: no special token is put in by the tokenizer's own call; the start of a row (usually one BOS) and its end (one
EOS) are ours to place, exactly once. A place where a prompt ends and an answer begins is a *seam*: the ids up to a seam
are always the ids that the prompt has alone, because that is what the model is shown when it answers. This module
knows no documents, no chat templates and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

__all__ = ["Encoder", "Ids", "Ranges", "fill_prompt"]

Ids = list[int]  # of one row: short lists are faster than small arrays
Ranges = list[tuple[int, int]]  # of tokens, end not included

_PROBES = (
    "a",
    "Word",
    "7",
    "2026",
    ".",
    "?!",
    ")",
    '"',
    "'s",
    "é",
    "漢",
    "🙂",
    "_",
    "\\",
    "<",
    "...",
    "~",
    "\u0301",
    "\u00a0",
)
_TAIL_CACHE = 4096  # distinct seam tails to remember; a template has a handful, free text has one per row


def fill_prompt(prompt_template: str, prompt: str) -> str:
    """``prompt_template`` with ``{input}`` replaced. Other braces are left alone, so JSON may stand in a template."""
    return prompt_template.replace("{input}", prompt)


class Encoder:
    """One tokenizer and the rule above.

    Attributes:
        tokenizer: the transformers tokenizer, fast or slow.
        prefix: ids that the tokenizer puts at the start of a text by default (usually ``(bos,)`` or ``()``).
        eos: id of the stop token, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.prefix = self._find_prefix()
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self._backend = self._find_backend()
        self._tails: dict[str, list[int]] = {}
        self._cuts_at_spaces: bool | None = None  # not looked at yet
        self._sync()

    def _find_prefix(self) -> tuple[int, ...]:
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return tuple(full[:at])
        return ()

    def _find_backend(self) -> Any:
        """The Rust tokenizer when calling it is the same as calling the Python one, else None.

        Going through Python makes attention masks and type ids that nobody reads, and costs about as much again.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        kind = type(self.tokenizer)
        plain = getattr(kind, "_encode_plus", None) is getattr(PreTrainedTokenizerFast, "_encode_plus", None)
        if plain and kind.__call__ is PreTrainedTokenizerBase.__call__:
            return self.tokenizer.backend_tokenizer
        return None

    def _sync(self) -> None:
        # A tokenizer.json may carry truncation or padding; the Python call switches both off, so must we.
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))

    # -- plain ids ---------------------------------------------------------------------------------------------------
    def batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without start and end tokens."""
        if not texts:
            return []
        if self._backend is not None:
            self._sync()
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in found]
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def ids(self, text: str) -> Ids:
        """The ids of one text, without start and end tokens."""
        return self.batch([text])[0]

    def start(self, ids: Ids) -> tuple[Ids, int]:
        """The ids with exactly one start, and by how many positions the rest moved (negative: to the left).

        A text or template may write the BOS itself; then the tokenizer's own would be the second.
        """
        drop = 0
        while self.bos is not None and drop < len(ids) and ids[drop] == self.bos:
            drop += 1
        prefix = list(self.prefix)
        if not prefix:
            drop = max(drop - 1, 0)  # the text's own one stays
        elif len(prefix) > 1 and ids[: len(prefix)] == prefix:
            return ids, 0
        return prefix + ids[drop:], len(prefix) - drop

    def end(self, ids: Ids) -> Ids:
        """The ids with exactly one EOS at the end, where the tokenizer has an EOS."""
        if self.eos is None:
            return ids
        keep = len(ids)
        while keep and ids[keep - 1] == self.eos:
            keep -= 1
        return [*ids[:keep], self.eos]

    def heads(self, texts: Sequence[str], limit: int) -> list[Ids]:
        """The ids of each text, of which only the first ``limit`` (and whether there are more) will be used.

        Of a very long text only a part is tokenised. It is cut where a word ends, and far behind the limit, so that
        the ids that are used are the same.
        """
        far = limit * 32 + 4096
        short = [_cut_at_word(text, far) if len(text) > far else text for text in texts]
        found = self.batch(short)
        for at, (text, part) in enumerate(zip(texts, short, strict=True)):
            if len(part) < len(text) and len(found[at]) < limit + 256:
                found[at] = self.ids(text)
        return found

    # -- seams -------------------------------------------------------------------------------------------------------
    def after(self, text: str) -> Ids:
        """Ids of a text that goes on from another one: no start-of-text space of SentencePiece, where avoidable."""
        anchor, anchor_id = self.tokenizer.eos_token, self.eos
        if anchor and anchor_id is not None:
            ids = self.ids(anchor + text)
            if len(ids) and ids[0] == anchor_id:
                return ids[1:]
        return self.ids(text)

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[Ids, int, bool]]:
        """For each prompt and answer: ids of the whole, how many of them are the prompt's, and whether it was split.

        Prompt and answer are tokenised together. Where a token would reach over the seam, or the prompt alone has
        other ids, the two are tokenised apart (split), so that the prompt's ids stay what answering will send.
        """
        if self._cuts_at_spaces is None:
            self._cuts_at_spaces = self._find_cut_rule()
        cuts = [_last_word(prompt) if self._cuts_at_spaces else 0 for prompt in prompts]
        before = self.batch([prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)])
        tails = self._cached([prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)])
        rest = self.batch([p[cut:] + a for p, a, cut in zip(prompts, answers, cuts, strict=True)])
        out = []
        for head, tail, whole, answer in zip(before, tails, rest, answers, strict=True):
            count, clean = len(head) + len(tail), whole[: len(tail)] == tail
            out.append((head + whole if clean else head + tail + self.after(answer), count, not clean))
        return out

    def _cached(self, texts: Sequence[str]) -> list[Ids]:
        """``batch`` for short texts that come again and again."""
        new = list({text for text in texts if text not in self._tails})
        made = dict(zip(new, self.batch(new), strict=True))
        found = [self._tails[text] if text in self._tails else made[text] for text in texts]
        room = _TAIL_CACHE - len(self._tails)
        self._tails.update([(text, ids) for text, ids in made.items() if len(text) < 256][: max(room, 0)])
        return found

    def _find_cut_rule(self) -> bool:
        """Are the ids of ``x y`` those of ``x`` and of `` y``, whatever x and y are?

        So it is where a text is cut into words, each with the space before it, before anything is merged (GPT-2's rule
        and its successors). Then a prompt needs to be tokenised only once, together with its answer.
        """
        if self._backend is None or "ByteLevel" not in repr(self._backend.pre_tokenizer):
            return False
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.rstrip or token.single_word or any(char.isspace() for char in str(token)):
                return False
        pairs = [(x, " " + y) for x, y in product(_PROBES, repeat=2)]
        apart = {text: ids for texts in zip(*pairs, strict=True) for text, ids in zip(texts, self.batch(texts))}
        together = self.batch([x + y for x, y in pairs])
        return all(ids == apart[x] + apart[y] for (x, y), ids in zip(pairs, together, strict=True))

    def spans(
        self, texts: Sequence[str], seams: Sequence[Sequence[int]], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[Ids, Ranges, bool]]:
        """Ids of each text, which of them carry loss, and whether a seam had to be split.

        Args:
            texts: rendered texts.
            seams: per text, the characters where answers begin (ascending).
            spans: per text, the character ranges that carry loss.
        """
        if self._backend is None:
            return [self._by_prefix(*item) for item in zip(texts, seams, spans, strict=True)]
        self._sync()
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False) if texts else []
        return [self._by_offset(*item) for item in zip(encodings, texts, seams, spans, strict=True)]

    def _by_offset(
        self, encoding: Any, text: str, seams: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> tuple[Ids, Ranges, bool]:
        ids: list[int] = encoding.ids
        for seam in seams:
            if not self._clean(encoding, ids, text, seam):
                return self._by_prefix(text, seams, spans)
        size = len(text), len(ids)
        return (
            ids,
            [(_token_at(encoding, begin, *size), _token_at(encoding, end, *size)) for begin, end in spans],
            False,
        )

    def _clean(self, encoding: Any, ids: list[int], text: str, seam: int) -> bool:
        """Are the ids before the seam those that the text before it has alone?

        Tokenizers cut at added tokens before anything else, so only what follows the last one needs to be compared.
        That tail is the same for every row of a template ("assistant\\n"), hence the cache.
        """
        count = _token_at(encoding, seam, len(text), len(ids))
        at = count - 1
        while at >= 0 and ids[at] not in self.added:
            at -= 1
        begin = encoding.token_to_chars(at)[0] if at >= 0 else 0
        tail = text[begin:seam]
        known = self._tails.get(tail)
        return (self._cached([tail])[0] if known is None else known) == ids[max(at, 0) : count]

    def joined(self, text: str, seams: Sequence[int]) -> tuple[Ids, bool]:
        """Ids in which every seam is kept, and whether a seam had to be split.

        The ids up to each seam are the ``joined`` ids of the text up to there.
        """
        *_, (ids, split) = self._heads(text, seams, [len(text)])
        return ids, split

    def _heads(self, text: str, seams: Sequence[int], ends: Sequence[int]) -> list[tuple[Ids, bool]]:
        """``joined`` of ``text[:end]`` for each end, with the seams before it."""
        marks = sorted({(seam, True) for seam in seams} | {(end, False) for end in ends})
        wholes = self.batch([text[:char] for char, _ in marks])
        found: dict[int, tuple[Ids, bool]] = {}
        head, at, split = list[int](), 0, False
        for (char, is_seam), whole in zip(marks, wholes, strict=True):
            kept = whole[: len(head)] == head
            ids = whole if kept else head + self.after(text[at:char])
            found[char] = ids, split or not kept
            if is_seam:
                head, at, split = ids, char, split or not kept
        return [found[end] for end in ends]

    def _by_prefix(self, text: str, seams: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[Ids, Ranges, bool]:
        """``_by_offset`` without offsets: slower, for Python tokenizers and for the few rows with a seam to split."""
        chars = sorted({char for span in spans for char in span})
        *heads, (ids, split) = self._heads(text, seams, [*chars, len(text)])
        place = {char: _same(head, ids) for char, (head, _) in zip(chars, heads, strict=True)}
        return ids, [(place[begin], place[end]) for begin, end in spans], split


def _cut_at_word(text: str, far: int) -> str:
    at = far
    while at > far // 2 and not (text[at].isspace() and not text[at - 1].isspace()):
        at -= 1
    return text[:at] if at > far // 2 else text


def _last_word(text: str) -> int:
    """Where the last word begins, at the one space before it; 0 when it is long, or the first."""
    at = text.rfind(" ", max(0, len(text) - 200))
    while at > 0 and text[at - 1].isspace():
        at = text.rfind(" ", max(0, len(text) - 200), at)
    return max(at, 0)


def _same(one: Ids, other: Ids) -> int:
    """How many ids at the start are the same."""
    for at, (left, right) in enumerate(zip(one, other)):
        if left != right:
            return at
    return min(len(one), len(other))


def _token_at(encoding: Any, char: int, chars: int, tokens: int) -> int:
    """Index of the first token that begins at ``char`` or later.

    ``char_to_token`` is None for a character that no token claims (offsets trimmed of their space).
    """
    while char < chars:
        token = encoding.char_to_token(char)
        if token is None:
            char += 1
            continue
        return int(token) + (1 if encoding.token_to_chars(token)[0] < char else 0)
    return tokens
