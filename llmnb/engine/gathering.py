"""A checkpoint of ranks that share no file system: what the others wrote on their disks comes to rank 0's.

Ranks save their own part of the optimizer's and the random numbers' state. Where a checkpoint is one folder for all,
nothing is sent. Knows no store and no Trainer.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["bring_together"]

_CHUNK = 1 << 24  # bytes


def bring_together(folder: Path, device: Any) -> bool:
    """Every rank calls it, once all have written to ``folder``; rank 0's is complete when it returns.

    Args:
        folder: the checkpoint's, by the same or by another path on each rank.
        device: that the ranks' backend sends tensors of.

    Returns:
        True when the ranks do not all see one folder. The others' is empty then: nothing else would remove it.
    """
    mark = [secrets.token_hex(8)]
    dist.broadcast_object_list(mark, src=0, device=device)
    seen = folder / f".{mark[0]}"
    if dist.get_rank() == 0:
        seen.touch()
    dist.barrier()
    sends = False
    if not seen.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seen.name}-{dist.get_rank():05d}").touch()
    dist.barrier()
    if not seen.exists():  # of several that see one folder, the first speaks for it
        marks = sorted(folder.glob(f"{seen.name}-*"))
        sends = marks[0].name.endswith(f"-{dist.get_rank():05d}")
    dist.barrier()
    if sends:
        for own in folder.glob(f"{seen.name}-*"):
            own.unlink()
    files = _files(folder) if sends else []
    listed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(listed, (seen.exists(), files))
    for rank, (_, found) in enumerate(listed):
        for name, size in found:
            if dist.get_rank() == rank:
                _send(folder / name, size, device)
            elif dist.get_rank() == 0:
                _receive(folder / name, size, rank, device)
    dist.barrier()
    if dist.get_rank() == 0:
        seen.unlink()
    elif sends:
        shutil.rmtree(folder)
    return not all(there for there, _ in listed)


def _files(folder: Path) -> list[tuple[str, int]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in found]


def _send(path: Path, size: int, device: Any) -> None:
    with open(path, "rb") as file:
        for start in range(0, size, _CHUNK):
            content = bytearray(file.read(min(_CHUNK, size - start)))
            dist.send(torch.frombuffer(content, dtype=torch.uint8).to(device), dst=0)


def _receive(path: Path, size: int, rank: int, device: Any) -> None:
    """What rank 0 wrote itself stays."""
    there = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.devnull if there else path, "wb") as file:
        for start in range(0, size, _CHUNK):
            content = torch.empty(min(_CHUNK, size - start), dtype=torch.uint8, device=device)
            dist.recv(content, src=rank)
            file.write(content.cpu().numpy().tobytes())
