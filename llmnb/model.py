"""What every model of the database shares: its description, its training, the checkpoint that answers.

``LLM`` and ``Pipeline`` stand on it. The database that trains a model hands itself over as an object (``Database``);
this room imports none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .checkpoint import Checkpoint
from .config import ModelSpec
from .errors import ConfigError, Fault, LlmnbError
from .query import Select
from .trainer import LLMTrainer

__all__ = ["Database", "Model", "connected", "databases", "plain_kwargs"]

# With neither path, checkpoint nor database at hand, a name like "experiment/step" is looked up in the database
# that was connected last in this process.
_last_database: list[Database] = []


class Database(Protocol):
    """What an LLM asks of a database."""

    def apply(self, model: Any, *, wait: bool = True) -> Any:
        """Stores and trains."""

    def find_checkpoint(self, name: str) -> Checkpoint | None:
        """The checkpoint named "experiment" or "experiment/step", fetched, or None."""

    def answering(self, run: str) -> Checkpoint | None:
        """The checkpoint that a run's model answers with (the best when it chose one, else the last), fetched."""

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with its files on this machine."""


def connected(database: Database) -> None:
    """Remembers the database that names of checkpoints are looked up in."""
    _last_database[:] = [database]


def databases(own: Database | None) -> list[Database]:
    """Where to look a name up: a model's own database, then the one that was connected last."""
    return [database for database in [own, *_last_database] if database is not None]


def plain_kwargs(what: str, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments in a form that JSON can hold.

    ``torch.bfloat16`` becomes ``"bfloat16"``; a quantization config its ``to_dict()``.

    Raises:
        ConfigError: a value that has no such form, by name.
    """
    faults: list[Fault] = []

    def plain(name: str, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return {str(k): plain(f"{name}.{k}", v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(name, v) for v in value]
        if type(value).__name__ == "dtype" and str(value).startswith("torch."):
            return str(value).removeprefix("torch.")
        if type(value).__module__.startswith("torch") and type(value).__name__ == "device":
            return str(value)
        if hasattr(value, "to_dict"):
            return plain(name, value.to_dict())
        faults.append(Fault(f"{what}[{name!r}]", f"a {type(value).__name__} cannot be stored with the model"))
        return None

    for name in ("token", "use_auth_token"):
        if isinstance((kwargs or {}).get(name), str):
            todo = "log in with `hf auth login`, or set HF_TOKEN; background runs see it too"
            faults.append(Fault(f"{what}[{name!r}]", "is a secret, and would be stored with the model", todo))
    out = {str(k): plain(str(k), v) for k, v in (kwargs or {}).items()}
    if faults:
        raise ConfigError(faults)
    return out


class Model:
    """A model of the database.

    Attributes:
        trainer: how ``db.apply`` trains it; None stores it only.
    """

    trainer: LLMTrainer | None

    def __init__(self, spec: ModelSpec, trainer: LLMTrainer | None) -> None:
        self._spec, self.trainer = spec, trainer
        self._tuned: Checkpoint | None = None
        self._database: Database | None = None
        self._run: str | None = None

    @property
    def identifier(self) -> str:
        """The model's name in the database."""
        return self._spec.identifier

    @property
    def model_name_or_path(self) -> str:
        """The base model."""
        return self._spec.model_name_or_path

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint that answers, or None while the base does."""
        if self._tuned is None and self._run and self._database is not None:
            found = self._database.answering(self._run)
            if found is not None:
                self._adopt(found)
        return self._tuned

    def spec(self) -> ModelSpec:
        """The description that is stored."""
        return self._spec

    def close(self) -> None:
        """Gives the memory of the weights back. The next ``predict`` loads them again."""
        raise NotImplementedError

    # -- training --------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any = None,
        select: Select | None = None,
        configuration: LLMTrainer | None = None,
        db: Database | None = None,
        *,
        on_ray: bool | None = None,
        ray_address: str | None = None,
        ray_configs: Mapping[str, Any] | None = None,
        wait: bool = True,
        **settings: Any,
    ) -> Any:
        """Trains on a selection of a database; afterwards this object answers with the trained weights.

        Args:
            X: the key: a column, a tuple of columns, ``"messages"``, or ``("prompt", "response")``.
            select: the documents; that of the configuration when not given.
            configuration: an ``LLMTrainer``; the model's own when not given.
            db: the database, from ``connect()``.
            on_ray, ray_address, ray_configs: as on ``LLMTrainer``.
            wait: False trains in the background and returns the run at once.
            **settings: any option of ``LLMTrainer``, on top of the configuration.

        Returns:
            The run.

        Raises:
            ConfigError: for wrong settings, all at once.
            LlmnbError: no database was given.
        """
        database = db or self._database
        if database is None:
            raise LlmnbError("fit needs a database.", todo="llm.fit(…, db=connect(…))")
        base = configuration if configuration is not None else self.trainer
        if base is None:
            base = LLMTrainer()
        given = {"key": X, "select": select, "on_ray": on_ray, "ray_address": ray_address, "ray_configs": ray_configs}
        changes = {name: value for name, value in given.items() if value is not None}
        self.trainer = base.copy(**changes, **settings)
        return database.apply(self, wait=wait)

    def _adopt(self, checkpoint: Checkpoint) -> None:
        """From now on this checkpoint answers."""
        self.close()
        self._tuned = checkpoint

    def _follow(self, database: Database, run: str) -> None:
        """From now on the newest checkpoint of a run answers, as soon as there is one."""
        self.close()
        self._database, self._run, self._tuned = database, run, None
