"""Our subclass of ``transformers.Trainer``: what it computes differently, and what it tells.

Differently: losses are divided by trained tokens for every architecture, on every rank and in the last window;
evaluation losses are means over tokens, so that they do not depend on the batch size; a NaN stays visible and goes
away again when it is over; the best checkpoint is the best of those that were saved; a run always leaves one.
Tells: metrics, finished checkpoints and faults, through ``Hooks``. Knows no rows but those it is given.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from ..errors import ConfigError, Fault
from ..events import Metric
from . import attention, faults, manifest, packing
from .bases import quiet
from .gathering import bring_together
from .hooks import Hooks
from .losses import HeadLoss, TokenLoss
from .memory import memory_in_use
from .order import Order
from .sharding import check_shared, keep_trained, share_on_cpus
from .snapshots import Writer

__all__ = ["Loop", "counts_tokens"]

# Of Trainer's own list of logs, 600 bytes each. A run that goes on elsewhere tells from it what the database had not
# heard when the checkpoint was taken.
_KEPT_LOGS = 5_000


def counts_tokens(model: Any) -> bool:
    """Does this model divide its loss by ``num_items_in_batch``?

    ``Trainer`` believes it of every ``forward`` with ``**kwargs``; a model that takes them and drops them would have
    each micro-batch weigh the same, however few tokens it trains.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner, "accepts_loss_kwargs", None) is False:
        return False
    try:
        forward = inspect.unwrap(type(inner).forward)
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    takes = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    return takes and "loss_function(" in source


class Loop(Trainer):
    """One run.

    Args:
        hooks: whom to tell.
        card: what every checkpoint's ``llmnb.json`` says beside its step.
        resumed: the card of the checkpoint that the run goes on from.
        order: of the training rows; None for Trainer's own.
        train_collator: makes the training batches; None: ``data_collator``, which makes those of evaluations.
        most_tokens: a pack goes through the model so many tokens at a time, in whole rows; None: at once.
        loraplus: LoRA's B learns so many times faster than A; None: as fast.
        principal: what PiSSA subtracts, ``pissa.Principal``; None without it.
        kwargs: of ``Trainer``.
    """

    compute_loss_func: Any
    control: Any
    data_collator: Any
    optimizer: Any

    def __init__(
        self,
        *,
        hooks: Hooks,
        card: dict[str, Any],
        resumed: Mapping[str, Any] | None = None,
        order: Order | None = None,
        train_collator: Any = None,
        most_tokens: int | None = None,
        loraplus: float | None = None,
        principal: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train_collator, self.most_tokens = train_collator, most_tokens
        self.loraplus, self.principal = loraplus, principal
        self.remove_callback(PrinterCallback)
        self.hooks = hooks
        self.card = card
        self.order = order
        if self.compute_loss_func is None and not counts_tokens(self.model):
            self.compute_loss_func = TokenLoss(self.args.label_smoothing_factor)
        own = self.compute_loss_func is None or isinstance(self.compute_loss_func, TokenLoss)
        self.mean_over_tokens = own
        self._resumes, self._open = resumed is not None, dict((resumed or {}).get("window") or {})
        resumed = resumed or {}
        best = resumed.get("best") or {}
        self.best: tuple[float, int] | None = (best["value"], best["step"]) if best else None
        self.patience = dict(resumed.get("patience") or {})
        self.saved_step: int | None = None
        self.writer = Writer()
        self.apart = False  # ranks on machines that share no folder
        self.ending = False  # the last on_epoch_end was called
        self.stream: Any = None  # rows that are read while they are trained: ``streaming.Streamed``
        self._tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self.tokens_before = int(resumed.get("tokens", 0))
        self._tokens_logged = 0
        self._items: Any = None
        self._eval_sum: torch.Tensor | None = None
        self._away = 0.0
        self._window = time.perf_counter()
        self._watch = faults.FaultWatch(self.args.device)

    def pick_up(self) -> None:
        """What ``Trainer`` forgets when it goes on from a checkpoint; called before the first step.

        The steps between logs, evaluations and checkpoints become those of this plan, and so does the learning rate
        of the next step; the losses since the last log are counted into the next one.
        """
        if not self._resumes:
            return
        self.state.compute_steps(self.args, self.state.max_steps)
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            rates = [rate * f(scheduler.last_epoch) for rate, f in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates):
                group["lr"] = rate
            scheduler._last_lr = rates  # what is told of the next step
        if self._open:
            self._tr_loss += self._open["loss"]
            self._globalstep_last_logged = self._open["since"]
            self.open_window(self._open)

    def _window_loss(self) -> float:
        """The losses since the last log, summed over steps; the mean of all ranks."""
        total = self._tr_loss.detach().clone()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        return float(total.item()) / self.args.world_size

    def window(self) -> dict[str, Any]:
        """What else was summed since the last log; a resumed run gets it back through ``open_window``."""
        return {}

    def open_window(self, window: Mapping[str, Any]) -> None:
        """Takes back what ``window`` gave."""

    def create_accelerator_and_postprocess(self) -> None:
        share_on_cpus(self.args)
        super().create_accelerator_and_postprocess()

    def create_optimizer(self, model: Any = None) -> Any:
        """With ``loraplus``: Hayou et al. 2024, LoRA+ (https://arxiv.org/abs/2402.12354), as peft builds it."""
        if self.loraplus is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        model = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if {"params", "model", "optimizer_dict"} & set(options):
            fault = f"loraplus_lr_ratio does not go with {self.args.optim}, which groups weights itself"
            raise ConfigError([Fault("optim", fault, "optim='adamw_torch'")])
        options = {"loraplus_weight_decay": self.args.weight_decay, **options}
        optimizer = create_loraplus_optimizer(model, kind, loraplus_lr_ratio=self.loraplus, **options)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.optimizer = optimizer
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.fsdp:
            check_shared(self.model)
        return prepared

    # --- order and counts -----------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.order is None:
            return super()._get_train_sampler(train_dataset)
        return self.order

    def get_train_dataloader(self) -> Any:
        own = self.data_collator
        self.data_collator = self.train_collator or own
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = own

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Wrappers around the sampler do not always pass the epoch on (on several ranks, in a resumed epoch).
        if self.order is not None:
            self.order.set_epoch(int(kwargs["epoch"]))
        if self.stream is not None:
            loader = kwargs["train_dataloader"]
            self.stream.begin(lambda: loader.batch_sampler)
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            mask = batch.get("attention_mask")
            self._tokens += batch["input_ids"].numel() if mask is None else mask.sum()
        if self.stream is not None and items is not None:
            # A step of nothing but blank rows has the loss 0, not 0 / 0.
            items = items.clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1)
        return batches, items

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        self._items = super()._get_num_items_in_batch(batch_samples, device)
        return self._items

    def tokens(self) -> int:
        """Real tokens (no padding) so far, on all ranks, the ones before a resume included."""
        count = self._tokens.clone()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(count)
        return self.tokens_before + int(count.item())

    # --- steps ----------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.compute_loss_func
        if not isinstance(own, HeadLoss) or "position_ids" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with own.instead_of_logits(inputs) as inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        parts = [inputs]
        if self.most_tokens is not None and self.mean_over_tokens:
            parts = packing.divide(inputs, self.most_tokens)
        loss: Any = 0.0
        for part in parts:
            with attention.rows(part.get("position_ids")):
                loss = loss + super().training_step(model, part, *args, **kwargs)
        self._watch.look("loss", loss, self.state.global_step + 1)
        self.writer.settle()  # what comes next changes the weights
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None:  # DeepSpeed without ZeRO knows none
            self._watch.look("grad_norm", norm, self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, *args: Any, **kw: Any
    ) -> None:
        before = self._globalstep_last_logged
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kw)
        if self._globalstep_last_logged != before:
            tr_loss.zero_()  # Trainer subtracts it from itself, which leaves a NaN a NaN for ever
        if self.ending and self.control.should_training_stop and self.saved_step != self.state.global_step:
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.control.should_training_stop:
            self.writer.settle()  # no step comes; what a person's callbacks do at the end may change the weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        summary = "train_runtime" in logs
        if "loss" in logs and not summary:
            tokens = self.tokens()
            seconds = time.perf_counter() - self._window - self._away
            logs["tokens_per_second"] = (tokens - self.tokens_before - self._tokens_logged) / max(seconds, 1e-9)
            logs["tokens"] = tokens
            logs["memory"] = memory_in_use(self.args.device)
            self._tokens_logged = tokens - self.tokens_before
            self._window, self._away = time.perf_counter(), 0.0
        super().log(logs, start_time)
        self._forget_old_logs()
        if not self.is_world_process_zero() or summary:
            return
        values = manifest.numbers(logs)
        self.hooks.say(Metric(step=self.state.global_step, epoch=self.state.epoch, values=values))
        for note in self._watch.notes(self.args, self.state):
            self.hooks.say(note)

    def _forget_old_logs(self) -> None:
        """Trainer keeps every log, and writes all of them with each checkpoint; the database has them already."""
        history = self.state.log_history
        if len(history) > 2 * _KEPT_LOGS:
            old, new = history[:-_KEPT_LOGS], history[-_KEPT_LOGS:]
            # Evaluations are few, and say which checkpoint was best.
            history[:] = [entry for entry in old if any(name.startswith("eval_") for name in entry)] + new

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        nested = isinstance(kwargs.get("eval_dataset", args[0] if args else None) or self.eval_dataset, dict)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if not nested:  # a dict of sets calls evaluate once for each
                self._away += time.perf_counter() - start

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._items = None
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and self._items is not None and self._eval_sum is not None:
            items = torch.as_tensor(self._items, device=loss.device).double()
            self._eval_sum += torch.stack([loss.double() * items, items])
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._eval_sum = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(self._eval_sum)
        total, count = self._eval_sum.tolist()
        self._eval_sum = None
        if self.mean_over_tokens and count and f"{prefix}_loss" in output.metrics:
            output.metrics[f"{prefix}_loss"] = total / count
        return output

    # --- checkpoints ----------------------------------------------------------------------------------------

    def evaluation_now(self) -> dict[str, float]:
        """What evaluations at this very step gave."""
        found: dict[str, float] = {}
        for entry in self.state.log_history:
            if entry.get("step") == self.state.global_step:
                found.update({k: v for k, v in entry.items() if k.startswith("eval_")})
        return {k: v for k, v in found.items() if not k.endswith(("_time", "_runtime", "_per_second"))}

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        name = self.args.metric_for_best_model
        if name is None:
            return False
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None or math.isnan(value):
            return False
        if self.best is None:
            return True
        return value > self.best[0] if self.args.greater_is_better else value < self.best[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.perf_counter()
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        metrics = self.evaluation_now()
        best = self._is_best(metrics)
        if best:
            name = str(self.args.metric_for_best_model)
            self.best = (metrics[name if name.startswith("eval_") else f"eval_{name}"], step)
        if self.best is not None:
            # Set before rotation, which spares it. Trainer itself names a step that may never have been saved.
            kept = folder.with_name(f"checkpoint-{self.best[1]}")
            self.state.best_model_checkpoint = str(kept) if best or kept.is_dir() else None
        tokens, open_loss, summed = self.tokens(), self._window_loss(), self.window()
        with self.writer.taking(self), contextlib.ExitStack() as undo:
            self.state.save_to_json = functools.partial(self.writer.state, self.state)
            undo.callback(self.state.__dict__.pop, "save_to_json")
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.world_size > 1:
                self.apart = bring_together(folder, self.args.device)
            self.saved_step = step
            if self.is_world_process_zero():
                card = {**self.card, "step": step, "tokens": tokens, "patience": dict(self.patience)}
                if self._globalstep_last_logged != step:
                    card["window"] = {"loss": open_loss, "since": self._globalstep_last_logged, **summed}
                if self.best is not None:
                    card["best"] = {"value": self.best[0], "step": self.best[1]}
                self.writer.later(manifest.write, folder, card)
                facts = folder, step, metrics, self.card["kind"], self.card["base_fingerprint"], best
                self.writer.later(self.hooks.checkpoint, *facts)
        self._away += time.perf_counter() - start

    def _load_best_model(self) -> None:
        self.writer.wait()
        if self.apart:  # only rank 0 could read it, and the ranks would load together
            return
        if self.principal is None:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self.principal.load(self.model, Path(self.state.best_model_checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.principal is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.principal.load(self.model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.writer.open:
            for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
                self.writer.tensors(part.state_dict(), Path(output_dir) / name)
            return
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.fsdp and self.is_world_process_zero() and hasattr(self.model, "peft_config"):
            keep_trained(Path(output_dir), self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with contextlib.ExitStack() as undo:
            config = getattr(self.model, "config", None)
            if config is not None:
                # Off while training; a saved model is for generation.
                undo.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = True
            undo.callback(setattr, self.args, "hub_token", self.args.hub_token)
            self.args.hub_token = None  # the arguments are saved too, and a token must not be
            if hasattr(self.model, "peft_config"):
                # "auto" asks the hub about the base at every save, and stores whole embeddings that were only grown.
                own = self.model.save_pretrained
                # An adapter that is compared with is not part of what was trained.
                options: Any = {"save_embedding_layers": False, "selected_adapters": ["default"]}
                self.model.save_pretrained = functools.partial(self.writer.adapter, self.model, own, **options)
                undo.callback(self.model.__dict__.pop, "save_pretrained", None)
            if self.writer.open:
                own = self.processing_class.save_pretrained
                self.processing_class.save_pretrained = functools.partial(self.writer.later, own)
                undo.callback(self.processing_class.__dict__.pop, "save_pretrained")
            undo.enter_context(quiet())
            super()._save(output_dir, state_dict)
            if self.principal is not None and self.is_world_process_zero():  # DeepSpeed has all ranks come here
                self.principal.complete(Path(output_dir or self.args.output_dir))
