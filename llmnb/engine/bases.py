"""Base models and tokenizers: from a folder or the hub, plain or quantised.

Knows transformers' loading and bitsandbytes; knows nothing of rows, adapters or training. Everything heavy is
imported inside functions, so that ``translate_kwargs`` costs nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import ModelSpec, thaw
from ..errors import MissingPackage, ModelError, near
from .fingerprints import fingerprint
from .vocabulary import ensure_pad, fit_vocabulary, stop_as_trained, vocabulary_rows

__all__ = [
    "HUB",
    "context_of",
    "dtype_of",
    "ensure_pad",
    "fingerprint",
    "fit_vocabulary",
    "load_base",
    "load_tokenizer",
    "quantised_bits",
    "quiet",
    "translate_kwargs",
    "stop_as_trained",
    "vocabulary_rows",
    "where",
]

BITS = (None, 4, 8)
HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


# --- spelling -----------------------------------------------------------------------------------------------


def translate_kwargs(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Old spellings of ``from_pretrained`` as today's.

    ``torch_dtype`` → ``dtype``, ``use_flash_attention_2`` → ``attn_implementation``, ``use_auth_token`` →
    ``token``; ``load_in_4bit``, ``load_in_8bit``, ``bnb_4bit_*`` and ``llm_int8_*`` → a ``quantization_config``.

    Raises:
        ModelError: two spellings of one thing that say different things.
    """
    kwargs = thaw(dict(model_kwargs))
    for old, new in (("torch_dtype", "dtype"), ("use_auth_token", "token")):
        if old in kwargs:
            _set(kwargs, new, kwargs.pop(old), old)
    if kwargs.pop("use_flash_attention_2", False):
        _set(kwargs, "attn_implementation", "flash_attention_2", "use_flash_attention_2")
    loose = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith(("load_in_", "bnb_4bit_", "llm_int8_"))}
    if loose.get("load_in_4bit") and loose.get("load_in_8bit"):
        raise ModelError("A model is loaded in 4 or in 8 bits, not in both.", seen=loose, todo="drop one of them")
    if any(loose.get(k) for k in ("load_in_4bit", "load_in_8bit")):
        wanted = {k: v for k, v in loose.items() if not (k.startswith("load_in_") and not v)}
        _set(kwargs, "quantization_config", {"quant_method": "bitsandbytes", **wanted}, next(iter(wanted)))
    elif any(not k.startswith("load_in_") for k in loose):
        raise ModelError(
            "Settings of a quantised load without the load itself.",
            seen=", ".join(sorted(loose)),
            todo="add load_in_4bit=True or load_in_8bit=True",
        )
    if kwargs.get("id2label"):  # JSON has no whole numbers as keys
        kwargs["id2label"] = {int(number): name for number, name in kwargs["id2label"].items()}
    return kwargs


def _set(kwargs: dict[str, Any], name: str, value: Any, said_as: str) -> None:
    if kwargs.get(name) is not None and value is not None and kwargs[name] != value:
        raise ModelError(
            f"{said_as} and {name} say different things.",
            seen=f"{said_as}={value!r}, {name}={kwargs[name]!r}",
            todo=f"give {name} only",
        )
    if value is not None:
        kwargs[name] = value


def where(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``from_pretrained``'s keyword arguments that says where files are."""
    return {name: kwargs[name] for name in HUB if name in kwargs}


def quantised_bits(model: Any) -> int | None:
    """4 or 8 when the model was loaded by bitsandbytes, else None."""
    if getattr(model, "is_loaded_in_4bit", False):
        return 4
    return 8 if getattr(model, "is_loaded_in_8bit", False) else None


# --- loading ------------------------------------------------------------------------------------------------


def load_base(
    spec: ModelSpec, *, bits: int | None = None, training: bool = False, dtype: str | None = None
) -> tuple[Any, Any]:
    """The base model and its tokenizer.

    Args:
        spec: which model. ``spec.model_kwargs`` may hold a ``quantization_config``, a ``device_map`` and a
            ``dtype`` of the person's own; they are respected.
        bits: 4 or 8 (bitsandbytes); None takes ``spec.bits``. 4 is NF4.
        training: one process trains on one device, so a quantised model is put there whole.
        dtype: of the weights when the person named none; None: float32 without a GPU (where 16-bit products
            are several times slower), else as the files are.

    Raises:
        ModelError: no such folder or hub id, another ``bits``, files that cannot be read.
        MissingPackage: bitsandbytes is needed.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kwargs = translate_kwargs(spec.model_kwargs)
    bits = spec.bits if bits is None else bits
    if kwargs.get("dtype") is None:
        kwargs["dtype"] = dtype or ("auto" if torch.cuda.is_available() else "float32")
    kwargs["dtype"] = _dtype(kwargs["dtype"])
    _quantise(kwargs, bits)
    if kwargs.get("quantization_config") is not None and "device_map" not in kwargs:
        kwargs["device_map"] = {"": _device()}
    tokenizer = load_tokenizer(spec)
    auto = AutoModelForCausalLM if spec.task == "causal-lm" else AutoModelForSequenceClassification
    check_path(spec.model_name_or_path)
    try:
        with quiet():
            model = auto.from_pretrained(_name(spec), **kwargs)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise explain(spec.model_name_or_path, error, "model") from error
    except TypeError as error:
        raise ModelError(
            "model_kwargs holds something that this model does not take.",
            seen=error,
            todo="model_kwargs go to from_pretrained",
        ) from error
    if training:
        _keep_four_bits(model)
    if not training and "device_map" not in kwargs and torch.cuda.is_available():
        model.to(_device())
    return model, tokenizer


def _keep_four_bits(model: Any) -> None:
    """An evaluation must not change what is trained after it: on CPUs with AVX512-BF16, bitsandbytes would repack
    4-bit weights at the first one, and compute in bfloat16 from there on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(spec: ModelSpec, folder: str | Path | None = None) -> Any:
    """The tokenizer of a checkpoint folder when it has one, else the base's.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    kwargs = thaw(dict(spec.tokenizer_kwargs))
    model_kwargs = translate_kwargs(spec.model_kwargs)
    for name in (*HUB, "trust_remote_code"):
        if name in model_kwargs:
            kwargs.setdefault(name, model_kwargs[name])
    name = _name(spec)
    if folder is not None and (Path(folder) / "tokenizer_config.json").is_file():
        name = str(folder)
        kwargs = {k: v for k, v in kwargs.items() if k not in HUB}
    else:
        check_path(spec.model_name_or_path)
    more = kwargs.pop("additional_special_tokens", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        if more:
            # transformers 5 takes this only after loading; the tokens that the tokenizer has already stay.
            tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
        return tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise explain(spec.model_name_or_path, error, "tokenizer") from error


def context_of(spec: ModelSpec) -> int | None:
    """The longest row that the base can take, in tokens; None when its config does not say.

    Raises:
        ModelError: the config cannot be loaded.
    """
    from transformers import AutoConfig

    kwargs = translate_kwargs(spec.model_kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k in (*HUB, "trust_remote_code")}
    check_path(spec.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(_name(spec), **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise explain(spec.model_name_or_path, error, "model") from error
    return getattr(config, "max_position_embeddings", None)


def dtype_of(spec: ModelSpec) -> Any:
    """The dtype that the person named in model_kwargs; None when they named none."""
    dtype = translate_kwargs(spec.model_kwargs).get("dtype")
    return None if dtype in (None, "auto") else _dtype(dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars, which would fill a worker's log."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _name(spec: ModelSpec) -> str:
    path = Path(spec.model_name_or_path).expanduser()
    return str(path) if path.is_dir() else spec.model_name_or_path


def _device() -> Any:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


def _dtype(value: Any) -> Any:
    import torch

    if not isinstance(value, str) or value == "auto":
        return value
    word = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}.get(
        value.removeprefix("torch."), value.removeprefix("torch.")
    )
    found = getattr(torch, word, None)
    if not isinstance(found, torch.dtype):
        known = ("float32", "bfloat16", "float16", "auto")
        close = near(word, known)
        raise ModelError(f"dtype={value!r} is not a dtype.", todo="one of " + ", ".join(close or known))
    return found


def _quantise(kwargs: dict[str, Any], bits: int | None) -> None:
    """Puts a ``quantization_config`` object into ``kwargs`` when one is asked for."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ModelError(f"bits={bits!r} is not possible.", todo="None, 4 or 8")
    given = kwargs.get("quantization_config")
    if isinstance(given, Mapping):
        given = kwargs["quantization_config"] = _quantization_config(dict(given), kwargs)
    if given is not None:
        own = 4 if getattr(given, "load_in_4bit", False) else 8 if getattr(given, "load_in_8bit", False) else None
        if bits is not None and own is not None and own != bits:
            raise ModelError(
                f"bits={bits}, and the quantization_config in model_kwargs says {own}.",
                todo="give one of the two",
            )
    elif bits is not None:
        kwargs["quantization_config"] = _quantization_config(
            {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}, kwargs
        )
    if kwargs.get("quantization_config") is None:
        kwargs.pop("quantization_config", None)


def _quantization_config(values: dict[str, Any], kwargs: Mapping[str, Any]) -> Any:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    if values.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return AutoQuantizationConfig.from_dict(values)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", "quant", "Loading a model in 4 or 8 bits")
    _quieten_bitsandbytes()
    values = {k: v for k, v in values.items() if k not in ("quant_method", "_load_in_4bit", "_load_in_8bit")}
    if values.get("load_in_4bit"):
        values.setdefault("bnb_4bit_quant_type", "nf4")
        if values.get("bnb_4bit_compute_dtype") is None:
            dtype = kwargs.get("dtype")
            fast = torch.bfloat16 if torch.cuda.is_available() else torch.float32
            values["bnb_4bit_compute_dtype"] = dtype if isinstance(dtype, torch.dtype) else fast
    return BitsAndBytesConfig(**values)


class _Once(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = str(record.msg) not in self.said
        self.said.add(str(record.msg))
        return new


def _quieten_bitsandbytes() -> None:
    """Its 8-bit product says the same at every call."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(f, _Once) for f in logger.filters):
        logger.addFilter(_Once())


# --- errors -------------------------------------------------------------------------------------------------


def check_path(name: str) -> None:
    """Raises when a name that can only be a folder is not one."""
    if not name:
        raise ModelError("No base model was named.", todo="give model_name_or_path: a folder or a hub id")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"The folder {name} holds no model: it has no config.json.",
                seen=", ".join(sorted(p.name for p in path.iterdir())[:12]) or "an empty folder",
                todo="give the folder that save_pretrained wrote",
            )
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = near(path.name, beside)
        raise ModelError(
            f"There is no folder {name}.",
            seen=f"tried {path.absolute()}; a hub id has the form owner/name",
            todo="did you mean " + " or ".join(str(path.parent / c) for c in close) + "?"
            if close
            else "check the path; a relative one starts where this process was started",
        )


def explain(name: str, error: Exception, part: str) -> ModelError:
    """An error of from_pretrained in words: what was tried, and what to do."""
    text = str(error).strip()
    tried = f"tried the folder {Path(name).absolute()} (not there) and the hub id {name}"
    if Path(name).expanduser().is_dir():
        tried = f"tried the folder {Path(name).expanduser().absolute()}"
    low = text.lower()
    if "trust_remote_code" in low:
        todo = "read that code; when you trust it, model_kwargs={'trust_remote_code': True}"
    elif "gated" in low or "401" in low or "403" in low:
        todo = "accept the model's terms on its page and log in (hf auth login), or give a token in model_kwargs"
    elif isinstance(error, ImportError):
        todo = "install what the message names"
    elif "couldn't connect" in low or "offline" in low or "local_files_only" in low or "connection" in low:
        todo = "the hub cannot be reached: check the network, or give a folder that holds the model"
    elif "not a local folder" in low or "is not a valid model identifier" in low or "404" in low:
        todo = "check the spelling on huggingface.co; a private model needs a token in model_kwargs"
    else:
        todo = "check that the files are whole, and that this transformers knows the architecture"
    first = "\n".join(line for line in text.splitlines()[:3])
    return ModelError(f"The {part} {name} could not be loaded.", seen=f"{tried}; {first}", todo=todo)
