"""The database goes away in the middle of a run: what that costs the training, and whether everything comes home.

Run by hand: ``python tests/bench/bench_outage.py [--seconds 60] [--outages 3]``. A real mongod is killed while a
background run trains, and started again after the outage. Speed is steps per second by the spool's own clock; that of
an outage is divided by the mean of as long a time before and after it, since machines change their speed. The run logs
every step and takes checkpoints all the while.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from tiny import make_model

from llmnb import LLM, Collection, LLMTrainer, connect
from llmnb.events import CheckpointSaved, Metric
from llmnb.launch import runner, spool
from llmnb.store import embedded


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--outages", type=int, default=3, help="as long between them")
    known = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory(prefix="llmnb-outage-") as folder:
        home, out = Path(folder) / "home", Path(folder) / "out"
        base = make_model("llama", Path(folder) / "base", hidden_size=256, intermediate_size=512)
        db = connect(home=home)
        rows = [{"text": f"{i} and {i * 7} make {i * 8} " * 4, "_fold": "train"} for i in range(256)]
        db.execute(Collection("rows").insert_many(rows))
        trainer = LLMTrainer(
            select=Collection("rows").find(),
            key="text",
            output_dir=str(out),
            max_steps=100_000,
            logging_steps=1,
            save_steps=200,
            save_total_limit=2,
            per_device_train_batch_size=8,
            use_cpu=True,
        )
        run = db.apply(LLM("m", str(base), trainer=trainer), wait=False)
        try:
            while not run.metrics():
                time.sleep(0.2)
            time.sleep(10.0)  # the first steps are slower
            marks = [time.time()]
            for _ in range(known.outages):
                time.sleep(known.seconds)
                marks.append(time.time())
                os.kill(embedded.status(home).pid, signal.SIGKILL)
                time.sleep(known.seconds)
                marks.append(time.time())
                embedded.start(home)
            time.sleep(known.seconds)
            marks.append(time.time())
            time.sleep(5.0)
            run.stop()
            run.wait(timeout=120)
            said = spool.read(out / run.id / "events.jsonl")
            stored = db.store.events.since(run.id)
        finally:
            runner.stop(home, patience=5.0)
            db.close()
            embedded.stop(home)
        times = [event.time for event in said if isinstance(event, Metric)]

        def speed(start: float, end: float) -> float:
            return sum(start <= t < end for t in times) / (end - start)

        def pauses(start: float, end: float) -> list[float]:
            inside = [t for t in times if start <= t < end]
            return [b - a for a, b in itertools.pairwise(inside)]

        speeds = [speed(*span) for span in itertools.pairwise(marks)]
        ratios = [2 * out / (before + after) for before, out, after in zip(speeds[::2], speeds[1::2], speeds[2::2])]
        longest = [max(pauses(*span)) for span in itertools.pairwise(marks)]
        print(f"steps per second, with it   {' '.join(f'{one:8.2f}' for one in speeds[::2])}")
        print(f"without it                  {' '.join(f'{one:8.2f}' for one in speeds[1::2])}")
        print(f"against before and after    {' '.join(f'{one:8.3f}' for one in ratios)}   (goal 0.95)")
        print(f"median                      {statistics.median(ratios):8.3f}")
        print(f"longest step, s: with       {max(longest[::2]):8.2f}; without {max(longest[1::2]):.2f}")
        print(f"events said / stored        {len(said)} / {len(stored)}")
        print(f"checkpoints said            {sum(isinstance(event, CheckpointSaved) for event in said)}")
        return 0 if [e.seq for e in said] == [e.seq for e in stored] else 1


if __name__ == "__main__":
    sys.exit(main())
