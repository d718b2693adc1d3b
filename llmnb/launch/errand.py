"""One job for a process of its own: it travels through the process's standard input, words and one result come back.

``Errand`` is the caller's end, ``serve`` the other one. The process is given one job, says in JSON lines what it does,
and ends; it ends, too, when its input does, so it never outlives its parent. The caller loads no torch, and a job that
runs out of memory ends alone. Knows nothing of what a job is.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import IO, Any

from ..errors import LlmnbError, ModelError
from . import aside

__all__ = ["Errand", "own", "serve"]

Say = Callable[[str], None]


class Errand:
    """One job, carried out elsewhere. ``stop`` may be called from any thread.

    Args:
        module: of this package; its ``main`` calls ``serve``.
        name: what the job is, for a person: "merge".
        memory: what to do when memory was short.
    """

    def __init__(self, module: str, name: str, memory: str) -> None:
        self._module, self._name, self._memory = module, name, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def carry_out(
        self, job: Any, say: Say | None = None, left: Callable[[int], None] | None = None
    ) -> Mapping[str, Any]:
        """Gives the job to a process and waits for its result.

        Args:
            job: anything that cloudpickle takes.
            say: told what is being done, in a few words.
            left: told the process's id when it ended without a result: what it left can be removed.

        Raises:
            LlmnbError: what the other side raised.
            ModelError: the process ended (out of memory, mostly), or was stopped.
        """
        with tempfile.TemporaryFile() as log:
            process = self._process = aside.start(self._module, log)
            if self._stopped:
                process.kill()
            result = None
            try:
                assert process.stdin is not None and process.stdout is not None
                with contextlib.suppress(OSError):  # it has ended: its last words say why
                    process.stdin.write(_pickled(job))
                    process.stdin.flush()
                for line in process.stdout:
                    said = json.loads(line)
                    if "error" in said:
                        # Our own child wrote it, through a private pipe.
                        raise pickle.loads(base64.b64decode(said["error"]))
                    if "result" in said:
                        result = said["result"]
                    elif say is not None:
                        say(said["says"])
            finally:
                aside.finish(process)
                if process.stdout is not None:
                    process.stdout.close()
                if result is None and left is not None:
                    left(process.pid)
            if result is None:
                raise self._ended(process, log)
            return dict(result)

    def _ended(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> ModelError:
        if self._stopped:
            todo = "nothing was written; start it again when you like"
            return ModelError(f"The {self._name} was stopped.", todo=todo)
        log.seek(0)
        seen = log.read()[-800:].decode("utf-8", "replace").strip() or f"exit status {process.poll()}"
        return ModelError(f"The {self._name}'s process has ended.", seen=seen, todo=self._memory)

    def stop(self) -> None:
        """Ends the job; nothing is left of it. Without one, the next ends at once."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


def _pickled(job: Any) -> bytes:
    import cloudpickle

    return bytes(cloudpickle.dumps(job))  # a notebook's own functions travel by value


# --- the other end --------------------------------------------------------------------------------------------


def own(error: Exception, what: str, memory: str) -> LlmnbError:
    """An error of ours: the caller may have no torch, so only those cross.

    Args:
        error: anything.
        what: what could not be done, one sentence.
        memory: what to do when memory was short.
    """
    if isinstance(error, LlmnbError):
        return error
    full = isinstance(error, MemoryError) or "memory" in str(error).lower()
    return ModelError(what, seen=f"{type(error).__name__}: {error}", todo=memory if full else None)


def serve(
    work: Callable[[Any, Say], Mapping[str, Any]],
    fault: Callable[[Exception], LlmnbError],
    leave: Callable[[Any], None] = lambda job: None,
) -> None:
    """Carries out the one job that standard input holds.

    Args:
        work: given the job and whom to tell what is being done; gives the result, plain data.
        fault: makes an error of ours of any.
        leave: given the job when whoever asked is gone: removes what is half done.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the lines

    def tell(line: Mapping[str, Any]) -> None:
        out.write(json.dumps(line).encode() + b"\n")
        out.flush()

    source = os.fdopen(os.dup(0), "rb")
    try:
        job = pickle.load(source)  # our own parent wrote it
        threading.Thread(target=_end_with, args=(source, lambda: leave(job)), daemon=True).start()
        tell({"says": "loading torch"})
        tell({"result": work(job, lambda words: tell({"says": words}))})
    except Exception as error:  # noqa: BLE001 - the border of the process: the caller raises it
        tell({"error": base64.b64encode(pickle.dumps(fault(error))).decode()})


def _end_with(source: IO[bytes], leave: Callable[[], None]) -> None:
    """The end of the input is the end: whoever asked is gone. Nothing half-done stays."""
    source.read()
    leave()
    os._exit(0)
