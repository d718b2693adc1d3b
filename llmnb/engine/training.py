"""A training run: settings, rows, model, adapter, loop, result — in that order, faults first.

Knows no database and no Ray: rows come from functions, everything else goes out through ``Hooks``. Works alone and as
one of several ranks when torch.distributed's environment is set.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ModelSpec, TrainConfig
from ..errors import ConfigError, Fault, ModelError
from ..events import Note
from . import adapters, bases, manifest
from .arguments import Plan, make_plan, trainer_options
from .explaining import explained
from .hooks import Hooks, TrainResult
from .memory import forget, give_back, kept_pages, memory_of
from .speedups import fuse_lora, take_chunked_loss, take_optimizer, take_packs

__all__ = ["Hooks", "TrainResult", "train"]

Source = Callable[[], Iterable[Mapping[str, Any]]]
# More at a time is no faster on a CPU, and takes more memory.
_CPU_TOKENS = 1024


def train(
    spec: ModelSpec,
    config: TrainConfig,
    data: Mapping[str, Source],
    hooks: Hooks,
    *,
    workdir: Path,
    adapter: Path | None = None,
    resume: Path | None = None,
    transform: Callable[..., Any] | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
    tuned: bool | None = None,
) -> TrainResult:
    """Trains, and says what happens while it does.

    Args:
        spec: the base model.
        config: how to train it.
        data: "train", and evaluation sets by name; "valid" is the one without a name of its own. Each is called
            when its rows are needed, once.
        hooks: whom to tell.
        workdir: checkpoints are written to ``workdir/checkpoints``.
        adapter: go on from this adapter (or whole model), with a new optimizer. With ``resume``: what the resumed
            run went on from; the weights are those of ``resume``.
        resume: a checkpoint folder to go on from exactly: optimizer, schedule, order of the rows, random numbers.
        transform: the person's function.
        trainer_kwargs: further arguments of ``transformers.Trainer`` (compute_metrics, callbacks, …).
        tuned: None leaves the choice of faster ways to compute the same to the engine.

    Raises:
        ConfigError: settings that do not go together.
        DataError: rows that cannot be trained on.
        ModelError: a model or adapter that cannot be loaded, or not be trained so.
        RunError: out of memory.
    """
    run_class = TrainingRun
    if spec.task == "text-classification":
        from .classification import ClassifierRun

        run_class = ClassifierRun
    if config.method == "dpo":
        from .dpo import PreferenceRun

        run_class = PreferenceRun
    run = run_class(spec, config, hooks, Path(workdir), tuned)
    try:
        return run.go(data, adapter, resume, transform, trainer_kwargs)
    except BaseException as error:
        told = explained(error, config)
        forget(error)
        if told is error:
            raise
        raise told from None
    finally:
        run.close()


class TrainingRun:
    """The parts of one run, so that nothing but this object holds them, and ``close`` lets them go.

    Attributes:
        tasks: what it can train.
        lora_task: peft's name for the task.
        whole_kind: what a checkpoint of all weights is.
        loop_class: the training loop; ``Loop`` unless it says otherwise.
    """

    tasks: tuple[str, ...] = ("causal-lm",)
    lora_task = "CAUSAL_LM"
    whole_kind = "model"
    loop_class: Any = None

    def __init__(self, spec: ModelSpec, config: TrainConfig, hooks: Hooks, workdir: Path, tuned: bool | None) -> None:
        self.spec, self.config, self.hooks, self.workdir, self.tuned = spec, config, hooks, workdir, tuned
        self.bits = config.bits if config.bits is not None else spec.bits
        self.counts: dict[str, Any] = {}
        self.model: Any = None
        self.tokenizer: Any = None
        self.loop: Any = None
        self.stream: Any = None
        self.principal: Any = None
        self.resume: Path | None = None
        self.main = True

    def go(
        self,
        data: Mapping[str, Source],
        adapter: Path | None,
        resume: Path | None,
        transform: Callable[..., Any] | None,
        trainer_kwargs: Mapping[str, Any] | None,
    ) -> TrainResult:
        from transformers import set_seed

        self._check(data, resume)
        self.resume = Path(resume) if resume is not None else None
        options = self._options(trainer_kwargs)
        self.main = _rank() == 0
        if not self.main:
            # Rank 0 speaks for all.
            self.hooks = Hooks()
        names = tuple(name for name in data if name != "train")
        plan = make_plan(self.config, self.workdir / "checkpoints", eval_names=names, say=self.hooks.say)
        if adapter is not None:
            adapter = adapters.find_adapter(adapter)
            if manifest.kind_of(adapter) != "adapter":
                self.spec, adapter = replace(self.spec, model_name_or_path=str(adapter)), None
        rows = self._rows(data, plan, transform)
        if self.main:
            self.counts["rows_digest"] = rows["train"].digest()
            self.hooks.read(dict(self.counts))
        set_seed(plan.arguments.seed)  # new weights are drawn before Trainer sets its own
        new_tokens = self._load(plan)
        fingerprint = bases.fingerprint(self.spec.model_name_or_path, **bases.where(self.spec.model_kwargs))
        self.counts["base_fingerprint"] = fingerprint
        if resume is not None:
            adapters.check_base(Path(resume), self.spec.model_name_or_path, fingerprint)
        self._prepare(plan, adapter, fingerprint, new_tokens)
        self._build(plan, rows, options, fingerprint, resume)
        return self._run(plan, resume)

    # --- before -------------------------------------------------------------------------------------------

    def _check(self, data: Mapping[str, Source], resume: Path | None) -> None:
        if "train" not in data:
            raise ConfigError([Fault("data", "has no 'train' rows")])
        if self.spec.task not in self.tasks:
            raise ModelError(f"A {self.spec.task} model is not trained here.", todo="use LLM or TextClassification")
        if self.bits is not None and not self.config.use_lora:
            raise ConfigError(
                [Fault("bits", f"{self.bits}-bit weights cannot be trained whole", "use_lora=True, or bits=None")]
            )
        if self.config.bits is not None and self.spec.bits not in (None, self.config.bits):
            raise ConfigError([Fault("bits", f"the model says {self.spec.bits}, the trainer {self.config.bits}")])
        if resume is not None and not (Path(resume) / "trainer_state.json").is_file():
            raise ModelError(
                f"{resume} cannot be resumed from.",
                seen="it has no trainer_state.json",
                todo="resume from the newest checkpoint of the run; older ones keep weights only",
            )

    def _options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        return trainer_options(given)

    def _loop_options(self) -> dict[str, Any]:
        """What the loop of another kind of run needs beside."""
        return {}

    def _collator(self) -> Any:
        from .rows import Collator

        return Collator(self.tokenizer)

    def _train_collator(self) -> Any:
        """Rows end to end where this model keeps them apart; None: as for evaluations."""
        return take_packs(self.model, self.config, self.counts, self._note)

    def _most_tokens(self, args: Any, collator: Any) -> int | None:
        most = self.config.max_tokens_per_batch
        why = "batches are padded" if collator is None else "workers must take as many steps" * (args.world_size > 1)
        if most is not None and why:
            self._note(f"max_tokens_per_batch has no effect: {why}.", "warning")
            return None
        if most is None and not why and args.device.type == "cpu" and self.counts.get("chunked_loss"):
            most = _CPU_TOKENS
        if most is not None:
            self.counts["max_tokens_per_batch"] = most
        return most

    def _rows(self, data: Mapping[str, Source], plan: Plan, transform: Any) -> dict[str, Any]:
        """Rows of every set that this run reads; their counts and notes are said."""
        from .rowcache import rows_of
        from .streaming import is_streamed
        from .templates import begins_as_trained

        self.tokenizer = bases.load_tokenizer(self.spec)
        if self.config.chat_template:
            self.tokenizer.chat_template = self.config.chat_template
        self._note(bases.ensure_pad(self.tokenizer, None))
        context = bases.context_of(self.spec)
        evaluates = str(plan.arguments.eval_strategy.value) != "no" or plan.arguments.eval_on_start
        rows, kept = {}, {}
        for name, source in data.items():
            if name != "train" and not evaluates:
                continue
            more = {"prompt_template": self.spec.prompt_template, "transform": transform, "context": context}
            if name == "train" and is_streamed(source):
                rows[name], kept[name] = self._stream(source, plan, more), False
                continue
            rows[name], kept[name] = rows_of(source, self.tokenizer, self.config, keeps=self.main, name=name, **more)
            report = rows[name].report
            for note in report.notes:
                level = "warning" if report.cut or report.dropped else "info"
                self.hooks.say(Note(level=level, text=note, data={"rows": name}))
        if kept["train"]:
            self._note(
                "The rows are those of an earlier run, kept in the cache: documents, tokenizer and settings agree."
            )
        report = rows["train"].report
        self.counts.update(rows_cached=kept["train"], key=report.key, kind=report.kind)
        self.counts["eval_rows"] = {name: len(found) for name, found in rows.items() if name != "train"}
        if self.stream is None:
            self.counts.update(report.numbers(), rows=report.used)
        if report.kind == "messages":
            given, self.tokenizer = self.tokenizer, begins_as_trained(self.tokenizer)
            if self.tokenizer is not given:
                self._note("The chat template is saved with the BOS that rows begin with, which it did not write.")
        return rows

    def _stream(self, documents: Any, plan: Plan, more: Mapping[str, Any]) -> Any:
        """Training rows that are read while they are trained; of the first ones it is said what became of them."""
        from .order import Order, seed_of
        from .streaming import HEAD, Streamed

        order = Order(documents, plan.arguments.train_sampling_strategy, seed_of(plan.arguments))
        head = list(itertools.islice(order, HEAD))
        token = self.tokenizer.pad_token_id
        self.stream = Streamed(documents, self.tokenizer, self.config, blank=token, head=head, **more)
        report = self.stream.report
        self.counts.update(streaming=True, found=len(documents), rows=len(documents))
        self._note(
            f"Documents are read while the run trains: {len(documents):,}, of which the first {report.found:,} were "
            "looked at. One that gives no row is a step's blank row, and is counted when it was read."
        )
        level = "warning" if report.cut or report.dropped else "info"
        for note in report.notes:
            self._note(note, level)
        return self.stream

    def _load(self, plan: Plan) -> list[int]:
        """The base, with a row for every token. Returns ids of tokens that the base did not have."""
        self.model, _ = bases.load_base(self.spec, bits=self.bits, training=True, dtype=plan.base_dtype)
        if not self.config.use_lora and getattr(self.model, "is_quantized", False):
            raise ConfigError([Fault("use_lora", "a quantised base cannot be trained whole", "use_lora=True")])
        before = bases.vocabulary_rows(self.model)
        self._note(bases.ensure_pad(self.tokenizer, self.model))
        bases.stop_as_trained(self.model, self.tokenizer, self.counts.get("kind") == "messages")
        after = bases.vocabulary_rows(self.model)
        return [i for i in range(before, after) if i != self.tokenizer.pad_token_id]

    def _note(self, text: str | None, level: str = "info") -> None:
        if text:
            self.hooks.say(Note(level=level, text=text))

    def _prepare(self, plan: Plan, adapter: Path | None, fingerprint: str, new_tokens: list[int]) -> None:
        """The model as it is trained: its adapter, its dtypes, its checkpointing."""
        config = self.config
        if adapter is not None and config.use_lora and config.lora_init != "default":
            what = f"{config.lora_init!r} begins a new adapter, and the run goes on from {adapter.name}"
            raise ConfigError([Fault("lora_init", what, "leave it out")])
        if adapter is not None:
            adapters.check_base(adapter, self.spec.model_name_or_path, fingerprint)
            self.model = adapters.load_adapter(self.model, adapter, trainable=config.use_lora)
            if not config.use_lora:
                self.model = self.model.merge_and_unload()
                self.model.requires_grad_(True)
        elif config.use_lora:
            self.model = adapters.attach_lora(self.model, config, new_tokens, task=self.lora_task)
            if config.lora_init != "default":
                from .pissa import Principal

                self.principal = Principal(self.model, config.lora_init, self.resume)
        if config.use_lora:
            modules = adapters.lora_modules(self.model)
            self.counts["modules"] = len(modules)
            self._note(f"LoRA changes {len(modules)} modules ({_leaves(modules)}).")
            if plan.arguments.activation_checkpointing:
                # With a frozen base nothing that enters a checkpointed layer needs a gradient, and none would come out.
                self.model.get_base_model().enable_input_require_grads()
            fuse_lora(self.model, config, plan.arguments, self.counts, self._note)
        asked = bases.dtype_of(self.spec) if not config.use_lora else None
        if asked is not None and plan.precision == "float16" and str(asked) == "torch.float16":
            raise ConfigError([Fault("fp16", "with weights in float16 has no float32 copy to step", "leave dtype out")])
        trained = adapters.check_dtypes(self.model, allow=asked)
        trainable, parameters = adapters.count_parameters(self.model)
        args = plan.arguments
        take_optimizer(args, config, trainable, memory_of(args.device), self._note)
        self.counts.update(
            optimizer=str(args.optim.value),
            liger=bool(args.use_liger_kernel),
            trainable=trainable,
            parameters=parameters,
            precision=plan.precision,
            trained_dtype=trained,
            bits=bases.quantised_bits(self.model),
        )

    def _build(
        self, plan: Plan, rows: dict[str, Any], options: dict[str, Any], fingerprint: str, resume: Path | None
    ) -> None:
        """The loop around the model."""
        from .callbacks import Patience, Watch
        from .loop import Loop
        from .order import evaluated, ordered
        from .tally import Tally

        args = plan.arguments
        train, order = ordered(rows["train"], args, self.tokenizer.pad_token_id)
        collator = self._train_collator()
        if collator is not None:
            take_chunked_loss(self.model, args, options, self.counts)
        if callable(options.get("optimizers")):
            options["optimizers"] = options["optimizers"](self.model)
        self.loop = (self.loop_class or Loop)(
            model=self.model,
            args=args,
            data_collator=self._collator(),
            train_collator=collator,
            most_tokens=self._most_tokens(args, collator),
            train_dataset=train,
            eval_dataset=evaluated(rows, args, self.tokenizer.pad_token_id, "compute_metrics" in options),
            processing_class=self.tokenizer,
            hooks=self.hooks,
            card=self._card(plan, fingerprint),
            resumed=manifest.read(resume) if resume else None,
            order=order,
            loraplus=self.config.loraplus_lr_ratio,
            principal=self.principal,
            **self._loop_options(),
            **options,
        )
        if self.stream is not None:
            self.loop.stream = self.stream
            self.loop.add_callback(Tally(self.loop, self.stream, self.counts))
        self.watch = Watch(self.loop, self._started, plan.own_logging)
        self.loop.add_callback(self.watch)
        if self.config.early_stopping_patience is not None:
            self.loop.add_callback(
                Patience(self.loop, self.config.early_stopping_patience, self.config.early_stopping_threshold)
            )

    def _card(self, plan: Plan, fingerprint: str) -> dict[str, Any]:
        return {
            "base": self.spec.model_name_or_path,
            "base_fingerprint": fingerprint,
            "kind": "adapter" if self.config.use_lora else self.whole_kind,
            "chat_template": self.tokenizer.chat_template,
            "prompt_template": self.config.prompt_template or self.spec.prompt_template,
            "rows_kind": self.counts.get("kind"),
            "vocabulary": bases.vocabulary_rows(self.model),
            "precision": plan.precision,
            "bits": self.counts["bits"],
            "rows": self.counts["rows"],
            "rows_digest": self.counts.get("rows_digest"),
            "versions": manifest.versions(),
        }

    # --- during and after ---------------------------------------------------------------------------------

    def _started(self, state: Any) -> None:
        args = self.loop.args
        self.counts.update(
            steps=state.max_steps,
            epochs=state.num_train_epochs,
            ranks=args.world_size,
            rows_per_step=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            device=str(args.device),
            seed=args.seed,
            versions=manifest.versions(),
        )
        if self.main:
            self.hooks.started(dict(self.counts))

    def _run(self, plan: Plan, resume: Path | None) -> TrainResult:
        from .callbacks import Finished, Killed

        loop, begin = self.loop, time.perf_counter()
        summary: dict[str, float] = {}
        try:
            with kept_pages(loop.args.device):
                summary = dict(loop.train(resume_from_checkpoint=str(resume) if resume else None).metrics)
        except Killed:
            self.watch.stopped = True
        except Finished:
            pass
        finally:
            loop.writer.wait()
        state = loop.state
        metrics = {name: float(value) for name, value in summary.items()}
        metrics.setdefault("train_runtime", time.perf_counter() - begin)
        for entry in state.log_history:
            metrics.update({k: v for k, v in entry.items() if k == "loss" or k.startswith("eval_")})
        metrics.pop("eval_model_preparation_time", None)
        return TrainResult(
            steps=state.global_step - getattr(loop, "_initial_global_step", 0),
            last_step=state.global_step,
            metrics=metrics,
            best_step=loop.best[1] if plan.chooses_best and loop.best else None,
            stopped=self.watch.stopped,
            kind=loop.card["kind"],
            base_fingerprint=loop.card["base_fingerprint"],
        )

    def close(self) -> None:
        """Lets go of everything; the memory of a model is free when this returned."""
        loop = self.loop
        if self.stream is not None:
            self.stream.close()
        if loop is not None:
            loop.accelerator.free_memory()
            loop.callback_handler.__dict__.update(
                model=None, optimizer=None, lr_scheduler=None, train_dataloader=None, eval_dataloader=None, callbacks=[]
            )
            loop.model = loop.model_wrapped = loop.optimizer = loop.lr_scheduler = loop.deepspeed = None
        self.__dict__.clear()
        give_back()


def _leaves(modules: list[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))


def _rank() -> int:
    import os

    return int(os.environ.get("RANK", "0"))
