"""connect() and the Datalayer: the database as a person holds it.

Queries are executed, models are stored and trained (``apply``), and models and checkpoints are found again
(``show``, ``load``, ``remove``). This room joins store, launch and the models; it knows no driver, no torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .config import ModelSpec, TrainConfig
from .errors import ConfigError, DataError, Fault, LlmnbError, NotFound, near
from .events import Event
from .inspection import Inspection
from .launch.inspecting import inspect as inspect_rows
from .launch.machine import gpus_visible
from .launch.run import Run
from .launch.start import check, launch
from .llm import LLM
from .measuring import Measuring
from .model import Model, connected, databases
from .pipelines import Pipeline, TextClassification
from .query import Query
from .store import Store, open_store
from .talks import Talks
from .trainer import LLMTrainer, Parcel, settle
from .weights import Weights

__all__ = ["Datalayer", "connect", "inspect"]

_CLASSES: dict[str, type[LLM] | type[Pipeline]] = {"causal-lm": LLM, "text-classification": TextClassification}
KINDS = ("checkpoint", "model", "run", "trainer")


def connect(uri: Any = None, *, artifacts: str | None = None, home: str | Path | None = None) -> Datalayer:
    """Opens a database.

    Args:
        uri: ``mongodb://…`` or ``mongodb+srv://…`` for a server; ``mongomock://name`` for one in this process only; a
            pymongo ``Database`` that a person already has; None for ``LLMNB_URI``, else an embedded mongod in
            ``./.llmnb``, started when it does not run yet and shared by all processes of this machine.
        artifacts: where checkpoints' bytes live: an fsspec URL (``file:///…``, ``s3://…``). None: where this database
            already keeps them, GridFS at first.
        home: folder of the embedded database and of caches (``LLMNB_HOME``, ``./.llmnb``).

    Raises:
        ConnectError: the URI is wrong, nobody listens there, or the password is.
        EmbeddedError: the embedded mongod cannot be found or started.
    """
    return Datalayer(open_store(uri, artifacts=artifacts, home=home))


def inspect(
    trainer: LLMTrainer | Model, model: Model | str | Path | None = None, db: Datalayer | None = None
) -> Inspection:
    """What a training would see of the documents, and what is wrong with them, without training.

    Args:
        trainer: an ``LLMTrainer``, or an ``LLM`` that has one.
        model: whose tokenizer reads: an ``LLM``, a hub id or a folder. Not needed when an LLM is given first.
        db: where the documents are; None: the database that was connected last, else ``connect()``.

    Returns:
        See ``Datalayer.inspect``, which does it.

    Raises:
        ConfigError: settings are wrong; no model.
        DataError: the selection is empty; chats, and no chat template.
        ModelError: the tokenizer cannot be loaded.
    """
    if isinstance(trainer, Model):
        model, trainer = trainer, trainer.trainer  # type: ignore[assignment]
    elif model is None:
        raise ConfigError([Fault("model", "is needed: its tokenizer reads the documents", "inspect(trainer, 'name')")])
    if not isinstance(model, Model):
        model = LLM("inspected", str(model))
    known = db or next((found for found in databases(None) if isinstance(found, Datalayer)), None) or connect()
    return known.inspect(model, trainer)  # type: ignore[arg-type]


class Datalayer(Weights, Talks, Measuring):
    """A connected database. Made by ``connect()``.

    Attributes:
        store: the low-level room; a person rarely needs it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        connected(self)

    def __repr__(self) -> str:
        # A repr ends in a saved notebook, so no address is in it.
        where = "in this process only" if self.store.in_process else f"MongoDB {self.store.version}".strip()
        return f"<llmnb database {self.store.name!r}, {'embedded ' if self.store.embedded else ''}{where}>"

    def close(self) -> None:
        """Closes the connection. Background runs go on."""
        self.store.close()

    # -- documents -------------------------------------------------------------------------------------------

    def execute(self, query: Query) -> Any:
        """Runs a query.

        Returns:
            Of an insert the ids; of a find a cursor of Documents; of find_one a Document or None; of a count, an update
            or a delete a number.

        Raises:
            QueryError: this is no query of ours, or the server cannot run it.
        """
        return self.store.execute(query)

    # -- models ----------------------------------------------------------------------------------------------

    def apply(
        self, model: Model, *, wait: bool = True, on_event: Callable[[Event], None] | None = None, progress: bool = True
    ) -> Run | None:
        """Stores a model; when it has a trainer, trains it.

        The same identifier again makes version n + 1; the version before stays the one that loads until the new one
        has a checkpoint.

        Args:
            model: an ``LLM`` or a pipeline.
            wait: False trains in a background job that outlives this process, and returns at once.
            on_event: called with each event of a run that is waited for.
            progress: shows a progress bar while waiting, when standard error is a terminal.

        Returns:
            The run, or None for a model without a trainer.

        Raises:
            ConfigError: settings are wrong; all of them are named, before any work.
            DataError: the selection is empty, or holds nothing to train on.
            RunError: the training failed. The version before is still the one that loads.
        """
        spec = model.spec()
        if model.trainer is None:
            self._add_version(model, None)
            return None
        parcel = settle(model.trainer, spec)
        self._check_data(parcel.config)
        objects = {
            "transform": parcel.transform,
            "trainer_kwargs": parcel.trainer_kwargs,
            "ray_configs": parcel.ray_configs,
            "ray_address": parcel.ray_address,
        }
        background = _in_background(parcel, wait)
        check(self.store, spec, parcel.config, objects, wait=wait, background=background)
        version = self._add_version(model, parcel.config)
        run = launch(
            self.store,
            spec=spec,
            version=version,
            config=parcel.config,
            parcel_objects=objects,
            wait=wait,
            background=background,
            on_event=on_event,
            progress=progress,
        )
        model._follow(self, run.id)
        return run

    def inspect(self, model: Model, trainer: LLMTrainer | None = None) -> Inspection:
        """What a training would see of the documents, and what is wrong with them, without training.

        It runs in a process of its own, with the code that makes a training's rows; no weights are loaded.

        Args:
            model: an ``LLM``; its tokenizer, prompt_template and context count.
            trainer: None: the model's own.

        Returns:
            Counts, lengths, faults with the _ids of the documents that have them, and rows as coloured tokens.

        Raises:
            ConfigError: settings are wrong, or there is no trainer.
            DataError: the selection is empty; chats, and no chat template.
            ModelError: the tokenizer cannot be loaded.
        """
        spec = model.spec()
        trainer = trainer or model.trainer
        if trainer is None:
            raise ConfigError([Fault("trainer", "is needed: it says which documents and which key", "LLMTrainer(…)")])
        if spec.task != "causal-lm":
            raise LlmnbError("Only the rows of language models are inspected.", seen=f"task {spec.task}")
        parcel = settle(trainer, spec)
        self._check_data(parcel.config)
        return inspect_rows(self.store, spec, parcel.config, parcel.transform)

    def _add_version(self, model: Model, config: TrainConfig | None) -> int:
        version = self.store.models.add(model.spec(), config)
        if config is None:
            checkpoint = getattr(model, "adapter_id", None)
            if isinstance(checkpoint, Checkpoint):
                self.store.models.point(model.identifier, version, str(checkpoint))
            self.store.models.ready(model.identifier, version)
        return version

    def _check_data(self, config: TrainConfig) -> None:
        """What can be said before any long work."""
        if config.select is None:
            todo = "LLMTrainer(select=Collection('…').find(), …)"
            raise ConfigError([Fault("select", "is needed: which documents to train on", todo)])
        if next(iter(self.store.rows(config.select, limit=1)), None) is None:
            names = self.store.collections()
            close = near(config.select.collection, names)
            raise DataError(
                f"The selection from {config.select.collection!r} is empty.",
                seen=f"collections here: {', '.join(sorted(names)) or 'none'}",
                todo=f"did you mean {close[0]!r}?" if close else "insert documents, or change the filter",
            )

    # -- what is there ---------------------------------------------------------------------------------------

    def show(self, kind: str | None = None, identifier: str | None = None) -> Any:
        """Names of what is stored.

        Args:
            kind: "model", "checkpoint", "run" or "trainer"; None for all of them.
            identifier: of a model: its versions; of a checkpoint's experiment: its steps.

        Returns:
            Of no kind a dict of lists; else a list. Experiments and runs are ordered oldest first: ``[-1]`` is the
            latest.

        Raises:
            NotFound: a kind or an identifier that is not there, with near names.
        """
        if kind is None:
            return {k: self.show(k) for k in KINDS}
        _known_kind(kind)
        if kind == "checkpoint":
            if identifier is None:
                return self.store.checkpoints.experiments()
            steps = [c.step for c in self.store.checkpoints.list(identifier)]
            if not steps:
                raise NotFound("experiment", identifier, self.store.checkpoints.experiments())
            return steps
        if kind == "model":
            return self.store.models.identifiers() if identifier is None else self.store.models.versions(identifier)
        if kind == "run":
            return sorted(record["_id"] for record in self.store.runs.list())
        return sorted({r["config"]["identifier"] for r in self.store.runs.list() if r.get("config")})

    def checkpoints(self, experiment: str) -> list[Checkpoint]:
        """The checkpoints of an experiment by step, with their metrics. Nothing is fetched."""
        return self.store.checkpoints.list(experiment)

    def runs(self) -> list[Run]:
        """All runs, newest first."""
        return [Run(self.store, record["_id"]) for record in self.store.runs.list()]

    def run(self, id: str = "latest") -> Run:
        """A run by id, or the latest.

        Raises:
            NotFound: with near names.
        """
        return Run(self.store, self.store.runs.get(id)["_id"])

    def resume(self, id: str = "latest", **words: Any) -> Run:
        """Goes on with a run that has ended: ``run.resume`` of that id, with all its words.

        Raises:
            NotFound: with near names.
        """
        return self.run(id).resume(**words)

    # -- loading and removing --------------------------------------------------------------------------------

    def load(self, kind: str, identifier: str, version: int | None = None) -> Any:
        """Loads by name.

        Args:
            kind: "model", "checkpoint", "trainer" or "run".
            identifier: a model's identifier, or a checkpoint's experiment (also ``"experiment/step"``).
            version: a model's version, or a checkpoint's step. None: the newest.

        Returns:
            A model that answers with its best step when the run chose one, else with its last; a ``Checkpoint`` whose
            files are on this machine, verified; a trainer; or a run.

        Raises:
            NotFound: with near names.
            ArtifactError: stored bytes are not what their digest says.
        """
        _known_kind(kind)
        if kind == "checkpoint":
            found = self.named(identifier) if version is None else self.store.checkpoints.get(identifier, version)
            return self.fetch(found)
        if kind == "run":
            return self.run(identifier)
        if kind == "trainer":
            runs = [r for r in self.store.runs.list() if r["config"]["identifier"] == identifier]
            if not runs:
                raise NotFound("trainer", identifier, self.show("trainer"))
            return LLMTrainer.from_config(TrainConfig.from_json(runs[0]["config"]))
        record = self.store.models.get(identifier, version)
        spec = ModelSpec.from_json(record["spec"])
        cls = _CLASSES.get(spec.task, Pipeline)
        model = cls.from_spec(spec)
        model._database = self
        if record.get("checkpoint"):
            model._adopt(self.load("checkpoint", record["checkpoint"]))
        return model

    def remove(self, kind: str, identifier: str, version: int | None = None) -> None:
        """Removes by name. Bytes that nothing names any more go with ``llmnb db gc``.

        Args:
            kind: "model", "checkpoint", "run", "chat" or "evaluation".
            identifier: a model's identifier, a checkpoint's experiment, a run's or evaluation's id, a kept chat's name.
            version: a model's version, or a checkpoint's step; None removes all of them.

        Raises:
            InUse: a model still points at the checkpoint (it is named), or the run still goes on.
            NotFound: with near names.
        """
        if kind in ("chat", "evaluation"):
            (self.store.chats if kind == "chat" else self.store.evaluations).remove(identifier)
            return
        _known_kind(kind)
        if kind == "checkpoint":
            steps = self.show("checkpoint", identifier) if version is None else [version]
            for step in steps:
                self.store.checkpoints.remove(identifier, step)
        elif kind == "model":
            self.store.models.remove(identifier, version)
        elif kind == "run":
            self.store.runs.remove(identifier)
            self.store.events.remove(identifier)
        else:
            raise LlmnbError("A trainer is part of its runs.", todo=f"remove its runs: {self.show('run')}")

    # -- for models that ask ---------------------------------------------------------------------------------

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with its files on this machine, verified."""
        return checkpoint.at(str(self.store.checkpoints.fetch(checkpoint)))

    def find_checkpoint(self, name: str) -> Checkpoint | None:
        """The checkpoint named "experiment" or "experiment/step", fetched, or None."""
        experiments = self.store.checkpoints.experiments()
        if name in experiments:
            return self.load("checkpoint", name)
        experiment, _, step = name.rpartition("/")
        if experiment in experiments and step.isdigit():
            return self.load("checkpoint", experiment, int(step))
        return None

    def answering(self, run: str) -> Checkpoint | None:
        """The checkpoint that a run's model version points at, fetched; None while there is none."""
        record = self.store.runs.get(run)
        try:
            version = self.store.models.get(record["model"], record["version"])
        except NotFound:
            return None
        return self.load("checkpoint", version["checkpoint"]) if version.get("checkpoint") else None


def _known_kind(kind: str) -> None:
    if kind not in KINDS:
        raise NotFound("kind", kind, KINDS)


def _in_background(parcel: Parcel, wait: bool) -> bool:
    """On Ray when it is asked for, or when what was asked for needs it; else in this process."""
    config = parcel.config
    if config.on_ray is not None:
        return config.on_ray or not wait
    asked = parcel.ray_configs or parcel.ray_address or config.deepspeed is not None
    return bool(asked or not wait or (config.num_gpus or 1) > 1 or (config.num_gpus != 1 and gpus_visible() > 1))
