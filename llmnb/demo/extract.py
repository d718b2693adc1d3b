"""Reads the documentation of Python's standard library, as it is installed on this machine.

Meant to be run by its path in a process of its own (``python -I -S extract.py``): importing a whole library
has side effects, and this file imports nothing of ours. It prints JSON lines, one for each documented thing, in an
order that depends on the names alone. It knows no questions, no tokens and no models.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Left out: what opens windows or browsers, prints poems, installs packages, holds tests or tables only, or is
# there on some machines and not on others with the same Python.
SKIPPED = frozenset(
    (
        "antigravity", "this", "idlelib", "test", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils",
        "ensurepip", "pydoc_data", "encodings", "sre_compile", "sre_constants", "sre_parse", "nturl2path", "msilib",
        "msvcrt", "winreg", "winsound", "nt", "posix", "posixpath", "ntpath", "genericpath", "opcode", "keyword",
        "token",
    )
)  # fmt: skip
_SIGNATURE_LINE = re.compile(r"^[\w.\s,|]*\(.*\)\s*(->.*|:|=.*)?$|^[\w.]+\(.*->.*$")
_OBJECT = re.compile(r"<(?:class |function |built-in function |module )?'?([\w.]+)[^<>]*>")
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "vs.", "cf.", "approx.", "incl.", "resp.", "No.")
_OS = ("posix", "nt", "posixpath", "ntpath", "genericpath")  # where os and os.path keep their functions
LONGEST = 220  # characters of a first sentence; the few longer ones are lists and tables


def module_names() -> list[str]:
    """Public modules and sub-modules of the standard library, sorted, parents first."""
    names = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        names.append(name)
        if name == "os":
            names.append("os.path")
        with contextlib.suppress(Exception):  # a part that this machine lacks is not documented here
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.submodule_search_locations:
                names.extend(_children(name, list(spec.submodule_search_locations)))
    return names


def _children(package: str, paths: list[str]) -> Iterator[str]:
    for info in sorted(pkgutil.iter_modules(paths), key=lambda i: i.name):
        if info.name.startswith("_") or info.name in ("test", "tests"):
            continue
        full = f"{package}.{info.name}"
        yield full
        if info.ispkg:
            yield from _children(full, [os.path.join(path, info.name) for path in paths])


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring on one line, "" when it has none of a usable length."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    for paragraph in paragraphs[:2]:
        lines = paragraph.splitlines()
        while lines and _SIGNATURE_LINE.match(lines[0].strip()):
            lines.pop(0)  # C functions begin with their own signature
        text = " ".join(" ".join(lines).split())
        if not text or text[0] in ">-+=*#|.:" or not re.search(r"[a-z]{2}", text):
            continue
        start = 0
        while (match := re.compile(r"[.!?](?=\s|$)").search(text, start)) is not None:
            if not text[: match.end()].endswith(_ABBREVIATIONS):
                text = text[: match.end()]
                break
            start = match.end()
        text = text.rstrip(":; ")
        if 8 <= len(text) <= LONGEST and text.isascii():
            return text if text[-1] in ".!?" else text + "."
        return ""
    return ""


def signature_of(thing: Any) -> str:
    """``(text, width=70)``, without memory addresses; "" when Python does not know it."""
    try:
        text = str(inspect.signature(thing))
    except Exception:  # noqa: BLE001 - Python evaluates default values written in C code, which can fail in any way
        return ""
    text = _OBJECT.sub(r"\1", text)
    return text if len(text) <= 160 and text.isascii() and " object at " not in text else ""


def kind_of(thing: Any) -> str:
    """module, class, exception, function or method's plain kind; "" for what is not documented here."""
    if inspect.ismodule(thing):
        return "module"
    if inspect.isclass(thing):
        return "exception" if issubclass(thing, BaseException) else "class"
    if inspect.isroutine(thing) or (callable(thing) and hasattr(thing, "__wrapped__")):
        return "function"
    return ""


def entry(name: str, module: str, kind: str, thing: Any) -> dict[str, Any] | None:
    """What the documentation says of one thing, or None when it says nothing."""
    doc = getattr(thing, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return None
    callable_kinds = ("function", "method", "class", "exception")
    return {
        "name": name,
        "module": module,
        "kind": kind,
        "signature": signature_of(thing) if kind in callable_kinds else "",
        "summary": first_sentence(doc),
        "doc": inspect.cleandoc(doc),
    }


def _belongs(thing: Any, name: str, module: ModuleType) -> bool:
    home = getattr(thing, "__module__", None) or module.__name__
    if home == module.__name__:
        return True
    declared = name in getattr(module, "__all__", ())
    return declared and (home[0] == "_" or home in _OS or home.split(".")[0] == module.__name__.split(".")[0])


def members(module: ModuleType, seen: set[int]) -> Iterator[dict[str, Any]]:
    """The module itself, its public functions and classes, and the methods that those classes define."""
    at = "os.path" if module.__name__ in _OS else module.__name__
    first = entry(at, at, "module", module)
    if first:
        yield first
    for name in sorted(set(getattr(module, "__all__", None) or vars(module))):
        thing = getattr(module, name, None)
        kind = kind_of(thing)
        if name.startswith("_") or kind in ("", "module") or id(thing) in seen or not _belongs(thing, name, module):
            continue
        seen.add(id(thing))
        full = f"{at}.{name}" if at != "builtins" else name
        found = entry(full, at, kind, thing)
        if found:
            yield found
        if kind in ("class", "exception"):
            yield from _methods(full, at, thing)  # type: ignore[arg-type]


def _methods(full: str, module: str, cls: type) -> Iterator[dict[str, Any]]:
    for name, raw in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        thing = raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw
        kind = "method" if inspect.isroutine(thing) else "property" if isinstance(raw, property) else ""
        found = entry(f"{full}.{name}", module, kind, thing) if kind else None
        if found:
            yield found


def documentation() -> Iterator[dict[str, Any]]:
    """Every documented thing of the standard library that can be imported here.

    Yields:
        ``{"name", "module", "kind", "signature", "summary", "doc"}``; names never repeat.
    """
    seen: set[int] = set()
    names: set[str] = set()
    alive = []  # keeps every module, so that an id() is never used twice
    for module_name in module_names():
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit):  # noqa: BLE001 - a part that this machine lacks is not documented here
            continue
        alive.append(module)
        for found in members(module, seen):
            if found["name"] not in names:
                names.add(found["name"])
                yield found


def main() -> None:
    """Prints the documentation as JSON lines."""
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(5000)
    out = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        lines = [json.dumps(found) for found in documentation()]
    out.write("\n".join(lines) + "\n")
    out.flush()
    os._exit(0)  # modules that were imported may have left threads or exit hooks behind


if __name__ == "__main__":
    main()
