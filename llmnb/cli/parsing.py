"""The command line, read: sub-commands, their options, and ``--name value`` for every training option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..options import CHANGEABLE

__all__ = ["parse"]

_RUN = "the run's id, or latest"
_KINDS = ("model", "checkpoint", "run", "collection", "evaluation")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The line as a namespace; ``module`` and ``function`` say what answers it, ``more`` holds unread words.

    Raises:
        SystemExit: the line is not understood, or help was asked for.
        ConfigError: an option of another sub-command's that takes none.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(list(words))
    if not hasattr(known, "module"):
        parser.print_help()
        raise SystemExit(2)
    if rest and known.function not in ("train", "chat", "resume", "lab", "data"):
        known.parser.error(f"not understood: {' '.join(rest)}")
    known.more = rest
    return known


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmnb",
        description="Fine-tune a language model on the data in your database.",
        epilog="First time here: llmnb quickstart. What this machine can do: llmnb doctor.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _quickstart(commands)
    _train(commands)
    _runs(commands)
    _chat(commands)
    _stored(commands)
    _services(commands)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"llmnb {__version__}")
        parser.exit()


def _add(commands: Any, name: str, module: str, help: str, more: str = "", function: str = "") -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.{' ' + more if more else ''}",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.set_defaults(module=module, function=function or name, parser=parser)
    return parser


def _where(parser: Any) -> None:
    place = parser.add_argument_group("database")
    place.add_argument("--uri", metavar="URI", help="mongodb://…; default: LLMNB_URI, else an embedded MongoDB")
    place.add_argument("--home", metavar="DIR", help="folder of the embedded MongoDB and caches (LLMNB_HOME, ./.llmnb)")


def _quickstart(commands: Any) -> None:
    made = _add(
        commands,
        "quickstart",
        "quickstart",
        "the whole path once, on this machine: documents, training, checkpoints, answers",
        "A small model learns to answer questions about Python's standard library. No network is needed; it takes "
        "less than six minutes on two cores.",
    )
    made.add_argument("--limit", type=_count, metavar="N", help="only N documents (default: all, about 11 000)")
    made.add_argument("--steps", type=_count, metavar="N", help="training steps (default: 1800)")
    made.add_argument("--background", action="store_true", help="train in a background job (Ray) and follow it")
    _where(made)


def _train(commands: Any) -> None:
    made = _add(
        commands,
        "train",
        "training",
        "fine-tune a model on a collection",
        "Every option of LLMTrainer, of LLM and of transformers.TrainingArguments is an option here, as --NAME VALUE: "
        "--learning_rate 2e-4, --lora_r 16, --num_train_epochs 3, --bits 4, … (--options names them all).",
    )
    made.add_argument("--model", metavar="M", help="the base model: a hub id or a folder")
    made.add_argument("--collection", metavar="C", help="the documents to train on")
    _narrowed(made)
    made.add_argument("--identifier", metavar="NAME", help="the model's name in the database (llm)")
    made.add_argument("--detach", action="store_true", help="train in a background job and return at once")
    made.add_argument("--options", action="store_true", help="list every option's name, and end")
    _where(made)


def _narrowed(made: Any) -> None:
    key = "a column, 'prompt,response', 'prompt,chosen,rejected', or messages; default: seen in the rows"
    made.add_argument("--key", metavar="K", help=key)
    made.add_argument("--filter", metavar="JSON", help="a MongoDB filter: only these documents")
    made.add_argument("--limit", type=_count, metavar="N", help="at most N documents")


def _runs(commands: Any) -> None:
    made = _add(commands, "runs", "running", "list the runs, newest first")
    made.add_argument("--limit", type=_count, default=20, metavar="N", help="how many (20)")
    made.add_argument("--state", metavar="STATE", help="only runs in this state")
    _where(made)
    for name, help in (
        ("watch", "follow a run until it ends"),
        ("stop", "ask a run to save a checkpoint and end"),
    ):
        made = _add(commands, name, "running", help)
        made.add_argument("run", nargs="?" if name == "watch" else None, default="latest", metavar="RUN", help=_RUN)
        if name == "stop":
            made.add_argument("--now", "--kill", action="store_true", help="end it now, without a checkpoint")
        _where(made)
    made = _add(
        commands,
        "reproduce",
        "running",
        "run a run again, and compare the losses",
        "Same query, settings, seed and base, as a run and a model of its own. What changed since is said first.",
    )
    made.add_argument("run", nargs="?", default="latest", metavar="RUN", help=_RUN)
    made.add_argument("--identifier", metavar="NAME", help="the new model's name (the run's with -again)")
    _where(made)
    made = _add(
        commands,
        "resume",
        "running",
        "go on with a run that has ended, from its newest checkpoint",
        "It may have stopped, failed, been lost or be done; it stays the same run. How long it trains and what its "
        "mathematics does not see (--save_steps, --eval_steps, --logging_steps, …) can be changed, as --NAME VALUE.",
    )
    made.add_argument("run", nargs="?", default="latest", metavar="RUN", help=_RUN)
    made.add_argument("--num_train_epochs", "--epochs", metavar="N", help="train until N epochs are done")
    made.add_argument("--max_steps", metavar="N", help="train until N steps are done")
    for name in CHANGEABLE[2:]:  # named, so that a value of theirs is not taken for the run
        made.add_argument(f"--{name}", help=argparse.SUPPRESS)
    made.add_argument("--detach", action="store_true", help="go on in the background and return at once")
    made.add_argument("--changed-data", action="store_true", help="go on although the documents changed since")
    _where(made)


def _chat(commands: Any) -> None:
    made = _add(
        commands,
        "chat",
        "asking",
        "ask a model; without a prompt, a conversation",
        "Any option of generate can be given as --NAME VALUE: --max_new_tokens 100, --do_sample true, --top_p 0.9.",
    )
    made.add_argument("prompt", nargs="?", help="a question; - reads it from standard input")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", metavar="EXPERIMENT[/STEP]", help="a checkpoint; default: the newest run's")
    which.add_argument("--model", metavar="NAME", help="a model of the database, a hub id or a folder")
    made.add_argument("--base", action="store_true", help="let the base answer, too, before")
    made.add_argument("--compare", nargs="+", default=[], metavar="NAME", help="base, or other checkpoints, too")
    made.add_argument("--history", metavar="NAME", help="go on with a chat that was kept")
    made.add_argument("--keep", metavar="NAME", help="keep the chat in the database under this name")
    made.add_argument("--save", nargs="?", const="", metavar="COLLECTION", help="write the chat as training data, too")
    made.add_argument("--form", choices=("text", "chat"), help="default: as the model was trained")
    _where(made)


def _stored(commands: Any) -> None:
    made = _add(
        commands,
        "data",
        "showing",
        "list the collections, look into one, or inspect it as a model reads it",
        "Without a model: its columns, with an example. With one: what a training would see, and what is wrong with "
        "it; every option of llmnb train is one here.",
    )
    made.add_argument("collection", nargs="?", metavar="COLLECTION", help="the collection; default: list them all")
    made.add_argument("--model", metavar="M", help="inspect it as this model reads it: a hub id or a folder")
    made.add_argument("--row", metavar="ID", help="with --model: show this document's tokens")
    _narrowed(made)
    _where(made)
    made = _add(commands, "checkpoints", "showing", "list checkpoints, newest run last", "Or those of one run.")
    made.add_argument("experiment", nargs="?", metavar="RUN", help="a run's id, or latest; default: all")
    made.add_argument("--remove", metavar="STEP", type=_count, help="remove this step of the run")
    _where(made)
    _evaluate(commands)
    made = _add(
        commands,
        "merge",
        "weights",
        "merge a checkpoint into its base, with the proof that it says the same",
        "The folder holds the whole model in 16 or 32 bits, its tokenizer and the proof. It appears when all of it is "
        "written, loaded again and compared.",
    )
    made.add_argument("checkpoint", metavar="EXPERIMENT[/STEP]", help="default step: the last; latest: the newest run")
    made.add_argument("folder", metavar="FOLDER", help="a new folder")
    made.add_argument("--base", metavar="M", help="where the base is now, when it moved: a folder or a hub id")
    _where(made)
    made = _add(
        commands,
        "export",
        "weights",
        "write a checkpoint's files as a folder, verified",
        "peft or transformers load it with no network.",
    )
    made.add_argument("checkpoint", metavar="EXPERIMENT[/STEP]", help="default step: the last; latest: the newest run")
    made.add_argument("folder", metavar="FOLDER", help="a new folder")
    _where(made)
    made = _add(
        commands,
        "push",
        "weights",
        "upload a checkpoint to a model hub, with a model card",
        "The token is what hf auth login or HF_TOKEN left. Names of the database and paths of this machine stay here.",
    )
    made.add_argument("checkpoint", metavar="EXPERIMENT[/STEP]", help="default step: the last; latest: the newest run")
    made.add_argument("repo", metavar="OWNER/NAME", help="the repository; made when it is not there")
    made.add_argument("--merged", metavar="FOLDER", help="upload the whole model that llmnb merge wrote there")
    made.add_argument("--base", metavar="OWNER/NAME", help="the base on the hub, when it was a folder here")
    made.add_argument("--public", action="store_true", help="everybody may see it; default: private")
    _where(made)
    made = _add(commands, "show", "showing", "list what is in the database: models, checkpoints, evaluations, …")
    made.add_argument("kind", nargs="?", choices=_KINDS, help="only this kind")
    made.add_argument("identifier", nargs="?", help="a model's name, or an experiment")
    _where(made)


def _evaluate(commands: Any) -> None:
    made = _add(
        commands,
        "evaluate",
        "evaluating",
        "measure checkpoints against their base, with the worst and the best row of each",
        "On the documents that validated the run, or on a collection. Metrics: perplexity, token_accuracy and, for "
        "pairs and chats, exact_match, rouge (rouge1, rouge2, rougeL), bleu, chrf. The result is kept in the database.",
    )
    made.add_argument("checkpoints", nargs="*", metavar="RUN[/STEP]", help="default: latest; all of one base")
    made.add_argument("--collection", metavar="C", help="documents to measure on; default: what validated the run")
    made.add_argument("--filter", metavar="JSON", help="a MongoDB filter: only these documents of the collection")
    made.add_argument("--metrics", metavar="M,M", help="parted by commas; default: all that the rows allow, but chrf")
    made.add_argument("--limit", type=_count, default=200, metavar="N", help="at most N documents (200)")
    made.add_argument("--max-new-tokens", type=_count, metavar="N", help="tokens of an answer (128)")
    made.add_argument("--batch-size", type=_count, metavar="N", help="rows at a time (8)")
    made.add_argument("--rank-by", metavar="M", help="the metric that the worst and the best row are told by")
    made.add_argument("--base", metavar="M", help="where the base is now, when it moved: a folder or a hub id")
    _where(made)


def _services(commands: Any) -> None:
    made = _add(commands, "db", "services", "the embedded MongoDB: start, status, stop, gc")
    made.add_argument("action", choices=("start", "status", "stop", "gc"), help="gc removes bytes that no record names")
    made.add_argument("--dry-run", action="store_true", help="gc: only say what would be removed")
    _where(made)
    made = _add(commands, "ray", "services", "what carries out background runs on this machine: status, stop")
    made.add_argument("action", choices=("status", "stop"))
    made.add_argument("--home", metavar="DIR", help="its folder (LLMNB_HOME, ./.llmnb)")
    made = _add(
        commands,
        "lab",
        "lab",
        "open JupyterLab at the first tutorial",
        "The tutorials are copied to ./llmnb-tutorials when they are not here. It listens on this machine only. Other "
        "options go to JupyterLab: --port 9000, --allow-root, …",
    )
    made.add_argument("--no-browser", dest="browser", action="store_false", help="only print the address")
    made = _add(commands, "doctor", "doctor", "what this machine can do, and what to do about what it cannot")
    made.add_argument("--offline", action="store_true", help="do not look for the model hub")
    _where(made)


def _count(text: str) -> int:
    number = int(text.replace("_", ""))
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
