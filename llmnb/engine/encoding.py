"""Text to token ids, by one rule for training and for answering.

The rule: no special token is put in by the tokenizer's own call; the start of a row (usually one BOS) and its end (one
EOS) are ours to place, exactly once. A place where a prompt ends and an answer begins is a *seam*: the ids up to a seam
are always the ids that the prompt has alone, because that is what the model is shown when it answers. This module
knows no documents, no chat templates and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Encoder", "Ids", "fill_prompt"]

Ids = npt.NDArray[np.int32]

_TAIL_CACHE = 4096  # distinct seam tails to remember; a template has a handful, free text has one per row


def fill_prompt(prompt_template: str, prompt: str) -> str:
    """``prompt_template`` with ``{input}`` replaced. Other braces are left alone, so JSON may stand in a template."""
    return prompt_template.replace("{input}", prompt)


def _array(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int32)


def _starts_with(ids: Ids, head: Ids) -> bool:
    return len(head) <= len(ids) and bool(np.array_equal(ids[: len(head)], head))


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
            return [_array(encoding.ids) for encoding in found]
        return [_array(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def ids(self, text: str) -> Ids:
        """The ids of one text, without start and end tokens."""
        return self.batch([text])[0]

    def start(self, ids: Ids) -> tuple[Ids, int]:
        """The ids with exactly one start, and by how many positions the rest moved (negative: to the left).

        A text or template may write the BOS itself; then the tokenizer's own would be the second.
        """
        drop = 0
        if self.bos is not None:
            while drop < len(ids) and ids[drop] == self.bos:
                drop += 1
        if not self.prefix:
            drop = max(drop - 1, 0)  # the text's own one stays
            return ids[drop:], -drop
        prefix = _array(self.prefix)
        if len(prefix) > 1 and _starts_with(ids, prefix):
            return ids, 0
        return np.concatenate([prefix, ids[drop:]]), len(prefix) - drop

    def end(self, ids: Ids) -> Ids:
        """The ids with exactly one EOS at the end, where the tokenizer has an EOS."""
        if self.eos is None:
            return ids
        keep = len(ids)
        while keep and ids[keep - 1] == self.eos:
            keep -= 1
        return np.append(ids[:keep], np.int32(self.eos))

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
        wholes = self.batch([p + a for p, a in zip(prompts, answers, strict=True)])
        heads = self.batch(prompts)
        out = []
        for whole, head, answer in zip(wholes, heads, answers, strict=True):
            if _starts_with(whole, head):
                out.append((whole, len(head), False))
            else:
                out.append((np.concatenate([head, self.after(answer)]), len(head), True))
        return out

    def spans(
        self, texts: Sequence[str], seams: Sequence[Sequence[int]], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[Ids, npt.NDArray[np.bool_], bool]]:
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
    ) -> tuple[Ids, npt.NDArray[np.bool_], bool]:
        ids: list[int] = encoding.ids
        for seam in seams:
            if not self._clean(encoding, ids, text, seam):
                return self._by_prefix(text, seams, spans)
        trained = np.zeros(len(ids), dtype=np.bool_)
        for begin, end in spans:
            first = _token_at(encoding, begin, len(text), len(ids))
            trained[first : _token_at(encoding, end, len(text), len(ids))] = True
        return _array(ids), trained, False

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
        alone = self._tails.get(tail)
        if alone is None:
            alone = self.ids(tail).tolist()
            if len(self._tails) < _TAIL_CACHE and len(tail) < 256:
                self._tails[tail] = alone
        return alone == ids[max(at, 0) : count]

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
        head, at, split = np.empty(0, dtype=np.int32), 0, False
        for (char, is_seam), whole in zip(marks, wholes, strict=True):
            kept = _starts_with(whole, head)
            ids = whole if kept else np.concatenate([head, self.after(text[at:char])])
            found[char] = ids, split or not kept
            if is_seam:
                head, at, split = ids, char, split or not kept
        return [found[end] for end in ends]

    def _by_prefix(
        self, text: str, seams: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> tuple[Ids, npt.NDArray[np.bool_], bool]:
        """``_by_offset`` without offsets: slower, for Python tokenizers and for the few rows with a seam to split."""
        chars = sorted({char for span in spans for char in span})
        *heads, (ids, split) = self._heads(text, seams, [*chars, len(text)])
        place = {char: _same(head, ids) for char, (head, _) in zip(chars, heads, strict=True)}
        trained = np.zeros(len(ids), dtype=np.bool_)
        for begin, end in spans:
            trained[place[begin] : place[end]] = True
        return ids, trained, split


def _cut_at_word(text: str, far: int) -> str:
    at = far
    while at > far // 2 and not (text[at].isspace() and not text[at - 1].isspace()):
        at -= 1
    return text[:at] if at > far // 2 else text


def _same(one: Ids, other: Ids) -> int:
    """How many ids at the start are the same."""
    count = min(len(one), len(other))
    same = one[:count] == other[:count]
    return count if same.all() else int(same.argmin())


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
