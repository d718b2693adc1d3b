"""The public surface: what ``import llmnb`` offers and what it costs."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import llmnb

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "ray", "pymongo", "plotly", "ipywidgets", "numpy", "peft")


def _fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_is_there():
    for name in llmnb.__all__:
        assert getattr(llmnb, name) is not None, name
    assert set(llmnb.__all__) <= set(dir(llmnb))


def test_import_loads_nothing_heavy():
    code = f"import sys, llmnb; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert _fresh(code) == "[]"


def test_load_ext_loads_nothing_heavy():
    code = (
        "import sys; from IPython.core.interactiveshell import InteractiveShell as S; s = S.instance();"
        f"before = set(sys.modules); s.run_line_magic('load_ext', 'llmnb');"
        f"print([m for m in {HEAVY!r} if m in set(sys.modules) - before])"
    )
    assert _fresh(code).splitlines()[-1] == "[]"


def _cpu(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def test_import_costs_under_a_tenth_of_a_second_of_cpu():
    _cpu("import llmnb")  # writes the bytecode
    plain = min(_cpu("pass") for _ in range(3))
    ours = min(_cpu("import llmnb") for _ in range(3))
    assert ours - plain < 0.1


def test_load_ext_costs_under_three_tenths_of_a_second_of_cpu():
    shell = "from IPython.core.interactiveshell import InteractiveShell as S; s = S.instance();"
    _cpu(shell + "s.run_line_magic('load_ext', 'llmnb')")
    plain = min(_cpu(shell) for _ in range(3))
    ours = min(_cpu(shell + "s.run_line_magic('load_ext', 'llmnb')") for _ in range(3))
    assert ours - plain < 0.3


def test_every_room_is_on_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [p.stem if p.suffix else p.name for p in (ROOT / "llmnb").iterdir() if not p.name.startswith(("__", "py."))]
    missing = [room for room in rooms if not re.search(rf"^\| `{room}(\.py|/)?`", text, re.MULTILINE)]
    assert not missing


def test_the_fix_of_each_trap_can_be_taken_out():
    """What ``bench/traps_out.py`` takes out is still there, and so are the tests that must fail then."""
    from bench.traps_out import FIXES

    assert {fix.trap for fix in FIXES} == set(range(1, 27))
    for fix in FIXES:
        assert (ROOT / "llmnb" / fix.file).read_text().count(fix.text) == 1, fix
        file, names = fix.tests.split("::")
        assert f"trap{fix.trap:02}" in names and f"def test_{names}" in (ROOT / "tests" / file).read_text(), fix


def test_every_setting_of_our_own_says_its_consequence():
    from dataclasses import fields

    from llmnb.config import ModelSpec, TrainConfig

    for cls in (ModelSpec, TrainConfig):
        for f in fields(cls):
            documented = f.metadata.get("help") or f.name in ("max_seq_length",)
            assert documented, f"{cls.__name__}.{f.name}"


def test_every_public_function_has_a_docstring():
    import importlib
    import inspect
    import pkgutil

    bare = []
    for info in pkgutil.walk_packages(llmnb.__path__, "llmnb."):
        module = importlib.import_module(info.name) if "__main__" not in info.name else None
        if module is None:
            continue
        assert module.__doc__, info.name
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                if not value.__doc__:
                    bare.append(f"{info.name}.{name}")
                for member, function in inspect.getmembers(value, inspect.isfunction):
                    named = not function.__name__.startswith("_")  # an alias of a private one is documented there
                    own = function.__module__ == info.name and member in vars(value) and named
                    if own and not member.startswith("_") and not inspect.getdoc(function):
                        bare.append(f"{info.name}.{name}.{member}")
    assert not bare


def test_no_address_is_in_the_repr_of_a_database():
    db = llmnb.connect("mongomock://quiet")
    assert repr(db) == "<llmnb database 'quiet', in this process only>"
