"""Rows: what the trainer sees of the documents, as token ids and labels.

Documents come from any iterable and are read once, in pieces, so that a large collection never lies in memory as
Python objects: a row costs five bytes a token. What is cut, dropped or passed over is counted in a ``RowReport``. This
module knows no database and no training loop.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from ..config import TrainConfig
from ..errors import ConfigError, DataError, Fault
from .counts import Counts, RowReport, opening_notes
from .encoding import Encoder, Ids, Ranges, fill_prompt
from .pieces import ahead, pieces_of
from .samples import Reader, Sample, infer_key
from .templates import Chat, ChatTemplate, chat_ids, prompt_ids, tools_of
from .watching import Watch

__all__ = ["Collator", "Maker", "RowReport", "Rows", "chat_ids", "infer_key", "make_rows", "prompt_ids"]

NO_LOSS = -100  # torch's ignore_index
_PEEK = 64  # documents to look at before the first one is read
_CHECKED_CHATS = 32  # chats whose prompt is rendered again and compared


class Rows(Sequence[dict[str, list[int]]]):
    """Rows of ``{"input_ids": [...], "labels": [...]}``; a label is -100 where there is no loss.

    The label of a row's first token is always -100: nothing comes before it that could predict it, and rows may be laid
    end to end without the seam being trained.

    Attributes:
        lengths: tokens of each row, (rows,).
        report: what became of the documents.
    """

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        trained: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
        report: RowReport,
    ) -> None:
        self._ids, self._trained, self._offsets = ids, trained, offsets
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets)
        self.report = report
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def _bounds(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return int(self._offsets[index]), int(self._offsets[index + 1])

    def ids(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of a row, (seq,): a view, not a copy."""
        begin, end = self._bounds(index)
        return self._ids[begin:end]

    def labels(self, index: int) -> npt.NDArray[np.int32]:
        """Labels of a row, (seq,)."""
        begin, end = self._bounds(index)
        return np.where(self._trained[begin:end], self._ids[begin:end], np.int32(NO_LOSS))

    @overload
    def __getitem__(self, index: int) -> dict[str, list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, list[int]]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, list[int]] | list[dict[str, list[int]]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        return {"input_ids": self.ids(index).tolist(), "labels": self.labels(index).tolist()}

    def every(self, count: int) -> Rows:
        """The first row of each ``count`` in succession."""
        kept = range(0, len(self), count)
        bounds = [self._bounds(at) for at in kept]
        ids = np.concatenate([self._ids[begin:end] for begin, end in bounds])
        trained = np.concatenate([self._trained[begin:end] for begin, end in bounds])
        report = replace(self.report, tokens=len(ids), trained_tokens=int(trained.sum()))
        return Rows(ids, trained, np.cumsum([0, *self.lengths[::count]]), report)

    def parts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Where each row begins, (rows + 1,); ids of all rows, (tokens,); which of them carry loss, (tokens,)."""
        return self._offsets, self._ids, self._trained

    def digest(self) -> str:
        """Identifies the rows, their labels and their order: 32 hexadecimal digits."""
        if self._digest is None:
            found = hashlib.blake2b(digest_size=16)  # twice as fast as sha256: 1 s for 200 M tokens
            for part in self.parts():
                found.update(np.ascontiguousarray(part).data)
            self._digest = found.hexdigest()
        return self._digest

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows, {self.report.tokens} tokens, {self.report.trained_tokens} trained)"


class Collator:
    """Rows to one batch of tensors, padded on the right and masked by position.

    The padding id is never looked for in the rows: where the pad token is the EOS, a real EOS keeps its label.
    """

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int | None = None) -> None:
        pad = tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else tokenizer.eos_token_id or 0)
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (batch, seq), int64."""
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // self.multiple) * self.multiple
        ids = np.full((len(rows), width), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), NO_LOSS, dtype=np.int64)
        for at, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[at, :length] = row["input_ids"]
            mask[at, :length] = 1
            labels[at, :length] = row["labels"]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }


class Encoded(NamedTuple):
    """A piece of the documents, tokenised.

    Attributes:
        names: _ids, one for each value.
        values: what was tokenised; of a chat that cannot be rendered, the reason.
        found: what the encoder gave for each value that can.
        unlike: where a chat does not begin with the prompt that answering would send.
    """

    names: list[str]
    values: Sequence[Any]
    found: Sequence[Any]
    unlike: Collection[int] = ()


class Maker:
    """Collects rows while documents stream by."""

    def __init__(
        self, tokenizer: Any, config: TrainConfig, prompt_template: str, counts: Counts, watch: Watch | None = None
    ) -> None:
        self.tokenizer, self.config, self.prompt_template, self.counts = tokenizer, config, prompt_template, counts
        self.watch = watch
        self.encoder = Encoder(tokenizer)
        self.template: ChatTemplate | None = None
        self._checked = 0
        self._piece: list[tuple[Ids, Ranges]] = []
        self._ids: list[npt.NDArray[np.int32]] = []
        self._trained: list[npt.NDArray[np.bool_]] = []
        self._lengths: list[npt.NDArray[np.int64]] = []

    def sides(self, kind: str, piece: Sequence[tuple[str, Sample]]) -> Sequence[tuple[str, Any]]:
        """What a row is made of each, with the _id of its document."""
        return [(identifier, sample.value) for identifier, sample in piece]

    def encode(self, kind: str, piece: Sequence[tuple[str, Sample]]) -> Encoded:
        """A piece of the documents, all of one kind, tokenised. Counts nothing; pieces come in order.

        Whatever asks the tokenizer is here, because this runs on a thread of its own.
        """
        sides = self.sides(kind, piece)
        names, values = [name for name, _ in sides], [value for _, value in sides]
        if kind == "text":
            return Encoded(names, values, self.encoder.heads(values, self.counts.limit))
        if kind == "pair":
            prompts = [fill_prompt(self.prompt_template, prompt) for prompt, _ in values]
            responses = [response for _, response in values]
            return Encoded(names, [*zip(prompts, responses, strict=True)], self.encoder.pairs(prompts, responses))
        return self._rendered(names, values)

    def keep(self, kind: str, encoded: Encoded, answers: bool) -> None:
        """Keeps the rows of a piece, and counts."""
        {"text": self._texts, "pair": self._pairs}.get(kind, self._chats)(encoded, answers)
        self._flush()

    def _flush(self) -> None:
        """One array for a piece: small arrays cost more than the ids in them."""
        lengths = np.array([len(ids) for ids, _ in self._piece], dtype=np.int64)
        total = int(lengths.sum())
        trained = np.zeros(total, dtype=np.bool_)
        at = 0
        for ids, ranges in self._piece:
            for begin, end in ranges:
                trained[at + begin : at + end] = True
            at += len(ids)
        flat = itertools.chain.from_iterable(ids for ids, _ in self._piece)
        self._ids.append(np.fromiter(flat, dtype=np.int32, count=total))
        self._trained.append(trained)
        self._lengths.append(lengths)
        self._piece = []

    def rows(self, report: RowReport) -> Rows:
        """All rows; the maker is empty afterwards."""
        ids, trained = np.empty(report.tokens, dtype=np.int32), np.empty(report.tokens, dtype=np.bool_)
        at = report.tokens
        while self._ids:  # from the end, giving each piece back at once, so that no two copies of all are held
            piece, mask = self._ids.pop(), self._trained.pop()
            ids[at - len(piece) : at], trained[at - len(piece) : at] = piece, mask
            at -= len(piece)
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *self._lengths])
        offsets = np.cumsum(lengths)
        return Rows(ids, trained, offsets, report)

    def _texts(self, encoded: Encoded, answers: bool) -> None:
        for name, raw in zip(encoded.names, encoded.found, strict=True):
            ids = self.encoder.end(self.encoder.start(raw)[0])
            self._keep(name, ids, [(0, len(ids))], False)

    def _pairs(self, encoded: Encoded, answers: bool) -> None:
        for name, (prompt, response), (raw, head, split) in zip(*encoded[:3], strict=True):
            # Each side by itself: a prompt may be nothing but an EOS, a response nothing but a BOS.
            begun, moved = self.encoder.start(raw[:head])
            ids = begun + self.encoder.end(raw[head:])
            if split:
                self.counts.split.add(name)
            if prompt[-1:].isalnum() and response[:1].isalnum():
                self.counts.touching.add(name)
            if self.encoder.eos is None:
                self.counts.endless.add(name)
            self._keep(name, ids, [(head + moved if answers else 0, len(ids))], answers)

    def _rendered(self, names: list[str], chats: Sequence[list[dict[str, Any]]]) -> Encoded:
        if self.template is None:
            self.template = ChatTemplate(self.tokenizer, self.config.chat_template)
            closer = self.template.closer.strip()
            tokens = len(self.encoder.ids(closer)) if closer else 1
            self.counts.long_stop = (closer, tokens) if tokens > 1 else None
        found = self.template.chats(chats)
        unlike = set()
        for at, (messages, chat) in enumerate(zip(chats, found, strict=True)):
            if self._checked < _CHECKED_CHATS and not isinstance(chat, str) and chat.seams:
                self._checked += 1
                if self._asked_otherwise(self.template, messages, chat):
                    unlike.add(at)
        good = [chat for chat in found if not isinstance(chat, str)]
        spans = self.encoder.spans([c.text for c in good], [c.seams for c in good], [c.spans for c in good])
        return Encoded(names, found, spans, unlike)

    def _chats(self, encoded: Encoded, answers: bool) -> None:
        good: list[tuple[str, Chat]] = []
        for at, (name, chat) in enumerate(zip(encoded.names, encoded.values, strict=True)):
            if isinstance(chat, str):
                self.counts.skip(name, chat)
                continue
            good.append((name, chat))
            if at in encoded.unlike:
                self.counts.unlike.add(name)
        for (name, chat), (raw, ranges, split) in zip(good, encoded.found, strict=True):
            ids, moved = self.encoder.start(raw)
            if moved:
                ranges = [(max(begin + moved, 0), max(end + moved, 0)) for begin, end in ranges]
            if self.encoder.prefix and moved > 0:
                self.counts.unmarked.add(name)
            if chat.open_ended:
                self.counts.unstopped.add(name)
                if chat.spans[-1][1] >= len(chat.text.rstrip()):
                    # No end of turn: the EOS becomes the last trained token.
                    ids = self.encoder.end(ids[: ranges[-1][1]])
                    ranges[-1] = ranges[-1][0], len(ids)
                if self.encoder.eos is None:
                    self.counts.endless.add(name)
            if not answers:
                ranges = [(0, len(ids))]
            if split:
                self.counts.split.add(name)
            self._keep(name, ids, ranges, answers)

    @staticmethod
    def _asked_otherwise(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], chat: Chat) -> bool:
        last = max(i for i, message in enumerate(messages) if message.get("role") == "assistant")
        prompt, _ = (
            template.given_tools(tools_of(messages)).try_render(messages[:last], prompt=True) if last else (None, "")
        )
        return prompt is not None and not chat.text.startswith(prompt)

    def fit(self, ids: Ids, ranges: Ranges) -> tuple[Ids, Ranges]:
        """What of a row fits. The first token has nothing before it that could predict it, so it carries no loss."""
        ids = ids[: self.counts.limit]
        return ids, [(max(begin, 1), min(end, len(ids))) for begin, end in ranges if max(begin, 1) < min(end, len(ids))]

    def _keep(self, name: str, ids: Ids, ranges: Ranges, answers: bool) -> None:
        counts, length = self.counts, len(ids)
        cut = length > counts.limit
        last = ranges[-1][1] if ranges else 0
        ids, ranges = self.fit(ids, ranges)
        if not ranges:
            counts.drop(name)
            return
        if cut:
            counts.cut.add(name)
            if answers and last > counts.limit:
                counts.shortened.add(name)
        if (ranges[0][0] > 1 or not answers) and self.begins_twice(ids):
            counts.doubled.add(name)
        counts.rows += 1
        counts.tokens += len(ids)
        counts.trained += sum(end - begin for begin, end in ranges)
        self._piece.append((ids, ranges))
        if self.watch is not None:
            self.watch.row(name, ids, length)

    def begins_twice(self, ids: Ids) -> bool:
        """True when a row begins with two BOS."""
        return len(ids) > 1 and ids[0] == ids[1] == self.encoder.bos


def make_rows(
    documents: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    config: TrainConfig,
    *,
    prompt_template: str = "{input}",
    transform: Callable[..., Any] | None = None,
    context: int | None = None,
    name: str = "train",
    watch: Watch | None = None,
) -> Any:
    """Reads documents once and makes rows of them: ``preferences.PairRows`` for ``method="dpo"``.

    Args:
        documents: any iterable of dicts; ``_id`` names them in the report.
        tokenizer: a transformers tokenizer, fast or slow.
        config: method, key, key_kind, max_seq_length, train_on, chat_template, prompt_template and max_cut_share
            are read.
        prompt_template: the model's own, used for the prompts of pairs when the config has none.
        transform: the person's function; it is given the values of the key's columns.
        context: the longest row the model can take, in tokens.
        name: what to call these rows in errors.
        watch: is shown every document and every row, and told of refusals in place of their being raised.

    Raises:
        ConfigError: key, key_kind, train_on and transform do not go together.
        DataError: nothing selected; a key that no document has; too many documents without a row; nothing to train.
    """
    template = config.prompt_template or prompt_template
    if "{input}" not in template:
        raise ConfigError([Fault("prompt_template", f"{template!r:.60} has no {{input}}", "say where the prompt goes")])
    stream = iter(documents)
    peek = list(itertools.islice(stream, _PEEK))
    if not peek:
        raise DataError(f"No document was selected for the {name} rows.", todo="check the collection and the filter")
    kind_of_reader: type[Reader] = Reader
    kind_of_maker: type[Maker] = Maker
    prefers = config.method == "dpo"
    if prefers:
        from .preferences import PairMaker, PreferenceReader

        kind_of_reader, kind_of_maker = PreferenceReader, PairMaker
    reader = kind_of_reader(config.key, config.key_kind, transform, peek, forgiving=watch is not None)
    counts = Counts(name, min(config.max_seq_length, context) if context else config.max_seq_length, once=prefers)
    if watch is not None:
        counts = watch.counts = replace(counts, kept=watch.kept)
        for found in watch.found.values():
            found.once = prefers
    maker = kind_of_maker(tokenizer, config, template, counts, watch)
    for piece, encoded in ahead(pieces_of(itertools.chain(peek, stream), reader, counts), maker.encode):
        for identifier, reason in piece.skipped:
            counts.skip(identifier, reason)
        if watch is not None:
            watch.samples(piece.samples)
        if piece.samples:
            maker.keep(piece.kind, encoded, answers_only(config.train_on, piece.kind))
    refusal = counts.refusal(reader, config)
    if refusal is not None and watch is None:
        raise refusal
    if watch is not None:
        watch.refusal = refusal
    return maker.rows(counts.report(reader, opening_notes(reader, config, tokenizer, template, context)))


def answers_only(train_on: str | None, kind: str) -> bool:
    """Do only the answers carry loss?"""
    if train_on not in (None, "answers", "all"):
        raise ConfigError([Fault("train_on", f"{train_on!r} is not possible", "'answers' or 'all'")])
    if train_on == "answers" and kind == "text":
        todo = "leave it out, or give a (prompt, response) pair or messages as key"
        raise ConfigError([Fault("train_on", "'answers' was asked for, but texts have no answers", todo)])
    return kind != "text" if train_on is None else train_on == "answers"
