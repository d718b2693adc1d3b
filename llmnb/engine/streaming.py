"""Rows that are made while they are trained, of documents that are read a few thousand ahead of the step.

The number of documents is known, and with it the order of every epoch; what a document holds is not, before it is its
turn. So a document that gives no row stands in the order as a blank one: it carries no loss. The first documents of the
order are made and judged before the first step, as all are of a set that is read whole. Memory is bounded by what may
wait. Knows no database: it is given a ``Numbered``.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..config import TrainConfig
from ..errors import DataError
from .counts import Counts, RowReport, opening_notes
from .encoding import Ids, Ranges
from .pieces import size_of
from .rows import NO_LOSS, Maker, answers_only
from .samples import Reader, Sample

__all__ = ["HEAD", "Numbered", "Streamed", "is_streamed"]

HEAD = 1000  # documents that are made and judged before the first step
_PEEK = 64
AHEAD_ROWS, AHEAD_TOKENS = 4096, 1_000_000  # what may wait to be trained, in this process
_FIRST, _MOST, _CHARS = 64, 1024, 1_000_000  # documents to read at once, and about how much text
_LOOK_S = 0.5
_GONE = "is no longer in the database"


class Numbered(Protocol):
    """Documents by number, in an order that does not change. When it is called, all of them, as of any source."""

    def __call__(self) -> Iterable[Mapping[str, Any]]: ...
    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a document."""

    def digest(self) -> str:
        """Identifies the documents and their order."""

    def fetch(self, indices: Sequence[int], fields: Sequence[str] | None = None) -> Sequence[Mapping[str, Any] | None]:
        """Documents by number; None for one that is gone. Called on another thread."""


def is_streamed(source: Any) -> bool:
    """Is this a ``Numbered``, whose documents are read while they are trained?"""
    return hasattr(source, "fetch")


@dataclass(frozen=True)
class _Made:
    """A row: token ids, and which of them carry loss."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    def row(self) -> dict[str, list[int]]:
        return {
            "input_ids": self.ids.tolist(),
            "labels": np.where(self.trained, self.ids, np.int32(NO_LOSS)).tolist(),
        }


class _Name(str):
    """What to call a document, and which of the piece it is."""

    place: int


class _PlacedMaker(Maker):
    """Makes rows as ``Maker`` does, and keeps none."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._made: list[_Made | None] = []

    def make(self, kind: str, piece: Sequence[tuple[_Name, Sample]], count: int, answers: bool) -> list[_Made | None]:
        """One row, or None, for each of ``count`` documents."""
        made = self._made = [None] * count
        if piece:
            self.keep(kind, self.encode(kind, piece), answers)
        return made

    def _keep(self, name: str, ids: Ids, ranges: Ranges, answers: bool) -> None:
        super()._keep(name, ids, ranges, answers)
        if not self._piece:
            return
        kept, where = self._piece.pop()
        trained = np.zeros(len(kept), dtype=np.bool_)
        for begin, end in where:
            trained[begin:end] = True
        assert isinstance(name, _Name)
        self._made[name.place] = _Made(np.array(kept, dtype=np.int32), trained)

    def _flush(self) -> None:
        """Nothing is kept."""


class Streamed(Sequence[dict[str, list[int]]]):
    """The rows of a selection, as the ``Rows`` of a set that is read whole.

    Args:
        selection: the documents.
        tokenizer: a transformers tokenizer.
        config: as for ``make_rows``.
        blank: a token; a document without a row is a row of this token, without a label.
        head: the documents that the first epoch begins with; they are read now, and judged.
        prompt_template, transform, context: as for ``make_rows``.

    Raises:
        ConfigError: key, key_kind, train_on and transform do not go together.
        DataError: nothing selected; of ``head``, too many documents without a row, or nothing to train.

    Attributes:
        lengths: as many as there are rows; how long each is, is not known.
        report: what became of ``head``.
        look: called twice a second while the training waits for a document; may raise.
        fetched: documents that were asked for, by this process.
        waiting: the most rows that waited at a time.
    """

    def __init__(
        self,
        selection: Numbered,
        tokenizer: Any,
        config: TrainConfig,
        *,
        blank: int,
        head: Sequence[int],
        prompt_template: str = "{input}",
        transform: Callable[..., Any] | None = None,
        context: int | None = None,
    ) -> None:
        self.selection, self.config = selection, config
        self.lengths = range(len(selection))
        self.look: Callable[[], None] = lambda: None
        self.fetched = self.waiting = 0
        self._blank = {"input_ids": [blank], "labels": [NO_LOSS]}
        self._lock = threading.Lock()  # one thread makes rows at a time
        self._batches: Callable[[], Iterable[Sequence[int]]] | None = None
        self._ahead: _Ahead | None = None
        self._begun = False
        limit = min(config.max_seq_length, context) if context else config.max_seq_length
        self._new_counts = lambda: Counts("train", limit)
        peek = self._peek()
        self.reader = Reader(config.key, config.key_kind, transform, peek)
        for document in peek:  # a transform decides the kind with its first document
            if self.reader.kind is None:
                self.reader.read(document)
        self._fields = _fields(self.reader, peek)
        template = config.prompt_template or prompt_template
        self._maker = _PlacedMaker(tokenizer, config, template, self._new_counts())
        self.report, self._digest = self._judge(head, opening_notes(self.reader, config, tokenizer, template, context))
        self._maker.counts = self._new_counts()
        self.fetched = 0

    def _peek(self) -> list[Mapping[str, Any]]:
        found = self.selection.fetch(range(min(_PEEK, len(self.selection)))) if len(self.selection) else ()
        peek = [document for document in found if document is not None]
        if not peek:
            raise DataError("No document was selected for the train rows.", todo="check the collection and the filter")
        return peek

    def _judge(self, head: Sequence[int], notes: Sequence[str]) -> tuple[RowReport, str]:
        """Refuses what a set that is read whole is refused for; the report of ``head``, and a digest of its rows."""
        found = hashlib.blake2b(digest_size=16)
        for begin in range(0, len(head), _FIRST):
            for made in self._make(head[begin : begin + _FIRST]):
                found.update(b"-" if made is None else made.ids.tobytes() + made.trained.tobytes())
        counts = self._maker.counts
        refusal = counts.refusal(self.reader, self.config)
        if refusal is not None:
            of = f"the first {counts.found} documents of {len(self)} in the order of the training were looked at"
            raise DataError(refusal.what, seen=f"{refusal.seen}; {of}" if refusal.seen else of, todo=refusal.todo)
        return counts.report(self.reader, notes), found.hexdigest()

    def __len__(self) -> int:
        return len(self.selection)

    def digest(self) -> str:
        """Identifies the documents, their order, and the rows of the first ones: 32 hexadecimal digits.

        What later documents hold is not in it.
        """
        return hashlib.blake2b(f"{self.selection.digest()} {self._digest}".encode(), digest_size=16).hexdigest()

    # -- rows ------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Any:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if not self._begun:
            self._begun = True
            self._ahead = self._start(index)
        made = self._ahead.take(index, self.look) if self._ahead is not None else None
        if made is None:  # nobody said that it would be asked for
            made = self._make([index])
        self.waiting = max(self.waiting, self._ahead.most if self._ahead is not None else 0)
        return dict(self._blank) if made[0] is None else made[0].row()

    def begin(self, batches: Callable[[], Iterable[Sequence[int]]]) -> None:
        """An epoch begins.

        Args:
            batches: gives the numbers that this process will ask for, in order. It may begin anywhere among them: what
                a resumed run passes over is not read.
        """
        self.close()
        self._batches, self._begun = batches, False

    def _start(self, index: int) -> _Ahead | None:
        if self._batches is None:
            return None
        numbers = itertools.chain.from_iterable(self._batches())
        plan = itertools.dropwhile(lambda number: number != index, numbers)
        return _Ahead((number for number in plan if number < len(self)), self._make)

    def close(self) -> None:
        """Reads no more."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def _make(self, indices: Sequence[int]) -> list[_Made | None]:
        documents = self.selection.fetch(indices, self._fields)
        with self._lock:
            self.fetched += len(indices)
            return list(self._rows_of(indices, documents))

    def _rows_of(self, indices: Sequence[int], documents: Sequence[Mapping[str, Any] | None]) -> Iterator[_Made | None]:
        """In pieces that are bounded in characters."""
        counts, maker = self._maker.counts, self._maker
        piece: list[tuple[_Name, Sample]] = []
        size = count = 0
        for index, document in zip(indices, documents, strict=True):
            name = _Name(self.selection.name(index))
            name.place, count = count, count + 1
            counts.found += 1
            sample = _GONE if document is None else self.reader.read(document)
            if isinstance(sample, str):
                counts.skip(name, sample)
                continue
            piece.append((name, sample))
            size += size_of(sample)
            if size >= _CHARS:
                yield from self._made(maker, piece, count)
                piece, size, count = [], 0, 0
        yield from self._made(maker, piece, count)

    def _made(self, maker: _PlacedMaker, piece: list[tuple[_Name, Sample]], count: int) -> list[_Made | None]:
        kind = self.reader.kind or "text"
        return maker.make(kind, piece, count, answers_only(self.config.train_on, kind))

    # -- counts ----------------------------------------------------------------------------------------------

    def counted(self) -> Counts:
        """What was counted since the last call; reads no more in this epoch."""
        self.close()
        with self._lock:
            counts, self._maker.counts = self._maker.counts, self._new_counts()
        return counts

    def refusal(self) -> DataError | None:
        """Why a run would not have started with what was read in this epoch; None while that is little."""
        with self._lock:
            counts = self._maker.counts
            return counts.refusal(self.reader, self.config) if counts.found >= HEAD else None


def _fields(reader: Reader, peek: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The only fields that are read; None: all, because a name with a dot in it can be no projection."""
    if any("." in column and column in document for document in peek for column in reader.columns):
        return None
    return sorted({column.split(".")[0] for column in reader.columns} | {"tools"})


class _Ahead:
    """A thread that reads and makes the rows of a plan, and keeps a bounded number of them.

    Args:
        plan: the numbers, in order; each is asked for in this order.
        make: documents to rows.

    Attributes:
        most: rows that waited at a time, at most.
    """

    def __init__(self, plan: Iterator[int], make: Callable[[Sequence[int]], list[_Made | None]]) -> None:
        self._plan, self._make = plan, make
        self._rows: deque[tuple[int, _Made | None]] = deque()
        self._tokens = self.most = 0
        self._changed = threading.Condition()
        self._over = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="llmnb-rows", daemon=True)
        self._thread.start()

    def take(self, index: int, look: Callable[[], None]) -> list[_Made | None] | None:
        """The row of a document, in a list; None when this is not the next of the plan.

        Raises:
            BaseException: what reading or making it raised.
        """
        with self._changed:
            while not self._rows and not self._over and self._error is None:
                if not self._changed.wait(_LOOK_S):
                    look()
            if not self._rows and self._error is not None:
                raise self._error
            if not self._rows or self._rows[0][0] != index:
                return None
            made = self._rows.popleft()[1]
            self._tokens -= 0 if made is None else len(made.ids)
            self._changed.notify_all()
            return [made]

    def close(self) -> None:
        """Ends the thread; at once, unless it waits for the database."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(60.0)

    def _read(self) -> None:
        count = _FIRST
        try:
            while numbers := list(itertools.islice(self._plan, count)):
                if not self._room():
                    return
                made = self._make(numbers)
                tokens = sum(len(one.ids) for one in made if one is not None)
                with self._changed:
                    self._rows.extend(zip(numbers, made, strict=True))
                    self._tokens += tokens
                    self.most = max(self.most, len(self._rows))
                    self._changed.notify_all()
                # Long documents are read a few at a time, short ones many.
                count = min(2 * count, _MOST, max(1, _CHARS // 4 * len(numbers) // max(tokens, 1)))
        except BaseException as error:  # noqa: BLE001 - a border: it is raised where the row is asked for
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _room(self) -> bool:
        """Waits until more may wait; False once nobody asks any more."""
        with self._changed:
            while not self._closed and (len(self._rows) > AHEAD_ROWS - _MOST or self._tokens > AHEAD_TOKENS):
                self._changed.wait()
            return not self._closed
