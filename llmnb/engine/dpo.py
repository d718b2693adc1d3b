"""DPO: a model learns which of two answers is preferred (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

The mathematics is TRL's (``trl.DPOTrainer``): this module hands it batches of our rows, the model and the reference.
The loop, its events, checkpoints, Stop and resume are those of every other training. The reference is the model as it
was before the first step: the base with its adapter off, a frozen copy of the adapter that training goes on from, or,
when all weights are trained, a frozen copy of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import MissingPackage, ModelError
from . import bases
from .arguments import Plan
from .loop import Loop
from .rows import NO_LOSS
from .training import TrainingRun

__all__ = ["PairLoss", "PreferenceLoop", "PreferenceRun"]

REFERENCE = "ref"  # the adapter that is compared with
TOLD = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


class PairLoss:
    """TRL's loss of a batch of pairs, and what it tells of them.

    Args:
        model: what is trained, as it was built (not wrapped for several ranks).
        reference: a frozen model to compare with; None: ``model`` with its adapter off, or with the adapter "ref".
        beta: how near the model stays to the reference.
        kind: TRL's ``loss_type``.
        device: of the batches.

    Raises:
        MissingPackage: TRL is not installed.
        ModelError: TRL would compute other probabilities than this model does.
    """

    def __init__(self, model: Any, reference: Any, *, beta: float, kind: str, device: Any) -> None:
        try:
            from trl.trainer.dpo_trainer import DPOTrainer
            from trl.trainer.utils import add_fused_lm_head
        except ImportError as error:
            raise MissingPackage("trl", "train", "Training with method='dpo'") from error
        self.model, self.reference, self._trl = model, reference, DPOTrainer
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        _head_is_plain(whole)
        add_fused_lm_head(whole, outputs=outputs)
        if reference is not None:
            add_fused_lm_head(reference)
        _check_probabilities(model)
        text = whole.config.get_text_config()
        routed = bool(getattr(text, "output_router_logits", False))
        # What TRL's functions read of their trainer. Each rank speaks for itself; ``PreferenceLoop`` adds them up.
        self._as_trainer = SimpleNamespace(
            model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
            ref_model="handed over",  # None would have TRL look for one in its model
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            accelerator=SimpleNamespace(
                device=device,
                gather=lambda values: values,
                gather_for_metrics=lambda values: values,
                autocast=contextlib.nullcontext,
            ),
            beta=beta,
            loss_types=[kind],
            loss_weights=[1.0],
            label_smoothing=0.0,
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            use_weighting=False,
            precompute_ref_logps=True,
            aux_loss_enabled=routed,
            router_aux_loss_coef=getattr(text, "router_aux_loss_coef", 0.0) if routed else 0.0,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )

    def __call__(self, model: Any, inputs: Mapping[str, Any], autocast: Any) -> tuple[torch.Tensor, list[float]]:
        """The mean loss over pairs.

        Args:
            model: what is trained, wrapped as it is called in a step.
            inputs: ``input_ids``, ``attention_mask`` and ``labels``, each (2 × pairs, seq): chosen, then rejected.
            autocast: a context in which the reference computes with the precision of the run.

        Returns:
            The loss, and the means of ``TOLD`` over these pairs.
        """
        mask = (inputs["labels"] != NO_LOSS).long()
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "completion_mask": mask}
        with torch.no_grad(), self._compared() as reference, autocast():
            chosen, rejected = self._trl.compute_ref_log_probs(self._as_trainer, reference, batch)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        loss = self._trl._compute_loss(self._as_trainer, model, batch, False)
        told = self._as_trainer._metrics["train"]
        values = [float(told[name][-1]) for name in TOLD]
        told.clear()
        return loss, values

    @contextlib.contextmanager
    def _compared(self) -> Iterator[Any]:
        """The reference, without dropout and without recomputing."""
        if self.reference is not None:
            yield self.reference
            return
        model, training = self.model, self.model.training
        named = REFERENCE in model.peft_config
        model.eval()
        try:
            if named:
                model.set_adapter(REFERENCE)
                yield model
            else:
                with model.disable_adapter():
                    yield model
        finally:
            if named:
                model.set_adapter("default")
            model.train(training)


def _head_is_plain(whole: Any) -> None:
    """TRL multiplies by the output layer's weight itself and would pass over whatever is put on it."""
    head = whole.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise ModelError(
            "DPO cannot be trained with an adapter on the output layer, nor with new tokens that share its weights.",
            seen=f"the output layer is {type(head).__name__}",
            todo="leave the output layer out of lora_target_modules; train new tokens with method='sft' first",
        )


@torch.no_grad()
def _check_probabilities(model: Any) -> None:
    """Log-probabilities as TRL computes them are those of the model's own logits."""
    device = next(model.parameters()).device
    ids = torch.randint(bases.vocabulary_rows(model), (2, 9), generator=torch.Generator().manual_seed(2)).to(device)
    training = model.training
    model.eval()
    try:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        theirs = model(**inputs, labels=ids, fused_lm_head=True).log_probs.float()
        logits = model(**inputs).logits[:, :-1].float()
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError("DPO cannot be trained on this model.", seen=f"{type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    own = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    gap = float((theirs - own).abs().max())
    if not gap <= (1e-3 if logits.dtype == model.dtype == torch.float32 else 0.3):
        raise ModelError(
            "DPO cannot be trained on this model: TRL would compute other probabilities than the model does.",
            seen=f"log-probabilities differ by {gap:.2g}",
            todo="train it with method='sft', on the preferred answers",
        )


class PreferenceLoop(Loop):
    """The loop with a loss over pairs, divided by the pairs of the whole optimizer step.

    Args:
        reference: see ``PairLoss``.
        beta: see ``PairLoss``.
        kind: see ``PairLoss``.
    """

    def __init__(self, *, reference: Any, beta: float, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # ``compute_loss`` divides by what ``_get_num_items_in_batch`` counts, so Trainer must not divide again.
        self.compute_loss_func, self.model_accepts_loss_kwargs, self.mean_over_tokens = None, True, True
        self.pair_loss = PairLoss(self.model, reference, beta=beta, kind=kind, device=self.args.device)
        if reference is not None:
            self.pair_loss.reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self._told = self._nothing()
        self._evaluated = self._nothing()

    def _nothing(self) -> torch.Tensor:
        """Sums of ``TOLD`` over pairs, and their number."""
        return torch.zeros(len(TOLD) + 1, dtype=torch.float64)

    def _summed(self, sums: torch.Tensor) -> torch.Tensor:
        """Over all ranks."""
        if self.args.world_size == 1:
            return sums
        total = sums.to(self.args.device)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        self._items = None
        if batch_samples:
            items = torch.tensor(sum(_pairs(batch) for batch in batch_samples), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                torch.distributed.all_reduce(items)
            self._items = items
        return self._items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, told = self.pair_loss(model, inputs, self.accelerator.autocast)
        pairs = _pairs(inputs)
        sums = self._told if self._eval_sum is None else self._evaluated
        if pairs:
            sums += torch.tensor([*(value * pairs for value in told), pairs], dtype=torch.float64)
        if num_items_in_batch is None:
            loss = loss * (1.0 if pairs else 0.0)
        else:
            shares = self.args.world_size if self.args.average_tokens_across_devices else 1
            loss = loss * (pairs * shares / num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "train_runtime" not in logs:
            *sums, pairs = self._summed(self._told).tolist()
            if pairs:
                logs.update({name: total / pairs for name, total in zip(TOLD, sums, strict=True)})
            self._told = self._nothing()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._evaluated = self._nothing()
        output = super().evaluation_loop(*args, **kwargs)
        *sums, pairs = self._summed(self._evaluated).tolist()
        if pairs:
            output.metrics.update({f"{prefix}_{name}": total / pairs for name, total in zip(TOLD, sums, strict=True)})
        return output

    def window(self) -> dict[str, Any]:
        return {"pairs": self._summed(self._told).tolist()}

    def open_window(self, window: Mapping[str, Any]) -> None:
        if self.is_world_process_zero():  # they are added up over the ranks again
            self._told += torch.tensor(window["pairs"], dtype=torch.float64)


def _pairs(batch: Mapping[str, Any]) -> int:
    """Pairs that carry loss; a blank one does not."""
    half = batch["labels"].shape[0] // 2
    return int((batch["labels"][:half] != NO_LOSS).any(dim=1).sum())


class PreferenceRun(TrainingRun):
    """A run on preferences."""

    loop_class = PreferenceLoop

    def _collator(self) -> Any:
        from .preferences import PairCollator

        return PairCollator(self.tokenizer)

    def _train_collator(self) -> Any:
        return None

    def _rows(self, *args: Any) -> dict[str, Any]:
        rows = super()._rows(*args)
        self.counts["method"] = "dpo"
        return rows

    def _prepare(self, plan: Plan, adapter: Path | None, fingerprint: str, new_tokens: list[int]) -> None:
        super()._prepare(plan, adapter, fingerprint, new_tokens)
        self.reference = None
        if not self.config.use_lora:
            self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            words = "a second copy of the weights, frozen"
        elif adapter is not None:
            keep_as_reference(self.model)
            words = "a frozen copy of the adapter that the run goes on from"
        else:
            words = "the base with its adapter off"
        still = _without_dropout(self.model)
        self._note(f"DPO compares with {words}." + (" The base's dropout is off." if still else ""))

    def _loop_options(self) -> dict[str, Any]:
        reference, self.reference = self.reference, None
        return {"reference": reference, "beta": self.config.dpo_beta, "kind": self.config.dpo_loss_type}

    def close(self) -> None:
        if self.loop is not None:
            self.loop.pair_loss = None
        super().close()


def keep_as_reference(model: Any) -> None:
    """Puts a frozen copy of the adapter "default" beside it, as "ref"; "default" stays the one that is trained."""
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter(REFERENCE, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                model.get_parameter(name.replace(".default", f".{REFERENCE}")).copy_(parameter)
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}" in name:
            parameter.requires_grad_(False)


def _without_dropout(model: Any) -> bool:
    """Switches the base's own dropout off, as TRL does: its noise would be taken for a preference. LoRA's stays."""
    found = False
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name and module.p:
            module.p, found = 0.0, True
    return found
