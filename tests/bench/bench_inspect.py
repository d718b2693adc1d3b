"""What an inspection costs beside plain tokenising of the same documents.

Run by hand: ``python tests/bench/bench_inspect.py [--rows 10000] [--rounds 5]``. Plain tokenising is what a
person would write: prompt and response joined, chats through ``apply_chat_template``, then the tokenizer, a thousand
texts at once. Both are given the documents as Python dicts. They alternate, and each inspection is divided by the
tokenising before it: the median of the rounds, since machines change their speed. Python's garbage collector is for
both what it is in an inspection's own process (``launch.collector``).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

import bad_data
from tiny import make_model

from llmnb.config import ModelSpec, TrainConfig
from llmnb.engine import bases
from llmnb.engine.inspecting import inspect_rows
from llmnb.launch import collector


def readable(document) -> bool:
    """Plain tokenising has no way to go on after a bad document: it is not given any."""
    return str(document["_id"]).startswith("good")


def plain_pairs(tokenizer, documents) -> int:
    texts = [d["prompt"] + d["response"] for d in documents]
    return sum(len(ids) for at in range(0, len(texts), 1000) for ids in tokenizer(texts[at : at + 1000])["input_ids"])


def plain_chats(tokenizer, documents) -> int:
    total = 0
    for at in range(0, len(documents), 1000):
        chats = [d["messages"] for d in documents[at : at + 1000]]
        texts = tokenizer.apply_chat_template(chats, chat_template=bad_data.STRICT, tokenize=False)
        total += sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    known = parser.parse_args()
    collector.seldom()
    with tempfile.TemporaryDirectory() as folder:
        spec = ModelSpec(model_name_or_path=make_model("llama", Path(folder) / "base"))
        tokenizer = bases.load_tokenizer(spec)
        for name, made, plain, settings in (
            ("pairs", bad_data.pairs, plain_pairs, {"key": ("prompt", "response")}),
            ("chats", bad_data.chats, plain_chats, {"key": "messages", "chat_template": bad_data.STRICT}),
        ):
            documents, _ = made(known.rows)
            good = [d for d in documents if readable(d)]
            data = {fold: [d for d in documents if d["_fold"] == fold] for fold in ("train", "valid")}
            config = TrainConfig(max_seq_length=128, **settings)
            plainly, looked = [], []
            for _ in range(known.rounds):
                begin = time.process_time()
                plain(tokenizer, good)
                plainly.append(time.process_time() - begin)
                begin = time.process_time()
                inspect_rows(data, spec, config)
                looked.append(time.process_time() - begin)
            ratios = [inspection / plain for inspection, plain in zip(looked, plainly, strict=True)]
            print(
                f"{name}: {len(documents)} documents; plain tokenising {statistics.median(plainly):.2f} s CPU, "
                f"inspection {statistics.median(looked):.2f} s: {statistics.median(ratios):.2f} × "
                f"({min(ratios):.2f} to {max(ratios):.2f}; goal 1.5)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
