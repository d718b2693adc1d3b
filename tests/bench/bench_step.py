"""Real tokens per CPU second of the training step, beside the peers, on the same rows in one run.

    python tests/bench/bench_step.py [--vocabulary 65536] [--full] [--equal] [--rounds 5] [--only ours,trainer]
    python tests/bench/bench_step.py --all

The work: a Llama of 6 layers, width 256, 8 heads (4 key-value); LoRA of rank 16 on all linear layers without dropout,
or all weights; 8 rows a step out of 2 000, lengths log-normal (median 150, sigma 0.9, 16 to 1 024), the first 40 % of
each a prompt without loss; float32, one thread. ``--equal``: all rows 256 long, where padding gives nothing away. Every
round starts each contestant in a process of its own, one after another (``--turns``: side by side, one of them at a
time for a second, so that they meet the same moments of a noisy machine); figures are medians with the least and the
most, ratios are medians of each round's ratio. Padding is never counted as tokens. As little of a padded batch is real
in the steps that are measured as in the whole epoch (``uneven.SEED``).

``trainer-grouped`` sorts every 400 rows, the longest first: ten steps of it would be of its longest rows only. So it
has a work of its own, beside ours alone, whose clock runs for 50 steps, which is one such piece: rows of every length.

Who is there: ``trainer`` is transformers.Trainer (its own settings are float32 without checkpointing here);
``trl`` and ``trl-packed`` are TRL's SFTTrainer with bf16 and gradient checkpointing off. ``trl-defaults`` and
``trl-packed-defaults`` are what TRL does on CPUs when nobody tells it: never the headline, and one round of them unless
``--defaults-too``. TRL's path on CPUs scores every position, prompts and padding too. ``bare`` is a PyTorch
loop over padded batches, ``bare-tricks`` the same loop over packs with everything of ours in it but the trainer.

Faster only counts when the loss is the same: ends with 1 when one of the first ten losses of ours is further than 1e-4
from the bare loop's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in (*Path(__file__).resolve().parents[2:0:-1], Path(__file__).resolve().parent)]

from step_contestants import AT_DEFAULTS, CONTESTANTS
from step_work import WARM
from turns import in_turns

MOST_APART = 1e-4
PIECE = 50  # steps over which transformers sorts rows by length
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"steps": WARM + PIECE, "only": "ours,trainer-grouped"},
    {"vocabulary": 65536},
    {"full": True},
    {"equal": True},
]
# (against whom, "rate" at least or "peak" at most, goal), by (vocabulary, full, equal): the goals of issue 6.
Goal = tuple[str, str, float]
GOALS: dict[tuple[int, bool, bool], list[Goal]] = {
    (8192, False, False): [
        ("trainer", "rate", 3.7),
        ("trainer-grouped", "rate", 2.0),
        ("trl-packed", "rate", 2.9),
        ("bare-tricks", "rate", 0.97),
        ("trainer", "peak", 0.36),
    ],
    (65536, False, False): [
        ("trainer", "rate", 4.0),
        ("trl-packed", "rate", 3.5),
        ("bare-tricks", "rate", 0.97),
        ("trainer", "peak", 0.17),
    ],
    (8192, True, False): [("trainer", "rate", 3.5), ("bare-tricks", "rate", 0.97)],
    (8192, False, True): [("trainer", "rate", 1.1), ("bare-tricks", "rate", 0.97)],
}
Found = dict[str, dict[int, dict[str, Any]]]


def compete(known: argparse.Namespace, names: list[str]) -> Found:
    """Every contestant in every round, in a process of its own; what each said, by round."""
    found: Found = {name: {} for name in names}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    flags = [f"--vocabulary={known.vocabulary}", f"--steps={known.steps}"]
    flags += ["--full"] * known.full + ["--equal"] * known.equal
    with tempfile.TemporaryDirectory(prefix="llmnb-step-") as base:
        make = f"from uneven import make_base; make_base({base!r}, {known.vocabulary})"
        here = {**env, "PYTHONPATH": os.pathsep.join(sys.path[:3])}
        subprocess.run([sys.executable, "-c", make], env=here, check=True, stdout=sys.stderr)
        for number in range(known.rounds):
            children: dict[str, Child] = {}
            try:
                for name in names:
                    if name in AT_DEFAULTS and number and not known.defaults_too:
                        continue
                    command = [sys.executable, __file__, *flags, f"--base={base}", f"--contestant={name}"]
                    children[name] = Child(command, env)
                    if not known.turns:
                        children[name].process.wait()
                in_turns(functools.partial(_alive, list(children.values())))
                for name, child in children.items():
                    found[name][number] = child.said()
                    print(f"  round {number + 1} {name:20} {found[name][number]['rate']:8,.0f}", flush=True)
            finally:
                for child in children.values():
                    child.process.kill()
    return found


class Child:
    """A contestant's process; what it says goes to files, so that it never waits for a reader."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="llmnb-step-")
        self.files = [Path(self.folder.name) / name for name in ("out", "errors")]
        with self.files[0].open("w") as out, self.files[1].open("w") as errors:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=errors)

    def said(self) -> dict[str, Any]:
        """Its last line."""
        failed = self.process.wait()
        with self.folder:
            out, errors = (file.read_text() for file in self.files)
        if failed:
            raise SystemExit(f"{self.process.args} failed:\n{errors[-4000:]}")
        return dict(json.loads(out.splitlines()[-1]))


def _alive(children: list[Child]) -> list[int]:
    return [child.process.pid for child in children if child.process.poll() is None]


def ratios(found: Found, name: str, other: str, what: str) -> list[float]:
    """Of the rounds that both were in."""
    return [run[what] / found[other][n][what] for n, run in found[name].items() if n in found[other]]


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def table(found: Found, turns: bool) -> None:
    """One line for each contestant."""
    beside = "trainer" if found.get("trainer") else next(iter(found))
    print(f"\n| | rounds | real tokens per CPU second | × {beside} | by the wall | peak, GB | × {beside} |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        rate, peak = ([run[what] for run in runs.values()] for what in ("rate", "peak"))
        wall = "–" if turns else f"{statistics.median(run['wall'] for run in runs.values()):,.0f}"
        faster, larger = (ratios(found, name, beside, what) for what in ("rate", "peak"))
        print(
            f"| {name} | {len(runs)} | {spread(rate, ',.0f')} | {spread(faster, '.2f')} | {wall} "
            f"| {spread(peak, '.2f')} | {statistics.median(larger):.2f} |"
        )


def judge(known: argparse.Namespace, found: Found) -> bool:
    """Goals and losses; False when a loss is too far off."""
    print()
    for other, what, goal in GOALS.get((known.vocabulary, known.full, known.equal), []):
        if "ours" in found and other in found:
            seen = ratios(found, "ours", other, what)
            middle = statistics.median(seen)
            good = middle >= goal if what == "rate" else middle <= goal
            sign, word = ("≥", "tokens per CPU second") if what == "rate" else ("≤", "peak memory")
            verdict = "reached" if good else "MISSED"
            print(f"ours against {other}, {word}: {spread(seen, '.2f')}   goal {sign} {goal}   {verdict}")
    equal = True
    if "bare" in found:
        plain = found["bare"][0]["losses"]
        for name in ("ours", "ours-padded", "bare-tricks", "trainer"):
            if name in found:
                losses = [run["losses"] for run in found[name].values()]
                gap = max(abs(a - b) for run in losses for a, b in zip(run, plain, strict=True))
                equal &= gap <= MOST_APART
                print(f"largest difference of the first {len(plain)} losses, {name} against bare: {gap:.1e}")
    return equal


def main() -> int:
    """One table for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA")
    parser.add_argument("--equal", action="store_true", help="rows of equal length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="the clock runs from the third on")
    parser.add_argument("--only", default="", help="contestants, with commas between: " + ", ".join(CONTESTANTS))
    parser.add_argument("--all", action="store_true", help="the works that have goals")
    parser.add_argument("--turns", action="store_true", help="side by side, one at a time for a second")
    parser.add_argument("--defaults-too", action="store_true", help="every round also with TRL's own settings")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.contestant:
        return one(known)
    if unknown := set(_names(known)) - set(CONTESTANTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; there are {', '.join(CONTESTANTS)}")
    equal = True
    for changes in COMBINATIONS if known.all else [{}]:
        one_work = argparse.Namespace(**{**vars(known), **changes})
        names = _names(one_work)
        trained = "all weights" if one_work.full else "LoRA"
        lengths = "equal" if one_work.equal else "uneven"
        print(f"\nvocabulary {one_work.vocabulary}, {trained}, rows of {lengths} length, {one_work.steps} steps")
        found = compete(one_work, names)
        table(found, one_work.turns)
        equal &= judge(one_work, found)
    return 0 if equal else 1


def _names(known: argparse.Namespace) -> list[str]:
    named = [name.strip() for name in known.only.split(",") if name.strip()]
    return named or [name for name in CONTESTANTS if name != "trainer-grouped"]


def one(known: argparse.Namespace) -> int:
    """One contestant, in this process."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(1)
    set_seed(0)
    print(json.dumps(CONTESTANTS[known.contestant](known)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
