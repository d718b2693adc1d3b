"""Rows: what the trainer sees of the documents, as token ids and labels.

Documents come from any iterable and are read once, in pieces, so that a large collection never lies in memory as
Python objects: a row costs five bytes a token. What is cut, dropped or passed over is counted in a ``RowReport``. This
module knows no database and no training loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..config import TrainConfig
from ..errors import ConfigError, DataError, Fault
from .encoding import Encoder, Ids, fill_prompt
from .samples import Reader, Sample, infer_key, missing_key, unused_fields
from .templates import Chat, ChatTemplate, chat_ids, prompt_ids

__all__ = ["Collator", "RowReport", "Rows", "chat_ids", "infer_key", "make_rows", "prompt_ids"]

NO_LOSS = -100  # torch's ignore_index
_PEEK = 64  # documents to look at before the first one is read
_PIECE_ROWS, _PIECE_CHARS = 1000, 2_000_000  # what is tokenised at once
_NAMED = 5  # _ids to name in a report
_CHECKED_CHATS = 32  # chats whose prompt is rendered again and compared


@dataclass(frozen=True)
class RowReport:
    """What became of the documents.

    Attributes:
        found: documents that were read.
        used: rows that are trained on.
        cut: of these, rows longer than ``limit`` whose end was cut off.
        dropped: documents without a row: unreadable ones, and rows left without a label.
        tokens: tokens in all rows.
        trained_tokens: tokens that carry loss.
        key: the fields that were read.
        kind: text, pair or messages.
        notes: sentences for the person.
        cut_ids: the first _ids of cut rows.
        dropped_ids: the first _ids of dropped documents.
        skipped: of the dropped, those that could not be read (a field missing, empty or of another type).
        split: rows whose prompt and answer had to be tokenised apart.
        limit: tokens a row may have.
    """

    found: int
    used: int
    cut: int
    dropped: int
    tokens: int
    trained_tokens: int
    key: Any
    kind: str
    notes: tuple[str, ...] = ()
    cut_ids: tuple[str, ...] = ()
    dropped_ids: tuple[str, ...] = ()
    skipped: int = 0
    split: int = 0
    limit: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data: lists instead of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class Rows(Sequence[dict[str, list[int]]]):
    """Rows of ``{"input_ids": [...], "labels": [...]}``; a label is -100 where there is no loss.

    The label of a row's first token is always -100: nothing comes before it that could predict it, and rows may be laid
    end to end without the seam being trained.

    Attributes:
        lengths: tokens of each row, (rows,).
        report: what became of the documents.
    """

    def __init__(self, ids: Ids, trained: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64], report: RowReport):
        self._ids, self._trained, self._offsets = ids, trained, offsets
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets)
        self.report = report

    def __len__(self) -> int:
        return len(self.lengths)

    def _bounds(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return int(self._offsets[index]), int(self._offsets[index + 1])

    def ids(self, index: int) -> Ids:
        """Token ids of a row, (seq,): a view, not a copy."""
        begin, end = self._bounds(index)
        return self._ids[begin:end]

    def labels(self, index: int) -> Ids:
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


@dataclass
class _Count:
    """A number of documents and the first of their _ids."""

    number: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, identifier: str) -> None:
        self.number += 1
        if len(self.ids) < _NAMED:
            self.ids.append(identifier)

    def __str__(self) -> str:
        more = ", …" if self.number > len(self.ids) else ""
        return f"_id {', '.join(self.ids)}{more}"


class _Maker:
    """Collects rows while documents stream by."""

    def __init__(self, tokenizer: Any, config: TrainConfig, prompt_template: str, limit: int, name: str) -> None:
        self.tokenizer, self.config, self.limit, self.name = tokenizer, config, limit, name
        self.encoder = Encoder(tokenizer)
        self.prompt_template = config.prompt_template or prompt_template
        self.template: ChatTemplate | None = None
        self.ids: list[Ids] = []
        self.trained: list[npt.NDArray[np.bool_]] = []
        self.lengths: list[int] = []
        self.found = 0
        self.cut, self.bare, self.split, self.open = _Count(), _Count(), _Count(), _Count()
        self.touching, self.unlike = _Count(), _Count()
        self.skipped: dict[str, _Count] = {}
        self.dropped = _Count()
        self.checked = 0

    def skip(self, identifier: str, reason: str) -> None:
        self.skipped.setdefault(reason, _Count()).add(identifier)
        self.dropped.add(identifier)

    def add(self, kind: str, piece: Sequence[tuple[str, Sample]], answers: bool) -> None:
        """Tokenises a piece of the documents, all of one kind, and keeps the rows."""
        names = [identifier for identifier, _ in piece]
        values = [sample.value for _, sample in piece]
        if kind == "text":
            self._texts(names, values)
        elif kind == "pair":
            self._pairs(names, values, answers)
        else:
            self._chats(names, values, answers)

    def _texts(self, names: Sequence[str], texts: Sequence[str]) -> None:
        for name, raw in zip(names, self.encoder.batch(texts), strict=True):
            ids = self.encoder.end(self.encoder.start(raw)[0])
            self._keep(name, ids, np.ones(len(ids), dtype=np.bool_))

    def _pairs(self, names: Sequence[str], values: Sequence[tuple[str, str]], answers: bool) -> None:
        prompts = [fill_prompt(self.prompt_template, prompt) for prompt, _ in values]
        responses = [response for _, response in values]
        found = self.encoder.pairs(prompts, responses)
        for name, prompt, response, (raw, head, split) in zip(names, prompts, responses, found, strict=True):
            ids, moved = self.encoder.start(raw)
            ids = self.encoder.end(ids)
            trained = np.ones(len(ids), dtype=np.bool_)
            if answers:
                trained[: head + moved] = False
            if split:
                self.split.add(name)
            if prompt[-1:].isalnum() and response[:1].isalnum():
                self.touching.add(name)
            self._keep(name, ids, trained)

    def _chats(self, names: Sequence[str], chats: Sequence[list[dict[str, Any]]], answers: bool) -> None:
        if self.template is None:
            self.template = ChatTemplate(self.tokenizer, self.config.chat_template)
        good: list[tuple[str, Chat]] = []
        for name, messages, chat in zip(names, chats, self.template.chats(chats), strict=True):
            if isinstance(chat, str):
                self.skip(name, chat)
                continue
            good.append((name, chat))
            if chat.seams and self.checked < _CHECKED_CHATS:
                self.checked += 1
                self._check_prompt(name, messages, chat)
        encoded = self.encoder.spans(
            [chat.text for _, chat in good], [chat.seams for _, chat in good], [chat.spans for _, chat in good]
        )
        for (name, chat), (raw, mask, split) in zip(good, encoded, strict=True):
            ids, moved = self.encoder.start(raw)
            trained = np.concatenate([np.zeros(max(moved, 0), dtype=np.bool_), mask[max(-moved, 0) :]])
            if chat.open_ended:
                self.open.add(name)
                if chat.spans[-1][1] >= len(chat.text.rstrip()):
                    ids, trained = self._closed(ids, trained)
            if not answers:
                trained = np.ones(len(ids), dtype=np.bool_)
            if split:
                self.split.add(name)
            self._keep(name, ids, trained)

    def _closed(self, ids: Ids, trained: npt.NDArray[np.bool_]) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """A chat whose template writes no end of turn, with the EOS as its last trained token."""
        last = int(trained.nonzero()[0][-1]) + 1
        closed = self.encoder.end(ids[:last])
        return closed, np.append(trained[: len(closed) - 1], self.encoder.eos is not None)[: len(closed)]

    def _check_prompt(self, name: str, messages: Sequence[Mapping[str, Any]], chat: Chat) -> None:
        assert self.template is not None
        last = max(i for i, message in enumerate(messages) if message.get("role") == "assistant")
        prompt, _ = self.template.try_render(messages[:last], prompt=True) if last else (None, "")
        if prompt is not None and not chat.text.startswith(prompt):
            self.unlike.add(name)

    def _keep(self, name: str, ids: Ids, trained: npt.NDArray[np.bool_]) -> None:
        cut = len(ids) > self.limit
        if cut:
            ids, trained = ids[: self.limit], trained[: self.limit]
        trained[:1] = False
        if not trained.any():
            self.bare.add(name)
            self.dropped.add(name)
            return
        if cut:
            self.cut.add(name)
        self.ids.append(ids)
        self.trained.append(trained)
        self.lengths.append(len(ids))


def make_rows(
    documents: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    config: TrainConfig,
    *,
    prompt_template: str = "{input}",
    transform: Callable[..., Any] | None = None,
    context: int | None = None,
    name: str = "train",
) -> Rows:
    """Reads documents once and makes rows of them.

    Args:
        documents: any iterable of dicts; ``_id`` names them in the report.
        tokenizer: a transformers tokenizer, fast or slow.
        config: key, key_kind, max_seq_length, train_on, chat_template, prompt_template and max_cut_share are read.
        prompt_template: the model's own, used for the prompts of pairs when the config has none.
        transform: the person's function; it is given the values of the key's columns.
        context: the longest row the model can take, in tokens.
        name: what to call these rows in errors.

    Raises:
        ConfigError: key, key_kind, train_on and transform do not go together.
        DataError: nothing selected; a key that no document has; too many documents without a row; nothing to train.
    """
    limit = min(config.max_seq_length, context) if context else config.max_seq_length
    template = config.prompt_template or prompt_template
    if "{input}" not in template:
        raise ConfigError([Fault("prompt_template", f"{template!r:.60} has no {{input}}", "say where the prompt goes")])
    stream = iter(documents)
    peek = list(itertools.islice(stream, _PEEK))
    if not peek:
        raise DataError(f"No document was selected for the {name} rows.", todo="check the collection and the filter")
    reader = Reader(config.key, config.key_kind, transform, peek)
    maker = _Maker(tokenizer, config, prompt_template, limit, name)
    for piece in _pieces(itertools.chain(peek, stream), reader, maker):
        kind = reader.kind or "text"
        maker.add(kind, piece, _answers(config.train_on, kind))
    report = _report(maker, reader, peek, context)
    ids = np.concatenate(maker.ids)
    trained = np.concatenate(maker.trained)
    offsets = np.concatenate([[0], np.cumsum(maker.lengths)]).astype(np.int64)
    return Rows(ids, trained, offsets, report)


def _answers(train_on: str | None, kind: str) -> bool:
    """Do only the answers carry loss?"""
    if train_on not in (None, "answers", "all"):
        raise ConfigError([Fault("train_on", f"{train_on!r} is not possible", "'answers' or 'all'")])
    if train_on == "answers" and kind == "text":
        todo = "leave it out, or give a (prompt, response) pair or messages as key"
        raise ConfigError([Fault("train_on", "'answers' was asked for, but texts have no answers", todo)])
    return kind != "text" if train_on is None else train_on == "answers"


def _pieces(
    documents: Iterable[Mapping[str, Any]], reader: Reader, maker: _Maker
) -> Iterator[list[tuple[str, Sample]]]:
    """Samples in pieces that are bounded in rows and in characters."""
    piece: list[tuple[str, Sample]] = []
    size = 0
    for document in documents:
        identifier = str(document.get("_id", maker.found))
        maker.found += 1
        sample = reader.read(document)
        if isinstance(sample, str):
            maker.skip(identifier, sample)
            continue
        piece.append((identifier, sample))
        size += _size(sample)
        if len(piece) >= _PIECE_ROWS or size >= _PIECE_CHARS:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _size(sample: Sample) -> int:
    if sample.kind == "messages":
        return sum(len(message.get("content") or "") for message in sample.value)
    return len(sample.value) if sample.kind == "text" else sum(map(len, sample.value))


def _report(maker: _Maker, reader: Reader, peek: Sequence[Mapping[str, Any]], context: int | None) -> RowReport:
    """The counts, once every document was read.

    Raises:
        DataError: nothing is left to train on, or too little of what was selected.
    """
    used, trained = len(maker.lengths), sum(int(mask.sum()) for mask in maker.trained)
    skipped = sum(count.number for count in maker.skipped.values())
    _refuse(maker, reader, used, skipped)
    return RowReport(
        found=maker.found,
        used=used,
        cut=maker.cut.number,
        dropped=maker.dropped.number,
        tokens=sum(maker.lengths),
        trained_tokens=trained,
        key=reader.key,
        kind=reader.kind or "text",
        notes=tuple(_notes(maker, reader, peek, context)),
        cut_ids=tuple(maker.cut.ids),
        dropped_ids=tuple(maker.dropped.ids),
        skipped=skipped,
        split=maker.split.number,
        limit=maker.limit,
    )


def _reasons(maker: _Maker) -> str:
    told = [f"{count.number} because it {reason} ({count})" for reason, count in maker.skipped.items()]
    if maker.bare.number:
        told.append(f"{maker.bare.number} because no token of it carries loss ({maker.bare})")
    return "; ".join(sorted(told, key=len)[:6])


def _refuse(maker: _Maker, reader: Reader, used: int, skipped: int) -> None:
    missing = {f"has no field {column!r}": column for column in reader.columns}
    if skipped == maker.found and set(maker.skipped) <= set(missing):
        raise missing_key([missing[reason] for reason in maker.skipped], reader.seen_fields, maker.name)
    longest = f"rows may have {maker.limit} tokens; a longer prompt leaves no room for its answer: raise max_seq_length"
    if not used:
        raise DataError(
            f"None of the {maker.found} {maker.name} documents can be trained on.",
            seen=_reasons(maker),
            todo=longest if maker.bare.number else "narrow the selection, or change key or transform",
        )
    share = maker.dropped.number / maker.found
    if share > maker.config.max_cut_share:
        raise DataError(
            f"{maker.dropped.number} of {maker.found} {maker.name} documents ({share:.0%}) give no row, "
            f"more than max_cut_share={maker.config.max_cut_share:g} allows.",
            seen=_reasons(maker),
            todo=(longest if maker.bare.number > skipped else "narrow the selection, or change key or transform")
            + "; max_cut_share=1 trains on what is left",
        )


def _notes(maker: _Maker, reader: Reader, peek: Sequence[Mapping[str, Any]], context: int | None) -> Iterator[str]:
    config, kind = maker.config, reader.kind
    if reader.inferred:
        unused = unused_fields(peek, reader.columns)
        rest = f"; not used: {', '.join(unused)}" if unused else ""
        yield f"key was not given; {reader.key!r} was chosen, as {kind}{rest}"
    if context and context < config.max_seq_length:
        yield f"max_seq_length is {config.max_seq_length}, but the model takes {context} tokens: rows are cut there"
    if maker.cut.number:
        yield f"{maker.cut.number} of {maker.found} rows have more than {maker.limit} tokens and were cut ({maker.cut})"
    for reason, count in maker.skipped.items():
        yield f"{count.number} of {maker.found} documents are left out: each {reason} ({count})"
    if maker.bare.number:
        yield f"{maker.bare.number} of {maker.found} rows are left out: no token carries loss ({maker.bare})"
    if maker.split.number:
        yield (
            f"in {maker.split.number} rows a token would reach from the prompt into the answer; the two were tokenised "
            f"apart, as they are when the model answers ({maker.split})"
        )
    if maker.touching.number * 2 > len(maker.lengths):
        yield "prompts and responses touch without a space; prompt_template='{input}\\n' would part them"
    if maker.open.number:
        yield "the chat template writes no end of turn; the tokenizer's EOS was put after the last answer of each row"
    if maker.unlike.number:
        yield (
            f"the chat template opens an answer otherwise than it writes one, so the model will be asked in a way that "
            f"it was not trained on ({maker.unlike})"
        )
    own = getattr(maker.tokenizer, "chat_template", None)
    if kind == "messages" and config.chat_template and own and config.chat_template != own:
        yield "chat_template was given, so the tokenizer's own is not used"
    if kind != "pair" and maker.prompt_template != "{input}":
        yield f"prompt_template is not used for rows of kind {kind}: they are trained as they are"
    if kind != "messages" and maker.encoder.eos is None:
        yield "the tokenizer has no EOS token, so rows have no stop token"
