"""What stands around the step: the whole run against the bare loop, events, checkpoints, the import, a long log.

    python tests/bench/bench_around.py [run event checkpoint import log] [--rounds 5] [--steps 500] [--events 50000]

``run``: a background run through ``db.apply`` on a real mongod, with events and checkpoints, against the engine's loop
alone over the same documents, from step 10 to the last. The two take turns of a second, one is stopped while the other
runs: one after the other, two of the same loops are up to a fifth apart on a noisy machine. ``event``: how long the
training's thread is held by an event while the database answers after 20 ms (a proxy in front of mongod), and what a
bare write and a fixed sum cost at the same moments: where the machine is slow all three rise together. ``checkpoint``:
how long a step is held by an adapter checkpoint of 10 MB, and what a second put of the same bytes adds. ``import``: CPU
seconds of ``import llmnb`` beyond Python's own. ``log``: a run that logs every step; every third block of 500 steps
says nothing and is compared with its neighbours (50 pairs: each alone is some per cent off on a noisy machine). Rounds
are interleaved, figures are medians with the least and the most, of the pairs with the middle half.
``bench_training`` has the reading of documents and a step with and without the database, ``bench_launch`` the time to
the first loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[2:0:-1]]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from turns import in_turns

from llmnb.config import ModelSpec, TrainConfig
from llmnb.events import Metric
from llmnb.query import Collection
from llmnb.store import embedded

LINE = b"x" * 150 + b"\n"  # as long as a metric's
PARTS = ("run", "event", "checkpoint", "import", "log")
BLOCK = 500
FIRST = 10
OVER = ("done", "failed", "stopped", "lost")
DELAY_S = 0.020
ROWS = [{"_id": i, "text": f"{i} and {i * 7} make {i * 8} " * 4, "_fold": "train"} for i in range(512)]


def told(what: str, values: list[float], unit: str, goal: str = "") -> None:
    middle, least, most = statistics.median(values), min(values), max(values)
    print(f"{what:66} {middle:9.4g} ({least:.4g}–{most:.4g}) {unit}   {goal}", flush=True)


def stamps(path: str, first: int = 0) -> Any:
    """A callback that writes to ``path`` when the steps ended (wall, CPU), and for how long each checkpoint held them.

    After step ``first`` it writes its process's id beside ``path`` and stops, until somebody lets it go on.
    """
    from transformers import TrainerCallback

    class Stamps(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []
            self.held: list[float] = []

        def on_train_begin(self, *args: Any, **more: Any) -> None:
            # Not between the steps: what a person's callback might do there has each copy made at once.
            import time

            from llmnb.engine.loop import Loop
            from llmnb.engine.snapshots import Writer

            def timed(own: Any, note: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    began = time.perf_counter()
                    own(*args, **kwargs)
                    note(time.perf_counter() - began)

                return call

            def waited(seconds: float) -> None:
                if self.held:
                    self.held[-1] += seconds

            Loop._save_checkpoint = timed(Loop._save_checkpoint, self.held.append)  # type: ignore[method-assign]
            Writer.settle = timed(Writer.settle, waited)  # type: ignore[method-assign]

        def on_step_end(self, args: Any, state: Any, *more: Any, **others: Any) -> None:
            import os
            import signal
            import time
            from pathlib import Path

            self.ends.append((time.perf_counter(), time.process_time()))
            if state.global_step == first:
                Path(path + ".pid").write_text(f"{os.getpid()} ")
                os.kill(os.getpid(), signal.SIGSTOP)

        def on_train_end(self, *args: Any, **more: Any) -> None:
            import json
            from pathlib import Path

            Path(path + ".part").write_text(json.dumps({"ends": self.ends, "held": self.held}))
            Path(path + ".part").rename(path)

    return Stamps()


def arguments(steps: int, **more: Any) -> dict[str, Any]:
    return {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 10, "use_cpu": True, **more}


def begin(uri: str, home: Path, base: str, path: str, *, rank: int = 8, first: int = 0, **given: Any) -> Any:
    """One background run, begun; its stamps go to ``path``."""
    from llmnb import LLM, LLMTrainer, connect

    db = connect(uri, home=home)
    trainer = LLMTrainer(
        select=Collection("rows").find(),
        key="text",
        output_dir=str(home / "out"),
        lora_r=rank,
        lora_dropout=0.0,
        max_seq_length=128,
        training_kwargs={"callbacks": [stamps(path, first)]},
        **given,
    )
    return db.apply(LLM("bench", base, trainer=trainer), wait=False)


def apply(uri: str, home: Path, base: str, rank: int = 8, **given: Any) -> dict[str, Any]:
    """One background run; what its stamps say."""
    path = home / "stamps.json"
    run = begin(uri, home, base, str(path), rank=rank, **given)
    if run.wait(3600) != "done" and run.state != "done":
        raise SystemExit(f"{run!r}\n{run.logs()}")
    return {"run": run.id, **json.loads(path.read_text())}


def bare(base: str, steps: int, path: str) -> None:
    """The engine's loop over the same documents: no database, nobody listens. In a process of its own."""
    from llmnb.engine.hooks import Hooks
    from llmnb.engine.training import train

    config = TrainConfig(
        key="text", max_seq_length=128, lora_dropout=0.0, arguments=arguments(steps, save_strategy="no")
    )
    kwargs = {"callbacks": [stamps(path, FIRST)]}
    with tempfile.TemporaryDirectory() as folder:
        spec = ModelSpec(model_name_or_path=base)
        train(spec, config, {"train": lambda: ROWS}, Hooks(), workdir=Path(folder), trainer_kwargs=kwargs)


def pid_of(path: Path, alive: Callable[[], bool]) -> int:
    """The process that has stopped itself after step ``FIRST``."""
    note = Path(f"{path}.pid")
    while not (note.exists() and note.read_text().endswith(" ")):
        if not alive():
            raise SystemExit(f"nothing was written to {note}")
        time.sleep(0.05)
    return int(note.read_text())


def a_step(ends: list[tuple[float, float]], ran: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds of a step, by the wall while it ran and of CPU, from step ``FIRST`` to the last one within the turns."""
    known = [end for end in ends[FIRST - 1 :] if end[0] <= ran[-1][1]]
    awake = sum(max(0.0, min(end, known[-1][0]) - began) for began, end in ran)
    return {"wall": awake / (len(known) - 1), "CPU": (known[-1][1] - known[0][1]) / (len(known) - 1)}


def one_round(uri: str, home: Path, base: str, steps: int, order: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """A step of ``whole`` and of ``bare``, side by side."""
    paths = {who: home / f"{who}.json" for who in order}
    for path in (*paths.values(), *(Path(f"{path}.pid") for path in paths.values())):
        path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", base, str(paths["bare"]), "--steps", str(steps)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        pids = {"bare": pid_of(paths["bare"], lambda: child.poll() is None)}
        given = arguments(steps, save_steps=100, save_total_limit=2)
        run = begin(uri, home, base, str(paths["whole"]), first=FIRST, **given)
        pids["whole"] = pid_of(paths["whole"], lambda: run.state not in OVER)
        taking = [pids[who] for who in order]
        turns = in_turns(lambda: [] if any(path.exists() for path in paths.values()) else taking)
        child.wait(600)
        run.wait(600)
    finally:
        child.kill()
    ends = {who: json.loads(path.read_text())["ends"] for who, path in paths.items()}
    return {who: a_step(ends[who], turns[pids[who]]) for who in order}


def whole_run(uri: str, home: Path, base: str, known: argparse.Namespace) -> None:
    from llmnb.launch import runner

    seen: dict[str, list[float]] = {"wall": [], "CPU": []}
    try:
        for number in range(known.rounds):
            took = one_round(uri, home, base, known.steps, ("whole", "bare") if number % 2 else ("bare", "whole"))
            for clock, values in seen.items():
                values.append(took["whole"][clock] / took["bare"][clock])
            print(f"  a step of the bare loop {took['bare']['CPU'] * 1e3:.1f} ms of CPU", flush=True)
    finally:
        runner.stop(home, patience=5.0)
    for clock, values in seen.items():
        told(f"whole run (database, events, checkpoints) / bare loop, {clock}", values, "x", "goal ≤ 1.03")


@contextlib.contextmanager
def slowly(uri: str) -> Iterator[str]:
    """The same database 20 ms away: what comes back is held for that long."""
    scheme, rest = uri.split("://", 1)
    login, _, where = rest.rpartition("@")
    host, tail = where.split("/", 1) if "/" in where else (where, "")
    name, port = host.rsplit(":", 1)
    door = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, delay: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(delay)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = door.accept()
                server = socket.create_connection((name, int(port)))
                for pair in ((client, server, 0.0), (server, client, DELAY_S)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"{scheme}://{login}{'@' if login else ''}127.0.0.1:{door.getsockname()[1]}/{tail}"
    finally:
        door.close()


class Told:
    """What a worker does with an event: the spool, and a thread that ships it to the database."""

    def __init__(self, store: Any, run: str, folder: Path) -> None:
        from llmnb.launch.said import Said
        from llmnb.launch.spool import Shipper, Spool

        self.store, self.run, self.said = store, run, Said()
        self.spool = Spool(folder / f"{run}.jsonl")
        self.shipper = Shipper(self.spool, lambda events: store.events.append(run, events))

    def say(self, event: Any) -> None:
        if not self.said.knows(event):
            self.spool.say(event)

    def close(self) -> int:
        """The number of events in the database."""
        self.shipper.close(120.0)
        self.spool.close()
        return self.store.events.last_seq(self.run)


def event(uri: str, home: Path, known: argparse.Namespace) -> None:
    from llmnb.store import open_store

    wall, cpu, bare, sums, count = [], [], [], [], 500
    with slowly(uri) as far, open_store(far, home=home) as store, open(home / "bare.jsonl", "ab", 0) as file:
        trips = []
        for _ in range(10):
            began = time.perf_counter()
            store.events.last_seq("nothing")
            trips.append((time.perf_counter() - began) * 1e3)
        told("a question to the database behind the proxy", trips, "ms")
        for number in range(known.rounds):
            mouth, took, worked, wrote, added = Told(store, f"event{number}", home), [], [], [], []
            for step in range(count):
                values = {"loss": 1.0, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens": float(step)}
                metric = Metric(step=step, epoch=step / 100, values=values)
                began, busy = time.perf_counter(), time.thread_time()
                mouth.say(metric)
                took.append((time.perf_counter() - began) * 1e6)
                worked.append((time.thread_time() - busy) * 1e6)
                time.sleep(0.005)  # a step
                # What the machine gives at these moments: one system call, and numbers that lie in no memory.
                began = time.perf_counter()
                file.write(LINE)
                wrote.append((time.perf_counter() - began) * 1e6)
                began = time.perf_counter()
                sum(range(1000))
                added.append((time.perf_counter() - began) * 1e6)
                time.sleep(0.005)
            stored = mouth.close()
            assert stored == count, f"{stored} of {count} events arrived"
            for all_of_them, some in ((wall, took), (cpu, worked), (bare, wrote), (sums, added)):
                all_of_them.append(statistics.median(some))
            print(f"  99 % within {sorted(took)[int(count * 0.99)]:.0f} µs by the wall", flush=True)
    told("an event on the training thread, 20 ms from the database, wall", wall, "µs", "goal ≤ 20")
    told("the same, CPU of the thread", cpu, "µs")
    told("a bare write of such a line to a file, between the events", bare, "µs")
    told("an event / a bare write", [event / write for event, write in zip(wall, bare)], "x")
    told("a thousand additions, between the events", sums, "µs")


def checkpoint(uri: str, home: Path, known: argparse.Namespace) -> None:
    from tiny import make_model

    from llmnb.launch import runner
    from llmnb.store import open_store

    size = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
    base = str(make_model("llama", home / "larger", **size))
    held: list[float] = []
    try:
        for _ in range(known.rounds):
            seen = apply(uri, home, base, rank=96, **arguments(40, save_steps=8, logging_steps=100))
            held += [seconds * 1e3 for seconds in seen["held"][:-1]]  # the last one is at the end: no step waits
    finally:
        runner.stop(home, patience=5.0)
    with open_store(uri, home=home) as store:
        kept = store.checkpoints.get(seen["run"], None)
        folder = Path(store.checkpoints.fetch(kept))
        adapter = (folder / "adapter_model.safetensors").stat().st_size / 1e6
        names = [name for name in store.database.list_collection_names() if name.endswith(".chunks")]
        before = sum(store.database[name].estimated_document_count() for name in names)
        store.checkpoints.put("again", 1, folder)
        after = sum(store.database[name].estimated_document_count() for name in names)
        assert names, "checkpoints are not in GridFS"
    told(f"a step held by a checkpoint (adapter {adapter:.1f} MB, with optimizer)", held, "ms")
    told("the same, for 10 MB of adapter", [ms / adapter * 10 for ms in held], "ms", "goal ≤ 10")
    print(f"{'chunks in the database before and after the same bytes were put again':66} {before}, {after}")


def importing(known: argparse.Namespace) -> None:
    def cpu(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": sys.path[0]})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cpu("import llmnb")
    told("import llmnb, CPU", [cpu("import llmnb") - cpu("pass") for _ in range(known.rounds)], "s", "goal < 0.1")


def log(uri: str, home: Path, known: argparse.Namespace) -> None:
    """In this process, with the worker's own spool and shipper.

    What is said is sent before the next block begins: by the wall that is a pause between the two, and its CPU time is
    of the block that said it.
    """
    import psutil
    from tiny import make_model

    from llmnb.engine.hooks import Hooks
    from llmnb.engine.training import train
    from llmnb.store import open_store

    base = str(make_model("llama", home / "small", hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    steps = known.events * 3 // 2 // BLOCK * BLOCK
    took: dict[str, list[float]] = {"wall": [], "CPU": []}
    memory: list[float] = []  # MB at the beginning of each block

    with open_store(uri, home=home) as store:
        mouth = Told(store, "long", home)

        def say(event: Any) -> None:
            if len(memory) % 3:
                mouth.say(event)

        from transformers import TrainerCallback

        class Mark(TrainerCallback):
            began: tuple[float, float]

            def on_step_begin(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
                if state.global_step % BLOCK:
                    return
                ended = time.perf_counter()
                while mouth.shipper.shipped < mouth.spool.last_seq:
                    time.sleep(0.02)
                if memory:
                    took["wall"].append(ended - self.began[0])
                    took["CPU"].append(time.process_time() - self.began[1])
                seen = psutil.Process().memory_info()  # without libraries, which others may share from time to time
                memory.append((seen.rss - seen.shared) / 1e6)
                self.began = time.perf_counter(), time.process_time()

        options = arguments(steps, logging_steps=1, save_strategy="no", per_device_train_batch_size=1)
        config = TrainConfig(key="text", max_seq_length=16, max_cut_share=1.0, lora_dropout=0.0, arguments=options)
        hooks = Hooks(say=say)
        kwargs = {"callbacks": [Mark()]}
        spec = ModelSpec(model_name_or_path=base)
        train(spec, config, {"train": lambda: ROWS}, hooks, workdir=home / "long", trainer_kwargs=kwargs)
        print(f"{steps} steps, {mouth.close()} events in the database")
    for clock, seconds in took.items():
        quiet = range(2, len(seconds) - 1, 3)
        told(f"a step of the long run, {clock}", [block / BLOCK * 1e3 for block in seconds], "ms")
        ratios = [(seconds[i - 1] + seconds[i + 1]) / 2 / seconds[i] for i in quiet]
        if len(ratios) > 1:
            middle = statistics.quantiles(ratios, n=4)
            told(f"blocks that say every step / blocks that say nothing, {clock}", middle, "x", "goal ≤ 1.02")
    tenth = len(memory) // 10
    a_step = (memory[-1] - memory[tenth]) * 1e6 / (BLOCK * (len(memory) - 1 - tenth))
    print(f"memory after a tenth {memory[tenth]:.0f} MB, at the end {memory[-1]:.0f} MB: {a_step:+.0f} bytes a step")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all of them unless told otherwise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of run")
    parser.add_argument("--events", type=int, default=50_000, help="of log")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.child:
        bare(known.child[0], known.steps, known.child[1])
        return
    if unknown := set(known.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))} unknown; there are {', '.join(PARTS)}")
    wanted = known.parts or PARTS
    if "import" in wanted:
        importing(known)
    if set(wanted) == {"import"}:
        return
    from tiny import make_model

    from llmnb import connect

    with tempfile.TemporaryDirectory(prefix="llmnb-around-") as name:
        home = Path(name)
        server = embedded.start(home / "mongod")
        try:
            connect(server.uri, home=home).execute(Collection("rows").insert_many(ROWS))
            base = str(make_model("llama", home / "base", hidden_size=128, intermediate_size=256))
            if "event" in wanted:
                event(server.uri, home, known)
            if "run" in wanted:
                whole_run(server.uri, home, base, known)
            if "checkpoint" in wanted:
                checkpoint(server.uri, home, known)
            if "log" in wanted:
                log(server.uri, home, known)
        finally:
            embedded.stop(home / "mongod")


if __name__ == "__main__":
    main()
