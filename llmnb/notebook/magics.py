"""The magics. Each is a thin line over the Python API: what it does is a method somewhere else, too.

A magic reads its line, calls the session's database, and shows a table or a view. It returns what a person would go on
with, so ``run = %llm_train … --start`` works.
"""

from __future__ import annotations

import argparse
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments
from IPython.display import display

from ..errors import ConfigError, Fault, NotFound
from ..options import CHANGEABLE, LONGER
from . import asking
from .arguments import bordered, known_settings, named, settings
from .documents import look_into
from .session import Session
from .tables import Table, local_time, short
from .weights import with_checkpoint

__all__ = ["NAMES", "LlmMagics"]

NAMES = (
    "llm_connect",
    "llm_data",
    "llm_train",
    "llm_runs",
    "llm_watch",
    "llm_stop",
    "llm_resume",
    "llm_checkpoints",
    "llm_evaluate",
    "llm_chat",
    "llm_help",
)
_GIVEN_AGAIN = (*CHANGEABLE, "transform", "training_kwargs", "ray_configs", "ray_address")
_HELP = argument("--help", "-h", action="store_true", help="show this help")


def _open(magic: Any) -> Any:
    """Marks a magic that reads options its parser does not list."""
    magic.open = True
    return magic


def _changeable(magic: Any) -> Any:
    """Names what ``%llm_resume`` takes, so that a value is not read as the run, and Tab knows it."""
    for name in reversed(_GIVEN_AGAIN):
        help = "train until so many are done" if name in LONGER else argparse.SUPPRESS
        magic = argument(f"--{name}", metavar="N", help=help)(magic)
    return magic


@magics_class
class LlmMagics(Magics):
    """The magics of one shell."""

    def __init__(self, shell: Any, session: Session) -> None:
        super().__init__(shell)
        self.session = session

    # -- the database ----------------------------------------------------------------------------------------

    @magic_arguments()
    @argument(
        "uri",
        nargs="?",
        help="mongodb://… or mongomock://name, or a variable that holds a database; nothing: "
        "LLMNB_URI, else the database of this folder (./.llmnb)",
    )
    @_HELP
    @no_var_expand
    @line_magic
    @bordered
    def llm_connect(self, known: Any, _rest: list[str], _cell: str | None) -> Any:
        """Connects the notebook to a database. Returns it: db = %llm_connect"""
        return self.session.connect(known.uri)

    @magic_arguments()
    @argument("collection", nargs="?", help="the collection to look into; nothing: list them all")
    @argument("--filter", help="a MongoDB filter, in quotes")
    @argument("--limit", type=int, help="at most so many documents")
    @argument("--rows", type=int, default=3, help="documents to show (3)")
    @argument("--model", help="inspect: what a training of this model would see, and what is wrong with it")
    @argument("--llm", help="the name of a variable that holds an LLM, in place of --model")
    @argument("--row", metavar="ID", help="with --model: this document as coloured tokens")
    @_HELP
    @no_var_expand
    @line_magic
    @_open
    @bordered
    def llm_data(self, known: Any, rest: list[str], _cell: str | None) -> Any:
        """Shows the collections, what is in one, or what a model sees of it.

        With --model (or --llm) the collection is inspected as a training would read it, and every option of a training
        is one here: %llm_data tickets --model M --key prompt,response --max_seq_length 1024. Nothing is trained.
        """
        from ..form import selection

        if known.model or known.llm:
            found = self.session.database().inspect(self._plan(known, named(rest)).llm)
            return found if known.row is None else found.row(known.row)
        if rest or known.row:
            todo = "--model NAME says whose tokenizer reads the documents"
            raise ConfigError(
                [Fault(rest[0] if rest else "--row", "is about an inspection, which needs a model", todo)]
            )
        store = self.session.database().store
        collections = store.collections()
        if not known.collection:
            return Table(
                ("collection", "documents"),
                sorted(collections.items()),
                empty="There are no collections yet: db.execute(Collection('docs').insert_many([…]))",
                note="%llm_data COLLECTION looks into one; with --model M it is inspected as M reads it"
                if collections
                else "",
            )
        if known.collection not in collections:
            raise NotFound("collection", known.collection, sorted(collections))
        return look_into(store, selection(known.collection, known.filter, known.limit), known.rows)

    # -- training --------------------------------------------------------------------------------------------

    @magic_arguments()
    @argument(
        "--start",
        action="store_true",
        help="start now, in the background; without it the plan is shown, and without any option the panel",
    )
    @argument("--model", help="the base model: a hub id or a folder")
    @argument("--llm", help="the name of a variable that holds an LLM, in place of --model")
    @argument("--collection", help="the documents to train on")
    @argument("--filter", help="a MongoDB filter, in quotes: only these documents")
    @argument("--limit", type=int, help="at most so many documents")
    @_HELP
    @no_var_expand
    @line_magic
    @_open
    @bordered
    def llm_train(self, known: Any, rest: list[str], _cell: str | None) -> Any:
        """Fine-tunes a model on a collection; alone, it opens the training panel. Returns the run that it starts.

        The panel has every setting with its consequence, rows as the model will see them, and a button that starts.

        Every option of LLMTrainer, of LLM and of transformers.TrainingArguments is an option here: --key text,
        --learning_rate 2e-4, --lora_r 16, --num_train_epochs 3, … (%llm_train --help names them all).
        --select, --transform, --eval_selects, --deepspeed and the other options that take an object can be given the
        name of a variable.
        """
        if not rest and not any(vars(known).values()):
            if self.session.in_notebook:
                self.session.open_panel()
            else:
                from .help import training_in_a_terminal

                print(training_in_a_terminal(self.session.database().store.collections()))
            return None
        plan = self._plan(known, named(rest))
        if not known.start:
            display(plan.table())
            print("The same in Python:\n")
            print(plan.python())
            return None
        run = self.session.database().apply(plan.llm, wait=False)
        self.session.watch(run)
        return run

    def _plan(self, known: Any, given: dict[str, str | None]) -> Any:
        from ..form import selection
        from .plan import Plan

        names = self.shell.user_ns
        model, trainer = settings(given, names)
        if known.model:
            if "model_name_or_path" in model:
                raise ConfigError([Fault("--model", "and --model_name_or_path are the same", "give one of them")])
            model["model_name_or_path"] = known.model
        if known.collection:
            if "select" in trainer:
                raise ConfigError([Fault("--collection", "and --select both say which documents", "give one of them")])
            trainer["select"] = selection(known.collection, known.filter, known.limit)
        elif known.filter or known.limit:
            raise ConfigError([Fault("--filter", "and --limit narrow a --collection", "give --collection, too")])
        llm = None
        if known.llm:
            from ..llm import LLM

            llm = names.get(known.llm)
            if not isinstance(llm, LLM):
                have = [name for name, value in names.items() if isinstance(value, LLM)]
                raise NotFound("LLM variable", known.llm, have, None if have else "llm = LLM('name', 'path')")
        return Plan(model, trainer, llm=llm, names=names)

    @magic_arguments()
    @argument("--limit", type=int, default=20, help="how many, newest first (20)")
    @argument("--state", help="only runs in this state")
    @_HELP
    @line_magic
    @bordered
    def llm_runs(self, known: Any, _rest: list[str], _cell: str | None) -> Table:
        """Lists the runs of the database, newest first."""
        store = self.session.database().store
        store.runs.find_lost()
        equal = {"state": known.state} if known.state else {}
        rows = []
        for record in store.runs.list(limit=known.limit, **equal):
            error = (record.get("error") or {}).get("what") or record.get("warning") or ""
            rows.append(
                (
                    record["_id"],
                    record.get("model"),
                    record.get("version"),
                    record["state"],
                    local_time(record.get("started") or record.get("created")),
                    _took(record),
                    short(error, 80),
                )
            )
        return Table(
            ("run", "model", "version", "state", "started", "took", "error" if any(r[-1] for r in rows) else ""),
            rows,
            empty="No run" + (f" is {known.state}." if known.state else " yet: %llm_train --help"),
            note="%llm_watch RUN shows its curve" if rows else "",
        )

    @magic_arguments()
    @argument("run", nargs="?", default="latest", help="the run's id; nothing: the newest")
    @argument("others", nargs="*", help="ids of runs to draw over it")
    @_HELP
    @line_magic
    @bordered
    def llm_watch(self, known: Any, _rest: list[str], _cell: str | None) -> Any:
        """Shows a run's curve, live while it goes on. Returns the run."""
        database = self.session.database()
        run, *others = (database.run(name) for name in (known.run, *known.others))
        self.session.watch(run, [other.id for other in others])
        return run

    @magic_arguments()
    @argument("run", help="the run's id, or latest")
    @argument("--now", action="store_true", help="end it now, without a checkpoint")
    @_HELP
    @line_magic
    @bordered
    def llm_stop(self, known: Any, _rest: list[str], _cell: str | None) -> None:
        """Asks a run to save a checkpoint and end."""
        run = self.session.database().run(known.run)
        if known.now:
            run.kill()
            print(f"{run.id}: {run.state}")
            return
        run.stop()
        print(f"Stopping {run.id}: it saves a checkpoint, then it ends.")

    @magic_arguments()
    @argument("run", nargs="?", default="latest", help="the run's id; nothing: the newest")
    @argument("--changed_data", action="store_true", help="go on although the documents changed since")
    @_changeable
    @_HELP
    @no_var_expand
    @line_magic
    @_open
    @bordered
    def llm_resume(self, known: Any, rest: list[str], _cell: str | None) -> Any:
        """Goes on with a run that has ended, from its newest checkpoint, in the background. Returns the run.

        It stays the same run. --num_train_epochs and --max_steps train it further; --save_steps, --eval_steps,
        --logging_steps and their like can be changed, too. --transform, --training_kwargs and --ray_configs take the
        name of a variable: objects are never loaded from the database.
        """
        said = {name: getattr(known, name) for name in _GIVEN_AGAIN if getattr(known, name) is not None}
        model, changes = settings({**said, **named(rest)}, self.shell.user_ns)
        if "training_kwargs" in changes:
            changes["trainer_kwargs"] = changes.pop("training_kwargs")
        run = self.session.database().run(known.run)
        run.resume(wait=False, changed_data=known.changed_data, **model, **changes)
        self.session.watch(run)
        return run

    @magic_arguments()
    @argument("experiment", nargs="?", help="a run's id, or EXPERIMENT/STEP; nothing: all that have checkpoints")
    @argument("--merge", metavar="FOLDER", help="merge it into its base, with the proof that it says the same")
    @argument("--export", metavar="FOLDER", help="write its files as a folder, verified")
    @argument("--remove", action="store_true", help="remove EXPERIMENT/STEP")
    @_HELP
    @line_magic
    @bordered
    def llm_checkpoints(self, known: Any, _rest: list[str], _cell: str | None) -> Any:
        """Lists checkpoints, newest first, to chat with, compare, merge, export or remove. Returns them.

        --merge returns the proof of the merge, --export the folder.
        """
        from . import picker_data

        if known.merge or known.export or known.remove:
            return with_checkpoint(self.session, known)
        database = self.session.database()
        experiment = known.experiment.partition("/")[0] if known.experiment else None
        listed = picker_data.found(database, experiment)
        if self.session.in_notebook:
            self.session.pick(experiment)
        return picker_data.Listed(listed, seen=self.session.in_notebook)

    @magic_arguments()
    @argument("checkpoints", nargs="*", metavar="RUN/STEP", help="RUN (its last step) or RUN/STEP; nothing: the newest")
    @argument("--collection", help="the documents to measure on; nothing: those that validated the run")
    @argument("--filter", help="a MongoDB filter, in quotes: only these documents of the collection")
    @argument(
        "--metrics", nargs="+", metavar="M", help="perplexity, rouge, … and functions of yours; nothing: the usual"
    )
    @argument("--limit", type=int, default=200, help="at most so many documents (200)")
    @argument("--max_new_tokens", type=int, help="tokens of an answer (128)")
    @argument("--batch_size", type=int, help="rows at a time (8)")
    @argument("--rank_by", metavar="M", help="the metric that best and worst rows are told by")
    @argument("--transform", help="the name of the run's function, when it had one")
    @argument("--base", metavar="FOLDER", help="where the base is now, when it moved")
    @_HELP
    @no_var_expand
    @line_magic
    @bordered
    def llm_evaluate(self, known: Any, _rest: list[str], _cell: str | None) -> Any:
        """Measures checkpoints against their base on the same documents. Returns the evaluation.

        Perplexity and token accuracy, and for pairs and chats exact match, ROUGE and BLEU over answers, or a function
        of the notebook's by its name: --metrics rouge my_function, with my_function(answer, reference). The result is
        kept in the database: db.evaluations()
        """
        from .evaluating import evaluate

        return evaluate(self.session, known, self.shell.user_ns)

    # -- chat ------------------------------------------------------------------------------------------------

    @magic_arguments()
    @argument("--checkpoint", help="EXPERIMENT or EXPERIMENT/STEP; nothing: what the newest run's model answers with")
    @argument("--compare", nargs="+", default=[], metavar="NAME", help="base, or other checkpoints, that answer, too")
    @argument("--form", choices=("text", "chat"), help="text or chat; nothing: as the model was trained")
    @argument("--history", metavar="NAME", help="go on with a chat that was kept")
    @argument("--keep", metavar="NAME", help="keep the chat in the database under this name")
    @argument(
        "--save", nargs="?", const="", metavar="COLLECTION", help="write the last chat, or --history NAME, as data"
    )
    @argument("--close", action="store_true", help="end the chat processes and give their memory back")
    @_HELP
    @no_var_expand
    @line_cell_magic
    @_open
    @bordered
    def llm_chat(self, known: Any, rest: list[str], cell: str | None) -> Any:
        """Asks a checkpoint; the cell's text is the question, and below the answer one can go on asking.

        The answer comes from a process of its own, which stays warm for the next question. Any option of generate can
        be given: --max_new_tokens 100, --temperature 0.7, --seed 1, …
        """
        if known.close:
            self.session.close_chats()
            return None
        if known.save is not None:
            asking.save(self.session, known)
            return None
        if (cell is None and not self.session.in_notebook) or (cell is not None and not cell.strip()):
            raise ConfigError(
                [Fault("%%llm_chat", "has no prompt", "write %%llm_chat alone in the first line, the prompt below")]
            )
        asking.ask(self.session, known, rest, (cell or "").strip())
        return None

    # -- help ------------------------------------------------------------------------------------------------

    @magic_arguments()
    @_HELP
    @line_magic
    @bordered
    def llm_help(self, known: Any, _rest: list[str], _cell: str | None) -> Any:
        """Says what to type first, and lists these magics."""
        from .help import Help

        return Help([(name, getattr(self, name)) for name in NAMES], self.session.in_notebook)

    def more_help(self, name: str) -> None:
        """What ``--help`` says beyond the parser's own."""
        if name != "llm_train":
            return
        import textwrap

        print("\nEvery other option, as --NAME VALUE:")
        print(textwrap.fill("  ".join(known_settings()), 110, initial_indent="  ", subsequent_indent="  "))


def _took(record: dict[str, Any]) -> str:
    from . import words

    start, end = record.get("started"), record.get("ended")
    if not start or not end:
        return ""
    seconds = (end - start).total_seconds()
    return f"{seconds:.0f} s" if seconds < 100 else words.about(seconds).removeprefix("about ")
