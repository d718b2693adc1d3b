"""Documents to samples: which fields of a document are trained on, and what they are.

A sample is a text, a prompt with its response, or a chat. A document that cannot be read is never passed over in
silence: it comes back with a reason. This module knows no tokenizer, no database and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import thaw
from ..errors import ConfigError, DataError, Fault, near
from .formats import ALPACA, alpaca_note, alpaca_pair, as_messages, is_sharegpt, sharegpt_note

__all__ = ["KINDS", "Messages", "Reader", "Sample", "infer_key", "unused_fields"]

KINDS = ("text", "pair", "messages")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
)
_TEXTS = ("text", "content", "body")
_MISSING = object()
# What a person's own function may raise; anything beyond these is a fault of the process, not of a document.
_THEIRS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Messages(list[dict[str, Any]]):
    """A chat, and the functions that its assistant may call.

    Attributes:
        tools: JSON schemas, as OpenAI's ``tools``; None without any.
    """

    def __init__(self, messages: Iterable[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> None:
        super().__init__(dict(message) for message in messages)
        self.tools = list(tools) if tools else None


@dataclass(frozen=True)
class Sample:
    """One document as it is trained: ``kind`` is text (value: str), pair ((prompt, response)) or messages (a list).

    A preference has a second value of the same kind, with the answer that was rejected.
    """

    kind: str
    value: Any
    rejected: Any = None


def _at(document: Mapping[str, Any], column: str) -> Any:
    """The value of a column, which may be a dotted path; ``_MISSING`` when it is not there."""
    if column in document:
        return document[column]
    value: Any = document
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def looks_like_chat(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and bool(value)
        and all(isinstance(item, Mapping) and "role" in item for item in value)
    )


def own_fields(documents: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Values by field, without those that the database adds; None is not a value."""
    fields: dict[str, list[Any]] = {}
    for document in documents:
        for name, value in document.items():
            if not str(name).startswith("_") and value is not None:
                fields.setdefault(str(name), []).append(value)
    return fields


def infer_key(sample_documents: Iterable[Mapping[str, Any]]) -> tuple[Any, str]:
    """The key and its kind for documents that came without one.

    In this order: a field with chat messages ("messages" first; also ShareGPT's), "text", Alpaca's three fields, a
    known pair of names (prompt and response, instruction and output, …), the only field that holds strings.

    Returns:
        (key, kind): kind is "text", "pair" or "messages".

    Raises:
        DataError: no document, or nothing that can be told apart.
    """
    documents = list(sample_documents)
    if not documents:
        raise DataError("There are no documents to look at.", todo="check the selection")
    fields = own_fields(documents)
    chats = [name for name, values in fields.items() if all(looks_like_chat(v) or is_sharegpt(v) for v in values)]
    if chats:
        return ("messages" if "messages" in chats else chats[0]), "messages"
    texts = [name for name, values in fields.items() if all(isinstance(value, str) for value in values)]
    if "text" in texts:
        return "text", "text"
    if set(ALPACA) <= set(texts):
        return ALPACA, "pair"
    for pair in PAIRS:
        if set(pair) <= set(texts):
            return pair, "pair"
    for name in _TEXTS:
        if name in texts:
            return name, "text"
    if len(texts) == 1:
        return texts[0], "text"
    raise DataError(
        "It cannot be told which fields of the documents to train on.",
        seen="fields with text: " + (", ".join(sorted(texts)) or "none") + "; all fields: " + ", ".join(sorted(fields)),
        todo="give key=: a field, a (prompt, response) pair, or 'messages'",
    )


def unused_fields(documents: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Fields with text that the columns leave out."""
    used = {column.split(".")[0] for column in columns}
    fields = own_fields(documents)
    return sorted(
        name for name, values in fields.items() if name not in used and all(isinstance(value, str) for value in values)
    )


class Reader:
    """Reads samples from documents.

    Args:
        key: a column, a tuple of columns, or None to infer it from ``peek``.
        kind: text, pair or messages; None: from the key and the documents.
        transform: the person's function, given the values of the columns; or None.
        peek: the first documents.
        forgiving: a document on which the transform fails is one that cannot be read.

    Raises:
        ConfigError: key, kind and transform do not go together.
        DataError: the key cannot be inferred.

    Attributes:
        key: as given, or as inferred.
        converted: how a known format was read, in a sentence; "" when nothing was.
        columns: the columns that are read.
        kind: the kind of all samples; None until the first one when a transform decides.
        inferred: the key was inferred.
        peek: the first documents.
    """

    def __init__(
        self,
        key: Any,
        kind: str | None,
        transform: Callable[..., Any] | None,
        peek: Sequence[Mapping[str, Any]],
        forgiving: bool = False,
    ) -> None:
        self.transform = transform
        self.forgiving = forgiving
        self.inferred = key is None
        self.peek = peek
        self.converted = ""
        found: str | None = None
        if key is None:
            key, found = self._infer(peek)
        if isinstance(key, list):
            key = tuple(key)
        self.key = key
        self.columns: tuple[str, ...] = (key,) if isinstance(key, str) else tuple(key)
        self._check(kind)
        self.kind = kind if transform is not None else kind or found or self._kind_of(peek)
        self.seen_fields: dict[str, None] = {}

    def _infer(self, peek: Sequence[Mapping[str, Any]]) -> tuple[Any, str | None]:
        return infer_key(peek)

    def _check(self, kind: str | None) -> None:
        faults = []
        count = len(self.columns)
        if kind is not None and kind not in KINDS:
            faults.append(Fault("key_kind", f"{kind!r} is not possible", "one of " + ", ".join(KINDS)))
        if not count or not all(isinstance(column, str) and column for column in self.columns):
            faults.append(Fault("key", f"{self.key!r} is not a column or a tuple of columns", "name fields"))
        elif self.transform is None:
            if count > 2 and self.columns != ALPACA:
                todo = "give a transform that makes one text, or a prompt and a response, of them"
                faults.append(Fault("key", f"{count} columns need a transform", todo))
            elif kind == "pair" and count < 2:
                faults.append(Fault("key_kind", "a pair needs two columns", "key=('prompt', 'response')"))
            elif kind in ("text", "messages") and count > 1:
                faults.append(Fault("key_kind", f"{kind!r} needs one column or a transform", "name one field"))
        if faults:
            raise ConfigError(faults)

    def _kind_of(self, peek: Sequence[Mapping[str, Any]]) -> str:
        if len(self.columns) > 1:
            return "pair"
        if self.columns == ("messages",):
            return "messages"
        for document in peek:
            value = _at(document, self.columns[0])
            if isinstance(value, str) and value.strip():
                return "text"
            if isinstance(value, (list, tuple, Mapping)) and value:
                return "messages"
        return "text"

    @property
    def _alpaca(self) -> bool:
        return self.columns == ALPACA and self.transform is None

    def read(self, document: Mapping[str, Any]) -> Sample | str:
        """The sample of a document, or the reason why it has none.

        Raises:
            DataError: the transform failed; the document is named.
        """
        values = []
        for column in self.columns:
            value = _at(document, column)
            if value is _MISSING and self._alpaca and column == "input":
                value = ""
            if value is _MISSING:
                for name in document:
                    if len(self.seen_fields) < 200 and not str(name).startswith("_"):
                        self.seen_fields.setdefault(str(name))
                return f"has no field {column!r}"
            values.append(value)
        if self.transform is None:
            if self.kind != "pair" and isinstance(values[0], Mapping) and self.kind != "messages":
                return f"{self.columns[0]!r} is a dict, not a string"
            if self._alpaca:
                self.converted = alpaca_note()
                return self._sample("pair", alpaca_pair(*values), (ALPACA[0], ALPACA[2]))
            return with_tools(self._sample(self.kind or "text", values, self.columns), document)
        try:
            result = self.transform(*values)
        except _THEIRS as error:
            if self.forgiving:
                return f"fails in transform ({type(error).__name__}: {error})"
            raise DataError(
                f"transform failed on the document with _id {document.get('_id')!s}.",
                seen=f"{type(error).__name__}: {error}",
                todo=f"it was given the values of {', '.join(map(repr, self.columns))}",
            ) from error
        return self._result(result)

    def _result(self, result: Any) -> Sample | str:
        if isinstance(result, str):
            sample = self._sample("text", [result], ("text",))
        elif looks_like_chat(result):
            sample = self._sample("messages", [result], ("messages",))
        elif isinstance(result, Mapping):
            sample = with_tools(self._of_dict(result), result)
        else:
            return f"transform gave {type(result).__name__}, not a dict"
        if isinstance(sample, Sample):
            if self.kind is None:
                self.kind = sample.kind
            if sample.kind != self.kind:
                return f"is of kind {sample.kind}, where {self.kind} was expected"
        return sample

    def _of_dict(self, result: Mapping[str, Any]) -> Sample | str:
        for kind in sorted(("messages", "pair", "text"), key=lambda kind: kind != self.kind):
            if kind == "pair":
                for pair in PAIRS:
                    if set(pair) <= set(result):
                        return self._sample("pair", [result[pair[0]], result[pair[1]]], pair)
            elif kind in result:
                return self._sample(kind, [result[kind]], (kind,))
        if len(self.columns) == 1 and self.columns[0] in result:  # it changed the column in place
            value = result[self.columns[0]]
            kind = self.kind or ("messages" if looks_like_chat(value) else "text")
            if kind != "pair":
                return self._sample(kind, [value], self.columns)
        gave = ", ".join(sorted(map(str, result))) or "nothing"
        return f"transform gave {gave}; wanted is text, or prompt and response, or messages"

    def _sample(self, kind: str, values: Sequence[Any], names: Sequence[str]) -> Sample | str:
        if kind == "messages":
            chat = values[0]
            if is_sharegpt(chat):
                chat = as_messages(chat)
                if isinstance(chat, str):
                    return chat
                self.converted = sharegpt_note(names[0])
            fault = chat_fault(chat, names[0])
            return fault or Sample(kind, [dict(message) for message in chat])
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, str):
                return f"{name!r} is {type_of(value)}, not a string"
            if not value.strip():
                return f"{name!r} is empty"
        return Sample(kind, values[0] if kind == "text" else tuple(values))


def with_tools(sample: Sample | str, source: Mapping[str, Any]) -> Sample | str:
    """A chat with the functions that stand beside it, as a list or as the text of one."""
    given = source.get("tools")
    if isinstance(sample, str) or sample.kind != "messages" or not given:
        return sample
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return "'tools' is a text that is no JSON"
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        return f"'tools' is {type_of(given)}, not a list of functions"
    if not all(isinstance(tool, Mapping) for tool in given):
        return "'tools' holds something that is no function's schema"
    tools = [thaw(tool) for tool in given]
    rejected = None if sample.rejected is None else Messages(sample.rejected, tools)
    return Sample(sample.kind, Messages(sample.value, tools), rejected)


def type_of(value: Any) -> str:
    return {"NoneType": "null", "dict": "a dict", "Frozen": "a dict", "list": "a list", "tuple": "a list"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )


def chat_fault(value: Any, name: str) -> str:
    """What is wrong with a chat, "" when nothing is. https://platform.openai.com/docs/api-reference/chat ."""
    # The plain type first: an abstract one takes three times as long to ask.
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, Sequence)):
        return f"{name!r} is {type_of(value)}, not a list of messages"
    if not value:
        return f"{name!r} is empty"
    for at, message in enumerate(value):
        if not isinstance(message, (dict, Mapping)):
            return f"message {at} of {name!r} is {type_of(message)}, not a dict with role and content"
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            return f"message {at} of {name!r} has no role"
        if content is None and role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            more = "; only text can be trained, so give the content as one string" if content is not None else ""
            return f"the content of message {at} of {name!r} is {type_of(content)}, not a string{more}"
        if role == "assistant" and not content.strip():
            return f"the answer in message {at} of {name!r} is empty"
        if message.get("weight") not in (None, 0, 1):
            return f"the weight of message {at} of {name!r} is neither 0 nor 1"
    return ""


def missing_key(columns: Sequence[str], seen: Iterable[str], name: str) -> DataError:
    """The error for a key that no document has: it names the fields there are, and near ones."""
    fields = sorted(seen)
    offers = {column: near(column, fields) for column in columns}
    guesses = [f"{column!r} → " + " or ".join(map(repr, found)) for column, found in offers.items() if found]
    return DataError(
        f"No document of the {name} rows has the field " + " and ".join(repr(column) for column in columns) + ".",
        seen="fields: " + (", ".join(fields) or "none"),
        todo="did you mean " + "; ".join(guesses) + "?" if guesses else "set key= to one of these fields",
    )
