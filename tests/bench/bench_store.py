"""How fast the store reads documents and moves checkpoints, beside a plain GridFS that proves nothing.

Run by hand: ``python tests/bench/bench_store.py``. It starts a mongod of its own in a temporary folder. Rounds are
interleaved and medians are shown, because machines are noisy; only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gridfs

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmnb.events import Metric
from llmnb.query import Collection
from llmnb.store import Store, embedded, open_store


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def documents(store: Store, n: int, rounds: int) -> Iterator[tuple[str, str]]:
    chat = [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y" * 900}]
    chats = Collection("chats")
    written = seconds(lambda: store.execute(chats.insert_many([{"messages": chat, "n": i} for i in range(n)])))
    yield f"insert_many of {n} chats of 1.5 kB", f"{n / written:,.0f} documents/s"
    plain = store.database["chats"]
    times: dict[str, list[float]] = {"driver": [], "rows": [], "fold": []}
    for _ in range(rounds):
        times["driver"].append(seconds(lambda: sum(1 for _ in plain.find())))
        times["rows"].append(seconds(lambda: sum(1 for _ in store.rows(chats.find()))))
        times["fold"].append(seconds(lambda: sum(1 for _ in store.rows(chats.find(), "train"))))
    driver, rows, fold = (statistics.median(times[name]) for name in ("driver", "rows", "fold"))
    yield "read by the bare driver", f"{n / driver:,.0f} documents/s"
    yield "read by store.rows", f"{n / rows:,.0f} documents/s, {driver / rows:.2f}x the driver"
    yield "read by store.rows, one fold", f"{n / fold:,.0f} documents/s, {driver / fold:.2f}x the driver"


def checkpoints(store: Store, megabytes: int, rounds: int, folder: Path) -> Iterator[tuple[str, str]]:
    plain = gridfs.GridFS(store.database, "plain")
    times: dict[str, list[float]] = {"plain put": [], "put": [], "again": [], "plain get": [], "get": [], "cached": []}
    for number in range(rounds):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(os.urandom(megabytes * 1_000_000))

        def plain_put(number: int = number, weights: Path = weights) -> None:
            with open(weights, "rb") as file:
                plain.put(file, _id=number)

        def plain_get(number: int = number) -> None:
            stored = plain.get(number)
            with open(folder.parent / "plain", "wb") as file:
                while chunk := stored.readchunk():  # iterating it would go line by line
                    file.write(chunk)

        def put(step: int = number) -> None:
            store.checkpoints.put("bench", step, folder)

        def again(step: int = number) -> None:
            store.checkpoints.put("bench-again", step, folder)

        def get(step: int = number) -> None:
            store.checkpoints.fetch(store.checkpoints.get("bench", step))

        order = [("plain put", plain_put), ("put", put)]
        for name, work in order if number % 2 else order[::-1]:
            times[name].append(seconds(work))
        times["again"].append(seconds(again))
        order = [("plain get", plain_get), ("get", get)]
        for name, work in order if number % 2 else order[::-1]:
            times[name].append(seconds(work))
        times["cached"].append(seconds(get))
    median = {name: statistics.median(values) for name, values in times.items()}
    speed = {name: megabytes / value for name, value in median.items()}
    for what in ("put", "get"):
        bare = speed[f"plain {what}"]
        yield f"plain GridFS {what} of {megabytes} MB", f"{bare:,.0f} MB/s"
        yield f"checkpoint {what} of {megabytes} MB", f"{speed[what]:,.0f} MB/s, {speed[what] / bare:.2f}x plain GridFS"
    yield "checkpoint put of bytes that are stored", f"{speed['again']:,.0f} MB/s (nothing is sent)"
    yield "checkpoint get from the cache", f"{median['cached'] * 1000:.1f} ms"


def events(store: Store, n: int) -> Iterator[tuple[str, str]]:
    batch = [Metric(seq=i + 1, step=i, values={"loss": 1.0, "grad_norm": 0.5}) for i in range(n)]
    wrote = seconds(lambda: [store.events.append("bench", batch[i : i + 100]) for i in range(0, n, 100)])
    yield "events stored, in batches of 100", f"{n / wrote:,.0f} events/s"
    read = seconds(lambda: store.events.since("bench"))
    yield "events read", f"{n / read:,.0f} events/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=40_000)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "checkpoint").mkdir()
        server = embedded.start(home)
        try:
            with open_store(server.uri, home=home) as store:
                print(store.describe())
                for lines in (
                    documents(store, options.documents, options.rounds),
                    checkpoints(store, options.megabytes, options.rounds, home / "checkpoint"),
                    events(store, 10_000),
                ):
                    for name, value in lines:
                        print(f"{name:45s} {value}")
        finally:
            embedded.stop(home)


if __name__ == "__main__":
    main()
