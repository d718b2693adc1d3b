"""Cross entropy over trained tokens: whole logits, or, for packs, a chunk of them at a time.

Prompts carry no loss, and a vocabulary is large: most of the logits of a batch are computed to be thrown away. For a
pack (``packing``) the hidden states of trained tokens are chosen before the output layer, which then runs chunk by
chunk; the gradient with respect to the hidden states is computed on the way, so logits never exist whole. The method is
that of Liger's fused linear cross entropy (https://arxiv.org/abs/2410.10989). For a plain linear output layer its
gradient is written out and takes the place of the logits; any other one (quantised, with LoRA on it) goes through
autograd. Capped and scaled logits are known to both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .attention import rows
from .bases import vocabulary_rows

__all__ = ["HeadLoss", "TokenLoss", "agrees"]

# Logits that exist at a time, numbers: 32 MB in float32.
_CHUNK = 1 << 23


class TokenLoss:
    """Cross entropy summed over trained tokens and divided by their number in the whole optimizer step."""

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Args: ``outputs["logits"]``: (batch, seq, vocab); ``labels``: (batch, seq), -100 where there is no loss."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        target = labels[..., 1:].reshape(-1).to(logits.device)
        scores = logits[..., :-1, :].float().reshape(-1, logits.shape[-1])
        total = F.cross_entropy(scores, target, reduction="sum", label_smoothing=self.smoothing)
        count = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count


class HeadLoss(TokenLoss):
    """The same for a pack, without its logits. For anything else it is ``TokenLoss``.

    Args:
        model: what is trained; its output layer is run by this object.
        smoothing: label smoothing.
    """

    def __init__(self, model: Any, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head = whole.get_output_embeddings()
        config = whole.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.chunk = max(_CHUNK // vocabulary_rows(model), 16)
        self._hidden: torch.Tensor | None = None

    @contextlib.contextmanager
    def instead_of_logits(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Meanwhile the model computes no logits; ``__call__`` does, of the trained tokens.

        Args:
            inputs: of a pack: ``labels`` (1, seq).

        Yields:
            The inputs to give to the model.
        """
        places = (inputs["labels"][0, 1:] != -100).nonzero().flatten()

        def keep(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hook.remove()  # the next one to run the output layer is ``__call__``
            self._hidden = args[0]
            return (args[0][:, :0],)

        hook = self.head.register_forward_pre_hook(keep)
        try:
            yield {**inputs, "logits_to_keep": places}
        finally:
            hook.remove()
            self._hidden = None

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """As ``TokenLoss``; in a pack the logits are not looked at."""
        if self._hidden is None:
            return super().__call__(outputs, labels, num_items_in_batch)
        targets = labels[0, 1:]
        targets = targets[targets != -100]
        hidden = self.hidden
        if hidden.shape[0] != targets.shape[0]:
            raise ValueError(f"{targets.shape[0]} trained tokens, and the output layer was given {hidden.shape[0]}")
        trained = [p for p in self.head.parameters() if p.requires_grad]
        pieces: Any = _pieces_by_hand if self._by_hand(hidden) else _pieces
        total = _Chunked.apply(hidden, targets, self, pieces, *trained)
        return total / (targets.shape[0] if num_items_in_batch is None else num_items_in_batch)

    def _by_hand(self, hidden: torch.Tensor) -> bool:
        """May the gradient of this output layer be written out? In float32, without label smoothing."""
        head = self.head
        plain = type(head) is torch.nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
        same = plain and hidden.dtype == head.weight.dtype == torch.float32
        return same and not self.smoothing and not torch.is_autocast_enabled(hidden.device.type)

    @property
    def hidden(self) -> torch.Tensor:
        """What the output layer was given, (trained tokens, width)."""
        assert self._hidden is not None
        return self._hidden[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, width) to (tokens, vocab), float32."""
        logits = self.head(hidden).float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class _Chunked(torch.autograd.Function):
    """Summed cross entropy; its gradients are ready when the forward pass is."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, loss: HeadLoss, pieces: Any, *trained: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        into_hidden = torch.empty_like(hidden)
        into_trained = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for piece in range(0, hidden.shape[0], loss.chunk):
            at = slice(piece, piece + loss.chunk)
            total += pieces(loss, hidden[at].detach(), targets[at], into_hidden[at], trained, into_trained)
        ctx.save_for_backward(into_hidden, *(g.to(p.dtype) for g, p in zip(into_trained, trained, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:  # type: ignore[override]
        into_hidden, *into_trained = (gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return into_hidden, None, None, None, *into_trained


def _pieces(
    loss: HeadLoss,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    into_hidden: torch.Tensor,
    trained: Sequence[torch.Tensor],
    into_trained: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The summed loss of some tokens, by autograd; writes or adds its gradients to ``into_…``."""
    own = hidden.requires_grad_()
    with torch.enable_grad():
        total = F.cross_entropy(loss.logits(own), targets, reduction="sum", label_smoothing=loss.smoothing)
    found, *more = torch.autograd.grad(total, [own, *trained])
    into_hidden.copy_(found)
    for sum_, part in zip(into_trained, more, strict=True):
        sum_ += part
    return total.detach()


def _pieces_by_hand(
    loss: HeadLoss,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    into_hidden: torch.Tensor,
    trained: Sequence[torch.Tensor],
    into_trained: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The same: the logits become their own gradient, softmax less one at the target, in place."""
    weight, bias = loss.head.weight, loss.head.bias
    logits = F.linear(hidden, weight, bias)
    if loss.scale != 1.0:
        logits.mul_(loss.scale)
    slope = None
    if loss.cap is not None:
        bent = logits.div_(loss.cap).tanh_()
        slope = 1 - bent * bent
        logits = bent.mul_(loss.cap)
    target = targets[:, None]
    ends = torch.logsumexp(logits, 1, keepdim=True)
    total = (ends - logits.gather(1, target)).sum()
    into_logits = logits.sub_(ends).exp_()
    into_logits.scatter_add_(1, target, torch.full_like(ends, -1.0))
    if slope is not None:
        into_logits.mul_(slope)
    if loss.scale != 1.0:
        into_logits.mul_(loss.scale)
    torch.mm(into_logits, weight, out=into_hidden)
    for parameter, sum_ in zip(trained, into_trained, strict=True):
        if parameter is weight:
            sum_.addmm_(into_logits.T, hidden)
        else:
            sum_ += into_logits.sum(0)
    return total


@torch.no_grad()
def agrees(model: Any, loss: HeadLoss) -> bool:
    """True when ``loss`` makes this model's own logits, of the trained tokens of two short rows in a pack."""
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary_rows(model), (1, 18), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[0, [0, 1, 2, 9, 10]] = -100
    places = torch.arange(9, device=device).repeat(2)[None]
    pack = {"input_ids": ids, "position_ids": places, "use_cache": False}
    training = model.training
    model.eval()
    try:
        with rows(places):
            whole = model(**pack).logits[0, :-1][labels[0, 1:] != -100].float()
            with loss.instead_of_logits({**pack, "labels": labels}) as inputs:
                inputs.pop("labels")
                model(**inputs)
                chosen = loss.logits(loss.hidden)
    except (TypeError, ValueError, AttributeError):  # a model of another build: it knows no logits_to_keep, has no head
        return False
    finally:
        model.train(training)
    # Half precision rounds the products of another shape differently.
    most = 1e-4 if model.dtype == torch.float32 else 0.2
    return chosen.shape == whole.shape and float((chosen - whole).abs().max() / whole.std()) <= most
