"""The README's first code block runs as it stands; what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.mongod
@pytest.mark.slow
def test_the_first_code_block_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)[:1]
    # The demo's base is made with few steps here: the block is the same, its answers are worse.
    script = "from llmnb.demo import newborn; newborn.RECIPE['steps'] = 12\n" + block
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLMNB")} | {"LLMNB_HOME": str(tmp_path / "home")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"\['\d{8}-\d{6}-\d{3}-stdlib'\]", done.stdout), done.stdout
    finally:
        subprocess.run([sys.executable, "-m", "llmnb.cli", "db", "stop"], cwd=tmp_path, env=env, timeout=90)


def test_every_magic_that_it_shows_exists():
    from llmnb.notebook.magics import NAMES

    assert set(re.findall(r"%%?(llm_\w+)", README)) <= set(NAMES)


def test_every_extra_that_it_names_exists():
    declared = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"`(?:llmnb)?\[(\w+)\]`", README):
        assert re.search(rf"^{extra} = \[", declared, re.M), extra


def test_its_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "bash tests/run" in README and "bash tests/run" in ci
    for package in ("python3-venv", "libcurl4", "chromium"):
        assert package in README and package in ci
