"""``llmnb lab``: JupyterLab at the first tutorial, on this machine only.

The tutorials travel in the package; they are copied to where the person works, once, and a copy that is there is never
written over. This process becomes JupyterLab, so that Ctrl-C and its questions are JupyterLab's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from ..errors import LlmnbError, MissingPackage

__all__ = ["FOLDER", "command", "lab", "place", "source"]

FOLDER = "llmnb-tutorials"


def lab(known: argparse.Namespace) -> int:
    """Opens it; does not return."""
    for name in ("jupyterlab", "ipykernel", "anywidget"):
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(name, "notebook", "llmnb lab")
    folder, copied = place(Path.cwd(), source())
    if copied:
        print(f"The tutorials are in {folder.name}/ now: {len(copied)} notebooks.", flush=True)
    line = command(folder, browser=known.browser, more=known.more)
    os.execv(line[0], line)


def source() -> Path:
    """Where the tutorials lie: in the installed package, or beside it in a checkout.

    Raises:
        LlmnbError: they are in neither.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tutorials", package.parent / "notebooks"):
        if any(folder.glob("01-*.ipynb")):
            return folder
    raise LlmnbError("The tutorials are not in this installation.", todo="install llmnb again, or use a checkout of it")


def place(here: Path, there: Path) -> tuple[Path, list[Path]]:
    """The folder of the tutorials in ``here``, and what had to be copied into it.

    Args:
        here: the person's current folder; when it holds the tutorials itself, nothing is copied.
        there: where they come from.
    """
    books = sorted(there.glob("*.ipynb"))
    if all((here / book.name).exists() for book in books):
        return here, []
    folder = here / FOLDER
    missing = [book for book in books if not (folder / book.name).exists()]
    if missing:
        folder.mkdir(exist_ok=True)
    return folder, [Path(shutil.copyfile(book, folder / book.name)) for book in missing]


def command(folder: Path, *, browser: bool = True, more: list[str] | None = None) -> list[str]:
    """The line that starts JupyterLab in the current folder, at the first of ``folder``'s tutorials."""
    first = min(book.name for book in folder.glob("*.ipynb"))
    inside = [FOLDER] if folder.name == FOLDER and folder != Path.cwd() else []
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ServerApp.ip=127.0.0.1",
        f"--LabApp.default_url=/lab/tree/{'/'.join([*inside, first])}",
        *([] if browser else ["--no-browser"]),
        *(more or []),
    ]
