"""Faults at random moments, and what is left of the promises: ``python tests/bench/bench_faults.py [FAULT …]``.

Each round starts a real background run (tiny Llama, real mongod, real runner or Ray), injects one fault at a random
moment, waits for the run's end, resumes it where the fault ended it, and checks every promise against a run that
nothing was done to: no event lost, none doubled, no state untrue, no checkpoint that fails its digest, and the same
losses to the last bit. With ``--in-a-row 4`` a run on two workers that was ended is resumed and struck again, four
times at most: every round is judged, and the losses when it is done. It prints one line a fault, and what went wrong
in full. Disk faults mount a tmpfs, as root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import pymongo
from pymongo.errors import PyMongoError
from tiny import make_model

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.errors import DatabaseError, LaunchError, LlmnbError, RunError
from llmnb.events import CheckpointSaved, Metric
from llmnb.launch import cluster, runner, spool
from llmnb.launch.run import FINAL, Run
from llmnb.store import embedded, open_store

STEPS, SAVE_STEPS = 60, 10
LIMIT_S = 480.0
Plan = int | str  # workers, or a stage of ZeRO on two of them
ZERO = {"zero2": 2, "zero3": 3}
AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)

KERNEL = """
import sys, time
from llmnb import LLM, Collection, LLMTrainer, connect
home, base, out, name, workers, steps, save = sys.argv[1:]
db = connect(home=home)
trainer = LLMTrainer("t", select=Collection("rows").find(), key="text", output_dir=out, max_steps=int(steps),
    logging_steps=1, save_steps=int(save), per_device_train_batch_size=2, max_seq_length=64, use_cpu=True,
    lora_dropout=0.1, num_gpus=int(workers) if workers != "1" else None)
print(db.apply(LLM(name, base, trainer=trainer), wait=False).id, flush=True)
time.sleep(600)
"""


@dataclass
class Tally:
    """What was found in the rounds of one fault."""

    rounds: int = 0
    hit: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    untrue: int = 0
    damaged: int = 0
    unequal: int = 0
    faults: list[str] = field(default_factory=list)

    def line(self, fault: str) -> str:
        """For the table."""
        hit = ", ".join(f"{state} {count}" for state, count in sorted(self.hit.items()))
        return (
            f"{fault:14} {self.rounds:3} rounds  events lost {self.lost}, doubled {self.doubled}  untrue states "
            f"{self.untrue}  damaged checkpoints {self.damaged}  other losses {self.unequal}  ({hit})"
        )


class Bench:
    """A home with a mongod, a runner and a small data set; removed at the end."""

    def __init__(self, folder: Path, seed: int, in_a_row: int) -> None:
        self.folder, self.home, self.out = folder, folder / "home", folder / "out"
        self.in_a_row, self.struck = in_a_row, 0
        self.broken: Run | None = None  # it was ended, and the next round goes on with it
        self.random = random.Random(seed)
        self.base = str(make_model("llama", folder / "base"))
        self.db = connect(home=self.home)
        rows = [{"_id": i, "text": f"{i} and {i * 7} make {i * 8}", "_fold": "train"} for i in range(64)]
        self.db.execute(Collection("rows").insert_many(rows))
        self.losses: dict[Plan, dict[int, float]] = {}
        self.seconds: dict[Plan, float] = {}
        self.recorded_after = 0.0  # seconds that a process takes from its start to a run's record

    def close(self) -> None:
        """Ends everything that was started."""
        with contextlib.suppress(LlmnbError):
            self.db.close()
        runner.stop(self.home, patience=5.0)
        embedded.stop(self.home)

    # -- runs ------------------------------------------------------------------------------------------------

    def model(self, name: str, plan: Plan, **changes: Any) -> LLM:
        """The model of a round, untrained."""
        workers = 1 if plan == 1 else 2
        settings: dict[str, Any] = dict(
            select=Collection("rows").find(),
            key="text",
            output_dir=str(self.out),
            max_steps=STEPS if workers == 1 else STEPS // 3,
            logging_steps=1,
            save_steps=SAVE_STEPS if workers == 1 else SAVE_STEPS // 2,
            per_device_train_batch_size=2,
            max_seq_length=64,
            use_cpu=True,
            lora_dropout=0.1,
            num_gpus=workers if workers > 1 else None,
            deepspeed={**AUTO, "zero_optimization": {"stage": ZERO[plan]}} if plan in ZERO else None,
        )
        return LLM(name, self.base, trainer=LLMTrainer("t", **{**settings, **changes}))

    def start(self, plan: Plan = 1, **changes: Any) -> Run:
        """A background run: a new one, or the one that the last round ended."""
        run, self.broken = self.broken, None
        if run is not None:
            run.resume(wait=False)
            return run
        return self.db.apply(self.model(f"m{self.random.getrandbits(40):x}", plan, **changes), wait=False)

    def writable(self) -> None:
        """Waits until the database takes writes again."""
        end = time.monotonic() + 2 * LIMIT_S
        while time.monotonic() < end:
            with contextlib.suppress(DatabaseError):
                self.db.execute(Collection("probe").insert_one({}))
                return
            time.sleep(0.2)

    def reference(self, plan: Plan) -> None:
        """Losses and seconds of a run that nothing is done to; the second one, which starts warm."""
        for _ in range(2):
            begin = time.monotonic()
            run = self.start(plan)
            run.wait(timeout=LIMIT_S)
            self.seconds[plan] = time.monotonic() - begin
        self.losses[plan] = {p["step"]: p["loss"] for p in run.metrics() if "loss" in p}

    def moment(self, plan: Plan = 1) -> float:
        """Sleeps until a random moment of a run's life."""
        seconds = self.random.uniform(0.0, 0.9 * self.seconds[plan])
        time.sleep(seconds)
        return seconds

    # -- judging ---------------------------------------------------------------------------------------------

    def ended(self, run: Run) -> str:
        """Waits for a final state, and looks as ``llmnb watch`` does."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            with contextlib.suppress(DatabaseError, PyMongoError):
                if run.look() in FINAL:
                    return run.state
            time.sleep(0.2)
        return run.state

    def judge(self, run: Run, tally: Tally, plan: Plan = 1, resumed: bool = True) -> None:
        """Every promise of one run."""
        state = self.ended(run)
        tally.rounds += 1
        tally.hit[state] += 1
        problems = self._states(run, state, tally)
        problems += self._events(run, tally)
        problems += self._checkpoints(run, tally)
        self.struck += 1
        if state != "done" and resumed and state in FINAL:
            if plan != 1 and self.struck < self.in_a_row:
                self.broken = run
            else:
                problems += self._gone_on(run, tally, plan)
        elif state == "done":
            problems += self._curve(run, tally, plan)
        if self.broken is None:
            self.struck = 0
        if problems:
            tally.faults.append(f"{run.id}: " + "; ".join(problems))

    def finish(self, tally: Tally, plan: Plan) -> None:
        """What the last round ended goes on to its end, too."""
        run, self.broken, self.struck = self.broken, None, 0
        if run is not None:
            problems = self._gone_on(run, tally, plan)
            if problems:
                tally.faults.append(f"{run.id}: " + "; ".join(problems))

    def _gone_on(self, run: Run, tally: Tally, plan: Plan) -> list[str]:
        run.resume(wait=False)
        problems = []
        after = self.ended(run)
        if after != "done":
            tally.untrue += 1
            problems.append(f"resumed, it ended {after}: {run.error}")
        return problems + self._events(run, tally) + self._checkpoints(run, tally) + self._curve(run, tally, plan)

    def _states(self, run: Run, state: str, tally: Tally) -> list[str]:
        problems = []
        record = run.record
        owner = record.get("owner") or {}
        if state not in FINAL:
            problems.append(f"after {LIMIT_S:.0f} s it is {state}")
        if state in FINAL and owner.get("pid") and _alive(owner):
            time.sleep(15.0)
            if _alive(owner):
                problems.append(f"{state}, and process {owner['pid']} lives")
        steps = max((p["step"] for p in run.metrics()), default=0)
        if state == "done" and steps < record["counts"]["steps"]:
            problems.append(f"done at step {steps} of {record['counts']['steps']}")
        if state in ("failed", "lost") and not (record.get("error") or {}).get("what"):
            problems.append(f"{state} without a reason")
        tally.untrue += len(problems)
        return problems

    def _events(self, run: Run, tally: Tally) -> list[str]:
        problems = []
        stored = self.db.store.events.since(run.id)
        numbers = [event.seq for event in stored]
        missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
        said = {event.seq: event for event in spool.read(Path(run.record["workdir"] or "/none") / "events.jsonl")}
        missing += sorted(set(said) - set(numbers) - set(missing))
        if missing:
            tally.lost += len(missing)
            problems.append(f"events lost: {missing[:10]}")
        for kind in (Metric, CheckpointSaved):
            names = Counter((e.step, *sorted(getattr(e, "values", ()))) for e in stored if isinstance(e, kind))
            twice = [name for name, count in names.items() if count > 1]
            if len(numbers) != len(set(numbers)) or twice:
                tally.doubled += max(len(twice), 1)
                problems.append(f"{kind.__name__} doubled: {twice[:5]}")
        saved = {event.step for event in stored if isinstance(event, CheckpointSaved)}
        silent = [c.step for c in run.checkpoints() if c.step not in saved]
        if silent and run.state == "done":
            tally.lost += len(silent)
            problems.append(f"checkpoints stored and not said: {silent}")
        return problems

    def _checkpoints(self, run: Run, tally: Tally) -> list[str]:
        problems = []
        fresh = Path(tempfile.mkdtemp(dir=self.folder))
        with open_store(self.db.store.uri, home=fresh) as store:  # an empty cache: every byte is read again
            for checkpoint in run.checkpoints():
                try:
                    store.checkpoints.fetch(checkpoint)
                except LlmnbError as error:
                    tally.damaged += 1
                    problems.append(f"checkpoint {checkpoint.step}: {error}")
        shutil.rmtree(fresh)
        return problems

    def _curve(self, run: Run, tally: Tally, plan: Plan) -> list[str]:
        losses = {p["step"]: p["loss"] for p in run.metrics() if "loss" in p}
        wanted = self.losses[plan]
        close = 0.0 if plan == 1 else 1e-6
        other = [s for s in wanted if s not in losses or abs(losses[s] - wanted[s]) > close]
        if other or len(losses) != len(wanted):
            tally.unequal += 1
            return [f"losses differ from the unbroken run's at {other[:5]}, {len(losses)} of {len(wanted)} steps"]
        return []


def _alive(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        return abs(process.create_time() - owner["born"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(pid: int | None, number: int) -> None:
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if pid:
            psutil.Process(pid).send_signal(number)


# --- the faults: each starts a run, does its harm, and returns the run ---------------------------------------------


def kernel(bench: Bench, number: int) -> Run | None:
    """The process that applied the run is killed: before, while or after it is handed over."""
    if not bench.recorded_after:
        begin = time.monotonic()
        with _kernel(bench, f"m{bench.random.getrandbits(40):x}") as process:
            process.stdout.readline()  # type: ignore[union-attr]
            bench.recorded_after = time.monotonic() - begin
            process.kill()
    name = f"m{bench.random.getrandbits(40):x}"
    with _kernel(bench, name) as process:
        time.sleep(bench.random.uniform(0.7, 2.5) * bench.recorded_after)  # other work makes later ones slower
        process.send_signal(number)
    found = bench.db.store.runs.list(model=name)
    return Run(bench.db.store, found[0]["_id"]) if found else None  # killed before anything was recorded


def _kernel(bench: Bench, name: str) -> subprocess.Popen[bytes]:
    words = [str(bench.home), bench.base, str(bench.out), name, "1", str(STEPS), str(SAVE_STEPS)]
    return subprocess.Popen([sys.executable, "-c", KERNEL, *words], stdout=subprocess.PIPE)


def _of_the_run(bench: Bench, number: int, plan: Plan, who: str) -> Run:
    """A process that the run's record names."""
    run = bench.start(plan)
    bench.moment(plan)
    _signal((run.record.get(who) or {}).get("pid"), number)
    return run


def worker(bench: Bench, number: int) -> Run:
    """The process that trains."""
    return _of_the_run(bench, number, 1, "owner")


def _of_the_runner(bench: Bench, number: int, who: str) -> Run:
    run = bench.start()
    bench.moment()
    found = runner.status(bench.home)
    _signal(found[who] if found else None, number)
    return run


def keeper(bench: Bench, number: int) -> Run:
    """The runner's keeper, which holds the queue and watches the processes that train."""
    return _of_the_runner(bench, number, "keeper")


def zygote(bench: Bench, number: int) -> Run:
    """The runner's warm process, which the processes that train are forked from."""
    return _of_the_runner(bench, number, "zygote")


def mongod(bench: Bench, number: int) -> Run:
    """The database; it comes back after a moment."""
    run = bench.start()
    bench.moment()
    _signal(embedded.status(bench.home).pid, number)
    time.sleep(bench.random.uniform(0.0, 3.0))
    embedded.start(bench.home)
    return run


def refuses(bench: Bench, number: int) -> Run:
    """The database answers, and refuses every write for a while."""
    run = bench.start()
    bench.moment()
    with pymongo.MongoClient(bench.db.store.uri) as client, contextlib.suppress(PyMongoError):
        client.admin.command("replSetStepDown", number, force=True)
    return run


@contextlib.contextmanager
def _small_disk(bench: Bench) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir=bench.folder))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disk(bench: Bench, number: int) -> Run:
    """The disk of the run's folder is full for a moment."""
    del number
    for former in bench.small.iterdir():  # type: ignore[attr-defined]
        shutil.rmtree(former)
    run = bench.start(output_dir=str(bench.small))  # type: ignore[attr-defined]
    bench.moment()
    hog = bench.small / "hog"  # type: ignore[attr-defined]
    with open(hog, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
    time.sleep(bench.random.uniform(0.1, 2.0))
    hog.unlink()
    return run


def two_stops(bench: Bench, number: int) -> Run:
    """Two people press Stop in the same moment."""
    run = bench.start()
    bench.moment()

    def press() -> None:
        with contextlib.suppress(RunError):  # it had ended already
            Run(bench.db.store, run.id).stop()

    pressing = [threading.Thread(target=press) for _ in range(2)]
    for thread in pressing:
        thread.start()
    for thread in pressing:
        thread.join()
    return run


def two_applies(bench: Bench, number: int) -> Run:
    """Two people apply the same identifier in the same moment."""
    name = f"m{bench.random.getrandbits(40):x}"
    runs: list[Run] = []

    def apply() -> None:
        runs.append(bench.db.apply(bench.model(name, 1), wait=False))

    applying = [threading.Thread(target=apply) for _ in range(2)]
    for thread in applying:
        thread.start()
    for thread in applying:
        thread.join()
    for run in runs:
        bench.ended(run)
    versions = sorted(run.record["version"] for run in runs)
    if versions != [1, 2] or bench.db.load("model", name).checkpoint is None:
        raise AssertionError(f"versions {versions}")
    return runs[bench.random.randrange(2)]


def rank(bench: Bench, number: int) -> Run:
    """Rank 0 of a run of two workers."""
    return _of_the_run(bench, number, 2, "rank0")


def driver(bench: Bench, number: int) -> Run:
    """The driver of a run of two workers."""
    return _of_the_run(bench, number, 2, "owner")


def head(bench: Bench, number: int) -> Run:
    """The head of the Ray cluster, in the run of two workers."""
    run = bench.start(2)
    bench.moment(2)
    found = cluster.status(bench.home)
    for pid in found.pids if found else ():
        _signal(int(pid), number)
    return run


def _stopped(bench: Bench, plan: Plan) -> Run:
    """A person presses Stop; the run is resumed."""
    run = bench.start(plan)
    bench.moment(plan)
    with contextlib.suppress(RunError):  # it had ended already
        run.stop()
    return run


def zero2(bench: Bench, number: int) -> Run:
    """Stop, and resume, of two workers that share optimizer and gradients."""
    return _stopped(bench, "zero2")


def zero3(bench: Bench, number: int) -> Run:
    """Stop, and resume, of two workers that share the weights, too."""
    return _stopped(bench, "zero3")


KILL, TERM = signal.SIGKILL, signal.SIGTERM
FAULTS: dict[str, tuple[Callable[[Bench, int], Run | None], int, Plan]] = {
    "kernel-kill": (kernel, KILL, 1),
    "kernel-term": (kernel, TERM, 1),
    "worker-kill": (worker, KILL, 1),
    "worker-term": (worker, TERM, 1),
    "runner-kill": (keeper, KILL, 1),
    "runner-term": (keeper, TERM, 1),
    "zygote-kill": (zygote, KILL, 1),
    "zygote-term": (zygote, TERM, 1),
    "mongod-kill": (mongod, KILL, 1),
    "mongod-term": (mongod, TERM, 1),
    "refuses-5s": (refuses, 5, 1),
    "refuses-60s": (refuses, 60, 1),
    "disk-full": (disk, 0, 1),
    "two-stops": (two_stops, 0, 1),
    "two-applies": (two_applies, 0, 1),
    "rank-kill": (rank, KILL, 2),
    "rank-term": (rank, TERM, 2),
    "driver-kill": (driver, KILL, 2),
    "driver-term": (driver, TERM, 2),
    "head-kill": (head, KILL, 2),
    "head-term": (head, TERM, 2),
    "zero2-stop": (zero2, 0, "zero2"),
    "zero3-stop": (zero3, 0, "zero3"),
}


def main() -> int:
    """Runs the faults that are named; all of them when none is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--in-a-row", type=int, default=1, help="faults to one run on two workers at most")
    parser.add_argument("--verbose", action="store_true", help="a line for each round")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    known = parser.parse_args()
    names = known.faults or list(FAULTS)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    print(f"seed {known.seed}", flush=True)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="llmnb-faults-") as folder:
        bench = Bench(Path(folder), known.seed, known.in_a_row)
        with contextlib.ExitStack() as stack:
            stack.callback(bench.close)
            if "disk-full" in names:
                bench.small = stack.enter_context(_small_disk(bench))  # type: ignore[attr-defined]
            for name in names:
                tally = Tally()
                act, number, plan = FAULTS[name]
                if plan not in bench.losses:
                    bench.reference(plan)
                while tally.rounds < known.rounds:
                    bench.writable()
                    try:
                        run = act(bench, number)
                    except LaunchError as error:
                        tally.faults.append(f"not launched: {error}")
                        tally.rounds += 1
                        continue
                    if run is None:
                        tally.hit["nothing recorded"] += 1
                        tally.rounds += 1
                        continue
                    bench.judge(run, tally, plan)
                    for fault in tally.faults[-1:]:
                        if fault.startswith(run.id):
                            print(f"  {name}: {fault}", flush=True)
                    if known.verbose:
                        print(f"  {time.strftime('%H:%M:%S')} {name} {tally.rounds}: {dict(tally.hit)}", flush=True)
                bench.finish(tally, plan)
                print(tally.line(name), flush=True)
                bad += len(tally.faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
