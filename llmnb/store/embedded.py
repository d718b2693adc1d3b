"""A mongod of our own, for a person who has none: one for each home folder, shared by all processes.

It is started once, under a lock file; whoever comes second attaches. It is a one-node replica set, bound to
loopback, with a random password in the data folder (mode 0600), and it belongs to no process: it outlives its starter
and takes no signal from a terminal. ``stop`` ends it. After a kill or a power cut the next ``start`` recovers it, on
another port when its own is taken.

It knows nothing of what is stored in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pymongo
from pymongo import errors as driver

from ..errors import EmbeddedError
from . import environment
from .address import DEFAULT_NAME, mask_uri
from .mongod_binary import explain_exit, find_mongod
from .mongod_folder import START_LIMIT_S, Folder, data_in_use, make_secrets, prepared, starter_lock

__all__ = ["Server", "start", "status", "stop"]

USER = "llmnb"
_SET = "rs0"
_PORT_TAKEN = 48
_LOG_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class Server:
    """A running embedded mongod.

    Attributes:
        uri: its full address, a secret.
        pid: its process.
        port: on 127.0.0.1.
        home: the folder that was given to ``start``.
        started: True when this call started it.
    """

    uri: str = field(repr=False)
    pid: int
    port: int
    home: Path
    started: bool = False

    @property
    def safe_uri(self) -> str:
        """The address without its password."""
        return mask_uri(self.uri)


def start(home: Path | str) -> Server:
    """The embedded server of a home folder, started if it does not run. Safe to call from many processes at once.

    Raises:
        EmbeddedError: no program, a shared library is missing, the data folder cannot be used.
    """
    folder = prepared(home)
    server = _attach(folder)
    if server is not None:
        return server
    with starter_lock(folder):
        # Another process may have started it while this one waited.
        server = _attach(folder, 30.0) if data_in_use(folder) else None
        return server if server is not None else _start(folder)


def status(home: Path | str) -> Server | None:
    """The running embedded server of a home folder, or None. Starts nothing and creates nothing."""
    folder = Folder(Path(home).expanduser().resolve())
    return _attach(folder) if folder.root.is_dir() else None


def stop(home: Path | str, timeout: float = 60.0) -> bool:
    """Ends the embedded server of a home folder; its data stay.

    Returns:
        False when none ran.

    Raises:
        EmbeddedError: it does not end.
    """
    folder = Folder(Path(home).expanduser().resolve())
    if not folder.root.is_dir():
        return False
    with starter_lock(folder):
        if not data_in_use(folder):
            return False
        server = _attach(folder, 10.0)
        _end(folder, server, timeout)
    return True


# -- attaching ----------------------------------------------------------------------------------------------


def _uri(folder: Folder, port: int) -> str:
    password = folder.password.read_text(encoding="ascii").strip()
    return f"mongodb://{USER}:{password}@127.0.0.1:{port}/{DEFAULT_NAME}?authSource=admin&directConnection=true"


def _client(uri: str, timeout_ms: int = 10_000) -> Any:
    return pymongo.MongoClient(uri, serverSelectionTimeoutMS=timeout_ms, connectTimeoutMS=timeout_ms, appname="llmnb")


def _attach(folder: Folder, patience_s: float = 3.0) -> Server | None:
    """The running server, when it answers to our password and takes writes.

    Args:
        folder: of the server.
        patience_s: how long to wait for the answer in all.
    """
    try:
        facts = json.loads(folder.facts.read_text(encoding="utf-8"))
        port, pid = int(facts["port"]), int(facts["pid"])
        uri = _uri(folder, port)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not _alive(pid) or not _listens(port):
        return None
    with _client(uri) as client, contextlib.suppress(driver.PyMongoError), pymongo.timeout(patience_s):
        # SCRAM proves both ways: a stranger on this port knows no password of ours, so it cannot answer.
        client.admin.command("ping")
        if client.admin.command("hello").get("isWritablePrimary"):
            return Server(uri, pid, port, folder.home)
    return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        return True
    return pid > 0


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
    except OSError:
        return False


# -- starting -----------------------------------------------------------------------------------------------


def _start(folder: Folder) -> Server:
    if data_in_use(folder):
        _wait_or_refuse(folder)
    binary = find_mongod()
    try:
        make_secrets(folder)
        if folder.log.exists() and folder.log.stat().st_size > _LOG_LIMIT:
            os.replace(folder.log, folder.log.with_suffix(".log.old"))
    except OSError as error:
        raise EmbeddedError("The folder for the embedded server cannot be used.", seen=error) from error
    port = _launch(binary, folder)
    try:
        uri = _uri(folder, port)
        _open_up(folder, uri, port)
        pid = int((folder.data / "mongod.lock").read_text().strip() or 0)
        part = folder.facts.with_suffix(".part")
        part.write_text(json.dumps({"port": port, "pid": pid}), encoding="utf-8")
        os.replace(part, folder.facts)
    except BaseException:
        _end(folder, None, 20.0)
        raise
    return Server(uri, pid, port, folder.home, started=True)


def _wait_or_refuse(folder: Folder) -> None:
    """A mongod holds the data and did not answer as ours: its starter died half-way, or it is not ours to use."""
    end = time.monotonic() + 20
    while time.monotonic() < end and data_in_use(folder):
        try:
            facts = json.loads(folder.facts.read_text(encoding="utf-8"))
            with _client(_uri(folder, int(facts["port"])), 2000) as client:
                client.admin.command("ping")
        except driver.OperationFailure as error:
            raise _wrong_password(folder) from error
        except (OSError, ValueError, KeyError, driver.PyMongoError):
            break  # nobody knows its port: it was never finished; end it and begin again
        time.sleep(0.2)
    if data_in_use(folder):
        _end(folder, None, 60.0)


def _wrong_password(folder: Folder) -> EmbeddedError:
    return EmbeddedError(
        "The embedded server does not accept the password in its folder.",
        seen=folder.password,
        todo=f"put the right password back into that file; or move {folder.root} away to begin with an empty database",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ports(folder: Folder) -> Iterator[int]:
    """The port of last time first, so that addresses that others hold stay true."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        port = int(json.loads(folder.facts.read_text(encoding="utf-8"))["port"])
        if not _listens(port):
            yield port
    for _ in range(5):
        yield _free_port()


def _command(binary: Path, folder: Folder, port: int) -> list[str]:
    # Two secrets, both by file: nothing here may show in a list of processes.
    return [
        *(str(binary), "--fork", "--dbpath", str(folder.data), "--port", str(port), "--bind_ip", "127.0.0.1"),
        *("--nounixsocket", "--auth", "--keyFile", str(folder.keyfile), "--replSet", _SET, "--oplogSize", "64"),
        *("--wiredTigerCacheSizeGB", "0.25", "--networkMessageCompressors", "disabled"),
        *("--wiredTigerEngineConfigString", "log=(prealloc=false,file_max=16MB)"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        *("--logpath", str(folder.log), "--logappend"),
    ]


def _launch(binary: Path, folder: Folder) -> int:
    """Starts the program, which forks itself into a session of its own and reports when it listens; its port."""
    code, said = 0, ""
    for port in _ports(folder):
        with open(folder.root / "start.out", "w+", encoding="utf-8", errors="replace") as out:
            try:
                code = subprocess.run(
                    _command(binary, folder, port),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=folder.root,
                    env=environment.for_child(),
                    start_new_session=True,
                    timeout=START_LIMIT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise EmbeddedError(
                    f"mongod did not start within {START_LIMIT_S:.0f} s.", seen=folder.data, todo=f"read {folder.log}"
                ) from error
            except OSError as error:
                raise EmbeddedError(
                    "mongod cannot be run.",
                    seen=f"{binary}: {error.strerror or error}",
                    todo="set LLMNB_MONGOD to another one; or give a server: LLMNB_URI; or connect('mongomock://name')",
                ) from error
            out.seek(0)
            said = out.read()
        if code == 0:
            return port
        if code != _PORT_TAKEN:
            break
    raise explain_exit(binary, code, said, folder.log, folder.data)


def _open_up(folder: Folder, uri: str, port: int) -> None:
    """Makes a server that listens one that we can use: user, replica set, its own port as the member's host."""
    host = f"127.0.0.1:{port}"
    try:
        with _client(uri) as client:
            try:
                client.admin.command("ping")
            except driver.OperationFailure:
                _first_user(folder, host)
                return
            _settle(client, host)
    except driver.PyMongoError as error:
        raise EmbeddedError(
            "The embedded server started and does not answer.", seen=str(error)[:300], todo=f"read {folder.log}"
        ) from error


def _first_user(folder: Folder, host: str) -> None:
    """An empty server lets a local caller make the first user, and only that one."""
    with _client(f"mongodb://{host}/?directConnection=true") as bare:
        try:
            with contextlib.suppress(driver.OperationFailure):  # it was initiated, and its starter died before the user
                bare.admin.command("replSetInitiate", {"_id": _SET, "members": [{"_id": 0, "host": host}]})
            _wait_primary(bare)
            password = folder.password.read_text(encoding="ascii").strip()
            bare.admin.command("createUser", USER, pwd=password, roles=["root"])
        except driver.OperationFailure as error:
            raise _wrong_password(folder) from error


def _settle(client: Any, host: str, timeout: float = 60.0) -> None:
    """Waits until a server with our user takes writes; tells the replica set its new address first when it moved."""
    end = time.monotonic() + timeout
    while not client.admin.command("hello").get("isWritablePrimary"):
        with contextlib.suppress(driver.OperationFailure):  # it has not read its configuration yet: look again
            config = client.admin.command("replSetGetConfig")["config"]
            if config["members"][0]["host"] != host:
                config["members"][0]["host"] = host
                config["version"] += 1
                client.admin.command("replSetReconfig", config, force=True)
        if time.monotonic() > end:
            raise driver.ServerSelectionTimeoutError(f"no primary after {timeout:.0f} s")
        time.sleep(0.02)


def _wait_primary(client: Any, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not client.admin.command("hello").get("isWritablePrimary"):
        if time.monotonic() > end:
            raise driver.ServerSelectionTimeoutError(f"no primary after {timeout:.0f} s")
        time.sleep(0.02)


# -- ending -------------------------------------------------------------------------------------------------


def _end(folder: Folder, server: Server | None, timeout: float) -> None:
    end = time.monotonic() + timeout
    if server is not None:
        with _client(server.uri, 5000) as client, contextlib.suppress(driver.PyMongoError):
            client.admin.command("shutdown", force=True, timeoutSecs=5)  # the answer is a closed connection
    elif data_in_use(folder):
        # The file is locked by a mongod, so the process that it names is that mongod and no other.
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder.data / "mongod.lock").read_text().strip()), signal.SIGTERM)
    while data_in_use(folder):
        if time.monotonic() > end:
            raise EmbeddedError(f"The embedded server does not end within {timeout:.0f} s.", seen=folder.data)
        time.sleep(0.05)
