"""The tutorials run from top to bottom, by nbclient and by nbval, with no network and a home of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "notebooks" / "01-quickstart.ipynb"
PATIENCE = 600  # seconds for one cell, on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, with an embedded database and a cluster that end with the tests."""
    from llmnb.launch import runner
    from llmnb.store import embedded

    folder = tmp_path_factory.mktemp("tutorials")
    home = folder / "home"
    yield folder
    runner.stop(home)
    embedded.stop(home)


def environment(folder: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LLMNB", "JUPYTER", "IPYTHON"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**env, "PYTHONPATH": path, "LLMNB_HOME": str(folder / "home"), "IPYTHONDIR": str(folder / "ipython")}


@pytest.mark.notebook
@pytest.mark.mongod
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_runs_and_shows_what_it_promises(place):
    book = nbformat.read(QUICKSTART, 4)
    client = nbclient.NotebookClient(book, timeout=PATIENCE, resources={"metadata": {"path": str(place)}})
    began = time.monotonic()
    client.execute(env=environment(place))
    print(f"01-quickstart ran in {time.monotonic() - began:.0f} s")
    pages = {cell.source.split("\n")[0]: _html(cell) for cell in book.cells if cell.cell_type == "code"}
    (curve,) = [page for source, page in pages.items() if source.startswith("run = ")]
    assert 'data-status="done"' in curve and 'data-points="200"' in curve and "image/svg+xml" in curve
    checkpoints = pages["%llm_checkpoints"]
    assert "best" in checkpoints and ">200<" in checkpoints and ">100<" in checkpoints
    chats = [page for source, page in pages.items() if source.startswith("%%llm_chat")]
    for chat in chats:
        assert chat.count("llmnb-answer") == 2 and "base" in chat and "failed" not in chat
    plain = str(book)
    assert not re.search(r"mongodb://[^\s:]+:[^*@\s]+@", plain), "no password is saved"


def _html(cell) -> str:
    """The last HTML of a cell: what its display was updated to."""
    return "".join(str(o.data.get("text/html", "")) for o in cell.outputs if "data" in o)


@pytest.mark.notebook
@pytest.mark.mongod
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nbval_sees_no_failure_in_the_quickstart(place):
    pytest.importorskip("nbval")
    copy = place / QUICKSTART.name
    shutil.copy(QUICKSTART, copy)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", f"--nbval-cell-timeout={PATIENCE}", "-q", "--timeout=0"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(place), str(copy)],
        env=environment(place),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_tutorials_are_saved_without_outputs():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                assert not cell.outputs and cell.execution_count is None, f"{path.name}: clear the outputs"


def test_binder_is_one_folder_with_a_pinned_python():
    assert not (ROOT / ".binder").exists()
    assert re.fullmatch(r"python-3\.\d+", (ROOT / "binder" / "runtime.txt").read_text().strip())
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
