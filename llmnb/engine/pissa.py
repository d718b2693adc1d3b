"""PiSSA: LoRA that begins with the largest singular values of each weight (Meng et al. 2024,
https://arxiv.org/abs/2404.02948).

The method trains ``W - B0 A0 + B A`` from ``B A = B0 A0``, the principal part of W. peft takes ``B0 A0`` out of the
base; its adapters then fit no other copy of that base, and in 16 bits the rest is rounded. Here the base stays as it is
and ``B0 A0`` is subtracted beside it, so an adapter that is switched off gives the base. A checkpoint holds
``[B, -B0]`` and ``[A; A0]``: a plain LoRA adapter of twice the rank, which fits the base as everyone has it. Knows no
rows and no loop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import ModelError
from .adapters import read_weights

__all__ = ["Principal"]

_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Principal:
    """The principal parts of a model's adapted weights, subtracted wherever its LoRA adapter acts.

    Args:
        model: a ``PeftModel`` with a new LoRA adapter "default"; its A and B are set.
        kind: "pissa" for the whole decomposition, "pissa_niter_N" for a randomised one in N iterations (Halko et al.
            2011, https://arxiv.org/abs/0909.4061), which takes seconds where the other takes minutes.
        checkpoint: a checkpoint of the same run: its parts are taken in place of new ones.

    Raises:
        ModelError: an adapted module is no plain linear layer, or the checkpoint is of another run.
    """

    def __init__(self, model: Any, kind: str, checkpoint: Path | None = None) -> None:
        from peft.tuners.lora import LoraLayer
        from transformers.pytorch_utils import Conv1D

        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        odd = [name for name, layer in self.layers.items() if type(layer.base_layer) not in (torch.nn.Linear, Conv1D)]
        if odd:
            layer = type(self.layers[odd[0]].base_layer).__name__
            raise ModelError(
                "PiSSA decomposes the weights of plain linear layers only.",
                seen=f"{odd[0]} is {layer}",
                todo="lora_init='default', or other lora_target_modules",
            )
        found = read_weights(checkpoint) if checkpoint is not None else None
        for name, layer in self.layers.items():
            a, b = _decomposed(layer, kind) if found is None else self._parts(found, name, 1)
            layer.register_buffer("principal_a", a.to(layer.weight.device), persistent=False)
            layer.register_buffer("principal_b", b.to(layer.weight.device), persistent=False)
            layer.register_forward_hook(_subtract)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)

    def _parts(self, found: dict[str, Any], name: str, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a module in a checkpoint's tensors: those that were trained (0), or those subtracted (1)."""
        rank = self.layers[name].r["default"]
        a, b = (found.get(f"{name}.lora_{side}.weight") for side in "AB")
        if a is None or b is None or a.shape[0] != 2 * rank:
            raise ModelError("This checkpoint is not of a run with PiSSA.", seen=name, todo="set lora_init='default'")
        begin = half * rank
        return a[begin : begin + rank], b[:, begin : begin + rank] * (-1 if half else 1)

    def load(self, model: Any, folder: Path) -> None:
        """What a checkpoint had trained, into the adapter; also its biases, tokens and whole modules.

        Raises:
            ModelError: it is of another run.
        """
        from peft.utils import set_peft_model_state_dict

        found = read_weights(folder)
        for name in self.layers:
            a, b = self._parts(found, name, 0)
            found |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        set_peft_model_state_dict(model, found, adapter_name="default")

    def complete(self, folder: Path) -> None:
        """Makes of a saved adapter one that fits the base: what is subtracted stands beside what was trained."""
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / _FILE)
        for name, layer in self.layers.items():
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            tensors[a] = torch.cat([tensors[a], layer.principal_a.to("cpu", tensors[a].dtype)])
            tensors[b] = torch.cat([tensors[b], -layer.principal_b.to("cpu", tensors[b].dtype)], dim=1).contiguous()
        save_file(tensors, folder / _FILE, metadata={"format": "pt"})
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        rank = 2 * config["r"]
        scaling = next(iter(self.layers.values())).scaling["default"]
        alpha = scaling * rank
        config.update(r=rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, use_rslora=False)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _decomposed(layer: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (rank, in) and B0 (out, rank), float32: scaling × B0 A0 is the weight's best approximation of that rank."""
    rank, scaling = layer.r["default"], layer.scaling["default"]
    weight = layer.base_layer.weight.detach().float()
    weight = weight.T if layer.fan_in_fan_out else weight
    if rank > min(weight.shape):
        raise ModelError(
            "PiSSA's rank is above that of a weight.", seen=f"{rank}; {tuple(weight.shape)}", todo="lora_r"
        )
    if kind == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=int(kind.rsplit("_", 1)[1]))
        v = v.T
    root = (s / scaling).sqrt()
    return (root[:, None] * v).contiguous(), (u * root).contiguous()


def _subtract(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters or layer.merged:
        return output
    moved = F.linear(F.linear(args[0].to(layer.principal_a.dtype), layer.principal_a), layer.principal_b)
    return output - (moved * layer.scaling["default"]).to(output.dtype)
