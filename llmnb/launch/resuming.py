"""Going on with a run that has ended: it is read from the database, what may change is checked, and it is reopened.

A resumed run is the same run in its next attempt. Which checkpoint it goes on from is found where it trains
(``reporting``); here its parcel is made again. Nothing pickled is loaded from the database, so what has no JSON form (a
transform, arguments of the Trainer) must be given again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import options
from ..config import ModelSpec, TrainConfig, thaw
from ..errors import ConfigError, Fault, NotFound, RunError, near
from ..events import Event
from ..job import TrainJob, source_text
from . import machine, rayconfigs
from .run import FINAL, Run
from .start import begin, check
from .worker import own_folder

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["Given", "objects_of", "resume", "settled", "spec_of"]


@dataclass(frozen=True)
class Given:
    """What a person gives beside the settings; see ``Run.resume``. ``verb``: the method they called."""

    transform: Callable[..., Any] | None = None
    trainer_kwargs: Mapping[str, Any] | None = None
    ray_configs: Mapping[str, Any] | None = None
    ray_address: str | None = None
    changed_data: bool = False
    verb: str = "resume"


def resume(
    store: Store,
    run_id: str,
    given: Given,
    changes: Mapping[str, Any],
    *,
    wait: bool | None = None,
    progress: bool = True,
    on_event: Callable[[Event], Any] | None = None,
) -> Run:
    """Goes on with a run. Arguments, returns and raises as for ``Run.resume``."""
    run = Run(store, run_id)
    state, record = run.look(), run.record
    if state not in FINAL:
        raise RunError(
            f"Run {run.id} still goes on.",
            seen=f"state {state}",
            todo="run.wait() waits for its end; run.stop() ends it with a checkpoint",
        )
    before = TrainConfig.from_json(record["config"])
    config = settled(_changed(before, changes), record)
    _check_left(run, record, before, config)
    objects = objects_of(before, record, given)
    spec = spec_of(store, record)
    background = bool(record.get("background", record.get("job")))
    wait = not background if wait is None else wait
    layout = check(store, spec, config, objects, wait=wait, background=background)
    _check_workers(record, layout.workers)
    attempt = int(record.get("attempt", 1))
    cluster = objects["ray_address"]
    described = rayconfigs.described(objects["ray_configs"])
    config = replace(config, ray_configs=", ".join(sorted(objects["ray_configs"])) or None)
    opened = store.runs.reopen(
        run.id,
        attempt,
        config=config,
        cluster=cluster,
        ray_configs=described,
        background=background or not wait,
        starter={**machine.this_process(), "since": time.time()},
        extended=bool(record.get("extended")) or _longer(before, config),
    )
    if opened is None:
        raise RunError(
            f"Run {run.id} was resumed by somebody else at this moment.",
            seen=f"state {run.state}",
            todo="db.run(…).wait() follows it",
        )
    job = TrainJob(
        run=run.id,
        model=spec,
        version=record["version"],
        config=config,
        uri=None if store.in_process else store.uri,
        database=store.name,
        workdir=str(_folder(record, before, config)),
        workers=layout.workers,
        attempt=attempt + 1,
        changed_data=given.changed_data,
        **objects,
    )
    return begin(job, store, wait=wait, background=background, on_event=on_event, progress=progress)


# -- settings -------------------------------------------------------------------------------------------------


def _changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config with some settings changed.

    Raises:
        ConfigError: settings that cannot change, or wrong values; all of them.
    """
    faults: list[Fault] = []
    arguments = thaw(config.arguments)
    own: dict[str, Any] = {}
    for written, value in changes.items():
        today = options.canonical(written, value)
        if isinstance(today, Fault):
            faults.append(today)
            continue
        for name, real in today.items():
            if name not in options.CHANGEABLE:
                faults.append(_refused(written, name))
            elif name == "output_dir":
                own[name] = str(real)
            else:
                arguments[name], fault = options.check(name, real)
                faults += [fault] if fault else []
    if faults:
        raise ConfigError(faults)
    if "num_train_epochs" in changes and "max_steps" not in changes:
        arguments.pop("max_steps", None)  # it would win over the epochs that were asked for
    return replace(config, **own, arguments=arguments)


def _refused(written: str, name: str) -> Fault:
    if name in options.training_arguments() or name in TrainConfig.__dataclass_fields__:
        todo = "start a new run, with adapter_id='RUN' to go on from this one's weights"
        return Fault(written, "cannot change while a run goes on: it would not be the same run", todo)
    close = near(written, options.CHANGEABLE)
    return Fault(written, "is not an option of resume", ("did you mean " + " or ".join(close) + "?") if close else "")


def settled(config: TrainConfig, record: Mapping[str, Any]) -> TrainConfig:
    """As many workers as before, although this machine may have more GPUs than the one before."""
    ranks = (record.get("counts") or {}).get("ranks")
    if ranks is None or config.num_gpus is not None or "scaling_config" in str(config.ray_configs):
        return config
    return replace(config, num_gpus=int(ranks))


def _check_workers(record: Mapping[str, Any], workers: int) -> None:
    ranks = (record.get("counts") or {}).get("ranks")
    if ranks is not None and ranks != workers:
        what = f"the run trained on {ranks} worker{'s'[: ranks != 1]}, and now it would be {workers}"
        raise ConfigError([Fault("ray_configs", what, f"ScalingConfig(num_workers={ranks}), or a new run")])


def _check_left(run: Run, record: Mapping[str, Any], before: TrainConfig, config: TrainConfig) -> None:
    """Refuses when nothing is left to do.

    Raises:
        RunError: the run is done, or was trained further already than is asked for now.
    """
    last = next(reversed(run.metrics()), None) if record["state"] == "done" or before != config else None
    way = "run.resume(num_train_epochs=…) or run.resume(max_steps=…) trains it further"
    step, epoch = (last["step"], last["epoch"] or 0.0) if last else (0, 0.0)
    seen = f"step {step}, epoch {epoch:g}"
    steps = config.arguments.get("max_steps") or -1
    short = step >= steps if steps > 0 else epoch >= config.arguments.get("num_train_epochs", 3.0)
    longer = _longer(before, config)
    if longer and short:
        asked = f"max_steps={steps}" if steps > 0 else f"num_train_epochs={config.arguments['num_train_epochs']:g}"
        raise RunError(f"Run {run.id} was trained that far already.", seen=f"{seen}; asked for: {asked}", todo=way)
    if record["state"] == "done" and not longer:
        raise RunError(f"Run {run.id} is done: nothing is left to do.", seen=seen, todo=way)


def _longer(before: TrainConfig, config: TrainConfig) -> bool:
    return any(before.arguments.get(name) != config.arguments.get(name) for name in options.LONGER)


# -- what travels beside them ---------------------------------------------------------------------------------


def objects_of(config: TrainConfig, record: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """Everything that has no JSON form.

    Raises:
        ConfigError: what was not given again, or is another; all of it.
    """
    faults = _transform_faults(config, given)
    wanted = {name for name in (config.training_kwargs or "").split(", ") if name}
    kwargs = dict(given.trainer_kwargs or {})
    for name in sorted(wanted - kwargs.keys()):
        todo = f"run.{given.verb}(trainer_kwargs={{{name!r}: …}})"
        faults.append(Fault(f"trainer_kwargs[{name!r}]", "was given when the run began, and is not stored", todo))
    for name in sorted(kwargs.keys() - wanted):
        faults.append(Fault(f"trainer_kwargs[{name!r}]", "was not given when the run began", "leave it out"))
    configs: dict[str, Any] = {}
    try:
        recorded = record.get("ray_configs")
        configs = dict(given.ray_configs) if given.ray_configs is not None else rayconfigs.rebuilt(recorded)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    address = given.ray_address if given.ray_address is not None else record.get("cluster")
    return {
        "transform": given.transform,
        "trainer_kwargs": kwargs,
        "ray_configs": configs,
        "ray_address": None if address == "local" else address,
    }


def _transform_faults(config: TrainConfig, given: Given) -> list[Fault]:
    if config.transform is None:
        if given.transform is None:
            return []
        return [Fault("transform", "was not given when the run began", "leave it out, or start a new run")]
    if given.transform is None:
        todo = f"run.{given.verb}(transform=…); its source was\n{config.transform}"
        return [Fault("transform", "was given when the run began; a function is never loaded from the database", todo)]
    if source_text(given.transform) == config.transform or given.changed_data:
        return []
    todo = f"changed_data=True takes it nevertheless; the source was\n{config.transform}"
    return [Fault("transform", "is not the one that the run began with", todo)]


def spec_of(store: Store, record: Mapping[str, Any]) -> ModelSpec:
    """The model that a run fills. Raises RunError when it was removed."""
    try:
        return ModelSpec.from_json(store.models.get(record["model"], record["version"])["spec"])
    except NotFound as error:
        raise RunError(
            f"The model that run {record['_id']} fills is gone.",
            seen=error.what,
            todo=f"start a new run, with adapter_id={record['_id']!r} to go on from its weights",
        ) from error


def _folder(record: Mapping[str, Any], before: TrainConfig, config: TrainConfig) -> Path:
    """Where the run was, when that is here and meant; else its own folder beneath the output folder."""
    run, former = record["_id"], Path(str(record.get("workdir") or ""))
    if before.output_dir == config.output_dir and record.get("workdir") and _is_of(former, run):
        return former
    return own_folder(config.output_dir, run)


def _is_of(folder: Path, run: str) -> bool:
    try:
        return (folder / "run").read_text(encoding="utf-8").strip() == run
    except OSError:
        return False
