"""LoRA adapters: attach a new one, load one that was trained, count, and say which modules there are.

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685); Dettmers et al. 2023, QLoRA
(https://arxiv.org/abs/2305.14314); Kalajdzievski 2023, rsLoRA (https://arxiv.org/abs/2312.03732); Liu et al. 2024,
DoRA (https://arxiv.org/abs/2402.09353). Built on peft. Knows nothing of rows or training loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import TrainConfig, thaw
from ..errors import AdapterMismatch, ModelError, near
from . import manifest

__all__ = [
    "attach_lora",
    "check_base",
    "check_dtypes",
    "count_parameters",
    "extras",
    "find_adapter",
    "linear_modules",
    "load_adapter",
    "lora_modules",
    "read_weights",
]


# --- a new adapter ------------------------------------------------------------------------------------------


def attach_lora(model: Any, config: TrainConfig, new_tokens: Sequence[int] = (), task: str = "CAUSAL_LM") -> Any:
    """Puts a new LoRA adapter on a base; everything else is frozen.

    Adapter weights are float32 whatever the base is, because small updates vanish in 16 bits.

    Args:
        model: the base, plain or quantised.
        config: ``lora_*`` settings.
        new_tokens: ids of tokens that the base does not have; their embedding rows are trained with the adapter.
        task: peft's task type; with "SEQ_CLS" the new classification head is trained and stored too.

    Returns:
        The ``peft.PeftModel``.

    Raises:
        ModelError: a target matches no module (the modules there are are named), or a LoRA option is wrong.
    """
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, config.lora_target_modules)
    try:
        lora = LoraConfig(
            task_type=task,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias=config.lora_bias,  # type: ignore[arg-type]
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            target_modules=targets,
            # GPT-2's Conv1D holds its weight as (in, out); peft turns this on for it, and warns when it has to.
            fan_in_fan_out=_is_conv1d(model),
            trainable_token_indices=list(new_tokens) or None,
        )
        wrapped = get_peft_model(model, lora)
    except (ValueError, NotImplementedError) as error:
        raise ModelError("The LoRA adapter cannot be put on this model.", seen=error, todo=_offer(model)) from error
    found = lora_modules(wrapped)
    if not found:
        raise ModelError("LoRA found no module to change.", seen=config.lora_target_modules, todo=_offer(model))
    _head_is_free(wrapped, config.lora_target_modules)
    return wrapped


def _targets(model: Any, given: Any) -> Any:
    """Target modules as peft takes them, each of them checked to match something."""
    given = thaw(given)
    if isinstance(given, str):
        if given.lower() == "all-linear":
            return "all-linear"
        if "," in given and not any(c in given for c in "|()*\\["):
            given = [part.strip() for part in given.split(",") if part.strip()]
        else:
            return _regex(model, given)
    names = [name for name, _ in linear_modules(model)] + [name for name, _ in model.named_modules()]
    missing = [t for t in given if not any(n == t or n.endswith("." + t) for n in names)]
    if missing or not given:
        leaves = sorted({name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)})
        close = [near(t, leaves, 1) for t in missing]
        hint = ", ".join(f"{t} → {c[0]}" for t, c in zip(missing, close) if c)
        raise ModelError(
            "LoRA target modules that this model does not have: " + (", ".join(map(str, missing)) or "none was given"),
            seen=_census(model),
            todo=f"did you mean {hint}?" if hint else _offer(model),
        )
    return list(given)


def _regex(model: Any, pattern: str) -> str:
    import re

    try:
        found = any(re.fullmatch(pattern, name) for name, _ in model.named_modules())
    except re.error as error:
        raise ModelError(f"lora_target_modules={pattern!r} is not a regular expression.", seen=error) from error
    if found:
        return pattern
    if any(name.rsplit(".", 1)[-1] == pattern for name, _ in model.named_modules()):
        return rf".*\.{re.escape(pattern)}|{re.escape(pattern)}"  # one plain name
    close = near(pattern, {name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)})
    raise ModelError(
        f"LoRA target {pattern!r} matches no module.",
        seen=_census(model),
        todo=f"did you mean {' or '.join(close)}?" if close else _offer(model),
    )


def linear_modules(model: Any) -> list[tuple[str, Any]]:
    """Linear layers (also quantised ones, and GPT-2's Conv1D) with their full names, the output head left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]


def _is_conv1d(model: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    kinds = {isinstance(module, Conv1D) for _, module in linear_modules(model)}
    return kinds == {True}


def _census(model: Any) -> str:
    counts = Counter(name.rsplit(".", 1)[-1] for name, _ in linear_modules(model))
    return "linear modules here: " + ", ".join(f"{name} (×{count})" for name, count in counts.items())


def _offer(model: Any) -> str:
    return 'lora_target_modules="all-linear", or some of: ' + ", ".join(
        sorted({name.rsplit(".", 1)[-1] for name, _ in linear_modules(model)})
    )


def lora_modules(model: Any) -> list[str]:
    """Full names of the modules that carry a LoRA adapter."""
    from peft.tuners.lora import LoraLayer

    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _head_is_free(wrapped: Any, asked: Any) -> None:
    """``all-linear`` must not reach the output head: it is as large as the vocabulary, and often tied."""
    from peft.tuners.lora import LoraLayer

    head = wrapped.get_base_model().get_output_embeddings()
    if isinstance(asked, str) and asked.lower() == "all-linear" and isinstance(head, LoraLayer):
        raise ModelError("all-linear reached the output head.", todo=_offer(wrapped.get_base_model()))


# --- an adapter that was trained ----------------------------------------------------------------------------


def find_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter: a folder, or a hub id whose files are fetched.

    Raises:
        ModelError: neither.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        if manifest.kind_of(path) is None:
            seen = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "an empty folder"
            raise ModelError(
                f"{path} holds neither an adapter nor a model.",
                seen=seen,
                todo="an adapter folder has adapter_config.json and adapter_model.safetensors",
            )
        return path
    if path.is_absolute() or str(adapter).count("/") != 1:
        raise ModelError(f"There is no adapter folder {adapter}.", seen=f"tried {path.absolute()}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(adapter)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"The adapter {adapter} could not be loaded.",
            seen=f"tried the folder {path.absolute()} and the hub id {adapter}: {error}",
            todo="check the name; without the network, give a folder",
        ) from error


def check_base(folder: Path, base: str, base_fingerprint: str) -> None:
    """Raises when an adapter was trained on another base.

    An adapter from elsewhere, without ``llmnb.json``, cannot be checked and passes.

    Raises:
        AdapterMismatch: the recorded fingerprint is another.
    """
    card = manifest.read(folder)
    recorded = card.get("base_fingerprint")
    if recorded and recorded != base_fingerprint:
        raise AdapterMismatch(
            "This adapter was trained on another base model.",
            seen=f"adapter: {card.get('base')} ({recorded}); here: {base} ({base_fingerprint})",
            todo=f"load it with model_name_or_path={card.get('base')!r}",
        )


def read_weights(folder: Path) -> dict[str, Any]:
    """The tensors of an adapter's file, on the CPU.

    Raises:
        ModelError: it cannot be read.
    """
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        return load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read.", seen=error) from error


def extras(folder: Path) -> set[str]:
    """What an adapter has beside LoRA's matrices: "tokens" (rows of the embeddings), "modules" (whole ones), "bias".

    Raises:
        ModelError: it cannot be read.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read.", seen=error) from error
    found = {
        "tokens": getattr(config, "trainable_token_indices", None),
        "modules": getattr(config, "modules_to_save", None),
        "bias": getattr(config, "bias", "none") != "none",
    }
    return {name for name, there in found.items() if there}


def load_adapter(model: Any, folder: Path, *, name: str = "default", trainable: bool = False) -> Any:
    """Puts a trained adapter on a base, or on a model that has others.

    Args:
        model: a base or a ``PeftModel``.
        folder: holds ``adapter_config.json`` and its weights.
        name: the adapter's name on this model.
        trainable: to train it further.

    Returns:
        The ``PeftModel``; the adapter is active.

    Raises:
        AdapterMismatch: keys or shapes are not those of this model.
        ModelError: the files cannot be read.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    weights = read_weights(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The adapter in {folder} cannot be read.", seen=error) from error
    config.inference_mode = not trainable
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            from peft import get_peft_model

            model = get_peft_model(model, config, adapter_name=name)
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (ValueError, KeyError, RuntimeError) as error:
        raise AdapterMismatch("This adapter does not fit this model.", seen=error, todo="check its base") from error
    missing = [k for k in result.missing_keys if f".{name}." in k and ("lora_" in k or "token_adapter" in k)]
    if missing or result.unexpected_keys:
        raise AdapterMismatch(
            f"This adapter does not fit this model: {len(missing)} weights are missing, "
            f"{len(result.unexpected_keys)} belong nowhere.",
            seen=", ".join((missing + list(result.unexpected_keys))[:6]),
            todo="check that the adapter belongs to this base, and that its files are whole",
        )
    model.set_adapter(name)
    if not trainable:
        model.requires_grad_(False)
        model.eval()
    return model


# --- checks -------------------------------------------------------------------------------------------------


def count_parameters(model: Any) -> tuple[int, int]:
    """``(trained, all)`` parameters; a 4-bit weight counts as the elements it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        # A ZeRO-3 shard keeps its whole size beside it.
        count = getattr(parameter, "ds_numel", None) or (_product(shape) if shape is not None else parameter.numel())
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def _product(shape: Sequence[int]) -> int:
    out = 1
    for size in shape:
        out *= int(size)
    return out


def check_dtypes(model: Any, *, allow: Any = None) -> str:
    """The dtype of all trained weights, checked to be one, and to be float32 unless another was asked for.

    Args:
        model: ready to train.
        allow: a dtype that the person asked for.

    Raises:
        ModelError: trained weights in another dtype (an optimizer step would round most of it away), or none.
    """
    import torch

    kinds = Counter(p.dtype for p in model.parameters() if p.requires_grad)
    if not kinds:
        raise ModelError("Nothing in this model is trained.", todo="check use_lora and lora_target_modules")
    wrong = [dtype for dtype in kinds if dtype not in (torch.float32, torch.float64, allow)]
    if wrong or len(kinds) > 1:
        first = next(n for n, p in model.named_parameters() if p.requires_grad and p.dtype == (wrong or list(kinds))[0])
        raise ModelError(
            "Weights that are trained are not all in float32.",
            seen=", ".join(f"{str(d).removeprefix('torch.')}: {c} tensors" for d, c in kinds.items()) + f" ({first})",
            todo="leave dtype out of model_kwargs, and ask for bf16=True instead",
        )
    return str(next(iter(kinds))).removeprefix("torch.")
