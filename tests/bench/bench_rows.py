"""Documents in a mongod to rows with labels, beside ``datasets.map`` of the same documents from Arrow.

Run by hand: ``python tests/bench/bench_rows.py [--documents 100000] [--rounds 5]``. It starts a mongod of its own in a
temporary folder. Half of the documents are prompts with responses, half are chats of two to six messages; their words
are those of the standard library's documentation, their lengths are log-normal (median 600 characters, sigma 0.9).
Every contestant runs in a process of its own, because a warm tokenizer remembers words; the clock starts when
everything is imported, the tokenizer loaded and the database open. Rounds are interleaved and medians are shown:

* *ours, first*: read from mongod, tokenised, labelled, and kept for the next run;
* *ours, second*: the same once more, from what was kept;
* *datasets.map*: the chat template applied and all tokenised in batches (its default process count), no labels made,
  and the result written to Arrow as it always is. What it kept of an earlier round is not used.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

CONTESTANTS = ("ours, first", "ours, second", "datasets.map")
KINDS = ("pairs", "chats")
KEYS: dict[str, Any] = {"pairs": ("prompt", "response"), "chats": "messages"}
LIMIT = 1024  # tokens of a row


# --- the documents ----------------------------------------------------------------------------------------------------


def texts_of(passages: list[str], count: int, seed: int) -> Iterator[str]:
    """Pieces of the passages, of log-normal length."""
    import numpy as np

    random = np.random.default_rng(seed)
    words = " ".join(passages).split(" ")
    lengths = np.clip(np.exp(random.normal(np.log(600), 0.9, count)), 40, 12_000).astype(int)
    for length, begin in zip(lengths, random.integers(0, len(words), count), strict=True):
        take = int(length) // 6 + 1
        piece = words[begin : begin + take] + words[: max(begin + take - len(words), 0)]
        yield " ".join(piece)[:length].strip() or "nothing"


def made(kind: str, passages: list[str], count: int) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts_of(passages, count, KINDS.index(kind))):
        if kind == "pairs":
            at = text.find(" ", int(len(text) * 0.4))
            at = at if at > 0 else len(text) // 2
            yield {"_id": number, "_fold": "train", "prompt": text[:at], "response": text[at:]}
            continue
        turns = 2 * (1 + number % 3)
        step = max(len(text) // turns, 8)
        parts = [text[i * step : (i + 1) * step].strip() or "yes" for i in range(turns)]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": part} for i, part in enumerate(parts)]
        yield {"_id": number, "_fold": "train", "messages": messages}


# --- the contestants --------------------------------------------------------------------------------------------------


def ours(known: argparse.Namespace, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from llmnb.config import ModelSpec, TrainConfig
    from llmnb.engine import bases
    from llmnb.engine.rowcache import rows_of
    from llmnb.query import Collection
    from llmnb.store import open_store

    store = open_store(known.uri, home=folder / "home")
    tokenizer = bases.load_tokenizer(ModelSpec(model_name_or_path=str(folder / "base")))
    config = TrainConfig(key=KEYS[known.kind], max_seq_length=LIMIT)
    select = Collection(known.kind).find()

    def work() -> Any:
        rows, kept = rows_of(store.source(select, "train"), tokenizer, config)
        assert kept == (known.contestant == "ours, second")
        return rows.report.used, rows.report.tokens, rows.digest()

    return work, store.close


def theirs(known: argparse.Namespace, folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import datasets

    from llmnb.config import ModelSpec
    from llmnb.engine import bases

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = bases.load_tokenizer(ModelSpec(model_name_or_path=str(folder / "base")))
    found = datasets.load_from_disk(str(folder / known.kind))

    def pairs(batch: Any) -> Any:
        texts = [prompt + response for prompt, response in zip(batch["prompt"], batch["response"], strict=True)]
        return tokenizer(texts, truncation=True, max_length=LIMIT)

    def chats(batch: Any) -> Any:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return tokenizer(texts, truncation=True, max_length=LIMIT, add_special_tokens=False)

    def work() -> Any:
        done = found.map({"pairs": pairs, "chats": chats}[known.kind], batched=True, remove_columns=found.column_names)
        return len(done), 0, ""

    return work, lambda: None


def contest(known: argparse.Namespace) -> dict[str, Any]:
    """One contestant, in this process."""
    work, close = (theirs if known.contestant == "datasets.map" else ours)(known, Path(known.folder))
    wall, cpu = time.perf_counter(), _cpu()
    rows, tokens, digest = work()
    found = {"wall": time.perf_counter() - wall, "cpu": _cpu() - cpu, "rows": rows, "tokens": tokens, "digest": digest}
    close()
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / 1024
    return found


def _cpu() -> float:
    return sum(
        getattr(resource.getrusage(who), name)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for name in ("ru_utime", "ru_stime")
    )


# --- the rounds -------------------------------------------------------------------------------------------------------


def prepare(folder: Path, uri: str, count: int) -> int:
    """The documents in mongod and in Arrow, and the tokenizer; characters of all documents."""
    import datasets

    from llmnb.demo.library import passages
    from llmnb.engine.scratch import new_llama
    from llmnb.store import open_store

    found = [passage["text"] for passage in passages()]
    new_llama(folder / "base", found, vocabulary=8192, layers=1, context=LIMIT)
    size = 0
    with open_store(uri, home=folder / "home") as store:
        for kind in KINDS:
            documents = list(made(kind, found, count))
            size += sum(len(json.dumps(document)) for document in documents)
            for at in range(0, count, 10_000):
                store.database[kind].insert_many(documents[at : at + 10_000])
            datasets.Dataset.from_list(documents).save_to_disk(str(folder / kind))
    return size


def apart(known: argparse.Namespace, folder: Path, uri: str, contestant: str, kind: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE), "--contestant", contestant, "--kind", kind, "--folder", str(folder)]
    env = {**os.environ, "BENCH_URI": uri}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.contestant:
        known.uri = os.environ["BENCH_URI"]
        print(json.dumps(contest(known)))
        return
    from llmnb.store import embedded

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = embedded.start(folder)
        try:
            size = prepare(folder, server.uri, known.documents // len(KINDS))
            print(f"{known.documents} documents, {size / 1e6:.0f} MB as JSON, {os.cpu_count()} cores")
            times = rounds(known, folder, server.uri)
        finally:
            embedded.stop(folder)
    show(times)


def rounds(known: argparse.Namespace, folder: Path, uri: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    times: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {name: [] for name in CONTESTANTS} for kind in KINDS}
    for number in range(known.rounds):
        shutil.rmtree(folder / "home" / "cache", ignore_errors=True)
        for kind in KINDS:
            order = CONTESTANTS if number % 2 else (CONTESTANTS[2], *CONTESTANTS[:2])
            for contestant in order:
                times[kind][contestant].append(apart(known, folder, uri, contestant, kind))
            first, second = (times[kind][name][-1] for name in CONTESTANTS[:2])
            assert (first["rows"], first["digest"]) == (second["rows"], second["digest"])
    return times


def show(times: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Both kinds together and each alone: the sum of the medians, and its ratio to datasets.map's."""
    for kinds in (KINDS, *((kind,) for kind in KINDS)):
        print(" and ".join(kinds))
        for what in ("wall", "cpu"):
            spent = {
                name: sum(statistics.median(one[what] for one in times[kind][name]) for kind in kinds)
                for name in CONTESTANTS
            }
            for name in CONTESTANTS:
                ratio = spent[name] / spent["datasets.map"]
                each = [sum(times[kind][name][at][what] for kind in kinds) for at in range(len(times[kinds[0]][name]))]
                print(f"  {name:14s} {what:4s} {spent[name]:7.2f} s  {ratio:6.3f}x  ({min(each):.2f}-{max(each):.2f})")


if __name__ == "__main__":
    main()
