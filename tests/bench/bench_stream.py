"""A selection of 1 000 000 short documents, read while it is trained: how soon it starts, how much memory it takes.

Run by hand: ``python tests/bench/bench_stream.py [--documents 1000000] [--steps 400]``. A mongod of its own in a
temporary folder, background runs of a tiny Llama through ``db.apply``: streamed, and the first 100 000 of the same
documents read before the training, for its pace. ``--whole`` also reads all of them first; ``--epoch`` trains all of
them once, 256 a step, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from tiny import make_model

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.launch import runner
from llmnb.store import embedded

WORDS = tuple("the cat sat on a mat and dog ran to park question answer hello world what is your name my".split())  # noqa: SIM905
PACE = {"logging_steps": 5, "save_strategy": "no", "use_cpu": True, "per_device_train_batch_size": 8}


def fill(collection: Any, count: int) -> None:
    """Pairs of about 20 words, without a fold of their own."""
    chance = random.Random(0)
    for begin in range(0, count, 20_000):
        collection.insert_many(
            [
                {
                    "prompt": " ".join(chance.choices(WORDS, k=8)),
                    "response": " ".join(chance.choices(WORDS, k=chance.randint(3, 14))),
                }
                for _ in range(min(20_000, count - begin))
            ],
            ordered=False,
        )


def peak(pid: int) -> float:
    """The most memory that the process had resident, MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def worked(pid: int) -> float:
    """CPU seconds that the process had."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def one(db: Any, base: str, folder: Path, select: Any, steps: int, streaming: bool, **more: Any) -> dict[str, Any]:
    """A background run, watched from outside. ``steps``: -1 for a whole epoch."""
    trainer = LLMTrainer(
        select=select,
        key=("prompt", "response"),
        output_dir=str(folder / "out"),
        max_steps=steps,
        max_seq_length=128,
        streaming=streaming,
        cache_rows=False,
        num_train_epochs=1,
        **{**PACE, **more},
    )
    server = db.store.database.client.admin
    found: dict[str, Any] = {"peak": 0.0}
    begin = time.perf_counter()
    run = db.apply(LLM("bench", base, trainer=trainer), wait=False, progress=False)
    while True:
        record = db.store.runs.get(run.id)
        owner = record.get("owner")
        if owner:
            found.setdefault("began", time.perf_counter() - begin)
            found.setdefault("returned", server.command("serverStatus")["metrics"]["document"]["returned"])
            with contextlib.suppress(OSError):
                found["peak"] = max(found["peak"], peak(owner["pid"]))
                found["cpu"] = worked(owner["pid"])
        if "first" not in found and any("loss" in metric for metric in run.metrics()):
            found["first"], found["first_cpu"] = time.perf_counter() - begin, found["cpu"]
            found["read"] = server.command("serverStatus")["metrics"]["document"]["returned"] - found["returned"]
        if record["state"] in ("done", "failed", "lost", "stopped"):
            break
        time.sleep(0.2)
    if record["state"] != "done":
        raise SystemExit(f"{record['state']}: {record.get('error')}")
    paces = [metric["tokens_per_second"] for metric in run.metrics() if "tokens_per_second" in metric]
    tokens = [metric["tokens"] for metric in run.metrics() if "tokens" in metric]
    per_cpu = (tokens[-1] - tokens[0]) / (found["cpu"] - found["first_cpu"])
    return {**found, "pace": statistics.median(paces), "per_cpu": per_cpu, "counts": record["counts"]}


def show(what: str, found: dict[str, Any]) -> None:
    counts = found["counts"]
    print(
        f"{what}: process began after {found['began']:.1f} s, first {PACE['logging_steps']} steps done after "
        f"{found['first']:.1f} s ({found['first_cpu']:.1f} of its CPU); the server had given {found['read']:,} "
        f"documents and ids (of {counts['found']:,}); peak {found['peak']:,.0f} MB; {found['pace']:,.0f} tokens/s, "
        f"{found['per_cpu']:,.0f} per CPU second",
        flush=True,
    )


def main() -> None:
    """Prints one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="also read all documents before a training")
    parser.add_argument("--epoch", action="store_true", help="train all documents once, and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = embedded.start(folder / "home")
        try:
            db = connect(server.uri, home=folder / "home")
            begin = time.perf_counter()
            fill(db.store.database["short"], options.documents)
            print(f"{options.documents:,} documents inserted in {time.perf_counter() - begin:.0f} s", flush=True)
            layers = 1 if options.epoch else 2
            size = {"hidden_size": 64 * layers, "intermediate_size": 128 * layers, "num_hidden_layers": layers}
            base = str(make_model("llama", folder / "base", **size))
            every, some = Collection("short").find(), Collection("short").find().limit(100_000)
            if options.epoch:
                show("streamed, an epoch", one(db, base, folder, every, -1, True, per_device_train_batch_size=256))
                return
            ratios = []
            for number in range(options.rounds):
                stream = one(db, base, folder, every, options.steps, True)
                show(f"streamed, round {number + 1}", stream)
                first = one(db, base, folder, some, options.steps, False)
                show(f"100 000 read first, round {number + 1}", first)
                ratios.append((stream["pace"] / first["pace"], stream["per_cpu"] / first["per_cpu"]))
            for what, found in zip(("second", "CPU second"), zip(*ratios, strict=True), strict=True):
                told = ", ".join(f"{ratio:.3f}" for ratio in found)
                print(f"tokens per {what}, streamed against read first: {statistics.median(found):.3f}x ({told})")
            if options.whole:
                show("all read first", one(db, base, folder, every, options.steps, False))
        finally:
            with contextlib.suppress(Exception):
                runner.stop(folder / "home")
            embedded.stop(folder / "home")


if __name__ == "__main__":
    main()
