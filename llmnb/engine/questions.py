"""Documents to what an evaluation asks: rows whose loss is measured, and for each row its prompt and right answer.

Rows are made by ``rows.make_rows``, exactly as the training made them; here each finds its document again. Knows no
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import TrainConfig
from ..errors import DataError
from .preferences import PreferenceReader
from .rows import Rows, make_rows
from .samples import Messages, Reader, Sample
from .templates import tools_of

__all__ = ["Question", "Questions", "questions"]

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What belongs to one row.

    Attributes:
        id: the document's.
        document: as it was read.
        prompt: a text (the template is not filled in), chat messages, or None where nothing can be asked.
        reference: the right answer; for plain text the text.
    """

    id: str
    document: Document
    prompt: str | list[dict[str, Any]] | None
    reference: str


@dataclass(frozen=True)
class Questions:
    """Rows, and one ``Question`` for each. ``kind`` is text, pair or messages."""

    rows: Rows
    asked: list[Question]

    @property
    def kind(self) -> str:
        return self.rows.report.kind


def questions(
    documents: Sequence[Document],
    tokenizer: Any,
    config: TrainConfig,
    *,
    prompt_template: str,
    transform: Callable[..., Any] | None,
    context: int | None,
) -> Questions:
    """Makes rows of documents as their run does, and tells which row is whose.

    Args:
        documents: read more than once.
        tokenizer, config, prompt_template, transform, context: see ``rows.make_rows``. Documents without a row are
            left out and counted, however many they are.

    Raises:
        ConfigError, DataError: as ``make_rows`` does.
    """
    config = replace(config, max_cut_share=1.0)  # it was the training's to refuse
    prefers = config.method == "dpo"

    def made(part: Sequence[Document], config: TrainConfig) -> Rows:
        rows = make_rows(
            part,
            tokenizer,
            config,
            prompt_template=prompt_template,
            transform=transform,
            context=context,
            name="evaluated",
        )
        # Of a preference the answer that was chosen is the right one.
        return rows.chosen() if prefers else rows

    rows = made(documents, config)
    report = rows.report
    kind = None if prefers else report.kind
    known = replace(config, key=report.key, key_kind=kind)  # nothing is inferred from a part of them
    kept = list(documents) if not report.dropped else _kept(documents, lambda part: made(part, known))
    if len(kept) != len(rows):
        seen = f"{len(rows)} rows of all documents, {len(kept)} of each alone"
        todo = "a transform must give the same whenever it is called, and give rows of one kind"
        raise DataError("It cannot be told which row is of which document.", seen=seen, todo=todo)
    reader = (PreferenceReader if prefers else Reader)(report.key, kind, transform, kept[:1])
    return Questions(rows, [_question(at, document, reader) for at, document in enumerate(kept)])


def _kept(documents: Sequence[Document], made: Callable[[Sequence[Document]], Rows]) -> list[Document]:
    """The documents that give a row: halves are made again until all of one, or none of it, do."""
    try:
        rows = made(documents)
    except DataError:
        return []
    if len(rows) == len(documents):
        return list(documents)
    middle = len(documents) // 2
    return [*_kept(documents[:middle], made), *_kept(documents[middle:], made)]


def _question(at: int, document: Document, reader: Reader) -> Question:
    name = str(document.get("_id", at))
    sample = reader.read(document)
    if isinstance(sample, str):
        raise DataError(f"The document with _id {name} was read once, and a second time it cannot be.", seen=sample)
    prompt, reference = _parts(sample)
    return Question(name, document, prompt, reference)


def _parts(sample: Sample) -> tuple[str | list[dict[str, Any]] | None, str]:
    if sample.kind == "pair":
        prompt, reference = sample.value
        return prompt, reference
    if sample.kind == "text":
        return None, sample.value
    for at in range(len(sample.value) - 1, 0, -1):
        message = sample.value[at]
        trained = message.get("role") == "assistant" and message.get("weight") != 0
        if trained and isinstance(message.get("content"), str):
            return Messages(sample.value[:at], tools_of(sample.value)), message["content"]
    return None, ""
