"""Evaluating in a process of its own: the caller loads no torch, and what runs out of memory ends alone.

``EvaluationProcess`` is the caller's end; ``python -m llmnb.launch.evaluating`` is the other (see ``errand``).
``prepare`` makes the job of checkpoints and of what the database knows of their runs.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..config import ModelSpec, TrainConfig
from ..engine.evaluating import Asked
from ..errors import DataError, ModelError, near
from ..evaluation import BASE, Evaluation
from ..evaluation.measures import Settings
from ..query import Select
from .errand import Errand, own, serve
from .merging import described

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["EvaluationJob", "EvaluationProcess", "prepare"]

_MEMORY = "a smaller batch_size, fewer max_new_tokens, or a run with bits=4"
_LOOKED_AT = 100_000  # documents that are chosen among
_CHARS = 64_000_000  # of all documents: what is handed over lies in memory


@dataclass(frozen=True)
class EvaluationJob:
    """Attributes:

    asked: who is measured, the base first.
    documents: what rows are made of.
    names: metrics; None: all that the rows allow.
    functions: a person's own, by name.
    settings: how answers are made and shown.
    rows: where the documents are from (see ``Evaluation.rows``).
    notes: sentences about them.
    """

    asked: tuple[Asked, ...]
    documents: tuple[Mapping[str, Any], ...] = field(repr=False)
    names: tuple[str, ...] | None
    functions: Mapping[str, Callable[..., Any]]
    settings: Settings
    rows: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Known:
    """A checkpoint, its base as its run loaded it, and how the run was trained (None when it was removed)."""

    checkpoint: Checkpoint
    spec: ModelSpec
    config: TrainConfig | None


def prepare(
    store: Store,
    checkpoints: Sequence[Checkpoint],
    select: Select | None,
    metrics: tuple[tuple[str, ...] | None, Mapping[str, Callable[..., Any]]],
    settings: Settings,
    *,
    limit: int,
    base: str | None = None,
    transform: Callable[..., Any] | None = None,
) -> EvaluationJob:
    """The job for some checkpoints of one base; their files are fetched when nothing speaks against it.

    Args:
        store: knows their runs.
        checkpoints: at least one.
        select: the documents; None: those that validated the first one's run, else those it was trained on.
        metrics: of ``measures.chosen``.
        settings: how answers are made and shown.
        limit: documents at most.
        base: a folder or hub id of the base when it is no longer where it was; its weights must be the same.
        transform: the runs' function, when they had one.

    Raises:
        DataError: nothing is selected; a transform has to be given again; it is not known what to select.
        ModelError: checkpoints of different bases, or of something other than language models; no base.
        ArtifactError: stored bytes are damaged.
    """
    known = [_Known(one, *described(store, one)) for one in checkpoints]
    _check(known, base, transform)
    name = base or known[0].spec.model_name_or_path
    specs = [_loading(one, name) for one in known]
    configs = [one.config or TrainConfig() for one in known]
    documents, rows, notes = _documents(store, known[0], select, limit, whole=bool(metrics[1]))
    notes += _notes(known, specs, select)
    first = Asked(BASE, None, specs[0], configs[0], transform if configs[0].transform else None)
    asked = [first]
    for one, spec, config in zip(known, specs, configs, strict=True):
        folder = str(store.checkpoints.fetch(one.checkpoint))
        asked.append(Asked(str(one.checkpoint), folder, spec, config, transform if config.transform else None))
    return EvaluationJob(tuple(asked), documents, *metrics, settings, {**rows, "limit": limit}, tuple(notes))


def _loading(one: _Known, name: str) -> ModelSpec:
    """The base as the checkpoint stands on it: in 4 or 8 bits when it was trained so."""
    bits = one.spec.bits or (one.config.bits if one.config is not None else None)
    return replace(one.spec, identifier=BASE, model_name_or_path=name, adapter_id=None, bits=bits)


# --- what cannot be -----------------------------------------------------------------------------------------


def _check(known: Sequence[_Known], base: str | None, transform: Callable[..., Any] | None) -> None:
    first = known[0]
    for one in known:
        if one.spec.task != "causal-lm" or one.checkpoint.kind == "classifier":
            raise ModelError(
                f"{one.checkpoint} is no language model, so there are no answers of it to measure.",
                seen=one.spec.task,
                todo="its run's metrics are in db.checkpoints(…)",
            )
        if not _same_base(first, one):
            raise ModelError(
                "These checkpoints stand on different bases, so there is no one base to compare them with.",
                seen="; ".join(f"{k.checkpoint} on {k.spec.model_name_or_path}" for k in (first, one)),
                todo="evaluate them apart, with the same select=",
            )
        if one.config is not None and one.config.transform and transform is None:
            raise DataError(
                f"The rows of {one.checkpoint} went through a transform, which is not stored.",
                seen=one.config.transform.strip().splitlines()[0][:120],
                todo="give the function again: evaluate(…, transform=f)",
            )
    where = Path(base or first.spec.model_name_or_path).expanduser()
    if where.is_absolute() and not where.is_dir():
        todo = "when it moved, say where: base='…' (llmnb evaluate --base); that it is the same is checked"
        raise ModelError(
            f"The base of {first.checkpoint} is not on this machine.", seen=f"no folder {where}", todo=todo
        )


def _same_base(one: _Known, other: _Known) -> bool:
    a, b = one.checkpoint.base_fingerprint, other.checkpoint.base_fingerprint
    return a == b if a and b else one.spec.model_name_or_path == other.spec.model_name_or_path


# --- which rows ---------------------------------------------------------------------------------------------


def _documents(
    store: Store, first: _Known, select: Select | None, limit: int, *, whole: bool
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any], list[str]]:
    """The documents, where they are from, and what is to be said of them."""
    config = first.config or TrainConfig()
    if select is not None:
        found, which = _read(store, config, select, None, limit, whole)
        if not found:
            names = store.collections()
            close = near(select.collection, names) if select.collection not in names else []
            raise DataError(
                f"The selection from {select.collection!r} is empty.",
                seen=f"collections here: {', '.join(sorted(names)) or 'none'}",
                todo=f"did you mean {close[0]!r}?" if close else "change the filter",
            )
        trained = sum(document.get("_fold") == "train" for document in found)
        own = config.select is not None and config.select.collection == select.collection
        notes = [f"{trained} of the {len(found)} documents are of the train fold"] if own and trained else []
        return found, _described(found, select, None, f"{select.collection}, as selected", which), notes
    if config.select is None:
        raise DataError(
            f"The run of {first.checkpoint} was removed, so the rows that validated it are not known.",
            todo="say which documents to measure on: select=Collection('…').find(…)",
        )
    for name, chosen in config.eval_selects.items():
        found, which = _read(store, config, chosen, None, limit, whole)
        if found:
            words = f"the validation set {name!r} of {first.checkpoint.experiment}"
            return found, _described(found, chosen, None, words, which), []
    for fold in ("valid", "train"):
        found, which = _read(store, config, config.select, fold, limit, whole)
        if found:
            words = f"the {fold} fold of {config.select.collection}"
            notes = [f"no document of {config.select.collection} validates: these were trained on"]
            return found, _described(found, config.select, fold, words, which), notes if fold == "train" else []
    raise DataError(
        f"Nothing is left of the documents that {first.checkpoint.experiment} was trained on.",
        seen=config.select,
        todo="say which documents to measure on: select=Collection('…').find(…)",
    )


def _read(
    store: Store, config: TrainConfig, select: Select, fold: str | None, limit: int, whole: bool
) -> tuple[tuple[dict[str, Any], ...], str]:
    """Documents, and which ones in words; only the fields that rows are made of unless ``whole``.

    A selection in an order of the person's own is read from its beginning. Else those are taken whose ``_id`` has the
    smallest hash: ids often say what a document is about, and the first of them would be of one kind.
    """
    rows = store.rows(select, fold=fold, limit=limit + 1 if _ordered(select) else _LOOKED_AT + 1)
    chosen: list[tuple[int, int, Mapping[str, Any]]] = []  # a heap: the largest hash first
    count = 0
    for count, row in enumerate(rows, 1):
        if count > (limit if _ordered(select) else _LOOKED_AT):
            break
        place = count if _ordered(select) else _hash(row.get("_id"))
        if len(chosen) < limit:
            heapq.heappush(chosen, (-place, count, row))
        elif -place > chosen[0][0]:
            heapq.heapreplace(chosen, (-place, count, row))
    key = config.key
    columns = None if key is None or whole else {c.split(".")[0] for c in ((key,) if isinstance(key, str) else key)}
    found: list[dict[str, Any]] = []
    size = 0
    for _, _, document in sorted(chosen, key=lambda item: item[1]):
        kept = {k: v for k, v in document.items() if columns is None or k in columns or k in ("_id", "_fold")}
        size += len(str(kept))
        if found and size > _CHARS:
            break
        found.append(kept)
    return tuple(found), _which(len(found), count, _ordered(select))


def _ordered(select: Select) -> bool:
    return bool(select.sort_by) or select.pipeline is not None


def _hash(id: Any) -> int:
    return int.from_bytes(hashlib.blake2b(f"evaluation {id}".encode(), digest_size=8).digest(), "big")


def _which(found: int, count: int, ordered: bool) -> str:
    documents = f"{found:,} document{'' if found == 1 else 's'}"
    if found == count:
        return documents
    if ordered:
        return f"the first {documents}"
    if count > _LOOKED_AT:
        return f"{found:,} of the first {_LOOKED_AT:,} documents"
    return f"{found:,} of {count:,} documents"


def _described(found: Sequence[Any], select: Select, fold: str | None, words: str, which: str) -> dict[str, Any]:
    return {
        "words": f"{which} of {words}",
        "collection": select.collection,
        "select": select.to_json(),
        "fold": fold,
        "documents": len(found),
    }


def _notes(known: Sequence[_Known], specs: Sequence[ModelSpec], select: Select | None) -> list[str]:
    """What makes the models unlike, and that not all of the rows are measured on."""
    notes = []
    first = known[0]
    for one, spec in zip(known[1:], specs[1:]):
        if spec.bits != specs[0].bits:
            notes.append(f"{one.checkpoint} stands on the base {_bits(spec)}; the base was measured {_bits(specs[0])}")
        both = select is None and one.config is not None and first.config is not None
        if both and one.config.select != first.config.select:  # type: ignore[union-attr]
            notes.append(f"{one.checkpoint} was trained on another selection; some of these rows may be among those")
    notes += [
        f"{one.checkpoint}'s run was removed: the documents' form was inferred" for one in known if one.config is None
    ]
    return notes


def _bits(spec: ModelSpec) -> str:
    return f"in {spec.bits} bits" if spec.bits else "as its files are"


# --- the process --------------------------------------------------------------------------------------------


class EvaluationProcess(Errand):
    """One evaluation, carried out elsewhere. ``stop`` may be called from any thread."""

    def __init__(self) -> None:
        super().__init__("evaluating", "evaluation", f"when memory was short: {_MEMORY}")

    def run(self, job: EvaluationJob, say: Callable[[str], None] | None = None) -> Evaluation:
        """Carries a job out and waits for it.

        Args:
            job: of ``prepare``.
            say: told what is being done, in a few words.

        Raises:
            LlmnbError: what the other side raised.
            ModelError: the process ended (out of memory, mostly), or was stopped.
        """
        found = Evaluation.from_json(self.carry_out(job, say))
        return replace(
            found,
            rows={**job.rows, **found.rows},
            notes=tuple(dict.fromkeys((*job.notes, *found.notes))),
            settings={**found.settings, "limit": job.rows["limit"]},
        )


def _work(job: EvaluationJob, say: Callable[[str], None]) -> dict[str, Any]:
    from ..engine.evaluating import evaluate
    from ..engine.quiet import hushed

    with hushed():
        return evaluate(job.asked, job.documents, job.names, job.functions, job.settings, say).to_json()


def main() -> None:
    """``python -m llmnb.launch.evaluating``."""
    serve(_work, lambda error: own(error, "The evaluation failed.", _MEMORY))


if __name__ == "__main__":
    main()
