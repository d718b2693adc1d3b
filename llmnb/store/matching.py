"""The part of MongoDB's query and update language that our own records are found and changed with, in plain Python.

Pure functions of documents. What is not known here raises, so that a new operator is never silently ignored.
Source: https://www.mongodb.com/docs/manual/reference/operator/
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["changed", "matches"]

_MISSING = object()


def matches(record: Any, filter: Mapping[str, Any]) -> bool:
    """True when a document matches a filter.

    Raises:
        NotImplementedError: an operator that is not known here.
    """
    return all(_holds(record, key, wanted) for key, wanted in filter.items())


def _holds(record: Any, key: str, wanted: Any) -> bool:
    if key == "$or":
        return any(matches(record, part) for part in wanted)
    if key == "$and":
        return all(matches(record, part) for part in wanted)
    values = _values(record, key.split("."))
    if isinstance(wanted, Mapping) and any(name.startswith("$") for name in wanted):
        return all(_operator(name)(values, operand) for name, operand in wanted.items())
    return _equal(values, wanted)


def _values(value: Any, path: list[str]) -> list[Any]:
    """All values at a dotted path; arrays on the way, and at its end, are looked into."""
    if not path:
        return [value, *value] if isinstance(value, list) else [value]
    if isinstance(value, list):
        return [found for item in value for found in _values(item, path)] or [_MISSING]
    if not isinstance(value, Mapping) or path[0] not in value:
        return [_MISSING]
    return _values(value[path[0]], path[1:])


def _equal(values: list[Any], wanted: Any) -> bool:
    return any(value == wanted or (wanted is None and value is _MISSING) for value in values)


def _compare(test: Callable[[Any, Any], bool]) -> Callable[[list[Any], Any], bool]:
    def holds(values: list[Any], operand: Any) -> bool:
        return any(value is not _MISSING and value is not None and test(value, operand) for value in values)

    return holds


def _element(values: list[Any], operand: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) and matches(value, operand) for value in values)


def _not(values: list[Any], operand: Mapping[str, Any]) -> bool:
    return not all(_operator(name)(values, inner) for name, inner in operand.items())


_OPERATORS: dict[str, Callable[[list[Any], Any], bool]] = {
    "$eq": _equal,
    "$ne": lambda values, operand: not _equal(values, operand),
    "$in": lambda values, operand: any(_equal(values, item) for item in operand),
    "$nin": lambda values, operand: not any(_equal(values, item) for item in operand),
    "$gt": _compare(lambda a, b: a > b),
    "$gte": _compare(lambda a, b: a >= b),
    "$lt": _compare(lambda a, b: a < b),
    "$lte": _compare(lambda a, b: a <= b),
    "$exists": lambda values, operand: any(value is not _MISSING for value in values) == bool(operand),
    "$elemMatch": _element,
    "$not": _not,
}


def _operator(name: str) -> Callable[[list[Any], Any], bool]:
    if name not in _OPERATORS:
        raise NotImplementedError(f"the operator {name}")
    return _OPERATORS[name]


def changed(record: Mapping[str, Any], change: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The document after an update.

    Raises:
        NotImplementedError: an operator, or a dotted path, that is not known here.
    """
    after = copy.deepcopy(dict(record))
    for name, fields in change.items():
        for field, operand in fields.items():
            if "." in field:
                raise NotImplementedError(f"an update of {field}")
            if name == "$set":
                after[field] = operand
            elif name == "$unset":
                after.pop(field, None)
            elif name == "$inc":
                after[field] = after.get(field, 0) + operand
            elif name == "$max":
                after[field] = max(after.get(field, operand), operand)
            elif name == "$push":
                after[field] = [*after.get(field, []), operand]
            elif name == "$pull":
                after[field] = [item for item in after.get(field, []) if not matches(item, operand)]
            else:
                raise NotImplementedError(f"the update {name}")
    return after
