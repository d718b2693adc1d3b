"""Which weights a base has, told from a small sample of them.

An adapter belongs to one base. Its name does not say which: folders are moved, hub repositories change. The
fingerprint does: model type and sizes, the layer and shape of each tensor, and up to 32 evenly spaced elements of
it. Names are left out, because transformers renames tensors when it loads and saves. Elements are compared as
bfloat16, so that the same weights stored as float32, float16 or bfloat16 are the same base, and they are read from the
base's own files, so that a quantised load is the same base too. Reads a few kilobytes of each file: a model of 8
billion parameters takes about as long as one of 8 million.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError

__all__ = ["fingerprint"]

_SAMPLES = 32
_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# safetensors' dtype names → (torch name, bytes per element)
_FLOATS = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}


def fingerprint(model_or_path: Any, **where: Any) -> str:
    """Identifies a base model's weights.

    Args:
        model_or_path: a folder, a hub id whose files are here, or a model in memory. A model that was loaded from a
            folder is told by that folder; only one that has no files is read from memory.
        where: ``revision``, ``subfolder``, ``token``, ``cache_dir`` of a hub id.

    Returns:
        32 hexadecimal digits.

    Raises:
        ModelError: the weights cannot be found.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        folder = _folder(str(model_or_path), where)
        return _digest(_config_of(folder), _file_samples(folder))
    model = model_or_path
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if name and os.path.isdir(name):
        return fingerprint(name)
    return _digest(model.config, _memory_samples(model))


def _digest(config: Any, samples: Iterable[tuple[str, tuple[int, ...], bytes]]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps({name: getattr(config, name, None) for name in _SIZES}, default=str).encode())
    for layer, shape, data in sorted((re.findall(r"\d+", name), shape, data) for name, shape, data in samples):
        digest.update(f"{layer}{list(shape)}".encode())
        digest.update(data)
    return digest.hexdigest()[:32]


def _folder(name: str, where: Mapping[str, Any]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path / where["subfolder"] if where.get("subfolder") else path
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json", **{k: v for k, v in where.items() if v is not None})
    except OSError as error:
        raise ModelError(f"The files of {name} are not here.", seen=error, todo="load the model first") from error
    return Path(str(found)).parent


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        # A model with code of its own: its config is read as plain values, because nothing of it is run here.
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return type("Config", (), values)


def _places(count: int) -> list[int]:
    """Up to ``_SAMPLES`` evenly spaced places among ``count`` elements, the first and the last among them."""
    if count <= _SAMPLES:
        return list(range(count))
    return [place * (count - 1) // (_SAMPLES - 1) for place in range(_SAMPLES)]


def _as_bfloat16(values: Any) -> bytes:
    import torch

    return values.detach().to("cpu", torch.float32).to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


def _file_samples(folder: Path) -> list[tuple[str, tuple[int, ...], bytes]]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    if all(file.is_file() for file in files):
        return [sample for file in files for sample in _safetensors_samples(file)]
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return [sample for file in pickles for sample in _pickle_samples(file)]
    raise ModelError(
        f"No weights in {folder}.",
        seen=", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "an empty folder",
        todo="a model folder has model.safetensors (or an index of several)",
    )


def _safetensors_samples(file: Path) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Format: 8 bytes little-endian header length, JSON header, then raw tensors.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    import torch

    samples = []
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            kind, size = _FLOATS.get(entry["dtype"], ("", 1))
            count = (end - start) // size
            parts = []
            for place in _places(count):
                handle.seek(8 + length + start + place * size)
                parts.append(handle.read(size))
            data = b"".join(parts)
            if kind and data:
                data = _as_bfloat16(torch.frombuffer(bytearray(data), dtype=getattr(torch, kind)))
            samples.append((name, shape, data))
    return samples


def _pickle_samples(file: Path) -> list[tuple[str, tuple[int, ...], bytes]]:
    import torch

    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return [_tensor_sample(name, tensor) for name, tensor in state.items()]


def _memory_samples(model: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    # A tied tensor is stored once, under the name that is not listed as tied.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return [_tensor_sample(name, tensor) for name, tensor in model.state_dict().items() if name not in tied]


def _tensor_sample(name: str, tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    import torch

    places = torch.tensor(_places(tensor.numel()), dtype=torch.long, device=tensor.device)
    flat = tensor.detach().reshape(-1)[places]
    if tensor.is_floating_point():
        return name, tuple(tensor.shape), _as_bfloat16(flat)
    return name, tuple(tensor.shape), flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
