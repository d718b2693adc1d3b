"""Warming up a process that will fork: nothing of it may reach a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmnb.engine import warm

torch = pytest.importorskip("torch")

THREADS = """
import os
os.environ.update(OPENBLAS_NUM_THREADS="1", JE_ARROW_MALLOC_CONF="background_thread:false")
from llmnb.engine import warm
warm.warm((*warm.MODULES, *warm.EXTRAS))
import sys
assert {"torch", "transformers.trainer", "peft"} <= set(sys.modules)
print(len(os.listdir("/proc/self/task")), warm.touched_gpu())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_a_warm_process_has_one_thread_and_no_gpu():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-2:] == ["1", "False"], done.stderr


def test_what_a_gpu_can_do_is_asked_of_the_drivers_tool_meanwhile(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 8.6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    before = torch.cuda.get_device_capability
    with warm._no_cuda_context():
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_capability(torch.cuda.device(1)) == (8, 6)
    assert torch.cuda.get_device_capability is before and not warm.touched_gpu()


def test_random_numbers_are_its_own():
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    warm.reseed()
    assert torch.rand(1) != first
