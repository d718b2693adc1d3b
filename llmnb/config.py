"""What to train, as frozen values: ``ModelSpec`` (which model) and ``TrainConfig`` (how).

Both go to JSON and back without loss, hold no secret, and never change once made. This room knows no
database, no torch and no Ray. Values that have no JSON form (a transform, a ``RunConfig``) travel beside the
config in ``job.TrainJob``; the config records their source text or a description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from . import query
from .errors import ConfigError, Fault

__all__ = ["DPO_LOSSES", "Frozen", "ModelSpec", "TrainConfig", "freeze_value", "setting", "unstreamable"]


class Frozen(dict[str, Any]):
    """A dict that cannot be changed. Compares and serialises like a dict."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this value was frozen with its config; make a new trainer to change it")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]
    __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return freeze_value, (dict(self),)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items(), key=lambda item: item[0])))


def freeze_value(value: Any) -> Any:
    """Dicts to ``Frozen``, lists and sets to tuples, all the way down."""
    if isinstance(value, Mapping):
        return Frozen((str(k), freeze_value(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(freeze_value(v) for v in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(freeze_value(v) for v in value))
    return value


def thaw(value: Any) -> Any:
    """The plain, changeable form: dicts and lists all the way down."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [thaw(v) for v in value]
    return value


def setting(default: Any = MISSING, unit: str = "", help: str = "", **more: Any) -> Any:
    """A dataclass field with its unit and its consequence, read by forms, docs and error texts."""
    metadata = {"unit": unit, "help": help, **more}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: Frozen(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Json:
    """``to_json`` / ``from_json`` for the two dataclasses below."""

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers, None. No secret is in it."""
        out = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            out[f.name] = value.to_json() if isinstance(value, query.Query) else _selects_out(thaw(value))
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Any:
        """The value that ``to_json`` wrote.

        Raises:
            ConfigError: a field that this version does not know.
        """
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = [name for name in data if name not in known]
        if unknown:
            todo = "it was stored by a newer llmnb; upgrade this one"
            raise ConfigError([Fault(name, "is not a setting of this version", todo) for name in unknown])
        return cls(**{name: _selects_in(name, value) for name, value in data.items()})

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, f.name, freeze_value(getattr(self, f.name)))


def _selects_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v.to_json() if isinstance(v, query.Query) else _selects_out(v) for k, v in value.items()}
    return value


def _selects_in(name: str, value: Any) -> Any:
    if name == "select" and isinstance(value, Mapping):
        return query.from_json(value)
    if name == "eval_selects" and isinstance(value, Mapping):
        return {k: query.from_json(v) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class ModelSpec(_Json):
    """Which model: a base, how to load it, perhaps an adapter on it, and how to prompt it.

    ``model_kwargs`` are in today's spelling (``dtype``, ``quantization_config``, ``attn_implementation``).
    A dtype is a word (``"bfloat16"``); a quantization config is its ``to_dict()``.
    """

    identifier: str = setting("llm", help="the model's name in the database")
    model_name_or_path: str = setting("", help="hub id or folder of the base model")
    task: str = setting("causal-lm", help="causal-lm, or the name of a transformers pipeline")
    bits: int | None = setting(None, "bits", "4 or 8 load a quantised base: less memory, slower on the CPU")
    adapter_id: Any = setting(None, help="adapter on the base: a path, a hub id, or experiment/step")
    model_kwargs: Mapping[str, Any] = setting({}, help="passed to AutoModel….from_pretrained")
    tokenizer_kwargs: Mapping[str, Any] = setting({}, help="passed to AutoTokenizer.from_pretrained")
    prompt_template: str = setting("{input}", help="text around a prompt; {input} is the prompt")
    predict_kwargs: Mapping[str, Any] = setting({}, help="defaults of predict: max_new_tokens, do_sample, …")
    functions: Mapping[str, Any] = setting(
        {}, help="source text of a pipeline's preprocess and postprocess; for the record, never run from it"
    )


# Those of TRL whose loss is a mean over pairs: batches of any size then add up to the same step.
DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "apo_zero",
    "apo_down",
    "bco_pair",
    "nca_pair",
    "sppo_hard",
)


@dataclass(frozen=True)
class TrainConfig(_Json):
    """How to train. Made by ``LLMTrainer.freeze()``, which is the only validation."""

    identifier: str = setting("llm-trainer", help="the trainer's name in the database")
    # data
    select: query.Select | None = setting(None, help="which documents")
    key: Any = setting(
        None, help="column, tuple of columns, 'messages', (prompt, response), (prompt, chosen, rejected)"
    )
    key_kind: str | None = setting(
        None, help="text, pair or messages; None: inferred from the key and the rows, and said"
    )
    transform: str | None = setting(None, help="source text of the transform; the function travels in the job")
    eval_selects: Mapping[str, Any] = setting({}, help="named validation sets; none: the valid fold")
    max_seq_length: int = setting(512, "tokens", "longer rows are cut and counted; less memory when lower")
    train_on: str | None = setting(
        None, help="'answers' or 'all' tokens carry loss; None: answers for pairs and chats, all for text"
    )
    chat_template: str | None = setting(
        None, help="for a tokenizer without one: a Jinja chat template, or chatml, zephyr, llama3, phi3, gemma, mistral"
    )
    max_cut_share: float = setting(
        0.1,
        "share of rows",
        "a run refuses to start when more rows than this are left out or lose the end of an answer",
    )
    prompt_template: str | None = setting(None, help="None: the model's own")
    streaming: bool | None = setting(
        None,
        help="documents are read while the run trains: it starts at once, in bounded memory; "
        "None: from 200,000 documents on, where that can be",
    )
    cache_rows: bool = setting(
        True, help="tokenised rows stay in this machine's cache folder; the same documents are not tokenised twice"
    )
    padding_free: bool | None = setting(
        None,
        help="rows end to end without padding: same rows, steps and loss, less work. None: where the model can",
    )
    max_tokens_per_batch: int | None = setting(
        None,
        "tokens",
        "without padding: rows pass the model so many tokens at a time; same loss, less memory. None: 1024 on a CPU",
    )
    # method
    method: str = setting("sft", help="'sft' learns what documents say; 'dpo' learns which of two answers is preferred")
    dpo_beta: float = setting(0.1, help="DPO: higher stays nearer to the model it began from")
    dpo_loss_type: str = setting(
        "sigmoid", help="DPO: sigmoid is the paper's; hinge, ipo, apo_zero, … are variants of TRL"
    )
    use_lora: bool = setting(True, help="False trains all weights: more memory, whole-model checkpoints")
    lora_r: int = setting(8, "rank", "more: more capacity and memory")
    lora_alpha: int = setting(16, help="scale of the update is alpha / r")
    lora_dropout: float = setting(0.05, "probability", "above 0: a little regularisation, slower")
    fused_lora: bool | None = setting(
        None, help="LoRA's products in one piece: same gradients, less work. None: where lora_dropout is 0 and no DoRA"
    )
    lora_target_modules: Any = setting("all-linear", help="module names, or 'all-linear' (without lm_head)")
    lora_bias: str = setting("none", help="'none', 'all' or 'lora_only'")
    use_rslora: bool = setting(False, help="scale of the update is alpha / sqrt(r): high ranks learn as low ones do")
    use_dora: bool = setting(False, help="size and direction of each weight apart: often a little better, slower")
    lora_init: str = setting(
        "default",
        help="'pissa' begins with a weight's largest singular values and learns faster; 'pissa_niter_16' soon",
    )
    loraplus_lr_ratio: float | None = setting(None, "times", "LoRA's B learns so many times faster than A; 16 is usual")
    bits: int | None = setting(None, "bits", "4 or 8: train LoRA on a quantised base (QLoRA)")
    # where
    output_dir: str = setting("output", help="local folder; each run gets a folder of its own beneath it")
    deepspeed: Any = setting(None, help="a DeepSpeed configuration (a dict, or the path of its JSON file)")
    num_gpus: int | None = setting(None, "workers", "exactly so many; CPU workers where there is no GPU")
    log_to_db: bool = setting(True, help="False: the cluster never needs to reach the database")
    on_ray: bool | None = setting(None, help="None: decided by ray_configs, ray_address, deepspeed, GPUs")
    ray_configs: str | None = setting(None, help="description; the objects travel in the job")
    # stopping and choosing
    early_stopping_patience: int | None = setting(None, "evaluations", "stop after so many without a better one")
    early_stopping_threshold: float = setting(0.0, help="a better one is better by more than this")
    # everything that transformers' Trainer knows
    arguments: Mapping[str, Any] = setting({}, help="options of transformers.TrainingArguments that were given")
    training_kwargs: str | None = setting(None, help="names given to the Trainer; the objects travel in the job")


def unit_of(cls: type, name: str) -> str:
    """The unit of a field, "" when it has none."""
    return str(next(f for f in fields(cls) if f.name == name).metadata.get("unit", ""))


def unstreamable(config: Mapping[str, Any], arguments: Mapping[str, Any], task: str = "causal-lm") -> str | None:
    """Why documents cannot be read while a run trains, by its settings; None when they can.

    Args:
        config: settings of ``TrainConfig``: method, select.
        arguments: options of ``TrainingArguments``.
        task: the model's.
    """
    select = config.get("select")
    if task != "causal-lm":
        return f"a {task} model must know all labels before it trains"
    if config.get("method", "sft") != "sft":
        return "pairs of answers are read before the training"
    if isinstance(select, query.Select) and select.pipeline is not None:
        return "what an aggregation gives cannot be read by _id, one after another"
    if arguments.get("train_sampling_strategy", "random") not in ("random", "sequential"):
        return f"train_sampling_strategy={arguments['train_sampling_strategy']!r} must know the length of every row"
    if arguments.get("dataloader_num_workers"):
        return "dataloader_num_workers are processes of their own, and the documents are read by a thread of this one"
    return None
