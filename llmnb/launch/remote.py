"""A run on a Ray cluster that is not ours: how its job gets there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import cluster
from .parcel import command, pack

if TYPE_CHECKING:
    from ..job import TrainJob
    from ..store import Store

__all__ = ["submit"]


def submit(job: TrainJob, store: Store, home: Path) -> None:
    """Submits a job to the cluster at ``job.ray_address``.

    Args:
        job: what to do.
        store: the database that the run is recorded in.
        home: this machine's home folder.

    Raises:
        LaunchError: nobody answers there, or the job is refused.
    """
    folder = Path(job.workdir)
    jobs = cluster.jobs_at(str(job.ray_address), home)
    store.runs.update(job.run, job=job.run, ray_address=jobs.url, ray_home=str(home), workdir=str(folder))
    path = pack(job, folder, home)
    here = job.ray_address == "auto"
    jobs.submit(command(path, here=here), id=job.run, cpus=1.0, gpus=0.0, metadata={"run": job.run})
