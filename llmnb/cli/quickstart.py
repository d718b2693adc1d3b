"""``llmnb quickstart``: the main job, once, on what this machine has — and on one screen.

Database, documents, base model, training, checkpoints, the best one loaded, three questions before and after.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import paper

if TYPE_CHECKING:
    from ..db import Datalayer
    from ..launch.run import Run

__all__ = ["quickstart", "recipe"]

COLLECTION = IDENTIFIER = "stdlib"
STEPS = 1800
ROWS_PER_STEP = 16
ANSWER = {"max_new_tokens": 60}


def recipe(home: str, steps: int = STEPS) -> dict[str, Any]:
    """The settings of the quickstart's training, as ``LLMTrainer`` takes them. Chosen by trying, for 2 cores."""
    each = -(-steps // 3)
    return {
        "key": ("prompt", "response"),
        "prompt_template": "{input}\n",
        "max_seq_length": 160,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "learning_rate": 6e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, each),
        "max_steps": steps,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "per_device_eval_batch_size": 32,
        "logging_steps": max(min(20, steps // 10), 1),
        "eval_strategy": "steps",
        "eval_steps": each,
        "save_strategy": "steps",
        "save_steps": each,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "output_dir": home,
    }


def quickstart(known: argparse.Namespace) -> int:
    """Runs it and prints it."""
    began = time.monotonic()
    from ..db import connect
    from .quiet import hush

    hush()

    database = connect(known.uri, home=known.home)
    paper.fact("Database", paper.place(database.store))
    _documents(database, known.limit)
    base = _base(database)
    questions = _questions(database)
    before = _answers(base, questions)
    run = _train(database, base, known.steps or STEPS, known.background)
    _checkpoints(database, run)
    model = database.load("model", IDENTIFIER)
    after = model.predict([q["prompt"] for q in questions], **ANSWER)
    _compare(questions, before, after)
    _next(run, time.monotonic() - began, known)
    return 0


def _documents(database: Datalayer, limit: int | None) -> None:
    from .. import demo

    counts = demo.load_documents(database, COLLECTION, limit=limit)
    new = f", {paper.count(counts['inserted'])} of them new" if counts["present"] else ""
    total = paper.count(counts["train"] + counts["valid"])
    paper.fact(
        "Documents",
        f"{total} questions about Python's standard library in collection {COLLECTION!r}{new}: "
        f"{paper.count(counts['train'])} to train on, {paper.count(counts['valid'])} held out",
    )


def _base(database: Datalayer) -> str:
    from .. import demo

    with paper.Follower("Base model") as follower:
        path = demo.base_model(database.store.home, follower)
    if follower.counts:
        parameters = f"{follower.counts['parameters'] / 1e6:.1f} M parameters"
        paper.fact(
            "Base model",
            f"a Llama of {parameters}, made here and pre-trained on the plain documentation in "
            f"{paper.about(follower.seconds)}: "
            f"loss {paper.figure(follower.first_loss)} → {paper.figure(follower.loss)}",
        )
    else:
        paper.fact("Base model", "the one made here before")
    for text in follower.warnings:
        paper.fact("", text)
    return str(path)


def _questions(database: Datalayer) -> list[dict[str, Any]]:
    from .. import demo

    return demo.questions()


def _answers(base: str, questions: Sequence[dict[str, Any]]) -> list[str]:
    from ..llm import LLM

    model = LLM("base", base, prompt_template="{input}\n")
    answers = list(model.predict([q["prompt"] for q in questions], **ANSWER))
    model.close()
    return answers


def _train(database: Datalayer, base: str, steps: int, background: bool) -> Run:
    from ..llm import LLM
    from ..query import Collection
    from ..trainer import LLMTrainer

    settings = recipe(str(database.store.home / "output"), steps)
    trainer = LLMTrainer("stdlib-trainer", select=Collection(COLLECTION).find(), **settings)
    model = LLM(IDENTIFIER, base, prompt_template="{input}\n", trainer=trainer)
    with paper.Follower("Training") as follower:
        run = database.apply(model, wait=not background, on_event=follower, progress=False)
        assert run is not None  # a model with a trainer always gives a run
        if background:
            _follow(run, follower)
    for text in follower.warnings:
        paper.fact("", text)
    counts = follower.counts
    paper.fact(
        "Training",
        f"LoRA: {counts.get('trainable', 0) / 1e3:.0f} k new weights, {steps} steps of {ROWS_PER_STEP} rows in "
        f"{paper.about(follower.seconds)}, {paper.count(follower.rate)} tokens/s: "
        f"loss {paper.figure(follower.first_loss)} → {paper.figure(follower.loss)}",
    )
    return run


def _follow(run: Run, follower: paper.Follower) -> None:
    try:
        run.wait(on_event=follower)
    except KeyboardInterrupt:
        print(f"\nThe run goes on in the background: llmnb watch {run.id}", file=sys.stderr)
        raise


def _checkpoints(database: Datalayer, run: Run) -> None:
    print(f"\nCheckpoints of run {run.id}")
    saved = database.checkpoints(run.id)
    best = database.store.models.get(IDENTIFIER)["checkpoint"]
    rows = [
        (c.step, paper.figure(c.metrics.get("eval_loss")), paper.size(c.size), "best, loaded" if str(c) == best else "")
        for c in saved
    ]
    paper.table(("step", "eval loss", "size", ""), rows, indent=2)


def _compare(questions: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]) -> None:
    print("\nThree questions that were never trained on")
    room = paper.width() - 10
    for question, old, new in zip(questions, before, after, strict=True):
        print(f"  {question['prompt']}")
        print(f"  before  {paper.one_line(old, room) or '(nothing)'}")
        print(f"  after   {paper.one_line(new, room) or '(nothing)'}")


def _next(run: Run, seconds: float, known: argparse.Namespace) -> None:
    place = (f" --uri {known.uri}" if known.uri and "@" not in known.uri else "") + (
        f" --home {known.home}" if known.home else ""
    )
    print(
        f"\nDone in {paper.about(seconds)}. The model learned the form of an answer, not the facts: it is tiny. Next:"
    )
    paper.table(
        ("", ""),
        [
            (f"llmnb chat{place} 'What does `os.walk` do?'", "ask it yourself"),
            (f"llmnb train{place} --model MODEL --collection C", "the same with a model and documents of yours"),
            ("jupyter lab", "then %load_ext llmnb and %llm_train in a cell"),
        ],
        indent=2,
    )
