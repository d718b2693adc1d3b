"""From ``apply`` to the first loss point in the database: a first run, a second run, and a cold script beside them.

The cold script is a fresh Python that imports the same packages and trains the same first step with the engine alone:
no database, no runner. The first run finds no runner; the second finds a warm one. Rounds are interleaved, figures are
medians, and the ratio to the cold script of the same round is what counts. Run it by its path:

    python tests/bench/bench_launch.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
from tiny import make_model

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.launch import runner
from llmnb.store import embedded

GOALS = {"first": 1.3, "second": 0.1}
ROWS = [{"_id": i, "text": f"{i} plus one is {i + 1}", "_fold": "train"} for i in range(256)]

COLD = """
import sys, time
from pathlib import Path
from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine.hooks import Hooks
from llmnb.engine.training import train
from llmnb.events import Metric

def say(event):
    if isinstance(event, Metric) and "loss" in event.values:
        print("first loss", flush=True)

rows = [{"_id": i, "text": f"{i} plus one is {i + 1}"} for i in range(256)]
arguments = dict(max_steps=2, logging_steps=1, save_strategy="no", per_device_train_batch_size=8, use_cpu=True)
train(ModelSpec(model_name_or_path=sys.argv[1]), TrainConfig(key="text", max_seq_length=64, arguments=arguments),
      {"train": lambda: rows}, Hooks(say=say), workdir=Path(sys.argv[2]))
"""


def cold(base: str, folder: Path) -> float:
    """Seconds from the start of Python to its first loss."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COLD, base, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])},
        text=True,
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if "first loss" in line:
                return time.perf_counter() - began
    raise SystemExit("the cold script said no loss")


@contextlib.contextmanager
def database() -> Iterator[tuple[str, Path]]:
    """A mongod and a home folder of the bench's own."""
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder) / "mongod")
        try:
            yield server.uri, Path(folder)
        finally:
            embedded.stop(Path(folder) / "mongod")


def apply(uri: str, home: Path, base: str) -> dict[str, float]:
    """Seconds until ``apply`` returns, and until the first loss point can be read from the database."""
    db = connect(uri, home=home)
    trainer = LLMTrainer(
        "t",
        select=Collection("rows").find(),
        key="text",
        output_dir=str(home / "out"),
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=8,
        max_seq_length=64,
        use_cpu=True,
    )
    began = time.perf_counter()
    run = db.apply(LLM("m", base, trainer=trainer), wait=False)
    returned = time.perf_counter() - began
    while not any("loss" in point for point in run.metrics()):
        time.sleep(0.002)
        if run.state in ("failed", "lost"):
            raise SystemExit(f"{run!r}\n{run.logs()}")
    loss = time.perf_counter() - began
    run.wait(120)
    while (runner.status(home) or {}).get("running"):
        time.sleep(0.05)
    db.close()
    return {"returned": returned, "loss": loss}


def memory(home: Path) -> float:
    """MB that the runner's processes hold for themselves."""
    return sum(process.memory_full_info().uss for process in runner._marked(home)) / 1e6


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, float]] = []
    with database() as (uri, folder):
        base = str(make_model("llama", folder / "base"))
        connect(uri).execute(Collection("rows").insert_many(ROWS))
        cold(base, folder / "warm-up")  # the disk's cache, for everybody
        for number in range(rounds):
            home = folder / f"home{number}"
            row = {"cold": cold(base, folder / f"cold{number}")}
            try:
                first = apply(uri, home, base)
                held = memory(home)
                second = apply(uri, home, base)
                third = apply(uri, home, base)
                row |= {"first": first["loss"], "second": second["loss"], "third": third["loss"]}
                row |= {"apply": first["returned"], "held": held, "held_after": memory(home)}
            finally:
                runner.stop(home, patience=2.0)
            rows.append(row)
            print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(f"\nPython {sys.version.split()[0]}, {psutil.cpu_count()} CPUs, {rounds} rounds, medians")
    print(f"cold script to its first loss   {middle['cold']:6.2f} s")
    for name in ("first", "second", "third"):
        ratio = statistics.median(row[name] / row["cold"] for row in rows)
        goal = f"(goal {GOALS[name]:g})" if name in GOALS else ""
        print(f"{name + ' run, apply to first loss':31} {middle[name]:6.2f} s   {ratio:.3f} of cold {goal}")
    print(f"apply(wait=False) returns after {middle['apply']:6.2f} s   with no runner there")
    print(f"memory of the idle runner       {middle['held']:6.0f} MB  two runs later {middle['held_after']:.0f} MB")


if __name__ == "__main__":
    main()
