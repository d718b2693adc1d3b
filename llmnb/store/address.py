"""Database addresses: which kinds there are, the database's name in one, and one without its secrets.

Knows no driver; it works on text.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from ..errors import ConnectError, near

__all__ = ["DEFAULT_NAME", "check_scheme", "database_name", "mask_uri", "mock_name"]

DEFAULT_NAME = "llmnb"
SCHEMES = ("mongodb", "mongodb+srv", "mongomock")

_SECRET_OPTIONS = re.compile(
    r"(?i)([?&;,](?:[^=&;,]*(?:password|secret|token)[^=&;,]*|authMechanismProperties)=)[^&;]*|(AWS_SESSION_TOKEN:)[^&;,]*"
)


def mask_uri(uri: str) -> str:
    """The address with ``***`` for its password, safe for a log, also when the address is malformed."""
    head, mark, rest = str(uri).partition("://")
    if not mark:
        head, rest = "", head
    # The last '@' ends the user's part even when a password holds an unescaped '@' or '/'.
    user, at, host = rest.rpartition("@")
    if at:
        name, colon, _ = user.partition(":")
        rest = f"{name}:***@{host}" if colon else f"{name}@{host}"
    masked = _SECRET_OPTIONS.sub(lambda m: (m.group(1) or m.group(2)) + "***", rest)
    return f"{head}{mark}{masked}"


def check_scheme(uri: str) -> str:
    """The scheme of an address we can open.

    Raises:
        ConnectError: it is no address, or not one of a MongoDB.
    """
    scheme, mark, _ = uri.partition("://")
    if mark and scheme.lower() in SCHEMES:
        return scheme.lower()
    known = ", ".join(f"{name}://…" for name in SCHEMES)
    close = near(scheme.lower(), SCHEMES, n=1) if mark else []
    todo = f"did you mean {close[0]}://…? " if close else ""
    raise ConnectError(
        "This is not the address of a MongoDB.",
        seen=mask_uri(uri) if uri else "an empty address",
        todo=f"{todo}an address begins with one of {known}; connect() without one starts an embedded server",
    )


def database_name(uri: str) -> str:
    """The database that an address names, ``llmnb`` when it names none."""
    rest = uri.partition("://")[2].rpartition("@")[2]
    path = rest.partition("?")[0].partition("/")[2]
    return unquote(path).strip("/") or DEFAULT_NAME


def mock_name(uri: str) -> str:
    """The database's name in ``mongomock://name``.

    Raises:
        ConnectError: there is no usable name in it.
    """
    parts = urlsplit(uri)
    name = unquote(parts.netloc.rpartition("@")[2].partition(":")[0] or parts.path.strip("/")) or DEFAULT_NAME
    if re.search(r'[/\\. "$\0]', name):
        raise ConnectError("This is not a database's name.", seen=name, todo="write mongomock://name")
    return name
