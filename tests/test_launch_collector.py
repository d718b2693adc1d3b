"""The garbage collector of processes that import for seconds: no full collection until they have, and then as usual."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
from llmnb.launch import collector
before, full = gc.get_threshold(), []
gc.callbacks.append(lambda phase, info: full.append(info["generation"]) if phase == "start" else None)
if {seldom}:
    collector.seldom()
import llmnb.engine.loop
print(full.count(2), full.count(0) > 100, end=" ")
collector.as_usual()
frozen = gc.get_freeze_count()
kept = [[] for _ in range(3_000_000)]  # what survives is walked again
print(gc.get_threshold() == before, frozen > 100_000, full.count(2) > 0)
"""


def said(seldom: bool) -> list[str]:
    code = CODE.format(seldom=seldom)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_imports_are_not_walked_again_and_again_and_later_collections_leave_them_alone():
    assert said(seldom=True) == ["0", "True", "True", "True", "True"]
    times, *rest = said(seldom=False)
    assert int(times) > 3 and rest == ["True"] * 4
