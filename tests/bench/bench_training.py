"""What the database costs a training: reading and tokenising its documents, and logging to it.

Run by hand: ``python tests/bench/bench_training.py``. It starts a mongod of its own in a temporary folder and trains a
tiny Llama on documents of the standard library. Rounds are interleaved and medians are shown, because machines are
noisy; only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from tiny import make_model

from llmnb import LLM, Collection, LLMTrainer, connect, demo
from llmnb.config import TrainConfig
from llmnb.store import embedded


def tokenise(db, base: str, rounds: int) -> None:
    """Documents per second, from mongod to token rows."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from llmnb.engine.rows import make_rows

    tokenizer = AutoTokenizer.from_pretrained(base)
    select = Collection("stdlib").find()
    rows = [dict(row) for row in db.store.rows(select)]
    config = TrainConfig(key=("prompt", "response"))
    arrow = Dataset.from_list([{"prompt": r["prompt"], "response": r["response"]} for r in rows])

    def mapped(batch):
        texts = [f"{p}{r}</s>" for p, r in zip(batch["prompt"], batch["response"], strict=True)]
        return tokenizer(texts, truncation=True, max_length=512)

    times: dict[str, list[float]] = {"ours": [], "map": []}
    for _ in range(rounds):
        start = time.perf_counter()
        made = make_rows(db.store.rows(select), tokenizer, config)
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        arrow.map(mapped, batched=True, load_from_cache_file=False)
        times["map"].append(time.perf_counter() - start)
    ours, plain = (statistics.median(times[name]) for name in ("ours", "map"))
    print(f"read from mongod and tokenised      {len(made) / ours:10,.0f} documents/s")
    print(f"datasets.map of the same from Arrow {len(rows) / plain:10,.0f} documents/s (no labels, no masks)")
    print(f"time, ours against datasets.map     {ours / plain:10.2f}x")


def logging(db, base: str, rounds: int, steps: int, folder: Path) -> None:
    """Seconds of training with events logged to the database, against none, a loss point every step."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for log in (True, False) if number % 2 else (False, True):
            trainer = LLMTrainer(
                select=Collection("stdlib").find().limit(512),
                key=("prompt", "response"),
                output_dir=str(folder / "out"),
                max_steps=steps,
                per_device_train_batch_size=8,
                max_seq_length=128,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                log_to_db=log,
            )
            run = db.apply(LLM("bench", base, trainer=trainer), progress=False)
            points = [m["time"] for m in run.metrics() if "loss" in m]
            times[log].append((points[-1] - points[0]) / (len(points) - 1))
    with_log, without = (statistics.median(times[log]) for log in (True, False))
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    print(f"a step, logged to the database      {with_log * 1e3:10.2f} ms")
    print(f"a step, logged to the spool only    {without * 1e3:10.2f} ms")
    print(
        f"overhead                            {statistics.median(ratios):10.3f}x ({min(ratios):.3f}–{max(ratios):.3f})"
    )


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = embedded.start(folder / "home")
        try:
            db = connect(server.uri, home=folder / "home")
            demo.load_documents(db)
            base = str(make_model("llama", folder / "base", hidden_size=128, intermediate_size=256))
            tokenise(db, base, options.rounds)
            logging(db, base, options.rounds, options.steps, folder)
        finally:
            embedded.stop(folder / "home")


if __name__ == "__main__":
    main()
