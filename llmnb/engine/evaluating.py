"""The base and checkpoints of it on the same documents: loss over the answers' tokens, and answers against references.

The base is loaded once and adapters are swapped on it (``voices``); each model reads and is asked as its run did. Knows
no database.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import ModelSpec, TrainConfig
from ..errors import ConfigError, DataError, Fault
from ..evaluation import Evaluation, Example, Scores
from ..evaluation.measures import KNOWN, USUAL, Settings, measure, ranking
from . import bases, manifest, scores
from .generation import Answerer
from .memory import forget
from .questions import Question, Questions, questions
from .reading import figures, read
from .scores import Marker

__all__ = ["Asked", "evaluate"]

_SHOWN = 4000  # characters of a text that an example keeps

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """A model to be measured.

    Attributes:
        name: "base" or "EXPERIMENT/STEP".
        adapter: folder of a checkpoint (an adapter, or a whole model), None for the base.
        spec: the base as it is loaded.
        config: how its run made rows.
        transform: its run's function, when it had one.
    """

    name: str
    adapter: str | None
    spec: ModelSpec
    config: TrainConfig
    transform: Callable[..., Any] | None = field(default=None, repr=False)


def evaluate(
    asked: Sequence[Asked],
    documents: Sequence[Mapping[str, Any]],
    names: Sequence[str] | None,
    functions: Mapping[str, Callable[..., Any]],
    settings: Settings,
    say: Say = lambda words: None,
) -> Evaluation:
    """Measures models of one base on the same documents.

    Args:
        asked: the base first. Those whose specs are the same share what is loaded.
        documents: what their rows are made of.
        names: metrics; None: all that the rows allow.
        functions: a person's own metrics by name, f(answer, reference) or f(answer, reference, document).
        settings: how answers are made, and how many rows are shown.
        say: told what is being done, in a few words.

    Returns:
        Everything but where the documents are from.

    Raises:
        ConfigError: a metric that these rows do not allow.
        DataError: no row can be made; a person's function failed.
        MissingPackage: a metric was asked for whose package is not installed.
        ModelError: a model cannot be loaded.
    """
    work = _Evaluation(list(documents), names, dict(functions), settings, say)
    try:
        return work.run(asked)
    except BaseException as error:
        forget(error)
        raise
    finally:
        work.close()


class _Evaluation:
    """One evaluation."""

    def __init__(
        self,
        documents: list[Mapping[str, Any]],
        names: Sequence[str] | None,
        functions: dict[str, Callable[..., Any]],
        settings: Settings,
        say: Say,
    ) -> None:
        self.documents, self.wanted, self.functions = documents, names, functions
        self.settings, self.say = settings, say
        self.notes: list[str] = []
        self._answerer: Answerer | None = None
        self._spec: ModelSpec | None = None

    def run(self, asked: Sequence[Asked]) -> Evaluation:
        first = asked[0]
        self.say("making rows")
        tokenizer = bases.load_tokenizer(first.spec)  # what is wrong with the rows is said before weights are loaded
        bases.ensure_pad(tokenizer, None)
        known = _questions(self.documents, tokenizer, first)
        self.names = self._chosen(known.kind)
        self.rank_by = ranking(self.names, self.functions, self.settings.rank_by)
        self.marker = Marker(self.names, self.functions)
        report = known.rows.report
        self.notes += [note for note in report.notes if _concerns(note)]
        found = [self._measured(one, known) for one in asked]
        self._compare(found)
        return Evaluation(
            models=tuple(found),
            metrics=tuple(self.names),
            base=first.spec.model_name_or_path,
            rows={"used": len(known.rows), "kind": known.kind, "digest": known.rows.digest()},
            rank_by=self.rank_by,
            settings={**asdict(self.settings), "rank_by": self.rank_by, **self._how(first), **self.marker.told},
            notes=tuple(dict.fromkeys(self.notes)),
            versions={**manifest.versions(), **scores.versions()},
        )

    def close(self) -> None:
        if self._answerer is not None:
            self._answerer.close()

    def _chosen(self, kind: str) -> list[str]:
        """The metrics for rows of a kind.

        Raises:
            ConfigError: plain text has no answers to compare.
        """
        if self.wanted is not None:
            answers = [name for name in self.wanted if name in self.functions or KNOWN[name].answers]
            if kind == "text" and answers:
                todo = "ask for perplexity and token_accuracy, or train on a (prompt, response) pair or on messages"
                what = "compares answers with references, and these rows are plain text"
                raise ConfigError([Fault(name, what, todo) for name in answers])
            return list(self.wanted)
        if kind == "text":
            return [name for name in USUAL if not KNOWN[name].answers]
        missing = scores.lacking(USUAL)
        if missing:
            packages = " and ".join(sorted(set(missing.values())))
            self.notes.append(
                f"{', '.join(missing)} left out: {packages} not installed (pip install 'llmnb[evaluate]')"
            )
        return [name for name in USUAL if name not in missing]

    # --- one model ------------------------------------------------------------------------------------------

    def _measured(self, one: Asked, first: Questions) -> Scores:
        self.say(f"{one.name}: loading")
        answerer = self._ready(one)
        answerer.swap(one.adapter, one.name)
        if one.config.chat_template:
            answerer.tokenizer.chat_template = one.config.chat_template  # the base is asked as the checkpoint is
        begun = time.monotonic()
        known = _questions(self.documents, answerer.tokenizer, one)
        if known.rows.digest() != first.rows.digest():
            self.notes.append(
                f"{one.name} reads the documents in its own form ({len(known.rows)} rows, "
                f"{known.rows.report.trained_tokens} tokens with loss): compare its answers with the others', not "
                "its perplexity"
            )
        self.say(f"{one.name}: reading {len(known.rows)} rows")
        loss = read(answerer, known.rows, self.settings.batch_size)
        metrics, each = figures(loss)
        counts = {"rows": len(known.rows), "tokens": int(known.rows.lengths.sum()), "trained": int(loss.tokens.sum())}
        answers: dict[int, str] = {}
        if any(name in self.functions or KNOWN[name].answers for name in self.names):
            answers, counts["cut"] = self._answers(one, answerer, known)
            counts["answers"] = len(answers)
            places = sorted(answers)
            whole, marks = self.marker.mark([answers[at] for at in places], [known.asked[at] for at in places])
            metrics.update(whole)
            for at, scores_ in zip(places, marks, strict=True):
                each[at].update(scores_)
        worst, best = self._ends(known, each, answers)
        chosen = {name: metrics[name] for name in self.names}
        return Scores(one.name, chosen, counts, round(time.monotonic() - begun, 3), best, worst)

    def _ready(self, one: Asked) -> Answerer:
        spec = replace(one.spec, predict_kwargs={})  # answers are greedy, whatever a person chats with
        if self._answerer is None or spec != self._spec:
            self.close()
            self._answerer, self._spec = None, spec
            self._answerer = Answerer(spec)
        return self._answerer

    def _answers(self, one: Asked, answerer: Answerer, known: Questions) -> tuple[dict[int, str], int]:
        """Row → answer, and how many ended at their limit."""
        most, size = self.settings.max_new_tokens, self.settings.batch_size
        template = one.config.prompt_template or one.spec.prompt_template
        context = getattr(answerer.model.config, "max_position_embeddings", None) or math.inf
        lengths = {
            at: _length(question, answerer.tokenizer, template)
            for at, question in enumerate(known.asked)
            if question.prompt
        }
        fits = [at for at, length in lengths.items() if length + most <= context]
        tight = [at for at, length in lengths.items() if length < context < length + most]
        fits.sort(key=lengths.__getitem__)
        groups = [(fits[i : i + size], most) for i in range(0, len(fits), size)]
        # One that would go beyond the context would take room from those beside it.
        groups += [([at], int(context) - lengths[at]) for at in tight]
        answers: dict[int, str] = {}
        cut = 0
        for group, room in groups:
            self.say(f"{one.name}: {len(answers)} of {len(fits) + len(tight)} answers")
            prompts: list[Any] = [known.asked[at].prompt for at in group]
            answers.update(
                zip(
                    group,
                    answerer.answer(prompts, max_new_tokens=room, batch_size=size, prompt_template=template),
                    strict=True,
                )
            )
            cut += answerer.cut
        self._note_answers(one, len(known.asked) - len(answers), len(tight), cut)
        if not answers:
            todo = "a chat needs a question before its last answer; a prompt must be shorter than the model's context"
            raise DataError("None of the rows has a question that can be asked.", todo=todo)
        return answers, cut

    def _note_answers(self, one: Asked, unasked: int, tight: int, cut: int) -> None:
        if unasked:
            self.notes.append(
                f"{one.name}: {_count(unasked, 'row')} without a question that fits the model, and no answer"
            )
        if tight:
            self.notes.append(
                f"{one.name}: {_count(tight, 'answer')} had less room than max_new_tokens: the model's context ended"
            )
        if cut:
            self.notes.append(f"{one.name}: {_count(cut, 'answer')} cut at {self.settings.max_new_tokens} new tokens")

    def _ends(
        self, known: Questions, each: list[dict[str, float]], answers: Mapping[int, str]
    ) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """The worst rows and the best, no row in both; of equals, the one with more loss is the worse."""
        lower = measure(self.rank_by).lower
        places = [at for at in range(len(each)) if self.rank_by in each[at]]

        def goodness(at: int) -> tuple[float, float]:
            score, loss = each[at][self.rank_by], each[at]["perplexity"]
            good = -score if lower else score
            return (-math.inf if math.isnan(good) else good), (-math.inf if math.isnan(loss) else -loss)

        places.sort(key=goodness)
        few = min(self.settings.shown, (len(places) + 1) // 2)
        rest = places[few:]
        best = rest[::-1][: self.settings.shown]
        made = {at: self._example(known.asked[at], each[at], answers.get(at)) for at in {*places[:few], *best}}
        return tuple(made[at] for at in places[:few]), tuple(made[at] for at in best)

    def _example(self, question: Question, found: Mapping[str, float], answer: str | None) -> Example:
        prompt = question.prompt or ""
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
        return Example(
            id=question.id,
            score=found[self.rank_by],
            prompt=_short(prompt),
            reference=_short(question.reference),
            answer=None if answer is None else _short(answer),
            scores={name: found[name] for name in self.names if name in found},
        )

    # --- what is said ---------------------------------------------------------------------------------------

    def _how(self, first: Asked) -> dict[str, Any]:
        """What figures depend on, beside the settings."""
        assert self._answerer is not None
        model = self._answerer.model
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "bits": bases.quantised_bits(model),
            "device": model.get_input_embeddings().weight.device.type,
            "max_seq_length": first.config.max_seq_length,
        }

    def _compare(self, found: Sequence[Scores]) -> None:
        for one in found:
            bad = [name for name, value in one.metrics.items() if not math.isfinite(value)]
            if bad:
                self.notes.append(f"{one.name}: {', '.join(bad)} is no finite number")


def _questions(documents: Sequence[Mapping[str, Any]], tokenizer: Any, one: Asked) -> Questions:
    return questions(
        documents,
        tokenizer,
        one.config,
        prompt_template=one.spec.prompt_template,
        transform=one.transform,
        context=bases.context_of(one.spec),
    )


def _concerns(note: str) -> bool:
    """Not what only a training needs to know."""
    return not note.startswith(("the tokenizer has no EOS", "prompts and responses touch", "the chat template writes"))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _length(question: Question, tokenizer: Any, template: str) -> int:
    from .templates import chat_ids, prompt_ids

    if isinstance(question.prompt, str):
        return len(prompt_ids(question.prompt, tokenizer, template))
    return len(chat_ids(question.prompt or [], tokenizer))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text) - _SHOWN:,} more characters)"
