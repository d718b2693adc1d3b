"""The trip of a newcomer: one command, from nothing to a model that answers in the trained form."""

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.mongod
def test_llmnb_quickstart(tmp_path):
    """A small form of it: few documents, few steps, a base that was hardly trained."""
    home = tmp_path / "home"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMNB_")} | {"COLUMNS": "100"}
    make = "import sys; from llmnb.cli import quickstart; from llmnb.demo import newborn\n"
    make += "newborn.RECIPE['steps'] = 12\n"
    make += "from llmnb.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", make, "quickstart", "--limit", "400", "--steps", "9"]
    try:
        done = subprocess.run(
            line, cwd=tmp_path, env=environment | {"LLMNB_HOME": str(home)}, capture_output=True, text=True, timeout=550
        )
        said = done.stdout
        assert done.returncode == 0, done.stderr

        # It says where the data are, and how many.
        assert re.search(r"^Database +MongoDB .* of this machine, in\s", said, re.M)
        assert re.search(r"^Documents +400 questions", said, re.M)

        # The base is made here; the loss of the training falls.
        assert re.search(r"^Base model +a Llama of .* M parameters", said, re.M)
        first, last = map(float, re.search(r"^Training.*?loss ([\d.]+) → ([\d.]+)", said, re.M | re.S).groups())
        assert last < first

        # Three checkpoints, one of them loaded.
        assert re.findall(r"^ +(\d+) +[\d.]+ +\d", said, re.M) == ["3", "6", "9"]
        assert said.count("best, loaded") == 1

        # Three questions before and after, then what to do next; all of it fits a screen.
        assert said.count("  before  ") == said.count("  after  ") == 3
        assert "llmnb chat" in said.splitlines()[-3]
        assert len(said.splitlines()) <= 32
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr

        # A second process needs no base and no documents any more.
        again = subprocess.run(
            [*line[:-1], "3"], cwd=tmp_path, env=environment | {"LLMNB_HOME": str(home)},
            capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert again.returncode == 0, again.stderr
        assert "the one made here before" in again.stdout and "0 of them new" in again.stdout
    finally:
        subprocess.run(
            [sys.executable, "-m", "llmnb.cli", "db", "stop", "--home", str(home)], env=environment, timeout=90
        )
