"""What became of the documents: counted while they stream by, then told as a ``RowReport`` or as an error.

Nothing that is cut, dropped or passed over goes unsaid; too much of it refuses to start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..config import TrainConfig
from ..errors import DataError
from .samples import Reader, missing_key, unused_fields

__all__ = ["Counts", "RowReport"]

_NAMED = 5  # _ids to name of each sort
_CHANGE = "narrow the selection, or change key or transform"
_LONGER = "raise max_seq_length, or leave the long ones out"
_STOP = "give the tokenizer an eos_token, or a chat_template that ends each turn"
_BOS = "leave the BOS out of the texts, or mend the tokenizer's own way to begin"


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

    def numbers(self) -> dict[str, int]:
        """What a run keeps of it."""
        return {name: getattr(self, name) for name in ("found", "cut", "dropped", "tokens", "trained_tokens")}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: lists instead of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass
class Count:
    """A number of documents and their _ids; of many, the first.

    With ``once`` the very same object, twice in succession, is one document: both answers of a preference say the same.
    """

    number: int = 0
    ids: list[str] = field(default_factory=list)
    kept: int = _NAMED
    once: bool = False
    last: str | None = None

    def add(self, identifier: str) -> None:
        if self.once and identifier is self.last:
            return
        self.last = identifier
        self.number += 1
        if len(self.ids) < self.kept:
            self.ids.append(identifier)

    def take_in(self, other: Count) -> None:
        """Adds another's."""
        self.number += other.number
        self.ids = [*self.ids, *other.ids][: self.kept]

    def __str__(self) -> str:
        more = ", …" if self.number > _NAMED else ""
        return f"_id {', '.join(self.ids[:_NAMED])}{more}"


@dataclass
class Counts:
    """The counters of one ``make_rows``.

    Attributes:
        name: what to call the rows.
        limit: tokens a row may have.
        kept: how many _ids of each sort are kept.
        once: a document has two rows, and what is true of both counts once.
        cut: rows that lost their end.
        shortened: of these, rows whose answer lost its end.
        endless: rows of answers that no stop token ends, though nothing was cut off.
        doubled: rows that begin with two BOS.
        bare: rows left without a label.
        split: rows with a seam inside a token.
        unstopped: chats whose template writes no end of turn.
        touching: pairs whose prompt and response touch, letter to letter.
        unlike: chats that do not begin with the prompt that answering would send.
        unmarked: chats without BOS in a template, where the tokenizer's rows have one.
        skipped: documents that could not be read, by reason.
        dropped: all documents without a row.
        long_stop: the end of turn and how many tokens it takes, when the tokenizer has no token for it.
    """

    name: str
    limit: int
    kept: int = _NAMED
    once: bool = False
    found: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    cut: Count = field(default_factory=Count)
    shortened: Count = field(default_factory=Count)
    endless: Count = field(default_factory=Count)
    doubled: Count = field(default_factory=Count)
    bare: Count = field(default_factory=Count)
    split: Count = field(default_factory=Count)
    unstopped: Count = field(default_factory=Count)
    touching: Count = field(default_factory=Count)
    unlike: Count = field(default_factory=Count)
    unmarked: Count = field(default_factory=Count)
    dropped: Count = field(default_factory=Count)
    skipped: dict[str, Count] = field(default_factory=dict)
    long_stop: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            count = getattr(self, f.name)
            if isinstance(count, Count):
                count.kept, count.once = self.kept, self.once

    def skip(self, identifier: str, reason: str) -> None:
        """A document that cannot be read."""
        self.skipped.setdefault(reason, Count(kept=self.kept, once=self.once)).add(identifier)
        self.dropped.add(identifier)

    def drop(self, identifier: str) -> None:
        """A row without a label."""
        self.bare.add(identifier)
        self.dropped.add(identifier)

    def take_in(self, other: Counts) -> None:
        """Adds what another process counted of other documents."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, Count):
                mine.take_in(theirs)
            elif f.name in ("found", "rows", "tokens", "trained"):
                setattr(self, f.name, mine + theirs)
        for reason, count in other.skipped.items():
            self.skipped.setdefault(reason, Count(kept=self.kept, once=self.once)).take_in(count)
        self.long_stop = self.long_stop or other.long_stop

    @property
    def unread(self) -> int:
        """Documents that could not be read."""
        return sum(count.number for count in self.skipped.values())

    def report(self, reader: Reader, notes: Sequence[str]) -> RowReport:
        """The counts, once every document was read.

        Args:
            reader: what read the documents.
            notes: sentences to put first.
        """
        if reader.converted:
            notes = [reader.converted, *notes]
        return RowReport(
            found=self.found,
            used=self.rows,
            cut=self.cut.number,
            dropped=self.dropped.number,
            tokens=self.tokens,
            trained_tokens=self.trained,
            key=reader.key,
            kind=reader.kind or "text",
            notes=(*notes, *self._notes()),
            cut_ids=tuple(self.cut.ids),
            dropped_ids=tuple(self.dropped.ids),
            skipped=self.unread,
            split=self.split.number,
            limit=self.limit,
        )

    def refusal(self, reader: Reader, config: TrainConfig) -> DataError | None:
        """Why a run must not start with these rows; None when it may.

        Nothing is left to train on; or more than ``max_cut_share`` of what was selected is left out, loses the end of
        an answer, has no stop token or begins with two BOS: what such rows teach is not what was meant.
        """
        missing = {f"has no field {column!r}": column for column in reader.columns}
        if self.unread == self.found and set(self.skipped) <= set(missing):
            return missing_key([missing[reason] for reason in self.skipped], reader.seen_fields, self.name)
        todo = _CHANGE
        if self.bare.number > self.unread:
            todo = (
                f"rows may have {self.limit} tokens, and a prompt that fills them leaves none for its answer: raise "
                "max_seq_length; a chat needs a message of the assistant"
            )
        if not self.rows:
            what = f"None of the {self.found} {self.name} documents can be trained on"
            what += ": no token of them carries loss." if self.bare.number else "."
            return DataError(what, seen=self._reasons(), todo=todo)
        most = config.max_cut_share
        for number, what, way_out in (
            (self.dropped.number, "give no row", todo),
            (self.dropped.number + self.shortened.number, "give no row or lose the end of their answer", _LONGER),
            (self.endless.number, "have an answer that no stop token ends: the model would never stop", _STOP),
            (self.doubled.number, "begin with two BOS, which the model never saw", _BOS),
        ):
            if number > most * self.found:
                return DataError(
                    f"{number} of {self.found} {self.name} documents ({number / self.found:.0%}) {what}; more than "
                    f"max_cut_share={most:g} allows.",
                    seen=self._reasons(),
                    todo=way_out + "; max_cut_share=1 trains on them as they are",
                )
        return None

    def _reasons(self) -> str:
        told = [(count.number, f"each {reason} ({count})") for reason, count in self.skipped.items()]
        if self.bare.number:
            told.append((self.bare.number, f"no token of each carries loss ({self.bare})"))
        if self.shortened.number:
            told.append(
                (self.shortened.number, f"the answer of each reaches beyond {self.limit} tokens ({self.shortened})")
            )
        if self.endless.number:
            told.append((self.endless.number, f"no stop token ends the answer of each ({self.endless})"))
        if self.doubled.number:
            told.append((self.doubled.number, f"each begins with two BOS ({self.doubled})"))
        return "; ".join(f"{number}: {why}" for number, why in sorted(told, reverse=True)[:6])

    def _notes(self) -> Iterator[str]:
        if self.cut.number:
            yield f"{self.cut.number} of {self.found} rows have more than {self.limit} tokens and were cut ({self.cut})"
        for reason, count in self.skipped.items():
            yield f"{count.number} of {self.found} documents are left out: each {reason} ({count})"
        if self.bare.number:
            yield f"{self.bare.number} of {self.found} rows are left out: no token carries loss ({self.bare})"
        if self.shortened.number:
            yield f"{self.shortened.number} of these lose the end of their answer ({self.shortened})"
        if self.endless.number:
            yield f"in {self.endless.number} rows no stop token ends the answer ({self.endless})"
        if self.doubled.number:
            yield f"{self.doubled.number} rows begin with two BOS ({self.doubled})"
        if self.split.number:
            yield (
                f"in {self.split.number} rows a token would reach from the prompt into the answer; the two were "
                f"tokenised apart, as they are when the model answers ({self.split})"
            )
        if self.touching.number * 2 > self.rows:
            yield "prompts and responses touch without a space; prompt_template='{input}\\n' would part them"
        if self.unstopped.number:
            yield "the chat template writes no end of turn; the tokenizer's EOS ends each row instead"
        if self.long_stop is not None:
            yield (
                f"the chat template ends a turn with {self.long_stop[0]!r}, which is no token of this tokenizer but "
                f"{self.long_stop[1]}; chat_template='zephyr' ends turns with the tokenizer's own EOS"
            )
        if self.unlike.number:
            yield (
                "the chat template opens an answer otherwise than it writes one, so the model will be asked in a way "
                f"that it was not trained on ({self.unlike})"
            )
        if self.unmarked.number:
            yield "the chat template writes no BOS; the tokenizer's was put first, in training and in answering"


def opening_notes(
    reader: Reader, config: TrainConfig, tokenizer: Any, prompt_template: str, context: int | None
) -> list[str]:
    """What was chosen for the person, and which settings have no effect on these rows."""
    notes = []
    if reader.inferred:
        unused = unused_fields(reader.peek, reader.columns)
        rest = f"; not used: {', '.join(unused)}" if unused else ""
        notes.append(f"key was not given; {reader.key!r} was chosen, as {reader.kind}{rest}")
    if context and context < config.max_seq_length:
        notes.append(f"max_seq_length is {config.max_seq_length}, but the model takes {context} tokens: rows end there")
    own = getattr(tokenizer, "chat_template", None)
    if config.chat_template and reader.kind != "messages":
        notes.append(f"chat_template is not used for rows of kind {reader.kind}")
    elif config.chat_template and own and config.chat_template != own:
        notes.append("chat_template was given, so the tokenizer's own is not used")
    if reader.kind != "pair" and prompt_template != "{input}":
        notes.append(f"prompt_template is not used for rows of kind {reader.kind}: they are trained as they are")
    if reader.kind != "messages" and tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no EOS token, so rows have no stop token")
    return notes
