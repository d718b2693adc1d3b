"""The scripts and styles of our pages, put together: anywidget takes one text for each widget."""

from __future__ import annotations

from pathlib import Path

__all__ = ["script", "style"]

_STATIC = Path(__file__).parent / "static"


def _text(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def script(*names: str) -> str:
    """The module of a widget: what all pages share, then the files in their order."""
    return "\n".join(map(_text, ("elements.js", *names)))


def style(*names: str) -> str:
    """The styles of a widget: the variables that all pages share, then the files in their order."""
    return "\n".join(map(_text, ("live.css", *names)))
