"""The demo's documents: questions about Python's standard library with one-sentence answers, and its plain text.

Pure functions of what ``extract`` reads, apart from ``entries``, which starts it. The same Python gives the same
documents with the same ids on every machine. This module knows no database and no model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["HELD_OUT", "documents", "entries", "passages"]

Entry = dict[str, Any]

# Nothing about these is trained on: they are in the "valid" fold, and the three questions ask about them.
HELD_OUT = ("json.dumps", "shutil.copytree", "math.sqrt")
_WORDS = {"function": "a function", "method": "a method", "class": "a class", "exception": "an exception"}
_WORDS.update({"property": "a property", "module": "a module"})
_NAMED_AT_MOST = 6  # things that an answer lists
_READING_S = 120.0  # reading takes under a second; a machine that needs this long has a broken library


@functools.cache
def entries() -> tuple[Entry, ...]:
    """What the standard library says of itself, read in a process of its own (about a second).

    Returns:
        ``{"name", "module", "kind", "signature", "summary", "doc"}`` of each documented thing.

    Raises:
        DataError: this Python has no documentation in it (it was stripped, or runs with ``-OO``).
    """
    script = Path(__file__).with_name("extract.py")
    command = [sys.executable, "-I", "-S", str(script)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_READING_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError("The standard library's documentation cannot be read.", seen=error) from error
    lines = done.stdout.decode("utf-8").splitlines() if done.returncode == 0 else []
    found = tuple(json.loads(line) for line in lines)
    if len(found) < 1000:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise DataError(
            "This Python's standard library has too little documentation for the demo.",
            seen=f"{len(found)} documented things in {sys.executable}" + (f"; {last[0]}" if last else ""),
            todo="use a Python whose library keeps its docstrings, or train on documents of your own",
        )
    return found


def documents(found: Sequence[Entry] | None = None) -> list[dict[str, Any]]:
    """Questions and answers about ``found`` (all entries when not given).

    The order is a shuffle by ``_id`` that is the same everywhere, the held-out ones first, so that any first part of it
    is a fair sample.

    Returns:
        ``{"_id", "prompt", "response", "text", "messages", "form", "name", "module", "kind"}``; those about
        ``HELD_OUT`` also have ``"_fold": "valid"``. No prompt stands there twice.
    """
    found = entries() if found is None else found
    made: dict[str, dict[str, Any]] = {}
    for form, entry, prompt, response in _asked(found):
        document = {
            "_id": f"{form}/{entry['name']}",
            "prompt": prompt,
            "response": response,
            "text": f"{prompt}\n{response}",
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            "form": form,
            "name": entry["name"],
            "module": entry["module"],
            "kind": entry["kind"],
        }
        if entry["name"] in HELD_OUT:
            document["_fold"] = "valid"
        made.setdefault(prompt, document)
    return sorted(made.values(), key=lambda d: ("_fold" not in d, hashlib.sha256(d["_id"].encode()).digest()))


def _asked(found: Sequence[Entry]) -> Iterator[tuple[str, Entry, str, str]]:
    short = Counter(e["name"].rpartition(".")[2] for e in found if _stands_alone(e))
    for entry in found:
        name, kind = entry["name"], entry["kind"]
        if entry["summary"]:
            asked = f"What does `{name}` do?" if kind in ("function", "method") else f"What is `{name}`?"
            yield "what", entry, asked, f"`{name}` is {_WORDS[kind]}: {entry['summary']}"
        if entry["signature"]:
            takes = _arguments(entry)
            answer = f"`{name}` takes `{takes}`." if takes else f"`{name}` takes no arguments."
            yield "takes", entry, f"Which arguments does `{name}` take?", answer
        last = name.rpartition(".")[2]
        if _stands_alone(entry) and short[last] == 1:
            yield "where", entry, f"Which module has `{last}`?", f"`{last}` is {_WORDS[kind]} in `{entry['module']}`."
    yield from _contents(found)


def _stands_alone(entry: Entry) -> bool:
    return entry["kind"] in ("function", "class", "exception") and entry["module"] != "builtins"


def _arguments(entry: Entry) -> str:
    inside = entry["signature"].partition(" -> ")[0].strip()[1:-1]
    if entry["kind"] == "method":
        first, _, rest = inside.partition(", ")
        inside = rest if first in ("self", "cls") else inside
    parts = [part for part in inside.split(", ") if part]
    while parts and parts[0] in ("/", "*"):
        parts.pop(0)
    return ", ".join(parts)


def _contents(found: Sequence[Entry]) -> Iterator[tuple[str, Entry, str, str]]:
    held: dict[str, list[str]] = {}
    for entry in found:
        if _stands_alone(entry) and entry["kind"] == "function" and entry["name"] not in HELD_OUT:
            held.setdefault(entry["module"], []).append(entry["name"].rpartition(".")[2])
    for entry in found:
        names = held.get(entry["name"], []) if entry["kind"] == "module" else []
        if len(names) > 1:
            listed = ", ".join(f"`{name}`" for name in names[:_NAMED_AT_MOST])
            more = " and others" if len(names) > _NAMED_AT_MOST else ""
            yield "holds", entry, f"Which functions are in `{entry['name']}`?", f"`{entry['name']}` has {listed}{more}."


def passages(found: Iterable[Entry] | None = None, length: int = 440, longest: int = 200) -> list[dict[str, Any]]:
    """The plain documentation, for pre-training: what ``help()`` prints, not questions and answers.

    Args:
        found: all entries when not given.
        length: characters of a passage, about; entries are put together until it is reached.
        longest: characters of a docstring, of which only the first paragraph is taken. A model this small learns
            names and openings from it; of whole docstrings it learned neither (measured).

    Returns:
        ``{"_id", "text"}``, in an order that mixes modules and is the same everywhere.
    """
    texts = [_printed(e, longest) for e in (entries() if found is None else found)]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    out: list[dict[str, Any]] = []
    piece: list[str] = []
    for text in texts:
        if piece and sum(map(len, piece)) + len(text) > length:
            out.append({"_id": len(out), "text": "\n\n".join(piece)})
            piece = []
        piece.append(text)
    if piece:
        out.append({"_id": len(out), "text": "\n\n".join(piece)})
    return out


def _printed(entry: Entry, longest: int) -> str:
    doc = entry["doc"].partition("\n\n")[0]
    if len(doc) > longest:
        doc = doc[:longest].rpartition("\n")[0] or doc[:longest]
    head = f"Help on {entry['kind']} {entry['name']} in {entry['module']}:"
    return f"{head}\n\n{entry['name']}{entry['signature']}\n{doc.rstrip()}"
