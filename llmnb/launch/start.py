"""Starting a run: in this process, on a thread of it, or as a job on a Ray cluster that outlives it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelSpec, TrainConfig
from ..errors import LaunchError
from ..events import Event
from ..job import TrainJob
from . import cluster, machine
from .masking import Mask
from .parcel import command, pack
from .progress import Progress
from .run import FINAL, Run
from .worker import own_folder, told_of, work

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["launch"]

OnEvent = Callable[[Event], Any]


def launch(
    store: Store,
    *,
    spec: ModelSpec,
    version: int,
    config: TrainConfig,
    parcel_objects: Mapping[str, Any] | None = None,
    wait: bool = True,
    background: bool = False,
    on_event: OnEvent | None = None,
    progress: bool = False,
    resume_from: str | None = None,
) -> Run:
    """Records a run and starts it.

    Args:
        store: the database.
        spec: the model.
        version: its version, which the run fills.
        config: how to train.
        parcel_objects: what travels beside the config: transform, trainer_kwargs, ray_configs, ray_address, workers.
        wait: returns when it has ended. False returns at once, and then it is a background job in any case.
        background: as a Ray job; else in this process.
        on_event: called with each event, when waited for.
        progress: shows a progress bar, when waited for.
        resume_from: "experiment/step" to go on from.

    Returns:
        The run.

    Raises:
        LaunchError: the job could not be started.
        LlmnbError: a run in this process failed: its own error. A waited job that failed raises ``RunError``.
    """
    objects = dict(parcel_objects or {})
    _refuse_what_is_not_built(config, objects)
    on_thread = store.in_process and not wait and not _asks_for_ray(config, objects)
    if store.in_process and (background or not wait) and not on_thread:
        raise LaunchError(
            "A Ray job cannot reach a database that lives in this process.",
            seen=store.describe(),
            todo="connect() with a server or with the embedded database; or train here, without on_ray",
        )
    record = store.runs.create(spec.identifier, model=spec.identifier, version=version, config=config)
    run = Run(store, record["_id"])
    job = TrainJob(
        run=run.id,
        model=spec,
        version=version,
        config=config,
        uri=None if store.in_process else store.uri,
        database=store.name,
        workdir=str(own_folder(config.output_dir, run.id)),
        transform=objects.get("transform"),
        trainer_kwargs=dict(objects.get("trainer_kwargs") or {}),
        ray_configs=dict(objects.get("ray_configs") or {}),
        ray_address=objects.get("ray_address"),
        resume_from=resume_from,
        workers=int(objects.get("workers") or config.num_gpus or 1),
    )
    if on_thread:
        _on_thread(job, store)
    elif background or not wait:
        _submit(job, store, run)
        if wait:
            _follow(run, on_event, progress)
    else:
        _here(job, store, on_event, progress)
    return run


def _refuse_what_is_not_built(config: TrainConfig, objects: Mapping[str, Any]) -> None:
    workers = int(objects.get("workers") or config.num_gpus or 1)
    if workers > 1:
        raise LaunchError(
            "Training on several workers is not possible in this version.",
            seen=f"{workers} workers",
            todo="num_gpus=1",
        )
    if objects.get("ray_configs"):
        raise LaunchError(
            "ray_configs cannot be honoured in this version: a run on Ray has one worker.",
            seen=", ".join(objects["ray_configs"]),
            todo="on_ray=True without ray_configs",
        )


def _asks_for_ray(config: TrainConfig, objects: Mapping[str, Any]) -> bool:
    return bool(config.on_ray or objects.get("ray_configs") or objects.get("ray_address") or config.deepspeed)


def _here(job: TrainJob, store: Store, on_event: OnEvent | None, progress: bool) -> None:
    with contextlib.ExitStack() as stack:
        followers = [on_event] if on_event is not None else []
        if progress and sys.stderr.isatty():
            followers.append(stack.enter_context(Progress(job.run)))

        def each(event: Event) -> None:
            for follower in followers:
                follower(event)

        work(job, store=store, on_event=each if followers else None)


def _on_thread(job: TrainJob, store: Store) -> None:
    """A database in this process, and not waited for: the run lives on a thread, and ends with this process."""
    print(f"llmnb: {store.describe()} lives in this process, and so does run {job.run}", file=sys.stderr)

    def carry() -> None:
        # A border: the reason is on the run, where the handle finds it. A daemon thread has nobody to raise to.
        with contextlib.suppress(Exception):
            work(job, store=store)

    threading.Thread(target=carry, name=f"llmnb-{job.run}", daemon=True).start()


def _follow(run: Run, on_event: OnEvent | None, progress: bool) -> None:
    try:
        run.wait(progress=progress and sys.stderr.isatty(), on_event=on_event)
    except KeyboardInterrupt:
        if run.state not in FINAL:
            print(f"llmnb: asking run {run.id} to stop with a checkpoint", file=sys.stderr)
            run.stop()
            run.wait()
        raise


def _submit(job: TrainJob, store: Store, run: Run) -> None:
    folder = Path(job.workdir)
    mask = Mask([job.uri, job.artifacts])
    home = Path(store.home).expanduser().absolute()
    try:
        if job.ray_address is None:
            ours = cluster.ensure(home)
            jobs: Any = ours.jobs()
            here, cpus, gpus = True, float(machine.cpus()), float(min(machine.gpus_visible(), 1))
        else:
            jobs = cluster.jobs_at(job.ray_address, home)
            here, cpus, gpus = job.ray_address == "auto", 1.0, 0.0
        store.runs.update(run.id, job=run.id, ray_address=jobs.url, ray_home=str(home), workdir=str(folder))
        path = pack(job, folder, home)
        jobs.submit(command(path, here=here), id=run.id, cpus=cpus, gpus=gpus, metadata={"run": run.id})
    except BaseException as error:
        store.runs.transition(run.id, "queued", "failed", error=told_of(error, mask))
        raise
