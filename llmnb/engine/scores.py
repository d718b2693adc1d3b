"""Answers against references: exact match, ROUGE, BLEU, chrF, and functions of a person's own.

ROUGE is torchmetrics' (F1 of https://aclanthology.org/W04-1013/), without stemming; its words are ours, which for ASCII
are those of the reference implementation and exist in every other script, too. BLEU and chrF are sacrebleu's
(https://aclanthology.org/W18-6319/), whose signature is told.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError, MissingPackage
from ..evaluation.measures import KNOWN, takes_document
from .questions import Question
from .samples import _THEIRS

__all__ = ["Marker", "lacking", "versions", "words"]

Function = Callable[..., Any]


def lacking(names: Sequence[str]) -> dict[str, str]:
    """The metrics that cannot be computed here: name → the package that is not installed."""
    found = {name: KNOWN[name].package for name in names if name in KNOWN and KNOWN[name].package}
    return {name: package for name, package in found.items() if importlib.util.find_spec(package) is None}


def versions() -> dict[str, str]:
    """Versions of the packages that compare answers."""
    found = {}
    for package in ("sacrebleu", "torchmetrics"):
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    return found


class Marker:
    """Marks answers.

    Args:
        names: the metrics; those that need no answers are passed over.
        functions: the person's own, by name.

    Raises:
        MissingPackage: one of them is computed by a package that is not installed.

    Attributes:
        told: how BLEU and chrF were computed, once ``mark`` has: sacrebleu's signatures.
    """

    def __init__(self, names: Sequence[str], functions: Mapping[str, Function]) -> None:
        for name, package in lacking(names).items():
            raise MissingPackage(package, "evaluate", f"The metric {name}")
        self._names = [name for name in names if name in functions or KNOWN[name].answers]
        self._functions = {name: (function, takes_document(function)) for name, function in functions.items()}
        self.told: dict[str, str] = {}

    def mark(
        self, answers: Sequence[str], asked: Sequence[Question]
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Compares answers with the references of their questions, one for one.

        Returns:
            The figures over all of them, and those of each.

        Raises:
            DataError: a person's function failed; it and the document are named.
        """
        references = [question.reference for question in asked]
        each: list[dict[str, float]] = [{} for _ in answers]
        whole: dict[str, float] = {}
        for name in self._names:
            if name in self._functions:
                values = [self._own(name, answer, question) for answer, question in zip(answers, asked, strict=True)]
            elif name in ("bleu", "chrf"):
                whole[name], values = self._sacre(name, answers, references)
            elif name == "exact_match":
                values = [float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)]
            else:
                values = [_rouge(name, a, r) for a, r in zip(answers, references, strict=True)]
            whole.setdefault(name, math.fsum(values) / len(values) if values else math.nan)
            for scores, value in zip(each, values, strict=True):
                scores[name] = value
        return whole, each

    def _own(self, name: str, answer: str, question: Question) -> float:
        function, document = self._functions[name]
        given = (answer, question.reference, dict(question.document)) if document else (answer, question.reference)
        try:
            value = function(*given)
        except _THEIRS as error:
            raise DataError(
                f"The metric {name} failed on the document with _id {question.id}.",
                seen=f"{type(error).__name__}: {error}",
                todo=f"it was given the answer {answer[:60]!r} and the reference {question.reference[:60]!r}",
            ) from error
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The metric {name} gave no number for the document with _id {question.id}.",
                seen=repr(value)[:120],
                todo="return a float, or a bool",
            ) from error

    def _sacre(self, name: str, answers: Sequence[str], references: Sequence[str]) -> tuple[float, list[float]]:
        from sacrebleu.metrics import BLEU, CHRF

        whole: Any = CHRF()
        single: Any = whole
        if name == "bleu":
            cut = "char" if _without_spaces(references) else "13a"
            whole, single = BLEU(tokenize=cut), BLEU(tokenize=cut, effective_order=True)
        score = float(whole.corpus_score(list(answers), [list(references)]).score) if answers else math.nan
        self.told[name] = str(whole.get_signature())
        return score, [float(single.sentence_score(a, [r]).score) for a, r in zip(answers, references, strict=True)]


def _rouge(name: str, answer: str, reference: str) -> float:
    from torchmetrics.functional.text.rouge import rouge_score

    found = rouge_score(answer, reference, rouge_keys=name, normalizer=str.lower, tokenizer=words)
    return float(found[f"{name}_fmeasure"])


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits; a character of a script without spaces is a word by itself."""
    parts = []
    for char in text.lower():
        kept = unicodedata.category(char)[0] in "LMN"
        parts.append(f" {char} " if _alone(char) else char if kept else " ")
    return "".join(parts).split()


def _alone(char: str) -> bool:
    """Chinese characters and Japanese kana."""
    return "\u3040" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff"


def _without_spaces(texts: Sequence[str]) -> bool:
    """True when most letters are of a script that does not part words."""
    alone = sum(_alone(char) for text in texts for char in text)
    return alone * 2 > sum(char.isalpha() for text in texts for char in text)
