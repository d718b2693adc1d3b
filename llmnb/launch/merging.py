"""Merging in a process of its own: the caller loads no torch, and a merge that runs out of memory ends alone.

``MergeProcess`` is the caller's end; ``python -m llmnb.launch.merging`` is the other (see ``errand``). ``prepare``
makes the job of a checkpoint and of what the database knows of its run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..config import ModelSpec, TrainConfig
from ..engine.proof import MergeReport, Probe
from ..errors import ModelError, NotFound
from ..folders import discard, place
from .errand import Errand, own, serve

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["MergeJob", "MergeProcess", "prepare"]

_MEMORY = "it takes about the memory of the whole model in 16 or 32 bits"
_DOCUMENTS, _CHARS = 96, 2_000_000  # more than are measured: some may give no row


@dataclass(frozen=True)
class MergeJob:
    """Attributes:

    spec: the base.
    adapter: folder of the checkpoint's files.
    out: the new folder, absolute.
    probe: what to measure on; None: a few sentences.
    """

    spec: ModelSpec
    adapter: str
    out: str
    probe: Probe | None = field(default=None, repr=False)


def prepare(
    store: Store,
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    transform: Callable[..., Any] | None = None,
) -> MergeJob:
    """The job for a checkpoint; its files are fetched when nothing speaks against it.

    Args:
        store: knows its run: the model that was trained, and the rows to measure on.
        checkpoint: which one.
        folder: where the merged model goes.
        base: a folder or hub id of the base when it is no longer where it was; its weights must be the same.
        transform: the run's function, when it had one: without it the run's rows cannot be made again.

    Raises:
        ArtifactError: the folder is in use; stored bytes are damaged.
        ModelError: there is nothing to merge.
        NotFound: the checkpoint was removed.
    """
    out = place(folder)
    spec, config = described(store, checkpoint)
    if checkpoint.kind != "adapter":
        raise ModelError(
            f"{checkpoint} is a whole model: there is nothing to merge.",
            todo=f"export it as a folder: db.export('{checkpoint}', folder)",
        )
    if spec.task != "causal-lm":
        raise ModelError(f"{checkpoint} is an adapter for {spec.task}; only language models are merged.")
    if base is not None:
        spec = replace(spec, model_name_or_path=str(base))
    where = Path(spec.model_name_or_path).expanduser()
    if where.is_absolute() and not where.is_dir():
        todo = "when it moved, say where: base='…' (llmnb merge --base); that it is the same is checked"
        raise ModelError(f"The base of {checkpoint} is not on this machine.", seen=f"no folder {where}", todo=todo)
    probe = None if config is None else _probe(store, config, transform)
    return MergeJob(spec, str(store.checkpoints.fetch(checkpoint)), str(out), probe)


def described(store: Store, checkpoint: Checkpoint) -> tuple[ModelSpec, TrainConfig | None]:
    """The base of a checkpoint as its run loaded it, and how the run was trained; None when the run was removed."""
    spec, config = ModelSpec(identifier=checkpoint.experiment), None
    try:
        record = store.runs.get(checkpoint.experiment)
        if record.get("config"):
            config = TrainConfig.from_json(record["config"])
        spec = ModelSpec.from_json(store.models.get(record["model"], record["version"])["spec"])
    except NotFound:
        pass  # the run or its model was removed; the checkpoint knows its base
    template = config.prompt_template if config is not None and config.prompt_template else spec.prompt_template
    base = checkpoint.base or spec.model_name_or_path
    return replace(spec, model_name_or_path=base, adapter_id=None, prompt_template=template), config


def _probe(store: Store, config: TrainConfig, transform: Callable[..., Any] | None) -> Probe | None:
    """Documents that validate; where there are none, some of those that were trained on."""
    if config.select is None:
        return None
    name = config.select.collection
    for chosen, select in config.eval_selects.items():
        documents = _documents(store, config, select, None)
        if documents:
            return Probe(documents, config, f"the validation set {chosen!r}", transform)
    for fold in ("valid", "train"):
        documents = _documents(store, config, config.select, fold)
        if documents:
            return Probe(documents, config, f"the {fold} fold of {name}", transform)
    return None


def _documents(store: Store, config: TrainConfig, select: Any, fold: str | None) -> tuple[dict[str, Any], ...]:
    key = config.key
    columns = None if key is None else {c.split(".")[0] for c in ((key,) if isinstance(key, str) else key)}
    found, size = [], 0
    for document in store.rows(select, fold=fold, limit=_DOCUMENTS):
        kept = {k: v for k, v in document.items() if columns is None or k in columns or k in ("_id", "tools")}
        found.append(kept)
        size += len(str(kept))
        if size > _CHARS:
            break
    return tuple(found)


class MergeProcess(Errand):
    """One merge, carried out elsewhere. ``stop`` may be called from any thread."""

    def __init__(self) -> None:
        super().__init__("merging", "merge", f"when memory was short: {_MEMORY}")

    def run(self, job: MergeJob, say: Callable[[str], None] | None = None) -> MergeReport:
        """Carries a job out and waits for it.

        Args:
            job: of ``prepare``.
            say: told what is being done, in a few words.

        Raises:
            LlmnbError: what the other side raised.
            ModelError: the process ended (out of memory, mostly), or was stopped. Nothing is left of the folder.
        """
        return MergeReport.from_dict(self.carry_out(job, say, lambda pid: discard(job.out, pid)))


# --- the other end --------------------------------------------------------------------------------------------


def _work(job: MergeJob, say: Callable[[str], None]) -> dict[str, Any]:
    from ..engine.merging import merge

    return merge(job.spec, job.adapter, job.out, probe=job.probe, say=say).to_dict()


def main() -> None:
    """``python -m llmnb.launch.merging``."""
    serve(
        _work,
        lambda error: own(error, "The checkpoint could not be merged.", _MEMORY),
        lambda job: discard(job.out, os.getpid()),
    )


if __name__ == "__main__":
    main()
