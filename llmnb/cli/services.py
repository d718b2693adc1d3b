"""``llmnb db`` and ``llmnb ray``: the services of this machine that outlive the processes that started them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..store import environment
from . import paper

__all__ = ["db", "ray"]


def _home(known: argparse.Namespace) -> Path:
    return Path(known.home).expanduser() if known.home else environment.read().home


def db(known: argparse.Namespace) -> int:
    """The embedded MongoDB of a home folder; ``gc`` works on any database."""
    home = _home(known)
    if known.action == "gc":
        return _collect(known)
    if known.uri or environment.read().uri:
        where = "--uri" if known.uri else "LLMNB_URI"
        print(f"{where} names a server, which is not ours to {known.action}. This is about the embedded one in {home}.")
    from ..store import embedded

    if known.action == "start":
        server = embedded.start(home)
        print(
            f"{'Started' if server.started else 'Already running'}: {server.safe_uri}, process {server.pid}, in {home}"
        )
    elif known.action == "status":
        found = embedded.status(home)
        if found is None:
            print(f"Not running in {home}. llmnb db start starts it.")
            return 3
        print(f"Running: {found.safe_uri}, process {found.pid}, in {home}")
    elif embedded.stop(home):
        print(f"Stopped; its data stay in {home}.")
    else:
        print(f"None was running in {home}.")
    return 0


def _collect(known: argparse.Namespace) -> int:
    from ..store import open_store

    with open_store(known.uri, home=known.home) as store:
        found = store.artifacts.gc(dry_run=known.dry_run)
    verb = "would be removed" if known.dry_run else "removed"
    print(f"{found['files']} files, {paper.size(found['bytes'])} {verb}: no record names them.")
    return 0


def ray(known: argparse.Namespace) -> int:
    """What carries out background runs on this machine: the runner, and Ray for runs on several workers."""
    from ..launch import cluster, runner

    home = _home(known)
    if known.action == "stop":
        print("Stopped." if runner.stop(home) else f"Nothing was running for {home}.")
        return 0
    found, head = runner.status(home), cluster.status(home)
    if found is None and head is None:
        print(f"Nothing is running for {home}. A background run starts it.")
        return 3
    print(_runner_in_words(found, home))
    print(f"Ray, for runs on several workers: {head.address if head else 'not running, started when one comes'}")
    return 0


def _runner_in_words(found: Mapping[str, Any] | None, home: Path) -> str:
    if found is None:
        return f"No runner for {home}."
    warm = f"process {found['zygote']} is warm" if found["zygote"] else "nothing is warm"
    lines = [f"Runner for {home}: process {found['keeper']}, {warm}"]
    lines += [f"  {run}: process {pid or 'starting'}" for run, pid in found["running"].items()]
    lines += [f"  {run}: waits for {', '.join(others)}" for run, others in found["waiting"].items()]
    return "\n".join(lines)
