"""Real kernels: a run outlives the kernel that started it, and a new kernel shows its whole curve."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("jupyter_client")

from jupyter_client.manager import KernelManager

from llmnb import connect

ROOT = Path(__file__).resolve().parents[1]


class Kernel:
    """A kernel of its own, with everything it said."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.manager = KernelManager(kernel_name="python3")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LLMNB", "JUPYTER", "IPYTHON"))}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.manager.start_kernel(
            env={**inherited, "PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1", **env},
            cwd=str(folder),
        )
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.outputs: list[dict] = []

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)

    def run(self, code: str, timeout: float = 240) -> str:
        """Runs a cell; what it printed. A cell that raises fails the test."""
        said: list[str] = []

        def hear(message: dict) -> None:
            self.outputs.append(message)
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])
            if message["msg_type"] == "error":
                raise AssertionError("\n".join(message["content"]["traceback"]))

        reply = self.client.execute_interactive(code, timeout=timeout, output_hook=hear)
        assert reply["content"]["status"] == "ok"
        return "".join(said)

    def listen(self, seconds: float) -> None:
        """Collects what the kernel says by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self.outputs.append(self.client.get_iopub_msg(timeout=0.3))
            except Exception as error:  # queue.Empty, by whatever name this version raises it
                if type(error).__name__ != "Empty":
                    raise

    def pages(self) -> list[str]:
        """Every piece of HTML that was displayed or updated, in order."""
        shown = [m for m in self.outputs if m["msg_type"] in ("display_data", "update_display_data")]
        return [m["content"]["data"]["text/html"] for m in shown if "text/html" in m["content"]["data"]]

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernels(tmp_path, mongo_uri):
    """Makes kernels that share a database and a home; ends them, and the cluster they started."""
    from llmnb.launch import runner

    home, made = tmp_path / "home", []

    def make() -> Kernel:
        made.append(Kernel(tmp_path, LLMNB_URI=mongo_uri, LLMNB_HOME=str(home)))
        return made[-1]

    yield make
    for kernel in made:
        kernel.close()
    runner.stop(home)


def points(page: str) -> int:
    found = re.search(r'data-points="(\d+)"', page)
    return int(found.group(1)) if found else 0


@pytest.mark.notebook
@pytest.mark.mongod
@pytest.mark.ray
@pytest.mark.slow
def test_a_run_outlives_its_kernel_and_a_new_kernel_shows_its_whole_curve(kernels, mongo_uri, tiny_llama, tmp_path):
    first = kernels()
    first.run("%load_ext llmnb")
    first.run("db = %llm_connect")
    first.run(
        "from llmnb import Collection\n"
        "_ = db.execute(Collection('docs').insert_many([{'text': f'{i}+1={i + 1}'} for i in range(60)]))"
    )
    id = (
        first.run(
            f"run = %llm_train --model {tiny_llama} --identifier sums --collection docs --key text --max_steps 400 "
            "--logging_steps 1 --per_device_train_batch_size 1 --save_strategy no --start\nprint('RUN', run.id)"
        )
        .rpartition("RUN ")[2]
        .strip()
    )
    assert "torch" not in first.run(
        "import sys; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    db = connect(mongo_uri, home=tmp_path / "home")
    run = db.run(id)

    def logged() -> int:
        return sum("loss" in point for point in run.metrics())

    wait_for(lambda: logged() >= 3, run, 180)
    os.kill(first.pid, signal.SIGKILL)
    at_the_kill = logged()
    assert run.state == "running", "it was killed in the middle of the run"

    second = kernels()
    second.run("%load_ext llmnb")
    second.run(f"again = %llm_watch {id}")
    assert run.wait(timeout=240).state == "done"
    assert logged() == 400 > at_the_kill
    assert [e.seq for e in run.events()] == list(range(1, len(run.events()) + 1)), "nothing is missing"
    second.listen(5)
    last = [page for page in second.pages() if "data-points" in page][-1]
    assert points(last) == 400 and 'data-status="done"' in last
    assert second.run("print(again.state)").strip() == "done"
    secret = re.search(r":([^:@/]+)@", mongo_uri)
    assert secret is None or not any(secret.group(1) in str(message) for message in first.outputs + second.outputs)
    db.close()


def wait_for(true, run, patience: float) -> None:
    end = time.monotonic() + patience
    while not true():
        assert run.state not in ("failed", "lost"), (run.error, run.logs(40))
        assert time.monotonic() < end, f"it did not happen in {patience} s; {run!r}\n{run.logs(40)}"
        time.sleep(0.3)


@pytest.mark.notebook
def test_a_kernel_of_its_own_loads_and_unloads(tmp_path):
    kernel = Kernel(tmp_path, LLMNB_HOME=str(tmp_path / "home"))
    try:
        kernel.run("%load_ext llmnb")
        kernel.run("import threading, warnings; warnings.simplefilter('ignore')")
        kernel.run("from llmnb import connect\nfrom llmnb.events import Metric\ndb = connect('mongomock://k')")
        kernel.run(
            "r = db.store.runs.create('x', model='x', version=1, config={}, counts={'steps': 9})\n"
            "db.store.events.append(r['_id'], [Metric(seq=i, step=i, values={'loss': 1.0}) for i in (1, 2, 3)])\n"
            "db.store.runs.transition(r['_id'], 'queued', 'starting')"
        )
        kernel.run("y = %llm_connect db")
        kernel.run("w = %llm_watch latest")
        widgets = [
            m for m in kernel.outputs if "application/vnd.jupyter.widget-view+json" in str(m["content"].get("data"))
        ]
        assert len(widgets) == 1
        assert points(kernel.pages()[-1]) == 3, "a picture is kept for the file from the start"
        assert "llmnb-watch" in kernel.run("print([t.name for t in threading.enumerate()])")
        kernel.run("%unload_ext llmnb")
        assert "llmnb-watch" not in kernel.run("print([t.name for t in threading.enumerate()])")
    finally:
        kernel.close()
