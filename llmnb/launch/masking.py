"""Taking secrets out of texts that leave the worker: errors on the run, logs, notes.

What is known to be secret (the database URI, its password, tokens) is replaced wherever it stands; what looks like a
password inside any URL is replaced as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

__all__ = ["Mask"]

_IN_URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"<>]+@")
_HIDDEN = "***"
# A shorter word stands in ordinary sentences too; inside a URL it is hidden all the same.
_SHORTEST = 4


class Mask:
    """Replaces secrets in texts. Its repr shows none.

    Args:
        secrets: URIs with passwords, tokens; None and "" are passed over.
    """

    def __init__(self, secrets: Iterable[str | None] = ()) -> None:
        words: set[str] = set()
        for secret in secrets:
            if secret:
                words |= _parts(str(secret))
        self._words = sorted((w for w in words if len(w) >= _SHORTEST), key=len, reverse=True)

    def __call__(self, text: object) -> str:
        """The text without the secrets."""
        out = _IN_URL.sub(rf"\g<scheme>{_HIDDEN}@", str(text))
        for word in self._words:
            out = out.replace(word, _HIDDEN)
        return out


def _parts(secret: str) -> set[str]:
    """A URI gives its user:password and its password, as written and unquoted; anything else gives itself."""
    head, found, rest = secret.partition("://")
    if not found:
        return {secret}
    login, at, _ = rest.partition("/")[0].rpartition("@")
    if not at:
        return set()
    password = login.partition(":")[2]
    return {p for p in (login, unquote(login), password, unquote(password)) if p} | {f"{head}://{login}@"}
