"""The bytes of a cursor's documents, without an object for each document on the way.

For raw batches pymongo first makes a ``RawBSONDocument`` of every document in a reply, then takes the bytes from the
reply itself (https://jira.mongodb.org/browse/PYTHON-2722): that is half of the time that reading bytes takes. It has a
class whose arrays stay bytes; with it the objects are left out. Both have private names, so where a driver has them no
more, its own way is taken.
"""

from __future__ import annotations

from typing import Any

__all__ = ["lean"]


def lean(cursor: Any) -> Any:
    """The same raw cursor, of ``find_raw_batches`` or ``aggregate_raw_batches``: same batches, same errors, sooner."""
    try:
        from bson import _convert_raw_document_lists_to_streams as to_streams
        from bson import decode
        from bson.raw_bson import _RAW_ARRAY_BSON_OPTIONS as options
        from bson.raw_bson import RawBSONDocument

        own = cursor._unpack_response
    except (ImportError, AttributeError):
        return cursor

    def unpacked(response: Any, *given: Any, **named: Any) -> Any:
        payload = getattr(response, "payload_document", None)
        if payload is None:
            return own(response, *given, **named)
        reply: dict[str, Any] = dict(decode(payload, options))
        if not isinstance(reply.get("cursor"), RawBSONDocument):  # an error, whose arrays have to be read
            return own(response, *given, **named)
        reply["cursor"] = dict(reply["cursor"])
        to_streams(reply)
        return [reply]

    cursor._unpack_response = unpacked
    return cursor
