"""Rows that an earlier run made, found again by content.

A file belongs to what its rows were made of: the documents' bytes, the tokenizer, every setting that ``make_rows``
reads, and the source text of what makes them. Rows from it are those that would be made, to the last token and note.
Where that is not certain (a function of the person's, a tokenizer that runs code of its own, a template that looks at
the clock) nothing is kept. Keeping only saves time: what cannot be written, or is damaged, is made anew.

The folder is private (training data lies in it), each file appears whole or not at all, and the least recently used
ones go when there are too many. This module knows no database: documents are told by whoever reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..config import TrainConfig
from .rows import RowReport, Rows, make_rows

__all__ = ["MOST_BYTES", "READ", "Shelf", "Told", "rows_of"]

MOST_BYTES = 4 * 2**30  # of all files together
READ = (  # of TrainConfig, by make_rows; a test finds those that are missing
    "method",
    "key",
    "key_kind",
    "max_seq_length",
    "train_on",
    "chat_template",
    "prompt_template",
    "max_cut_share",
)
_MAKERS = ("rows", "pieces", "encoding", "templates", "samples", "formats", "counts", "preferences")
_PACKAGES = ("transformers", "tokenizers", "jinja2", "numpy")
_MAGIC = b"llmnbrw1"
_LONGEST_HEAD = 1 << 22
_LEFT_OVER_S = 24 * 3600.0
_CLOCK = re.compile(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)")
_DAYS = re.compile(r"%[-#]?[dejmbhBaAyYCGuwUVWDFx%]")
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\b")


def _sources() -> str | None:
    """Of the modules that make rows, as this process has loaded them: hence when this one is loaded."""
    found = hashlib.blake2b(digest_size=16)
    try:
        for name in (*_MAKERS, "rowcache", "../config"):
            found.update((Path(__file__).parent / f"{name}.py").read_bytes())
    except OSError:
        return None  # installed without sources
    return found.hexdigest()


_SOURCES = _sources()


@runtime_checkable
class Told(Protocol):
    """A source of documents that are told by their content.

    Attributes:
        keeps: local folder for what is made of documents.
    """

    keeps: Path

    def __call__(self) -> Iterable[Mapping[str, Any]]: ...

    def fingerprint(self) -> str:
        """Of the documents and their order, without making Python objects of them."""

    def told(self) -> tuple[Iterable[Mapping[str, Any]], Callable[[], str]]:
        """The documents; and, when all were read, the fingerprint of those that were."""


def rows_of(
    source: Callable[[], Iterable[Mapping[str, Any]]],
    tokenizer: Any,
    config: TrainConfig,
    *,
    keeps: bool = True,
    transform: Callable[..., Any] | None = None,
    context: int | None = None,
    prompt_template: str = "{input}",
    name: str = "train",
) -> tuple[Any, bool]:
    """``make_rows`` of a source, and True when its rows were kept from before.

    Args:
        source: a ``Told`` one may be kept.
        tokenizer, config, transform, context, prompt_template, name: see ``make_rows``.
        keeps: new rows are kept; False where another rank keeps the same.
    """
    how: dict[str, Any] = {"prompt_template": prompt_template, "context": context}
    key, day = None, _day(tokenizer, config)
    if isinstance(source, Told) and config.cache_rows and transform is None:
        key = key_of(tokenizer, config, how)
    if key is None or not isinstance(source, Told):
        return make_rows(source(), tokenizer, config, transform=transform, name=name, **how), False
    shelf = Shelf(source.keeps)
    if shelf.has(key):
        found = shelf.get(f"{key}-{source.fingerprint()}")
        if found is not None:
            return found, True
    documents, told = source.told()
    rows = make_rows(documents, tokenizer, config, name=name, **how)
    if keeps and day == _day(tokenizer, config):  # no midnight has passed
        shelf.put(f"{key}-{told()}", rows)
    return rows, False


# --- what rows are made of, but for the documents -------------------------------------------------------------


def key_of(tokenizer: Any, config: TrainConfig, how: Mapping[str, Any]) -> str | None:
    """Identifies how rows are made; None when the same documents may give others next time."""
    day, words = _day(tokenizer, config), _tokenizer(tokenizer)
    if _SOURCES is None or day is None or words is None:
        return None
    given = config.to_json()
    settings = [{name: given[name] for name in READ}, dict(how)]
    versions = [sys.version, platform.machine(), *(_version(name) for name in _PACKAGES)]
    about = [_SOURCES, versions, words, tokenizer.chat_template, day, settings]
    return hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def _day(tokenizer: Any, config: TrainConfig) -> str | None:
    """Today, when a template writes the date; "" when it does not look; None when it writes the hour, or draws lots."""
    template = json.dumps([getattr(tokenizer, "chat_template", None), config.chat_template])
    if _CHANCE.search(template):
        return None
    template = template.replace('\\"', '"')
    if "strftime_now" not in template:
        return ""
    bare = re.sub(r"strftime_now is (not )?defined", "", template)
    formats = [one or other for one, other in _CLOCK.findall(bare)]
    known = len(formats) == bare.count("strftime_now")
    return time.strftime("%Y-%m-%d") if known and not any("%" in _DAYS.sub("", form) for form in formats) else None


def _tokenizer(tokenizer: Any) -> list[Any] | None:
    """Everything that decides what a text becomes; None when it is not all in view."""
    kind = type(tokenizer)
    if not getattr(tokenizer, "is_fast", False) or kind.__module__.partition(".")[0] != "transformers":
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # as the encoder has it
    backend.no_padding()
    written = hashlib.blake2b(backend.to_str().encode(), digest_size=16).hexdigest()
    facts = [getattr(tokenizer, name, None) for name in ("split_special_tokens", "padding_side", "add_prefix_space")]
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    return [kind.__qualname__, written, facts, ids, tokenizer.special_tokens_map, getattr(tokenizer, "init_kwargs", {})]


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", ""))


# --- the files ------------------------------------------------------------------------------------------------


class Shelf:
    """A folder of rows.

    A file is: a magic, the length and digest of its head, the head (JSON), and three arrays in the order in which
    ``Rows.digest`` reads them, so that proving them and identifying the rows is one pass.

    Args:
        folder: made when it is needed.
        most: bytes of all files together.
    """

    def __init__(self, folder: Path, most: int = MOST_BYTES) -> None:
        self.folder, self.most = Path(folder), most

    def has(self, key: str) -> bool:
        """True when rows were made so, of whatever documents."""
        return next(self.folder.glob(f"{key}-*.rows"), None) is not None

    def get(self, name: str) -> Any:
        """Rows that were kept, mapped into memory; None when there are none, or they are not what was written."""
        path = self.folder / f"{name}.rows"
        try:
            found = _read(path)
            os.utime(path)  # used now
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def put(self, name: str, rows: Any) -> bool:
        """Keeps rows; False when they are too many, or cannot be written here."""
        sides = getattr(rows, "sides", rows)
        head = _head(rows, sides)
        size = len(head) + sum(part.nbytes for part in sides.parts())
        part = self.folder / f".part-{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if size > self.most or 2 * size > shutil.disk_usage(self.folder).free:
                return False
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(head)
                for array in sides.parts():
                    file.write(np.ascontiguousarray(array).data)
            os.replace(part, self.folder / f"{name}.rows")
            self._make_room()
        except OSError:  # a full disk, a folder that is another person's: the rows are there all the same
            return False
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        return True

    def _make_room(self) -> None:
        kept, size = [], 0
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may do the same
                facts = path.stat()
                if path.name.startswith(".part-") and time.time() - facts.st_mtime > _LEFT_OVER_S:
                    path.unlink()
                elif path.suffix == ".rows":
                    kept.append((facts.st_mtime_ns, facts.st_size, path))
        for _, bytes_, path in sorted(kept, reverse=True):
            size += bytes_
            if size > self.most:
                path.unlink(missing_ok=True)


def _head(rows: Any, sides: Rows) -> bytes:
    about = {
        "pairs": sides is not rows,
        "rows": len(sides),
        "tokens": int(sides.lengths.sum()),
        "digest": sides.digest(),
    }
    words = json.dumps({**about, "report": rows.report.to_dict()}).encode()
    words += b" " * (-(len(words) + 32) % 64)
    return _MAGIC + len(words).to_bytes(8, "little") + hashlib.blake2b(words, digest_size=16).digest() + words


def _read(path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(32)
        length = int.from_bytes(start[8:16], "little")
        words = file.read(length) if start[:8] == _MAGIC and length < _LONGEST_HEAD else b""
        if hashlib.blake2b(words, digest_size=16).digest() != start[16:]:
            raise ValueError(path)
        about = json.loads(words)
        # Written to by nobody; a private map, because torch warns of arrays that cannot be written to.
        whole = np.memmap(file, np.uint8, "c").view(np.ndarray)
    count, tokens, at = about["rows"], about["tokens"], 32 + len(words)
    parts = []
    for kind, number in (("<i8", count + 1), ("<i4", tokens), ("?", tokens)):
        end = at + number * np.dtype(kind).itemsize
        parts.append(whole[at:end].view(kind))
        at = end
    told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["report"].items()}
    report = RowReport(**told)
    offsets, ids, trained = parts
    rows = Rows(ids, trained, offsets, report)
    if at != len(whole) or rows.digest() != about["digest"]:
        raise ValueError(path)
    if not about["pairs"]:
        return rows
    from .preferences import PairRows

    return PairRows(rows)
