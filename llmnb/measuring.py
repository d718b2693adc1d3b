"""Evaluations of a database: checkpoints against their base, measured, kept, and found again.

The part of ``Datalayer`` that knows evaluations, and ``evaluate`` for whoever holds no database in their hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .checkpoint import Checkpoint
from .errors import ConfigError, Fault, LlmnbError
from .evaluation import BASE, Evaluation
from .evaluation.measures import Settings, chosen
from .launch.evaluating import EvaluationProcess, prepare
from .launch.run import Run
from .model import databases
from .query import Collection, Select
from .store import Store

__all__ = ["Measuring", "evaluate"]


class Measuring:
    """Evaluations in the database whose ``store`` this is."""

    store: Store

    def named(self, checkpoint: str) -> Checkpoint:
        """The checkpoint of a name."""
        raise NotImplementedError

    def evaluate(
        self,
        checkpoints: Any,
        select: Select | Collection | str | None = None,
        metrics: Any = None,
        *,
        limit: int = 200,
        transform: Callable[..., Any] | None = None,
        base: str | None = None,
        say: Callable[[str], None] | None = None,
        process: EvaluationProcess | None = None,
        **settings: Any,
    ) -> Evaluation:
        """Measures checkpoints against their base on the same documents, in a process of its own, and keeps the result.

        Each model reads and is asked as its run did: with the run's key, template and row length. Answers are greedy.
        Of a chat the last answer is asked for. Metrics: ``perplexity`` (exp of the mean loss over the tokens that carry
        loss), ``token_accuracy`` (share of these that the model puts first), and for pairs and chats, over answers that
        the model gives, ``exact_match`` (but for space at the ends), ``rouge1``, ``rouge2``, ``rougeL`` (F1, 0 to 1;
        "rouge" is all three), ``bleu``, ``chrf`` (0 to 100), and any function ``f(answer, reference)`` or
        ``f(answer, reference, document)`` that gives a number, of which more is better.

        Args:
            checkpoints: ``"experiment"`` (its last step), ``"experiment/step"``, "latest" (the newest experiment), a
                ``Checkpoint``, a run, or several of them; all of one base, which is always measured, too.
            select: the documents: a find, or a collection. None: those that validated the first one's run (its
                validation set, else its valid fold).
            metrics: names and functions. None: all that the rows allow, but chrF.
            limit: documents at most. Of more, a sample that is always the same; of a selection with an order, the
                first. The result says so.
            transform: the runs' function, when they had one.
            base: a folder or hub id of the base when it is no longer where it was; the weights must be the same.
            say: told what is being done, in a few words.
            process: what carries it out; its ``stop()`` ends it from another thread.
            **settings: ``max_new_tokens`` (128), ``batch_size`` (8), ``rank_by`` (the metric that best and worst rows
                are told by), ``shown`` (5 of each).

        Returns:
            The evaluation: a table when it is shown; ``found["experiment/step"].metrics``, ``.best``, ``.worst``.

        Raises:
            ConfigError: no checkpoint, an unknown metric or setting, a metric that the rows do not allow.
            DataError: nothing is selected; a person's function failed (the document is named); a transform has to be
                given again.
            ModelError: checkpoints of different bases; the base is missing; the process ended or was stopped.
            NotFound: with near names.
            MissingPackage: a metric was asked for whose package is not installed.
        """
        wanted = chosen(metrics)
        asked = Settings.checked(settings)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError([Fault("limit", f"must be a whole number from 1 on, not {limit!r}")])
        found = self._checkpoints(checkpoints)
        job = prepare(self.store, found, _select(select), wanted, asked, limit=limit, base=base, transform=transform)
        result = (process or EvaluationProcess()).run(job, say)
        return Evaluation.from_json(self.store.evaluations.add(result.to_json()))

    def _checkpoints(self, given: Any) -> list[Checkpoint]:
        many = [given] if isinstance(given, (str, Checkpoint, Run)) or not isinstance(given, Iterable) else list(given)
        found: dict[str, Checkpoint] = {}
        for one in many:
            if isinstance(one, str) and one == BASE:
                continue  # it is always measured
            if isinstance(one, Run):
                one = one.id
            if not isinstance(one, (str, Checkpoint)):
                todo = "a name, a Checkpoint or a run"
                raise ConfigError([Fault("checkpoints", f"{one!r:.60} is no checkpoint", todo)])
            experiment, slash, step = one.partition("/") if isinstance(one, str) else ("", "", "")
            if experiment == "latest" and self.store.checkpoints.experiments():
                one = f"{self.store.checkpoints.experiments()[-1]}{slash}{step}"
            checkpoint = self.named(one) if isinstance(one, str) else one
            found.setdefault(str(checkpoint), checkpoint)
        if not found:
            todo = "name at least one: 'experiment' or 'experiment/step'; the base is always measured, too"
            raise ConfigError([Fault("checkpoints", "holds no checkpoint", todo)])
        return list(found.values())

    def evaluations(self) -> list[Evaluation]:
        """All evaluations, newest first, without their best and worst rows."""
        return [Evaluation.from_json(record) for record in self.store.evaluations.list()]

    def evaluation(self, id: str = "latest") -> Evaluation:
        """An evaluation by id, or the latest, with its best and worst rows.

        Raises:
            NotFound: with near ids.
        """
        return Evaluation.from_json(self.store.evaluations.get(id))


def _select(select: Any) -> Select | None:
    if isinstance(select, str):
        select = Collection(select)
    if isinstance(select, Collection):
        return select.find()
    if select is None or (isinstance(select, Select) and not select.one and not select.count):
        return select
    what = f"{select!r:.80} does not give documents"
    raise ConfigError([Fault("select", what, "Collection('…').find(…), or the name of a collection")])


def evaluate(checkpoints: Any, select: Any = None, metrics: Any = None, *, db: Any = None, **more: Any) -> Evaluation:
    """Measures checkpoints against their base: ``db.evaluate`` of the database that was connected last.

    Args:
        checkpoints, select, metrics: see ``Datalayer.evaluate``.
        db: another database.
        **more: every keyword of ``Datalayer.evaluate``.

    Raises:
        LlmnbError: no database is connected; and all that ``Datalayer.evaluate`` raises.
    """
    known: list[Any] = [db] if db is not None else list(databases(None))
    if not known:
        raise LlmnbError("An evaluation needs a database.", todo="db = llmnb.connect(…), then llmnb.evaluate(…)")
    found: Evaluation = known[0].evaluate(checkpoints, select, metrics, **more)
    return found
