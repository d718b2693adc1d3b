"""Merging in a process of its own: the caller loads no torch, and a merge that runs out of memory ends alone.

``MergeProcess`` is the caller's end; ``python -m llmnb.launch.merging`` is the other, which is given one job through
its standard input, says in JSON lines what it does, and ends. It ends too when its input does, so it never outlives
its parent. ``prepare`` makes the job of a checkpoint and of what the database knows of its run.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..config import ModelSpec, TrainConfig
from ..engine.proof import MergeReport, Probe
from ..errors import LlmnbError, ModelError, NotFound
from ..folders import discard, place
from . import aside

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["MergeJob", "MergeProcess", "prepare"]

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
        kept = {k: v for k, v in document.items() if columns is None or k in columns or k == "_id"}
        found.append(kept)
        size += len(str(kept))
        if size > _CHARS:
            break
    return tuple(found)


class MergeProcess:
    """One merge, carried out elsewhere. ``stop`` may be called from any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, job: MergeJob, say: Callable[[str], None] | None = None) -> MergeReport:
        """Carries a job out and waits for it.

        Args:
            job: of ``prepare``.
            say: told what is being done, in a few words.

        Raises:
            LlmnbError: what the other side raised.
            ModelError: the process ended (out of memory, mostly), or was stopped. Nothing is left of the folder.
        """
        with tempfile.TemporaryFile() as log:
            process = self._process = aside.start("merging", log)
            if self._stopped:
                process.kill()
            report = None
            try:
                assert process.stdin is not None and process.stdout is not None
                with contextlib.suppress(OSError):  # it has ended: its last words say why
                    process.stdin.write(_pickled(job))
                    process.stdin.flush()
                for line in process.stdout:
                    said = json.loads(line)
                    if "error" in said:
                        # Our own child wrote it, through a private pipe.
                        raise pickle.loads(base64.b64decode(said["error"]))
                    if "report" in said:
                        report = MergeReport.from_dict(said["report"])
                    elif say is not None:
                        say(said["says"])
            finally:
                aside.finish(process)
                if process.stdout is not None:
                    process.stdout.close()
                if report is None:
                    discard(job.out, process.pid)
            if report is None:
                raise self._ended(process, log)
            return report

    def _ended(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> ModelError:
        if self._stopped:
            return ModelError("The merge was stopped.", todo="nothing was written; start it again when you like")
        log.seek(0)
        seen = log.read()[-800:].decode("utf-8", "replace").strip() or f"exit status {process.poll()}"
        todo = "when memory was short: it takes about that of the whole model in 16 or 32 bits"
        return ModelError("The merge's process has ended.", seen=seen, todo=todo)

    def stop(self) -> None:
        """Ends the merge; nothing is left of it. Without one, the next ends at once."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


def _pickled(job: MergeJob) -> bytes:
    import cloudpickle

    return bytes(cloudpickle.dumps(job))  # a notebook's own transform travels by value


# --- the other end --------------------------------------------------------------------------------------------


def _own(error: Exception) -> LlmnbError:
    """The caller may have no torch, so only errors of our own cross."""
    if isinstance(error, LlmnbError):
        return error
    full = isinstance(error, MemoryError) or "memory" in str(error).lower()
    todo = "it takes about the memory of the whole model in 16 or 32 bits" if full else None
    return ModelError("The checkpoint could not be merged.", seen=f"{type(error).__name__}: {error}", todo=todo)


def main() -> None:
    """``python -m llmnb.launch.merging``."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the lines

    def say(line: Mapping[str, Any]) -> None:
        out.write(json.dumps(line).encode() + b"\n")
        out.flush()

    source = os.fdopen(os.dup(0), "rb")
    job = pickle.load(source)  # our own parent wrote it
    threading.Thread(target=_end_with, args=(source, job.out), daemon=True).start()
    say({"says": "loading torch"})
    try:
        from ..engine.merging import merge

        report = merge(job.spec, job.adapter, job.out, probe=job.probe, say=lambda words: say({"says": words}))
        say({"report": report.to_dict()})
    except Exception as error:  # noqa: BLE001 - the border of the process: the caller raises it
        say({"error": base64.b64encode(pickle.dumps(_own(error))).decode()})


def _end_with(source: IO[bytes], out: str) -> None:
    """The end of the input is the end: whoever asked is gone. Nothing half-done stays."""
    source.read()
    discard(out, os.getpid())
    os._exit(0)


if __name__ == "__main__":
    main()
