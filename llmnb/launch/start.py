"""Starting a run: in this process, on a thread of it, or in the background, where it outlives this process."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelSpec, TrainConfig
from ..errors import LaunchError, NotFound
from ..events import Event
from ..job import TrainJob
from . import machine, rayconfigs, remote, runner
from .layout import Layout, plan
from .masking import Mask
from .progress import Progress
from .run import FINAL, Run
from .sharing import with_files_read
from .worker import own_folder, told_of, work

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["begin", "check", "launch"]

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
    reproduces: Mapping[str, Any] | None = None,
) -> Run:
    """Records a run and starts it.

    Args:
        store: the database.
        spec: the model.
        version: its version, which the run fills.
        config: how to train.
        parcel_objects: what travels beside the config: transform, trainer_kwargs, ray_configs, ray_address.
        wait: returns when it has ended. False returns at once, and then it is a background job in any case.
        background: by this machine's runner or on a cluster; else in this process.
        on_event: called with each event, when waited for.
        progress: shows a progress bar, when waited for.
        reproduces: the run that this one repeats, and what it was made of; see ``reproducing``.

    Returns:
        The run.

    Raises:
        LaunchError: the job could not be started.
        LlmnbError: a run in this process failed: its own error. A waited job that failed raises ``RunError``.
    """
    objects = dict(parcel_objects or {})
    layout = check(store, spec, config, objects, wait=wait, background=background)
    config = with_files_read(config)
    record = store.runs.create(
        spec.identifier,
        model=spec.identifier,
        version=version,
        config=config,
        background=background or not wait,
        starter={**machine.this_process(), "since": time.time()},
        cluster=objects.get("ray_address"),
        ray_configs=rayconfigs.described(objects.get("ray_configs") or {}),
        **({"reproduces": dict(reproduces)} if reproduces else {}),
    )
    job = TrainJob(
        run=record["_id"],
        model=spec,
        version=version,
        config=config,
        uri=None if store.in_process else store.uri,
        database=store.name,
        workdir=str(own_folder(config.output_dir, record["_id"])),
        transform=objects.get("transform"),
        trainer_kwargs=dict(objects.get("trainer_kwargs") or {}),
        ray_configs=dict(objects.get("ray_configs") or {}),
        ray_address=objects.get("ray_address"),
        workers=layout.workers,
    )
    return begin(job, store, wait=wait, background=background, on_event=on_event, progress=progress)


def begin(
    job: TrainJob,
    store: Store,
    *,
    wait: bool = True,
    background: bool = False,
    on_event: OnEvent | None = None,
    progress: bool = False,
) -> Run:
    """Starts a run that is recorded and in state queued. Arguments, returns and raises as for ``launch``."""
    run = Run(store, job.run)
    heard = store.events.last_seq(run.id) if on_event is not None or progress else 0
    objects = {"ray_configs": job.ray_configs, "ray_address": job.ray_address}
    if _on_a_thread(store, job.config, objects, wait):
        _on_thread(job, store)
    elif background or not wait:
        _submit(job, store)
        if wait:
            _follow(run, on_event, progress, heard)
    else:
        _here(job, store, on_event, progress)
    return run


def check(
    store: Store, spec: ModelSpec, config: TrainConfig, objects: Mapping[str, Any], *, wait: bool, background: bool
) -> Layout:
    """What can be refused before anything is recorded or started. Arguments as for ``launch``.

    Raises:
        ConfigError: settings that several workers, DeepSpeed or Ray cannot honour; all of them.
        LaunchError: the database cannot be reached from where the run would be.
    """
    background = (background or not wait) and not _on_a_thread(store, config, objects, wait)
    layout = plan(
        config,
        objects.get("ray_configs") or {},
        bits=config.bits if config.bits is not None else spec.bits,
        gpus=None if objects.get("ray_address") is not None else machine.gpus_visible(),
        background=background,
    )
    if store.in_process and background:
        raise LaunchError(
            "A background run cannot reach a database that lives in this process.",
            seen=store.describe(),
            todo="connect() with a server or with the embedded database; or train here, without on_ray",
        )
    return layout


def _on_a_thread(store: Store, config: TrainConfig, objects: Mapping[str, Any], wait: bool) -> bool:
    asked = config.on_ray or objects.get("ray_configs") or objects.get("ray_address")
    asked = asked or config.deepspeed is not None or (config.num_gpus or 1) > 1
    return store.in_process and not wait and not asked


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


def _follow(run: Run, on_event: OnEvent | None, progress: bool, heard: int) -> None:
    try:
        run.wait(progress=progress and sys.stderr.isatty(), on_event=on_event, after=heard)
    except KeyboardInterrupt:
        if run.state not in FINAL:
            print(f"llmnb: asking run {run.id} to stop with a checkpoint", file=sys.stderr)
            run.stop()
            run.wait()
        raise


def _submit(job: TrainJob, store: Store) -> None:
    """Hands a job over; the run's record names who has it. What goes wrong meanwhile is on the run, and raised."""
    home = Path(store.home).expanduser().absolute()
    try:
        if job.ray_address is None:
            _to_our_runner(job, store, home)
        else:
            remote.submit(job, store)
    except BaseException as error:
        told = told_of(error, Mask([job.uri, job.artifacts]))
        store.runs.transition(job.run, "queued", "failed", attempt=job.attempt, error=told)
        raise


def _is_over(store: Store, run: str) -> bool:
    try:
        return store.runs.get(run)["state"] in FINAL
    except NotFound:  # a run of another database waits for its turn at the same runner
        return False


def _to_our_runner(job: TrainJob, store: Store, home: Path) -> None:
    place = {"host": socket.gethostname(), "home": str(home), "since": time.time()}
    store.runs.update(job.run, runner=place, ray_address=None, away=None, workdir=job.workdir)
    # A process ends a moment after its run: nobody waits for a run that is over.
    waits_for = [run for run in runner.submit(job, home) if run != job.run and not _is_over(store, run)]
    if waits_for:
        store.runs.update(job.run, waits_for=waits_for)
        print(f"llmnb: run {job.run} waits for {', '.join(waits_for)}", file=sys.stderr)
