"""The tutorials run from top to bottom, by nbclient and by nbval, with no network and one home of their own.

``tests/tutorials.py`` runs them and saves their outputs; what is saved is checked here, too.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
tutorials = pytest.importorskip("tutorials")

PATIENCE, ROOT, TUTORIALS, environment = tutorials.PATIENCE, tutorials.ROOT, tutorials.TUTORIALS, tutorials.environment
NAMES = (
    "01-quickstart",
    "02-your-own-data",
    "03-lora-and-qlora",
    "04-deepspeed-and-many-workers",
    "05-checkpoints-merging-chat",
    "06-runs-that-survive",
)
LARGEST = 300_000  # bytes of a file


def each(paths):
    return [pytest.param(p, id=p.stem, marks=pytest.mark.deepspeed if p.stem.startswith("04") else ()) for p in paths]


def runs_notebooks(test):
    for name in ("notebook", "mongod", "ray", "bitsandbytes", "slow"):
        test = getattr(pytest.mark, name)(test)
    return pytest.mark.timeout(1500)(test)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to run in, where the base model is found: one that was pre-trained for fewer steps, to save a minute."""
    with tutorials.place(tmp_path_factory.mktemp("tutorials")) as folder:
        began = time.monotonic()
        code = (
            "from llmnb.demo.newborn import _planned, base_model\n"
            "base_model(steps=300, apart=True).rename(_planned(None, None)[0])"
        )
        subprocess.run([sys.executable, "-c", code], check=True, env=environment(folder), capture_output=True)
        print(f"base model in {time.monotonic() - began:.0f} s")
        yield folder


# --- run ----------------------------------------------------------------------------------------------------


@runs_notebooks
@pytest.mark.parametrize("path", each(TUTORIALS))
def test_a_tutorial_runs_and_shows_what_it_promises(place, path):
    began = time.monotonic()
    book = tutorials.execute(path, place)
    print(f"{path.stem} ran in {time.monotonic() - began:.0f} s")
    PROMISES[path.stem[:2]](Pages(book))
    assert_fit_to_be_kept(tutorials.tidied(book, place))


@runs_notebooks
@pytest.mark.parametrize("path", each(TUTORIALS))
def test_nbval_sees_no_failure_in_a_tutorial(place, path):
    pytest.importorskip("nbval")
    copy = place / path.name
    shutil.copy(path, copy)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", f"--nbval-cell-timeout={PATIENCE}", "-q", "--timeout=0"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(place), str(copy)],
        env=environment(place),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=1400,
    )
    print(f"{path.stem} by nbval in {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


class Pages:
    """What the code cells of a notebook show, found by a piece of their source."""

    def __init__(self, book):
        self.cells = [cell for cell in book.cells if cell.cell_type == "code"]

    def html(self, piece):
        """The HTML of each cell with that in its source: what its displays were updated to."""
        found = [cell for cell in self.cells if piece in cell.source]
        assert found, piece
        return ["".join(str(o.data.get("text/html", "")) for o in cell.outputs if "data" in o) for cell in found]

    def text(self, piece, alone=False):
        """The plain text of the last cell with that in its source, or with that alone as its source."""
        (*_, cell) = [cell for cell in self.cells if (piece == cell.source if alone else piece in cell.source)]
        return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)

    def curves(self, piece, state, points):
        """Each curve that such a cell kept has ended so, with its picture."""
        for page in self.html(piece):
            assert f'data-status="{state}"' in page and f'data-points="{points}"' in page, page[:400]
            assert "image/svg+xml" in page

    def chats(self):
        """How many models answered in each chat cell; none failed."""
        pages = self.html("%%llm_chat")
        assert not any("failed" in page for page in pages)
        return [page.count("llmnb-answer") for page in pages]


def quickstart(pages):
    pages.curves("run = ", "done", 200)
    (checkpoints,) = pages.html("%llm_checkpoints")
    assert "best" in checkpoints and ">200<" in checkpoints and ">100<" in checkpoints
    assert pages.chats() == [2, 2]
    assert "[100, 200]" in pages.text("db.show")


def own_data(pages):
    pages.curves("run = ", "done", 40)
    assert "notes: 100 documents (" in pages.text("%llm_data notes", alone=True)
    found = pages.text("found = ")
    assert "the same as a row before" in found and "trained" in found
    counts = eval(pages.text("counts = "))
    assert 0 < counts["rows"] == counts["found"] <= 80 and counts["cut"] == counts["dropped"] == 0
    assert 0 < counts["trained_tokens"] <= counts["tokens"]
    assert pages.chats() == [1, 1]
    assert "transform=as_text" in pages.text("%llm_train")


def lora(pages):
    pages.curves("%llm_watch", "done", 40)
    (rows,) = ["".join(o.data["text/markdown"] for o in c.outputs) for c in pages.cells if "lines = [" in c.source]
    cells = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in rows.splitlines()[2:]}
    assert cells["lora8"][0] == "8" and cells["lora4"][0] == "4"
    weights = {name: int(row[1].replace(",", "")) for name, row in cells.items()}
    assert weights["lora"] == weights["lora8"] == weights["lora4"] < weights["full"] / 5
    assert all(0 < float(row[2]) < 7 for row in cells.values()), "below the logarithm of the vocabulary's size"
    assert pages.chats() == [2]


def workers(pages):
    pages.curves("run = ", "done", 10)
    assert "(2, 16)" in pages.text("counts = ")
    assert "4-bit weights cannot be" in pages.text("from llmnb.errors")
    assert pages.chats() == [1]


def checkpoints(pages):
    pages.curves("run = ", "done", 90)
    (listed,) = pages.html("%llm_checkpoints")
    assert all(f">{step}<" in listed for step in (30, 60, 90)) and "best" in listed
    assert pages.chats() == [3, 1]
    measured = pages.text("measured = ")
    assert "perplexity" in measured and "base" in measured and "bleu" in measured
    assert pages.text("report.max") == "(True, True)" and "perplexity" in pages.text("import shutil")
    assert "(60, 'adapter', " in pages.text("db.load")
    assert "[60, 90]" in pages.text("db.show")


def survival(pages):
    assert "running and past step 60: True" in pages.text("code = ")
    assert pages.text("stopped_at = ") == "('stopped', True)"
    assert pages.text("steps = ") == "True" and pages.text("run.error") == "True"
    assert pages.text("run.resume") == "('done', True)"
    page = pages.html("%llm_watch")[-1]
    assert 'data-status="done"' in page and "image/svg+xml" in page


PROMISES = dict(zip(("01", "02", "03", "04", "05", "06"), (quickstart, own_data, lora, workers, checkpoints, survival)))


# --- what is committed --------------------------------------------------------------------------------------


def test_every_tutorial_is_there_and_names_the_next():
    assert tuple(path.stem for path in TUTORIALS) == NAMES
    for path, following in itertools.pairwise(TUTORIALS):
        assert f"]({following.name})" in nbformat.read(path, 4).cells[-1].source, path.name


@pytest.mark.parametrize("path", each(TUTORIALS))
def test_a_tutorial_is_saved_with_its_outputs(path):
    assert path.stat().st_size < LARGEST
    book = nbformat.read(path, 4)
    assert_fit_to_be_kept(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run tests/tutorials.py"
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs), "its curve is there without a kernel"
    promised = Pages(book)
    PROMISES[path.stem[:2]](promised)


def assert_fit_to_be_kept(book):
    """No failure, no widget, no secret, and nothing of the machine it ran on."""
    assert "widgets" not in book.metadata
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            said = f"{output.output_type} of {cell.source[:60]!r}"
            assert output.output_type != "error" and output.get("name") != "stderr", f"{said}: {output}"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), said
            text = str(output)
            assert not re.search(r" object at 0x[0-9a-f]+>", text), f"{said}: something without words"
            assert not re.search(r"mongodb(\+srv)?://[\w.]", text), f"{said}: an address"
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|var|usr|opt)/", text), f"{said}: a path"
            assert not re.search(r"\b(pid|process) \d+", text), f"{said}: a process id"
            assert not re.search(r"(?i)(token|password|secret)s?[=:]", text), f"{said}: a secret"
            assert str(Path.home()) == "/" or str(Path.home()) + os.sep not in text, said


# --- binder -------------------------------------------------------------------------------------------------


def test_binder_is_one_folder_with_a_pinned_python():
    assert not (ROOT / ".binder").exists()
    assert re.fullmatch(r"python-3\.\d+", (ROOT / "binder" / "runtime.txt").read_text().strip())
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
