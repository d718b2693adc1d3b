"""The tutorials, run and saved: ``python tests/tutorials.py [01 04 …]`` runs them and writes their outputs into them.

One home serves all of them, so that the demo's base model and the runner are made once. What is saved is tidied: no
widget that lives in a kernel only, no path of this machine, no time that each cell took.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from jupyter_core.utils import ensure_async

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PATIENCE = 600  # seconds for one cell, on a busy machine
LAST_LOOK = 3  # seconds for views to see the end of their runs: without a page they look every two
_WIDGET = "application/vnd.jupyter.widget-view+json"
_NOT_KEPT = ("widgets", "execution", "signature")


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Path]:
    """A folder to run in, with an embedded database, a runner and a cluster that end with it."""
    from llmnb.launch import runner
    from llmnb.store import embedded

    try:
        yield folder
    finally:
        runner.stop(folder / "home")
        embedded.stop(folder / "home")


def environment(folder: Path) -> dict[str, str]:
    """Of a kernel: our own tree, and nothing of the person's settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMNB", "JUPYTER", "IPYTHON"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**env, "PYTHONPATH": path, "LLMNB_HOME": str(folder / "home"), "IPYTHONDIR": str(folder / "ipython")}


class Client(nbclient.NotebookClient):  # type: ignore[misc]
    """nbclient, which hears displays that are updated between two cells, too, as JupyterLab does."""

    async def _async_poll_output_msg(self, parent_msg_id: str, cell: Any, cell_index: int) -> None:
        while True:
            msg = await ensure_async(self.kc.iopub_channel.get_msg(timeout=None))
            if msg["parent_header"].get("msg_id") == parent_msg_id:
                try:
                    self.process_message(msg, cell, cell_index)
                except nbclient.client.CellExecutionComplete:
                    return
            elif msg["msg_type"] == "update_display_data":
                self._update_display_id(msg["content"]["transient"]["display_id"], msg)


def execute(path: Path, folder: Path) -> Any:
    """The notebook after a run from top to bottom by nbclient; its first failing cell raises."""
    book = nbformat.read(path, 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    book.cells.append(nbformat.v4.new_code_cell(f"import time; time.sleep({LAST_LOOK})"))
    client = Client(
        book,
        timeout=PATIENCE,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment(folder))
    book.cells.pop()
    return book


def tidied(book: Any, folder: Path) -> Any:
    """The notebook as it is committed."""
    for name in _NOT_KEPT:
        book.metadata.pop(name, None)
    book.metadata["language_info"] = {"name": "python"}
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        kept: list[Any] = []
        for output in cell.outputs:
            output = _without_widget(output)
            if output is None:
                continue
            joins = kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name
            if joins:
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = [_scrubbed(output, folder) for output in kept]
    return book


def _without_widget(output: Any) -> Any:
    """None for a widget: it lives in a kernel only, and the picture of it that is kept comes after it."""
    data = output.get("data")
    if data is None:
        return output
    if _WIDGET in data or data.get("text/html") == "":
        return None
    output.metadata = {}
    if "text/html" in data:  # a rule that hides the widget before it, which is not there any more
        data["text/html"] = re.sub(r"<style>.*?</style>", "", data["text/html"], flags=re.DOTALL)
    return output


def _scrubbed(output: Any, folder: Path) -> Any:
    if "text" in output:
        output.text = _plain(output.text, folder)
    for name, value in (output.get("data") or {}).items():
        if isinstance(value, str):
            output.data[name] = _plain(value, folder)
    return output


def _plain(text: str, folder: Path) -> str:
    for path, short in ((folder / "home", ".llmnb"), (folder, "."), (ROOT, "llmnb"), (Path.home(), "~")):
        text = text.replace(str(path), short)
    return text.replace(socket.gethostname(), "this-machine")


def main(words: Sequence[str]) -> int:
    """Runs the tutorials whose names begin with one of ``words`` (all, without any), and saves them."""
    chosen = [path for path in TUTORIALS if not words or path.name.startswith(tuple(words))]
    kept = os.environ.get("LLMNB_TUTORIALS_FOLDER")  # keeps database and base model from one time to the next
    with contextlib.ExitStack() as stack:
        folder = Path(kept) if kept else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(place(folder))
        for path in chosen:
            began = time.monotonic()
            book = tidied(execute(path, folder), folder)
            nbformat.write(book, path)
            print(f"{path.name}  {time.monotonic() - began:.0f} s  {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
