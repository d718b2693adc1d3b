"""On the PYTHONPATH of a process, this gives it the engine without torch (tests/fake_engine.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fake_engine

from llmnb.engine import warm

sys.modules["llmnb.engine.training"] = fake_engine
warm.MODULES = warm.EXTRAS = ()
warm.warm = lambda names: None
