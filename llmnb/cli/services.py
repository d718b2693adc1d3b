"""``llmnb db`` and ``llmnb ray``: the services of this machine that outlive the processes that started them."""

from __future__ import annotations

import argparse
from pathlib import Path

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
    """This machine's own Ray cluster."""
    from ..launch import cluster

    home = _home(known)
    if known.action == "stop":
        print("Stopped." if cluster.stop(home) else f"None was running for {home}.")
        return 0
    found = cluster.status(home)
    if found is None:
        print(f"Not running for {home}. A background run starts it.")
        return 3
    print(f"Running for {home}: {found.address}, dashboard {found.dashboard}")
    return 0
