"""Checkpoints of a database as folders: merged, exported, uploaded to a hub, each proved.

The part of ``Datalayer`` that hands weights out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .engine.proof import MergeReport
from .errors import NotFound
from .launch.cards import base_for_others, model_card, proof_of, without_paths
from .launch.merging import MergeProcess, prepare
from .store import Store
from .store.exporting import export
from .store.hub import upload

__all__ = ["Weights"]


class Weights:
    """Weights in the database whose ``store`` this is."""

    store: Store

    def merge(
        self,
        checkpoint: str | Checkpoint,
        folder: str | Path,
        *,
        base: str | None = None,
        transform: Callable[..., Any] | None = None,
        say: Callable[[str], None] | None = None,
        process: MergeProcess | None = None,
    ) -> MergeReport:
        """Merges a checkpoint's adapter into its base, in a process of its own, and proves that it says the same.

        The base is loaded in its own 16 or 32 bits, also when it was trained on in 4. What was written is loaded again
        and compared, on rows of the run's valid fold. The folder takes its name only after that.

        Args:
            checkpoint: ``"experiment"`` (its last step), ``"experiment/step"``, or a ``Checkpoint``.
            folder: for the whole model: safetensors, tokenizer, ``merge_report.json`` and ``README.md``. Not there yet,
                or empty.
            base: a folder or hub id of the base when it is no longer where it was; the weights must be the same.
            transform: the run's function, when it had one; without it, it is measured on a few sentences.
            say: told what is being done, in a few words.
            process: what carries it out; its ``stop()`` ends it from another thread.

        Raises:
            NotFound: with near names.
            ModelError: a whole model has nothing to merge; the base is missing; the two do not say the same.
            AdapterMismatch: the base is not the one that was trained on.
            ArtifactError: the folder is in use or cannot be written; no space left; stored bytes are damaged.
        """
        found = self.named(checkpoint) if isinstance(checkpoint, str) else checkpoint
        job = prepare(self.store, found, folder, base=base, transform=transform)
        return (process or MergeProcess()).run(job, say)

    def export(self, checkpoint: str | Checkpoint, folder: str | Path) -> Path:
        """Writes a checkpoint's files as a plain folder, each proved by its sha256.

        peft loads an adapter's folder, transformers a whole model's, with no network and without this package.

        Args:
            checkpoint: ``"experiment"`` (its last step), ``"experiment/step"``, or a ``Checkpoint``.
            folder: not there yet, or empty.

        Returns:
            The folder, absolute.

        Raises:
            NotFound: with near names.
            ArtifactError: the folder is in use or cannot be written; no space left; stored bytes are damaged.
        """
        found = self.named(checkpoint) if isinstance(checkpoint, str) else checkpoint
        return export(self.store.checkpoints, found, folder)

    def push(
        self,
        checkpoint: str | Checkpoint,
        repo: str,
        *,
        folder: str | Path | None = None,
        base: str | None = None,
        private: bool = True,
    ) -> str:
        """Uploads a checkpoint to a model hub, with a model card that says how it came to be.

        The card names rows by number and digest; the database's names, its filters and paths of this machine stay here.

        Args:
            checkpoint: ``"experiment"`` (its last step), ``"experiment/step"``, or a ``Checkpoint``.
            repo: ``owner/name``; made when it is not there.
            folder: what ``merge`` wrote for this checkpoint: the whole model goes up, with its proof, and no adapter.
            base: the hub id of the base, when it was trained on a folder of this machine.
            private: only its owner sees it.

        Returns:
            The address of the repository.

        Raises:
            ArtifactError: the hub is not reached or refuses; stored bytes are damaged; the folder is no merged model.
            ConfigError: an adapter on a folder of this machine, without ``base``; no name of a repository.
            NotFound: with near names.
        """
        found = self.named(checkpoint) if isinstance(checkpoint, str) else checkpoint
        public = base_for_others(found, base)
        with tempfile.TemporaryDirectory() as place:
            copy, proof = Path(place) / "model", ""
            if folder is None:
                export(self.store.checkpoints, found, copy)
            else:
                proof = proof_of(Path(folder), copy)
            (copy / "README.md").write_text(model_card(self.store, found, repo, public, proof), encoding="utf-8")
            without_paths(copy, {found.base: public, str(Path(folder or copy).absolute()): repo})
            return upload(copy, repo, private=private, message=f"{found}, by llmnb")

    def named(self, checkpoint: str) -> Checkpoint:
        """The checkpoint of a name: ``"experiment"`` (its last step) or ``"experiment/step"``. Nothing is fetched.

        Raises:
            NotFound: with near names.
        """
        experiment, slash, step = checkpoint.rpartition("/")
        if not slash:
            return self.store.checkpoints.get(checkpoint)
        return self.store.checkpoints.get(experiment, _step(step, experiment))


def _step(text: str, experiment: str) -> int:
    if not text.isdigit():
        raise NotFound("checkpoint", f"{experiment}/{text}", todo="write EXPERIMENT/STEP, the step as a number")
    return int(text)
