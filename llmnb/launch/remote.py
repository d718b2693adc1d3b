"""A run on a Ray cluster that is not ours: finding the cluster, handing the job over, hearing why it did not begin.

A job's parcel (with the database's password and a person's tokens) travels as a package that Ray unpacks into the job's
working directory; the cluster and this machine share no file system. Whoever may use the cluster can read it until
the job has: the worker then overwrites it. Nothing secret is in the job's command line, environment or metadata.

Ray knows what ``auto``, ``host:6379`` and ``ray://host:10001`` mean. It is asked in a process of its own: importing it
costs 2 s and 100 MB, and its client waits for minutes where nobody listens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import LaunchError, LlmnbError, MissingPackage
from .jobs import ENDED, LOOPBACK, Jobs, at, token
from .layout import spread
from .porter import SAYS
from .rayconfigs import storage_path
from .wrapping import EMPTY, HOME_THERE, wrap

if TYPE_CHECKING:
    from ..job import TrainJob
    from ..store import Store

__all__ = ["find", "forget", "lost_because", "near", "submit", "why_it_ended", "withdraw"]

_ANSWER_S = 5.0
_RAY_ANSWERS_S = 60.0
_ASKED_TIMES = 3
_ENTRYPOINT = "exec $(command -v python || command -v python3) porter.py"

# Ray's own client finds the dashboard of a cluster:
# https://docs.ray.io/en/latest/cluster/running-applications/job-submission/doc/ray.job_submission.JobSubmissionClient.html
_ASK_RAY = """
import sys
from ray.job_submission import JobSubmissionClient
print("URL", JobSubmissionClient(sys.argv[1]).get_address())
"""

# Each client of ray:// gets a server of its own on the head, at a port that was free a moment before. Where two
# clusters share a machine, one of them may find it taken; the next try is given another port.
_PORT_WAS_TAKEN = "Starting Ray client server failed"


def submit(job: TrainJob, store: Store) -> None:
    """Hands a job to the cluster at ``job.ray_address``, and watches until it has begun.

    Args:
        job: what to do.
        store: the database that the run is recorded in.

    Raises:
        LaunchError: nobody answers there, it asks for another token, the job is refused, or the cluster could reach
            neither the database nor a folder.
        ConfigError: with ``log_to_db=False``, no folder that both see.
    """
    from . import away

    jobs = find(str(job.ray_address))
    there = away.there_for(job, near(jobs))
    if there is None:
        _check_database(job, jobs)
        away.show_folder(store.settings.artifacts)
    package = f"_ray_pkg_{uuid.uuid4().hex}.zip"
    sent = dataclasses.replace(job, workdir=f"{HOME_THERE}/runs", away=there, uri=None if there else job.uri)
    places = (there, store.settings.artifacts, storage_path(job.ray_configs.get("run_config")))
    s3 = any(away.is_s3(place) for place in places)
    content = wrap(sent, package=package, needs=needs(job, s3), extras=extras(job, s3), s3=s3)
    known = {"job": job.submission, "ray_address": jobs.url, "package": package, "away": there, "courier": None}
    store.runs.update(job.run, **known)
    with away.furnished(job, store, there):
        jobs.put_package(package, content)
        _submit(job, jobs, package)
    if there is not None:
        away.ensure_courier(store, job.run)
    threading.Thread(target=_watch, args=(store, job.run), name=f"llmnb-watch-{job.run}", daemon=True).start()


def _submit(job: TrainJob, jobs: Jobs, package: str) -> None:
    apart = spread(job)  # its workers take what they need; the driver only waits
    on_cpu = apart or job.config.arguments.get("use_cpu")
    jobs.submit(
        _ENTRYPOINT,
        id=job.submission,
        cpus=0.0 if apart else 1.0,
        gpus=0.0 if on_cpu else float(min(jobs.gpus(), 1)),
        metadata={"run": job.run},
        package=package,
    )


def near(jobs: Jobs) -> bool:
    """True when the cluster's dashboard is on this machine, as far as its address tells."""
    return urlsplit(jobs.url).hostname in LOOPBACK


# --- finding --------------------------------------------------------------------------------------------------


def find(address: str) -> Jobs:
    """The Jobs API of a cluster.

    Args:
        address: ``auto`` (a cluster of this machine, or ``RAY_ADDRESS``), ``host:6379``, ``ray://host:10001`` or
            ``http://host:8265``.

    Raises:
        LaunchError: nobody answers there, within seconds; or it asks for another token.
        MissingPackage: Ray is needed to find it.
    """
    if address != "auto":
        _knock(address)
    url = address if urlsplit(address).scheme in ("http", "https") else _ask_ray(address)
    jobs = at(url)
    jobs.prove()
    return jobs


def _knock(address: str) -> None:
    """Somebody listens there: Ray itself would wait for minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    else:
        port = port or {"ray": 10001, "http": 80, "https": 443}.get(parts.scheme)
        host = host if parts.scheme in ("", "ray", "http", "https") else None
    if host is None or port is None:
        raise LaunchError(
            "This is not the address of a Ray cluster.",
            seen=address,
            todo="auto, host:6379, ray://host:10001 or http://host:8265",
        )
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise LaunchError(
            f"Nobody answers at the Ray address {address}.",
            seen=f"{host} port {port}: {error.strerror or error}",
            todo="check the address and that this machine may reach it; `ray status` on the head says whether it runs",
        ) from None


def _ask_ray(address: str) -> str:
    """The dashboard's URL of a cluster, by Ray's own client in a process of its own."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MissingPackage("ray", "ray", f"The Ray address {address}")
    env = dict(os.environ)
    if address != "auto":  # Ray lets these win over the address that it is given
        env.pop("RAY_ADDRESS", None)
        env.pop("RAY_API_SERVER_ADDRESS", None)
    if token():
        env.setdefault("RAY_AUTH_MODE", "token")
    if any(word in (env.get("RAY_ADDRESS", "") if address == "auto" else address) for word in LOOPBACK):
        # Without this, Ray 2.60 turns 127.0.0.1 into the machine's outward address.
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    command = [sys.executable, "-c", _ASK_RAY, address]
    piped: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        for _ in range(_ASKED_TIMES):
            done = subprocess.run(command, env=env, timeout=_RAY_ANSWERS_S, check=False, **piped)
            seen = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), done.stderr[-300:])
            if _PORT_WAS_TAKEN not in seen:
                break
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"The Ray cluster at {address} does not let us in.",
            seen=f"no answer within {_RAY_ANSWERS_S:g} s",
            todo="most often the token is another one (RAY_AUTH_TOKEN_PATH), or Ray's version is",
        ) from None
    for line in done.stdout.splitlines():
        if line.startswith("URL "):
            return line.removeprefix("URL ").strip()
    todo = "check ray_address; its dashboard must run, and be reached from here (--dashboard-host=0.0.0.0)"
    if "uthenticat" in seen or "oken" in seen:
        todo = "export RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH with the file that holds the cluster's token"
    raise LaunchError(f"The Ray cluster at {address} cannot be used.", seen=seen[:600], todo=todo)


def _check_database(job: TrainJob, jobs: Jobs) -> None:
    hosts = str(job.uri or "").partition("://")[2].rpartition("@")[2].partition("/")[0].split(",")
    if not near(jobs) and all(host.rpartition(":")[0] in LOOPBACK or host in LOOPBACK for host in hosts):
        raise LaunchError(
            "The cluster is another machine, and cannot reach this database.",
            seen=f"the database listens on {hosts[0]}, the cluster is at {jobs.url}",
            todo="connect() to a server that both reach; or log_to_db=False with RunConfig(storage_path='s3://…')",
        )


# --- what the cluster must have -------------------------------------------------------------------------------


def extras(job: TrainJob, s3: bool) -> list[str]:
    """The extras of llmnb that a run needs on the cluster."""
    found = ["train", "ray", *(["s3"] if s3 else [])]
    found += ["quant"] if job.model.bits or job.config.bits else []
    return found + (["deepspeed"] if job.config.deepspeed is not None else [])


def needs(job: TrainJob, s3: bool) -> list[str]:
    """The modules that a run needs on the cluster."""
    found = ["cloudpickle", "fsspec", "psutil", "pymongo", "torch", "transformers", "accelerate"]
    found += ["peft"] if job.config.use_lora or job.model.adapter_id else []
    found += ["bitsandbytes"] if job.model.bits or job.config.bits else []
    found += ["deepspeed"] if job.config.deepspeed is not None else []
    return found + (["s3fs"] if s3 else [])


# --- whether it began -----------------------------------------------------------------------------------------


def why_it_ended(jobs: Jobs, id: str) -> dict[str, Any] | None:
    """Why a job ended without its run having begun, as an error for the record; None while it has not ended."""
    info = jobs.info(id)
    if not info or info.get("status") not in ENDED:
        return None
    log = jobs.logs(id)
    for line in log.splitlines():
        if line.startswith(SAYS):
            return dict(json.loads(line.removeprefix(SAYS)))
    seen = f"{info.get('message') or ''}\n{log}".strip()[-1500:]
    what = "The job ended before the run began."
    return {"type": "LaunchError", "what": what, "seen": seen or None, "todo": None, "traceback": None}


def lost_because(why: Mapping[str, Any]) -> dict[str, Any]:
    """The error of a run whose job ended while it was at work.

    Args:
        why: what ``why_it_ended`` found.
    """
    told = {"type": "WorkerLost", "what": "The worker is gone without a word.", "seen": why.get("seen")}
    return {**told, "todo": "resume the run from its newest checkpoint", "traceback": None}


def withdraw(jobs: Jobs, record: Mapping[str, Any]) -> None:
    """Overwrites the parcel of a job that will not read it any more."""
    if record.get("package"):
        with contextlib.suppress(LaunchError):  # Ray drops it when no job names it
            jobs.put_package(record["package"], EMPTY)


def _watch(store: Store, run: str) -> None:
    """On a thread of the process that launched: a job that cannot begin is known, also when nobody waits."""
    from .run import Run

    pause = 1.0
    while True:
        time.sleep(pause)
        pause = min(pause * 1.2, 10.0)
        try:
            if Run(store, run).look() != "queued":
                return
        except (LlmnbError, RuntimeError):  # the store was closed, the run removed; whoever waits looks too
            return


def forget(package: str) -> None:
    """In a job: overwrites its package in the cluster's storage.

    Raises:
        LaunchError: the dashboard cannot be reached from here.
    """
    find("auto").put_package(package, EMPTY)
