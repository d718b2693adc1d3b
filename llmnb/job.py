"""The one parcel that goes from the caller to a worker.

It carries what a config must not: the database URI (a secret), and Python objects that have no JSON form
(the transform, Ray configs). Secrets are hidden from ``repr``. The parcel is written to a file with mode 0600 and never
to the database, and only ever read by the worker it was written for.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import ModelSpec, TrainConfig

__all__ = ["TrainJob", "source_text"]


@dataclass(frozen=True)
class TrainJob:
    """Attributes:

    run: the run's id, also its experiment id.
    model: which model.
    version: the model version that this run will fill.
    config: how to train.
    uri: the database, with its password; hidden from repr. None for a database in this process.
    database: the database's name.
    artifacts: where artifacts live (None: GridFS; else an fsspec URL).
    workdir: local folder for this run's spool, checkpoints in the making and log.
    transform: the person's function, or None.
    trainer_kwargs: extra keyword arguments of transformers.Trainer.
    ray_configs: keyword arguments of ray.train.torch.TorchTrainer.
    ray_address: where the cluster is; None for this machine's own.
    workers: how many worker processes.
    attempt: which attempt of the run this is; 1, and one more each time it is resumed.
    away: the folder that stands for the database on a cluster that does not reach it, or None.
    changed_data: train on although the rows or the base are not those of the attempt before.
    """

    run: str
    model: ModelSpec
    version: int
    config: TrainConfig
    uri: str | None = field(repr=False)
    database: str
    workdir: str
    artifacts: str | None = field(default=None, repr=False)
    transform: Callable[..., Any] | None = None
    trainer_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    ray_configs: dict[str, Any] = field(default_factory=dict, repr=False)
    ray_address: str | None = None
    workers: int = 1
    attempt: int = 1
    changed_data: bool = False
    away: str | None = None

    @property
    def submission(self) -> str:
        """The id of the job that carries this attempt out."""
        return self.run if self.attempt == 1 else f"{self.run}-{self.attempt}"

    def write(self, path: str | Path) -> Path:
        """Writes the parcel for one reader: mode 0600, cloudpickle, so that a notebook's own function travels."""
        import cloudpickle

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = _own_module(self.transform)
        if own is not None:
            cloudpickle.register_pickle_by_value(own)
        try:
            content = cloudpickle.dumps(self)
        finally:
            if own is not None:
                cloudpickle.unregister_pickle_by_value(own)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        return path

    @staticmethod
    def read(path: str | Path) -> TrainJob:
        """Reads what ``write`` wrote.

        Raises:
            TypeError: the file holds something else.
        """
        with open(path, "rb") as file:
            job = pickle.load(file)
        if not isinstance(job, TrainJob):
            raise TypeError(f"{path} holds a {type(job).__name__}, not a TrainJob")
        return job


def source_text(function: Callable[..., Any]) -> str:
    """A function's source text for the record, or its name where Python has none (typed at a prompt)."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return f"<{getattr(function, '__qualname__', type(function).__name__)}: no source text>"


def _own_module(function: Any) -> ModuleType | None:
    """The module of a function that lies beside the notebook: the worker cannot import it, so it goes by value."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is None or file is None or module.__name__ == "__main__":
        return None
    installed = Path(file).is_relative_to(sys.prefix) or Path(file).is_relative_to(sys.base_prefix)
    return None if installed or module.__name__.partition(".")[0] == "llmnb" else module
