"""Ranks for tests: one process imports everything once, and forks a rank (or two, over gloo) for each task.

Ten times cheaper than a run through Ray, and each task starts clean: DeepSpeed, accelerate and torch.distributed keep
state in their modules. ``python ranks.py TASKS`` reads a JSON list and writes ``NAME.json`` beside it for each.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_S = float(os.environ.get("RANKS_LIMIT_S", "150"))


def carry_out(tasks: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Trains each task; name → ``{"error", "losses", "evals", "norms", "saved", "last_step"}`` as rank 0 saw it.

    Args:
        tasks: ``name``, ``ranks`` (2 unless told otherwise) and arguments of ``drill.train``. With ``apart`` the
            ranks are as on two machines: each has a folder of its own, and is the first of its machine.
        folder: each task's own folder is ``folder/name``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks))
    with open(folder / "log", "wb") as log:
        command = [sys.executable, str(HERE / "ranks.py"), str(path)]
        subprocess.run(command, stdout=log, stderr=log, check=False, timeout=LIMIT_S * (1 + len(tasks)))
    found = {}
    for task in tasks:
        result = folder / f"{task['name']}.json"
        log_text = (folder / "log").read_text(errors="replace")[-2000:]
        found[task["name"]] = json.loads(result.read_text()) if result.exists() else {"error": log_text}
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _one(task: dict[str, Any], folder: Path) -> None:
    """Forks the ranks of one task and waits for them."""
    name, ranks = task.pop("name"), task.pop("ranks", 2)
    port, children = _free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _rank(task, folder, name, rank, ranks, port)
        children.append(child)
    end = time.monotonic() + LIMIT_S
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            for child in children:  # the other rank would wait for ever
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    if any(codes.values()):
        told = "".join((folder / f"{name}.log{rank}").read_text(errors="replace")[-3000:] for rank in range(ranks))
        result = folder / f"{name}.json"
        result.write_text(json.dumps({"error": told, "codes": [codes[child] for child in children]}))


def _rank(task: dict[str, Any], folder: Path, name: str, rank: int, ranks: int, port: int) -> None:
    code = 1
    try:
        log = os.open(folder / f"{name}.log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(LIMIT_S - 5)  # where a rank waits for the other for ever
        if ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
            local = 0 if task.get("apart") else rank
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(1 if local < rank else ranks))
        result = _train(task, folder / name / f"rank{rank}" if task.pop("apart", False) else folder / name)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:  # noqa: BLE001 - the border of the rank: the log has it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    from drill import texts, train

    begin = time.perf_counter()
    documents = task.pop("documents", 11)
    documents = documents if isinstance(documents, list) else texts(documents)
    resume = task.pop("resume", None)
    if task.pop("stream", False):
        from test_engine_streaming import Documents

        documents = Documents(documents)
    drill = train(folder, documents=documents, resume=Path(resume) if resume else None, **task)
    return {
        "error": None,
        "losses": drill.losses(),
        "norms": drill.series("grad_norm"),
        "evals": drill.series("eval_loss"),
        "margins": drill.series("rewards/margins") | drill.series("eval_rewards/margins"),
        "saved": [str(one["folder"]) for one in drill.saved],
        "last_step": drill.result.last_step,
        "counts": drill.counts,
        "recounted": drill.recounted,
        "fetched": len(getattr(documents, "asked", ())),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tasks = json.loads(Path(sys.argv[1]).read_text())
    gc.disable()
    costly = ["drill", "llmnb.engine.loop", "llmnb.engine.training", "peft", "torch.distributed.checkpoint.state_dict"]
    if any("deepspeed" in task.get("config", {}) for task in tasks):
        costly.append("deepspeed")
    for name in costly:  # once, for all ranks of all tasks
        importlib.import_module(name)
    if "offload_optimizer" in json.dumps(tasks):  # compiled on first use: minutes on a busy machine, and no rank's time
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load(verbose=False)
    gc.enable()
    gc.freeze()  # else each rank's collector walks, and copies, all that was imported
    for task in tasks:
        _one(task, Path(sys.argv[1]).parent)


if __name__ == "__main__":
    main()
