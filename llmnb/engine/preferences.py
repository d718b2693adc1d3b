"""Preferences: documents with a chosen and a rejected answer to one prompt, as pairs of rows.

Each answer is a row as the trainer makes it of a prompt with one answer, so ids, seams, end of turn and truncation are
those of every other training. Formats: https://huggingface.co/docs/trl/dataset_formats . This module knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, Fault
from .counts import RowReport
from .encoding import Ids, Ranges
from .formats import as_messages, is_sharegpt
from .rows import Collator, Encoded, Maker, Rows
from .samples import Reader, Sample, chat_fault, own_fields, type_of, with_tools

__all__ = ["PairCollator", "PairMaker", "PairRows", "PreferenceReader"]

COLUMNS = ("prompt", "chosen", "rejected")
_PROMPTS = ("prompt", "question", "instruction", "input")


# --- documents ----------------------------------------------------------------------------------------------


class PreferenceReader(Reader):
    """Reads preferences from documents; ``kind`` is "pair" for texts and "messages" for chats."""

    def _infer(self, peek: Sequence[Mapping[str, Any]]) -> tuple[Any, str | None]:
        fields = own_fields(peek)
        if not {"chosen", "rejected"} <= set(fields):
            raise DataError(
                "It cannot be told which fields of the documents hold the two answers.",
                seen="fields: " + (", ".join(sorted(fields)) or "none"),
                todo="give key=('prompt', 'chosen', 'rejected') with the names of your fields",
            )
        prompt = next((name for name in _PROMPTS if name in fields), None)
        return ((prompt, *COLUMNS[1:]) if prompt else COLUMNS[1:]), None

    def _check(self, kind: str | None) -> None:
        faults = []
        if kind is not None:
            faults.append(Fault("key_kind", f"{kind!r} does not go with method='dpo'", "leave it out"))
        good = all(isinstance(column, str) and column for column in self.columns)
        if not good or not (len(self.columns) in (2, 3) or (self.transform is not None and self.columns)):
            what = f"{self.key!r} does not name a prompt, the chosen and the rejected answer"
            faults.append(Fault("key", what, "key=('prompt', 'chosen', 'rejected'); chats need no prompt"))
        if faults:
            raise ConfigError(faults)

    def _kind_of(self, peek: Sequence[Mapping[str, Any]]) -> str:
        for document in peek:
            values = [document.get(column) for column in self.columns]
            found = self._preference(values, self.columns)
            if isinstance(found, Sample):
                return found.kind
        return "pair"

    def _sample(self, kind: str, values: Sequence[Any], names: Sequence[str]) -> Sample | str:
        found = self._preference(values, names)
        if isinstance(found, Sample):
            if self.kind is None:
                self.kind = found.kind
            if found.kind != self.kind:
                words = {"pair": "texts", "messages": "chats"}
                return f"has {words[found.kind]} as answers, where {words[self.kind]} were expected"
        return found

    def _result(self, result: Any) -> Sample | str:
        if not isinstance(result, Mapping):
            return f"transform gave {type(result).__name__}, not a dict"
        if not {"chosen", "rejected"} <= set(result):
            gave = ", ".join(sorted(map(str, result))) or "nothing"
            return f"transform gave {gave}; wanted is prompt, chosen and rejected"
        names = [name for name in COLUMNS if name in result]
        return with_tools(self._sample("", [result[name] for name in names], names), result)

    def _preference(self, values: Sequence[Any], names: Sequence[str]) -> Sample | str:
        (*prompts, chosen, rejected), (*_, good, bad) = values, names
        prompt = prompts[0] if prompts else None
        if prompts and prompt is None:
            return f"{names[0]!r} is null, not a string or a list of messages"
        if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, (list, tuple)):
            return _texts(prompt, chosen, rejected, names)
        chats = []
        for value, name in ((chosen, good), (rejected, bad)):
            chat = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
            chat = self._chat(chat, name)
            if isinstance(chat, str):
                return chat
            chats.append(chat)
        if isinstance(prompt, str):
            before: Any = [{"role": "user", "content": prompt}]
        else:
            before = [] if prompt is None else self._chat(prompt, names[0])
        return before if isinstance(before, str) else _chats(before, *chats)

    def _chat(self, value: Any, name: str) -> list[dict[str, Any]] | str:
        if is_sharegpt(value):
            value = as_messages(value)
            if isinstance(value, str):
                return value
            self.converted = f"{name!r} has from and value, as ShareGPT's: human was read as user, gpt as assistant"
        return chat_fault(value, name) or [dict(message) for message in value]


def _texts(prompt: Any, chosen: str, rejected: str, names: Sequence[str]) -> Sample | str:
    if prompt is None:
        return f"has texts in {names[0]!r} and {names[1]!r} and no prompt; name its field as the first of key"
    for name, value in zip(names, (prompt, chosen, rejected), strict=True):
        if not isinstance(value, str):
            return f"{name!r} is {type_of(value)}, not a string"
        if not value.strip():
            return f"{name!r} is empty"
    if chosen == rejected:
        return "has the same text as chosen and as rejected answer"
    return Sample("pair", (prompt, chosen), (prompt, rejected))


def _chats(before: list[dict[str, Any]], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> Sample | str:
    """Both chats with their common prompt, in which nothing carries loss."""
    common = 0
    for one, other in zip(chosen, rejected):
        if one != other:
            break
        common += 1
    # Many data sets give the prompt beside the chats, and in them once more.
    if before and not _ends_with(chosen[:common], before):
        chosen, rejected, common = before + chosen, before + rejected, len(before)
    if chosen == rejected:
        return "has the same chat as chosen and as rejected answer"
    if not common:
        return "has chats that begin differently and no prompt; both must begin with the same question"
    for chat in (chosen, rejected):
        if chat[common:][:1] == [] or chat[common].get("role") != "assistant":
            return "has chats that part before an answer; what follows the common prompt must be the assistant's"
    return Sample("messages", _asked(chosen, common), _asked(rejected, common))


def _ends_with(chat: list[dict[str, Any]], end: list[dict[str, Any]]) -> bool:
    last = chat[-len(end) :]
    said = [(message.get("role"), str(message.get("content")).strip()) for message in last]
    return said == [(message.get("role"), str(message.get("content")).strip()) for message in end]


def _asked(chat: list[dict[str, Any]], common: int) -> list[dict[str, Any]]:
    return [
        {**message, "weight": 0} if at < common and message.get("role") == "assistant" else message
        for at, message in enumerate(chat)
    ]


# --- rows ---------------------------------------------------------------------------------------------------


class PairRows(Sequence[dict[str, list[int]]]):
    """Rows of ``{"input_ids", "labels", "rejected_ids", "rejected_labels"}``, the first two of the chosen answer.

    Attributes:
        sides: ``Rows`` of all answers: chosen, rejected, chosen, ….
        lengths: tokens of the longer answer of each pair, prompt included, (pairs,).
        report: what became of the documents.
    """

    def __init__(self, sides: Rows) -> None:
        self.sides, self.report = sides, sides.report
        self.lengths: npt.NDArray[np.int64] = sides.lengths.reshape(-1, 2).max(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[int(index)]
        chosen, rejected = self.sides[2 * index], self.sides[2 * index + 1]
        return {**chosen, "rejected_ids": rejected["input_ids"], "rejected_labels": rejected["labels"]}

    def ids(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of the chosen answer with its prompt, (seq,)."""
        return self.sides.ids(2 * index)

    def labels(self, index: int) -> npt.NDArray[np.int32]:
        """Labels of the chosen answer, (seq,)."""
        return self.sides.labels(2 * index)

    def chosen(self) -> Rows:
        """The preferred answers alone."""
        return self.sides.every(2)

    def digest(self) -> str:
        """Identifies the pairs and their order: 32 hexadecimal digits."""
        return self.sides.digest()

    def __repr__(self) -> str:
        return f"PairRows({len(self)} pairs, {self.report.tokens} tokens, {self.report.trained_tokens} of answers)"


class _Name(str):
    """An _id of its own identity: both answers of a document are counted under it."""

    __slots__ = ()


class PairMaker(Maker):
    """Collects pairs of rows. A document gives both of its answers or none."""

    _sides: list[tuple[str, Ids, Ranges]]

    def sides(self, kind: str, piece: Sequence[tuple[str, Sample]]) -> Sequence[tuple[str, Any]]:
        named = [(_Name(name), sample) for name, sample in piece]
        return [(name, value) for name, sample in named for value in (sample.value, sample.rejected)]

    def keep(self, kind: str, encoded: Encoded, answers: bool) -> None:
        self._sides = []
        super().keep(kind, encoded, answers)

    def _keep(self, name: str, ids: Ids, ranges: Ranges, answers: bool) -> None:
        self._sides.append((name, ids, ranges))

    def _flush(self) -> None:
        at = 0
        while at < len(self._sides):
            name, *chosen = self._sides[at]
            two = at + 1 < len(self._sides) and self._sides[at + 1][0] is name
            if two:  # else the other one was refused, and counted
                self._keep_both(name, tuple(chosen), self._sides[at + 1][1:])
            at += 1 + two
        self._sides = []
        super()._flush()

    def _keep_both(self, name: str, *sides: Any) -> None:
        counts = self.counts
        fitting = [self.fit(ids, ranges) for ids, ranges in sides]
        if not all(ranges for _, ranges in fitting):
            counts.drop(name)
            return
        if fitting[0] == fitting[1]:
            counts.skip(name, f"has answers that are the same in the {counts.limit} tokens that fit")
            return
        if any(len(ids) > counts.limit for ids, _ in sides):
            counts.cut.add(name)
        if any(ranges[-1][1] > counts.limit for _, ranges in sides):
            counts.shortened.add(name)
        if any(ranges[0][0] > 1 and self.begins_twice(ids) for ids, ranges in fitting):
            counts.doubled.add(name)
        counts.rows += 1
        for (ids, _), (kept, ranges) in zip(sides, fitting, strict=True):
            counts.tokens += len(kept)
            counts.trained += sum(end - begin for begin, end in ranges)
            self._piece.append((kept, ranges))
            if self.watch is not None:
                self.watch.row(name, kept, len(ids))

    def rows(self, report: RowReport) -> Any:
        return PairRows(super().rows(report))


class PairCollator(Collator):
    """Pairs to one batch: chosen answers first, then the rejected ones in the same order.

    Blank rows, which fill the batches of several ranks, are left out where a pair is; a batch of blank ones keeps one.
    """

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``labels``, each (2 × pairs, seq), int64."""
        pairs = [row for row in rows if "rejected_ids" in row] or rows[:1]
        rejected = [
            {
                "input_ids": row.get("rejected_ids", row["input_ids"]),
                "labels": row.get("rejected_labels", row["labels"]),
            }
            for row in pairs
        ]
        return super().__call__([*pairs, *rejected])
