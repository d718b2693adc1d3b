"""``llmnb lab``: where the tutorials come from, where they are put, and the JupyterLab that opens at the first."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from llmnb.cli import lab, main

ROOT = Path(__file__).resolve().parents[1]
BOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_in_a_checkout_the_tutorials_are_its_notebooks():
    assert lab.source() == ROOT / "notebooks"


def test_they_are_copied_once_and_never_over_a_persons_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, copied = lab.place(tmp_path, lab.source())
    assert folder == tmp_path / "llmnb-tutorials" and sorted(p.name for p in copied) == BOOKS
    (folder / BOOKS[0]).write_text("mine")
    (folder / BOOKS[1]).unlink()
    folder, copied = lab.place(tmp_path, lab.source())
    assert [p.name for p in copied] == [BOOKS[1]] and (folder / BOOKS[0]).read_text() == "mine"
    assert "--LabApp.default_url=/lab/tree/llmnb-tutorials/01-quickstart.ipynb" in lab.command(folder)


def test_in_their_own_folder_nothing_is_copied(tmp_path, monkeypatch):
    for name in BOOKS:
        shutil.copy(ROOT / "notebooks" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert lab.place(tmp_path, lab.source()) == (tmp_path, [])
    line = lab.command(tmp_path, browser=False, more=["--port", "9000"])
    assert "--LabApp.default_url=/lab/tree/01-quickstart.ipynb" in line
    assert line[-3:] == ["--no-browser", "--port", "9000"] and "--ServerApp.ip=127.0.0.1" in line


def test_every_package_of_ours_travels():
    from setuptools import find_packages

    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M).group(1)
    assert re.findall(r'"(.*?)"', listed) == [*sorted(find_packages(str(ROOT), include=["llmnb*"])), "llmnb.tutorials"]


def test_without_jupyterlab_it_says_what_to_install(monkeypatch, capsys):
    found = lab.importlib.util.find_spec
    monkeypatch.setattr(lab.importlib.util, "find_spec", lambda name: None if name == "jupyterlab" else found(name))
    assert main(["lab"]) == 1
    said = capsys.readouterr().err
    assert "jupyterlab, which is not installed" in said and "pip install 'llmnb[notebook]'" in said


@pytest.mark.slow
def test_the_tutorials_travel_in_the_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("llmnb", "notebooks"):
        left_out = shutil.ignore_patterns("__pycache__", ".llmnb", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    code = "from llmnb.cli import lab; print(lab.source(), *sorted(p.name for p in lab.source().glob('*.ipynb')))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "site" / "llmnb" / "tutorials"), *BOOKS]
    assert (tmp_path / "site" / "llmnb" / "notebook" / "static" / "live.js").is_file()


@contextlib.contextmanager
def running(folder, *words):
    """A real ``llmnb lab`` in ``folder``: (its process, the address that it prints)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "LLMNB", "IPYTHON"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env.update(PYTHONPATH=path, JUPYTER_CONFIG_DIR=str(folder / "c"), JUPYTER_DATA_DIR=str(folder / "d"))
    env.update(JUPYTER_RUNTIME_DIR=str(folder / "r"), JUPYTERLAB_WORKSPACES_DIR=str(folder / "w"))
    work = folder / "work"
    work.mkdir()
    with open(folder / "lab.log", "wb") as log:
        line = [sys.executable, "-m", "llmnb.cli", "lab", "--no-browser", "--allow-root", *words]
        process = subprocess.Popen(line, cwd=work, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 90
        address = None
        while address is None and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
            address = re.search(r"http://127\.0\.0\.1:\d+/\S+", (folder / "lab.log").read_text())
        assert address, (folder / "lab.log").read_text()
        yield process, address.group()
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.notebook
@pytest.mark.slow
def test_it_opens_jupyterlab_at_the_first_tutorial_on_loopback_alone(tmp_path):
    with running(tmp_path, "--ServerApp.port=0") as (process, address):
        assert "/lab/tree/llmnb-tutorials/01-quickstart.ipynb?token=" in address
        listening: list[str] = []
        end = time.monotonic() + 30
        while not listening and time.monotonic() < end:  # the system's list may miss one while others change it
            found = psutil.Process(process.pid).net_connections("inet")
            listening = [connection.laddr.ip for connection in found if connection.status == "LISTEN"]
        assert listening and set(listening) == {"127.0.0.1"}
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.status == 200
        root, token = address.partition("/lab/")[0], address.partition("token=")[2]
        listed = f"{root}/api/contents/llmnb-tutorials?token={token}"
        with urllib.request.urlopen(listed, timeout=30) as page:
            said = page.read().decode()
        assert all(name in said for name in BOOKS)
