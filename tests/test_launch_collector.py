"""The garbage collector of processes that import for seconds: no full collection until they have, and then as usual."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from llmnb.launch import collector
before, seen = gc.get_threshold(), []
gc.callbacks.append(lambda phase, info: seen.append(info["generation"]) if phase == "start" else None)
collector.seldom()
import llmnb.engine.loop
print(seen.count(2), seen.count(0) > 100, end=" ")
collector.as_usual()
frozen = gc.get_freeze_count()
kept = [[] for _ in range(500_000)]
print(gc.get_threshold() == before, frozen > 100_000, seen.count(2) > 0)
"""


def test_imports_are_not_walked_again_and_again_and_later_collections_leave_them_alone():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True", "True", "True"]
