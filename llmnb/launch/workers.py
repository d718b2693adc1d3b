"""A run on several workers: Ray's ``TorchTrainer`` starts them, each trains as one rank, rank 0 tells.

The run's driver (``worker``) begins and ends the run. In between it hands its spool over to rank 0, which opens the
store itself and says, stores and reads what a run in one process would; every rank reads its own rows. Ray carries no
metric and no checkpoint. What goes to the ranks (the job with the database's password, a person's environment) travels
as bytes inside the function that Ray runs, never as its configuration, an environment variable or an argument.

Source: https://docs.ray.io/en/latest/train/api/doc/ray.train.torch.TorchTrainer.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import LaunchError, LlmnbError, RunError
from ..events import Note
from ..job import TrainJob
from . import cluster, collector, deaths, machine
from .away import open_for
from .bucket import with_filesystem
from .heart import patiently
from .layout import SLOT
from .masking import Mask
from .parcel import environment
from .rayconfigs import storage_path
from .reporting import Reporter, own_folder, tokens_of, told_of
from .room import NODE, asked_by, lacking
from .tickets import memory_kills
from .wrapping import HOME_THERE, travelling

if TYPE_CHECKING:
    from .worker import _Work

__all__ = ["Outcome", "RankFailed", "carry_rank", "train_on_workers"]

_PATIENCE_S = 900.0
_LOOK_EVERY_S = 0.5
# Ray Train asks its workers for their state this often; an end is seen that much later. Its default is 2 s.
_HEALTH_CHECK_S = "0.25"
_START_LIMIT_S = "1800"
# How long a rank that lost another one waits for Ray to find that one dead: a lost node's heartbeats have to stop.
_PEER_S = 60.0
# How long Ray takes to call a node dead whose machine is gone: 5 health checks that are 3 s apart, and their limits.
_NODE_S = 60.0
_ROOM_FIRST_S, _ROOM_EVERY_S = 5.0, 5.0
# A killed worker's lock on the spool is gone a moment after it.
_RELEASE_S = 20.0


@dataclass(frozen=True)
class Outcome:
    """Attributes: ``stopped``: the run was told to end; ``last_step``: optimizer steps done in all."""

    stopped: bool
    last_step: int = 0


class RankFailed(LlmnbError):
    """A rank's error on its way through Ray: text without secrets, made where it happened.

    Attributes:
        told: what the run's record will say.
        rank: which one.
        when: seconds since the epoch, so that the first of several is found.
    """

    def __init__(self, told: dict[str, Any], rank: int, when: float) -> None:
        super().__init__(f"Worker {rank}: {told['type']}: {told['what']}", seen=told["seen"], todo=told["todo"])
        self.told, self.rank, self.when = told, rank, when


# --- the driver -----------------------------------------------------------------------------------------------


def train_on_workers(work: _Work) -> Outcome:
    """Trains ``work.job`` on workers, and waits for them.

    Raises:
        RankFailed: a worker raised.
        RunError: a worker died, or the head of this machine's cluster.
        LaunchError: the cluster cannot start them.
    """
    ray = _connect(work.job)
    box: dict[str, Any] = {}
    kills = memory_kills()
    with work.listening():  # Ray took the signals when it connected
        trainer = _trainer(work, ray)
        turn = _Turn(work, ray, trainer.scaling_config)
        turn.say()
        work.hand_over()
        thread = threading.Thread(target=_fit, args=(trainer, box), name="llmnb-fit", daemon=True)
        nodes = _alive(ray)
        try:
            thread.start()
            # Not on the main thread, where Ray Train would take SIGINT for itself.
            while thread.is_alive():
                thread.join(_LOOK_EVERY_S)
                if thread.is_alive():
                    _ask_for_the_head(work.job)
                turn.look()
                if work.heart.letter and thread.is_alive() and not turn.has_come():
                    box["result"] = Outcome(stopped=True)  # the workers wait for their turn; they go with this process
                    break
        finally:
            _take_back(work)
    if "error" in box:
        _ask_for_the_head(work.job)
        seen = _death(box["error"])
        lost = seen is not None and _lost_a_node(ray, nodes, seen[1])
        raise _cause(box["error"], work, memory_killed=memory_kills() > kills, node_lost=lost) from None
    return box["result"]


def _ask_for_the_head(job: TrainJob) -> None:
    """Ray itself waits for a dead head, and then ends this process without a word. Of our own cluster we know.

    Raises:
        RunError: it is gone.
    """
    if job.ray_address is None and cluster.status(os.environ["LLMNB_HOME"]) is None:
        raise RunError(
            "The Ray cluster of this machine is gone: its head was killed, or crashed.",
            seen="a process of the head has ended",
            todo="run.resume() starts the cluster again and goes on from the newest checkpoint",
        )


def _alive(ray: Any) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _lost_a_node(ray: Any, before: set[str], seen: str) -> bool:
    """True when a node is gone that was there before. Ray may know that its worker does not answer, and not yet why."""
    end = time.monotonic() + (_NODE_S if deaths.does_not_answer(seen) else 0.0)
    while not before - _alive(ray):
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def _connect(job: TrainJob) -> Any:
    if job.ray_address is None:
        cluster.enter(os.environ["LLMNB_HOME"])  # before Ray is imported: it reads its environment then
    import ray

    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": _HEALTH_CHECK_S,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _START_LIMIT_S,
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    wanted: dict[str, Any] = {"env_vars": _rank_environment(job)}
    if job.ray_address is None:
        settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody takes this machine away; a process less
        wanted["worker_process_setup_hook"] = f"{collector.__name__}.{collector.seldom.__name__}"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=wanted)
    return ray


def _rank_environment(job: TrainJob) -> dict[str, str]:
    """What must be set before a rank's process starts. Ray shows it to everyone who may see the cluster: no secrets."""
    env = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    if job.ray_address is None:
        share = str(max(machine.cpus() // job.workers, 1))
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # torch's, and the tokenizers'
            env[name] = os.environ.get(name) or share
        if sys.platform == "linux" and "lo" in psutil.net_if_addrs():
            env["GLOO_SOCKET_IFNAME"] = "lo"  # our cluster is this machine: ranks meet on loopback
    return env


def _trainer(work: _Work, ray: Any) -> Any:
    """The ``TorchTrainer``."""
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer

    job = work.job
    configs = dict(job.ray_configs)
    configs["scaling_config"] = _scaling(job, ray.cluster_resources(), work.say)
    own = configs.get("run_config") or RunConfig(name=job.run)
    if storage_path(own) is None:
        own = dataclasses.replace(own, storage_path=str(work.folder / "ray"))
    configs["run_config"] = with_filesystem(own)
    sealed = _seal(job, work.folder)

    def train_as_one_rank() -> dict[str, Any]:
        return carry_rank(sealed)

    return TorchTrainer(train_as_one_rank, **configs)


def _scaling(job: TrainJob, there: Mapping[str, float], say: Callable[[Any], None]) -> Any:
    """What each worker gets. Without a GPU in the cluster, workers train on CPUs, and the run says so."""
    from ray.train import ScalingConfig

    scaling = job.ray_configs.get("scaling_config") or ScalingConfig(
        num_workers=job.workers, use_gpu=not job.config.arguments.get("use_cpu")
    )
    gpus = int(there.get("GPU", 0))
    if scaling.use_gpu and not gpus:
        resources = {k: v for k, v in (scaling.resources_per_worker or {}).items() if k != "GPU"} or None
        scaling = dataclasses.replace(scaling, use_gpu=False, resources_per_worker=resources, accelerator_type=None)
        if job.config.num_gpus is not None or "scaling_config" in job.ray_configs:
            many = "1 worker trains" if job.workers == 1 else f"{job.workers} workers train"
            say(Note(level="warning", text=f"There is no GPU here: {many} on the CPU.", data={"workers": job.workers}))
    if scaling.resources_per_worker is None and not scaling.use_gpu and job.ray_address is None and SLOT in there:
        scaling = dataclasses.replace(scaling, resources_per_worker={SLOT: 1})
    return scaling


def _seal(job: TrainJob, folder: Path) -> bytes:
    """The job and the person's environment as bytes: Ray shows neither."""
    draft = dataclasses.replace(job, ray_configs={}).write(folder / ".ranks.pickle")
    # On a cluster that is not ours each node has paths of its own.
    env = environment() if job.ray_address is None else travelling(s3=True) | {"LLMNB_HOME": HOME_THERE}
    try:
        return pickle.dumps((draft.read_bytes(), env, os.getcwd()))
    finally:
        draft.unlink(missing_ok=True)


def _fit(trainer: Any, box: dict[str, Any]) -> None:
    """On a thread."""
    try:
        box["result"] = Outcome(**trainer.fit().return_value)
    except BaseException as error:  # noqa: BLE001 - the border of the thread: the main thread raises it
        box["error"] = error


class _Turn:
    """Whether the workers have begun, and what they wait for until they have: on the run's record, and in a note."""

    def __init__(self, work: _Work, ray: Any, scaling: Any) -> None:
        self._work, self._ray, self._asked = work, ray, asked_by(scaling)
        self._come, self._said = False, ""
        self._next = time.monotonic() + _ROOM_FIRST_S

    def has_come(self) -> bool:
        if not self._come:
            record = patiently(lambda: self._work.store.runs.get(self._work.job.run), self._work.patience)
            self._come = record.get("rank0") is not None
        return self._come

    def say(self) -> None:
        """Before they are asked for."""
        text = self._lacking()
        if text:
            self._work.say(Note(level="warning", text=f"The workers wait for {text}.", data={"waits_for": text}))
            self._record(text)

    def look(self) -> None:
        """Every few seconds until they have begun."""
        if self._come or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _ROOM_EVERY_S
        self._record("" if self.has_come() else self._lacking())

    def _lacking(self) -> str:
        nodes = {NODE: float(sum(bool(node["Alive"]) for node in self._ray.nodes()))}
        text, never = lacking(self._asked, self._ray.cluster_resources() | nodes, self._ray.available_resources())
        return f"{text}; they begin when nodes join the cluster" if never else text

    def _record(self, text: str) -> None:
        if text != self._said:
            self._said = text
            run, runs = self._work.job.run, self._work.store.runs
            patiently(lambda: runs.update(run, waits_for=[text] if text else None), self._work.patience)


def _take_back(work: _Work) -> None:
    end = time.monotonic() + _RELEASE_S
    while True:
        try:
            work.take_back()
            return
        except LaunchError:  # rank 0 still holds the spool
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def _death(error: BaseException) -> tuple[int, str] | None:
    """The first worker that died without raising, and what Ray says of it."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    died = [(rank, e) for rank, e in sorted(failures.items()) if not isinstance(e, RankFailed)]
    return (died[0][0], str(getattr(died[0][1], "health_check_failure", died[0][1]))) if died else None


def _cause(error: BaseException, work: _Work, *, memory_killed: bool = False, node_lost: bool = False) -> BaseException:
    """What went wrong first: a worker that died, else the first that raised."""
    died = _death(error)
    if died:
        rank, seen = died
        what, todo = deaths.why(rank, work.job.workers, seen, memory_killed=memory_killed, node_lost=node_lost)
        return RunError(what, seen=work.mask(seen)[:1500], todo=todo)
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    raised = sorted((e for e in failures.values() if isinstance(e, RankFailed)), key=lambda e: e.when)
    if raised:
        return raised[0]
    return LaunchError("Ray could not train.", seen=work.mask(error)[:1500], todo="see the end of the run's log")


# --- a rank ---------------------------------------------------------------------------------------------------


def carry_rank(sealed: bytes) -> dict[str, Any]:
    """Trains as one rank, in a process that Ray started; torch.distributed's variables are set.

    Returns:
        ``Outcome``'s fields.

    Raises:
        RankFailed: whatever happened.
    """
    from .worker import to_log_file

    parcel, env, folder = pickle.loads(sealed)
    os.environ.update(env)
    with contextlib.suppress(OSError):  # relative paths of the person's mean this folder, where there is one
        os.chdir(folder)
    job: TrainJob = pickle.loads(parcel)
    rank = int(os.environ.get("RANK", "0"))
    mask = Mask([job.uri, job.artifacts, *tokens_of(job)])
    try:
        name = "worker.log" if rank == 0 else f"worker-{rank}.log"
        os.close(to_log_file(own_folder(job.workdir, job.run) / name))
        from ..engine import loop  # noqa: F401 - most of what a training imports

        collector.as_usual()
        result = _carry(job, rank)
    except BaseException as error:  # noqa: BLE001 - the border of the rank: the driver writes it on the run
        told = told_of(error, mask)
        print(told["traceback"], file=sys.stderr, flush=True)
        if deaths.lost_a_peer(told["what"]):
            time.sleep(_PEER_S)  # Ray finds who died, and ends this rank meanwhile: that one is the cause
        raise RankFailed(told, rank, time.time()) from None
    return {"stopped": bool(result.stopped), "last_step": int(result.last_step)}


def _carry(job: TrainJob, rank: int) -> Any:
    store: Any = patiently(lambda: open_for(job), _PATIENCE_S)
    try:
        reporter = Reporter(job, store, None, _PATIENCE_S)
        return reporter.train() if rank else _tell(reporter)
    finally:
        store.close()


def _tell(reporter: Reporter) -> Any:
    """Rank 0: what a run says, and the letters for it."""
    reporter.open_spool()
    run, runs = reporter.job.run, reporter.store.runs
    former = patiently(lambda: runs.get(run), reporter.patience).get("rank0") or {}
    reporter.restarts = int(former.get("starts", 0))  # of this attempt: Ray's FailureConfig starts all ranks again
    me = {"host": socket.gethostname(), "pid": os.getpid(), "starts": reporter.restarts + 1}
    patiently(lambda: runs.update(run, rank0=me), reporter.patience)
    reporter.heart.start()
    done = False
    try:
        result = reporter.train()
        done = True
        return result
    finally:
        reporter.heart.stop()
        reporter.ship(reporter.patience if done else 30.0)
        reporter.spool.close()
