"""Why a worker died, in words, from what Ray says about it. Pure; knows no Ray."""

from __future__ import annotations

import re

__all__ = ["does_not_answer", "lost_a_peer", "why"]

_RESUME = "run.resume() goes on from the newest checkpoint"
_LESS = "if memory ran out: a smaller batch or max_seq_length, bits=4, or fewer workers on one machine"
_NODE = re.compile(r"node has died|node was terminated|node (?:is|was) (?:dead|lost)|node died", re.IGNORECASE)
_MEMORY = re.compile(r"OutOfMemoryError|running low on memory|memory monitor|due to memory pressure")
_SILENT = re.compile(r"unavailable|unreachable|timed out", re.IGNORECASE)
_SIGTERM = re.compile(r"SIGTERM")
# Of gloo and NCCL, when the process at the other end is gone.
_PEER = re.compile(
    r"Connection (?:closed|reset) by peer|Connection refused|Broken pipe|Socket closed|remote process exited"
    r"|Timed out waiting .* for recv|ncclRemoteError|Gloo .*(?:failed|timeout)",
    re.IGNORECASE,
)


def why(rank: int, workers: int, seen: str, *, memory_killed: bool = False, node_lost: bool = False) -> tuple[str, str]:
    """What happened, and what to do.

    Args:
        rank: the worker that died.
        workers: how many there were.
        seen: Ray's words.
        memory_killed: the system has killed a process of this machine meanwhile because memory ran out.
        node_lost: a node of the cluster is gone that was there when the run began.
    """
    who = f"Worker {rank} of {workers}"
    if node_lost or _NODE.search(seen):
        todo = f"see whether that machine still runs, and its Ray; {_RESUME}, on the nodes that are there"
        return f"{who} was lost with its node: the machine, or Ray on it, is gone.", todo
    if memory_killed or _MEMORY.search(seen):
        return f"{who} was killed because memory ran out.", f"{_RESUME}; {_LESS.partition(': ')[2]}"
    if _SIGTERM.search(seen):
        return f"{who} was ended by SIGTERM.", f"{_RESUME}; run.stop() ends all workers with a checkpoint"
    return f"{who} died without a word: killed by SIGKILL, or crashed.", f"{_RESUME}; {_LESS}"


def does_not_answer(text: str) -> bool:
    """True when Ray does not know yet whether a worker is dead."""
    return _SILENT.search(text) is not None


def lost_a_peer(text: str) -> bool:
    """True for an error that says no more than that another rank is gone."""
    return _PEER.search(text) is not None
