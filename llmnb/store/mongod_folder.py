"""The folder of an embedded mongod: its paths, its lock of one starter, its secrets. Starts nothing."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import EmbeddedError

__all__ = ["Folder", "data_in_use", "make_secrets", "prepared", "starter_lock"]

START_LIMIT_S = 180.0  # recovering a large data folder takes its time


@dataclass(frozen=True)
class Folder:
    """Paths beneath the home."""

    home: Path

    @property
    def root(self) -> Path:
        return self.home / "mongod"

    @property
    def data(self) -> Path:
        return self.root / "db"

    @property
    def log(self) -> Path:
        return self.root / "mongod.log"

    @property
    def facts(self) -> Path:
        return self.root / "server.json"

    @property
    def password(self) -> Path:
        return self.root / "password"

    @property
    def keyfile(self) -> Path:
        return self.root / "keyfile"


def prepared(home: Path | str) -> Folder:
    """The folder, made when it is not there. Raises EmbeddedError when nothing can be written to it."""
    folder = Folder(Path(home).expanduser().resolve())
    try:
        folder.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.data.mkdir(exist_ok=True, mode=0o700)
        probe = folder.root / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EmbeddedError(
            "The folder for the embedded server cannot be used.",
            seen=f"{folder.root}: {error.strerror or error}",
            todo="give a folder that can be written: connect(home=…) or LLMNB_HOME; or a server: LLMNB_URI; "
            "or keep nothing: connect('mongomock://name')",
        ) from error
    return folder


@contextlib.contextmanager
def starter_lock(folder: Folder, timeout: float = START_LIMIT_S + 60) -> Iterator[None]:
    """One starter at a time on this machine. The lock dies with its holder; the file stays."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise EmbeddedError(
            "The embedded server runs on Linux and macOS only.", todo="give a server: connect('mongodb://…')"
        ) from error
    end = time.monotonic() + timeout
    with open(folder.root / "start.lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise EmbeddedError(
                        "Another process has been starting the embedded server for too long.",
                        seen=folder.root,
                        todo=f"read {folder.log}; end that process",
                    ) from None
                time.sleep(0.05)
        yield


def _write_secret(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def make_secrets(folder: Folder) -> None:
    """Writes password and keyfile on first use. Raises EmbeddedError when data is there and its password is not."""
    if not folder.password.exists():
        if (folder.data / "WiredTiger").exists():
            raise EmbeddedError(
                "The password of the embedded server is gone.",
                seen=folder.password,
                todo=f"put that file back; or move {folder.data} away to begin with an empty database",
            )
        _write_secret(folder.password, secrets.token_hex(24))
    if not folder.keyfile.exists():  # mongod wants one for a replica set with users; a new one serves as well
        _write_secret(folder.keyfile, base64.b64encode(secrets.token_bytes(96)).decode())
    for path in (folder.password, folder.keyfile):
        path.chmod(0o600)


def data_in_use(folder: Folder) -> bool:
    """True while a mongod holds the data folder: it keeps a lock on a file there, which dies with it.

    Only for the holder of the starter's lock: looking takes mongod's lock for a moment.
    """
    import fcntl

    try:
        with open(folder.data / "mongod.lock", "rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        return False
    return False
