"""What a training would see of the documents, and what is wrong with them, without training.

Rows are made by the training's own code, so nothing is shown that a training would not do. The costs beside the
tokenizer's are small: ``tests/bench/bench_inspect.py`` compares.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import ModelSpec, TrainConfig
from ..errors import LlmnbError
from ..inspection.report import Facts, Finding, Rows, ShownRow, made
from . import bases
from .counts import Count
from .looking import tokens_of
from .rows import make_rows
from .watching import Seen, Watch

__all__ = ["CONTENT_SAYS", "inspect_rows"]

KEPT = 10_000  # _ids of each finding
SHOWN = 3  # rows that are shown when none is asked for
_BINS = 16
# Of what a document that cannot be read is said to lack, the name of the finding.
_REASONS = (
    ("missing", r"^has no field"),
    ("content", r"^the content of message|^message N of .* is a"),
    ("empty", r"is empty$"),
    ("null", r" is null, not "),
    ("type", r" is (a|of type) .*not a (string|list)"),
    ("role", r"has no role$|is from .* which is none of"),
    ("weight", r"^the weight of message"),
    ("template", r"^the chat template|^its answers could not be found"),
    ("transform", r"transform"),
)
CONTENT_SAYS = {
    "duplicate": ("the same as a row before", "leave the copies out, or they weigh more than the others"),
    "leak": ("also trained on", "leave them out of one fold: an evaluation on them proves nothing"),
    "conflict": ("asks what another asks, and is answered otherwise", "keep the better answer, unless both are meant"),
    "echo": ("the answer only repeats the question", "check the fields that were taken"),
    "unanswered": ("ends with a question that nobody answers", "leave the last message out, or add its answer"),
    "special": (
        "a special token of the tokenizer stands inside a text",
        "take it out: the model reads it as a command",
    ),
    "markup": (
        "the marks of another chat format stand in a text",
        "give messages in place of text that was formatted before",
    ),
    "damaged": ("characters that were decoded wrongly", "read the source again with its right encoding"),
    "control": ("control characters in a text", "take them out"),
    "repetitive": ("the same few words again and again", "leave them out: such answers are learned fast"),
    "unknown": ("characters that the tokenizer does not know", "it puts its unknown token in their place"),
}
_ROW_SAYS = {
    "shortened": ("the end of the answer is cut off", "raise max_seq_length, or leave them out"),
    "cut": ("more tokens than fit; the end is cut off", "raise max_seq_length, or split them"),
    "masked": ("no token carries loss", "raise max_seq_length, or give them an answer"),
    "endless": ("no stop token ends the answer", "give the tokenizer an eos_token, or another chat_template"),
    "two-bos": ("begins with two BOS", "leave the BOS out of the texts, or mend the tokenizer"),
    "split": ("a token would reach from the prompt into the answer", "end the prompt with a space or a line"),
    "unlike": (
        "the answer opens otherwise than when the model is asked",
        "give a chat_template whose add_generation_prompt writes what it writes before an answer",
    ),
}


def inspect_rows(
    data: Mapping[str, Iterable[Mapping[str, Any]]],
    spec: ModelSpec,
    config: TrainConfig,
    *,
    transform: Any = None,
    show: Sequence[str] = (),
    collection: str = "",
    outside: Sequence[str] = (),
) -> Facts:
    """Makes the rows of a training and says what is wrong with them.

    Args:
        data: documents by the name of their set, "train" first; each is read once, in this order.
        spec: the model; its tokenizer is loaded, its weights are not.
        config: its settings for rows are used.
        transform: the person's function.
        show: _ids of rows to show; none: a few of the first, and one of each sort of fault.
        collection: what to call the documents.
        outside: _ids of documents in neither fold; it may be filled while the first set is read.

    Raises:
        ConfigError: key, key_kind, train_on and transform do not go together.
        DataError: no document at all; no chat template for chats.
        ModelError: the tokenizer cannot be loaded.
    """
    tokenizer = bases.load_tokenizer(spec)
    if config.chat_template:
        tokenizer.chat_template = config.chat_template
    bases.ensure_pad(tokenizer, None)
    context = bases.context_of(spec)
    began, seen, kinds = time.perf_counter(), Seen(), _Kinds()
    looked: list[tuple[str, Watch, Any]] = []
    for name, documents in data.items():
        stream = iter(documents)
        one = next(stream, None)
        if one is None and name == "valid":
            continue  # nothing validates; a training does without
        watch = Watch(tokenizer, seen, trains=name == "train", kept=KEPT)
        rows = make_rows(
            kinds.watched(itertools.chain([] if one is None else [one], stream)),
            tokenizer,
            config,
            prompt_template=spec.prompt_template,
            transform=transform,
            context=context,
            name=name,
            watch=watch,
        )
        looked.append((name, watch, rows))
    seconds = time.perf_counter() - began
    first = looked[0][2].report
    edges = _edges([length for _, watch, _ in looked for length in watch.lengths])
    findings = [finding for name, watch, _ in looked for finding in _findings(name, watch)]
    if outside:
        says = "_fold is neither train nor valid, so that nothing reads them"
        findings.append(
            Finding("fold", "neither", len(outside), tuple(outside[:KEPT]), says, "set or remove their _fold")
        )
    return Facts(
        collection=collection,
        model=spec.model_name_or_path,
        key=first.key,
        kind=first.kind,
        limit=first.limit,
        rows=tuple(_counted(name, watch, rows, edges) for name, watch, rows in looked),
        edges=edges,
        findings=tuple(sorted(findings, key=lambda finding: not finding.stops)),
        notes=_notes(first.notes),
        shown=tuple(_shown(tokenizer, looked, show, findings)),
        id_kind=kinds.one,
        seconds=seconds,
    )


class _Kinds:
    """Notes of what types the _ids are, while documents stream by."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def watched(self, documents: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for document in documents:
            self.names.add(type(document.get("_id")).__name__)
            yield document

    @property
    def one(self) -> str:
        return next(iter(self.names)) if len(self.names) == 1 else ""


def _counted(name: str, watch: Watch, rows: Any, edges: tuple[int, ...]) -> Rows:
    report, lengths = rows.report, np.array(watch.lengths, dtype=np.int64)
    told = np.quantile(lengths, (0.0, 0.5, 0.95, 1.0)) if len(lengths) else ()
    return Rows(
        name,
        report.found,
        report.used,
        report.dropped,
        report.cut,
        report.tokens,
        report.trained_tokens,
        tuple(int(n) for n in told),
        tuple(int(n) for n in np.histogram(lengths, bins=edges)[0]) if len(edges) > 1 else (),
    )


def _edges(lengths: Sequence[int]) -> tuple[int, ...]:
    """Bounds of about sixteen bins of a round width; the last one takes the longest hundredth, too."""
    if not lengths:
        return ()
    low, most, high = min(lengths), int(np.quantile(lengths, 0.99)), max(lengths)
    width = max(1, -(-(most + 1 - low) // _BINS))
    scale = 10 ** max(0, len(str(width)) - 1)
    width = next(wide for part in (1, 2, 5, 10) if (wide := part * scale) >= width)
    edges = list(range(low // width * width, most + width + 1, width))
    edges[-1] = max(edges[-1], high + 1)
    return tuple(edges)


def _findings(name: str, watch: Watch) -> Iterator[Finding]:
    counts = watch.counts
    if watch.refusal is not None:
        yield _refusal(name, watch.refusal)
    grouped: dict[str, tuple[str, Count]] = {}
    for reason, count in counts.skipped.items():
        says = re.sub(r"\bmessage \d+\b", "message N", reason)
        kept = grouped.setdefault(says, (_name_of(says), Count(kept=KEPT)))[1]
        kept.number += count.number
        kept.ids += count.ids[: KEPT - len(kept.ids)]
    for says, (kind, count) in grouped.items():
        yield Finding(kind, name, count.number, tuple(count.ids), f"left out: {says}")
    shortened = set(counts.shortened.ids)
    cut = Count(counts.cut.number - counts.shortened.number, [i for i in counts.cut.ids if i not in shortened])
    rows = {
        "shortened": counts.shortened,
        "cut": cut,
        "masked": counts.bare,
        "endless": counts.endless,
        "two-bos": counts.doubled,
        "split": counts.split,
        "unlike": counts.unlike,
    }
    for kind, count in rows.items():
        if count.number:
            says, todo = _ROW_SAYS[kind]
            yield Finding(kind, name, count.number, tuple(count.ids), says, todo)
    for kind, (says, todo) in CONTENT_SAYS.items():
        count = watch.found[kind]
        if count.number:
            yield Finding(kind, name, count.number, tuple(count.ids), says, todo)


def _refusal(name: str, error: LlmnbError) -> Finding:
    seen = f" Seen: {error.seen}." if error.seen else ""
    return Finding("refused", name, 0, (), f"{error.what}{seen}", error.todo or "", stops=True)


def _name_of(reason: str) -> str:
    return next((kind for kind, pattern in _REASONS if re.search(pattern, reason)), "unreadable")


def _notes(notes: Sequence[str]) -> tuple[str, ...]:
    """Those on what was chosen; what is counted is a finding."""
    return tuple(note for note in notes if not re.search(r"^(in )?\d+ |^\d+ of ", note))


def _shown(
    tokenizer: Any, looked: Sequence[tuple[str, Watch, Any]], show: Sequence[str], findings: Sequence[Finding]
) -> Iterator[ShownRow]:
    wanted = list(show)
    if not wanted:
        wanted = [identifier for _, watch, _ in looked[:1] for identifier in watch.names[:SHOWN]]
        wanted += [finding.ids[0] for finding in findings if finding.ids]
    left = dict.fromkeys(wanted)
    for name, watch, rows in looked:
        where: dict[str, list[int]] = {}
        for at, identifier in enumerate(watch.names):
            if identifier in left:
                where.setdefault(str(identifier), []).append(at)
        answers = getattr(rows, "sides", None)  # of a preference both are shown
        for identifier in [identifier for identifier in left if identifier in where]:
            del left[identifier]
            for at in where[identifier][-2 if answers is not None else -1 :]:
                told = tokens_of(tokenizer, rows if answers is None else answers, at)
                said = name if answers is None else f"{name}, {('chosen', 'rejected')[at % 2]}"
                yield made(ShownRow, {"id": identifier, "rows": said, **told})
