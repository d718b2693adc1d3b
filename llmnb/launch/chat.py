"""Chat in a process of its own: the caller loads no torch, and no traceback of the caller's holds the model's memory.

``ChatProcess`` is the caller's end; ``python -m llmnb.launch.chat`` is the other, which loads a base model once and
swaps adapters on it. They talk in JSON lines over the child's standard input and output: the model's description and
the questions go down, pieces of text come up. The child ends when its input ends, so it never outlives its parent.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import queue
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..config import ModelSpec
from ..errors import LlmnbError, ModelError
from . import aside

__all__ = ["IDLE", "Answer", "ChatProcess"]

Question = str | Sequence[Mapping[str, Any]]

IDLE = 15 * 60.0  # seconds without a question until the model's memory is given back
_FULL = ("out of memory", "can't allocate memory", "cannot allocate memory", "memoryerror", "bad_alloc")


class ChatProcess:
    """A process that answers for one base model and its adapters. It starts with the first question.

    Args:
        spec: the base model; nothing of it appears in the process list.
        idle: seconds without a question after which it ends by itself; the next question starts a new one. None: never.
        ended: called, from any thread, when it has ended in that way.
    """

    def __init__(self, spec: ModelSpec, idle: float | None = IDLE, ended: Callable[[], None] | None = None) -> None:
        self._spec, self._idle, self._ended = spec, idle, ended
        self._child: _Child | None = None
        self._lock = threading.Lock()
        self._count = self._busy = 0
        self._last: Answer | None = None
        self._timer: threading.Timer | None = None

    def __repr__(self) -> str:
        state = f"process {self.pid}" if self.alive else "not running"
        return f"<ChatProcess {self._spec.model_name_or_path}: {state}>"

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        child = self._child
        return child is not None and child.alive

    @property
    def pid(self) -> int | None:
        """The process's id, None before the first question."""
        child = self._child
        return child.process.pid if child is not None else None

    def ask(self, question: Question, *, adapter: str | Path | None = None, **sampling: Any) -> Answer:
        """Asks, and gives the answer piece by piece.

        Closing the answer, or ``stop()``, ends it; what came so far stays with the caller.

        Args:
            question: a text, or chat messages.
            adapter: folder of the adapter that answers; None: the base itself.
            **sampling: options of ``generate``.

        Raises:
            LlmnbError: (while the pieces are read) what the model's side raised; the process lives on.
            ModelError: the process ended (out of memory, mostly); the next question starts a new one.
        """
        self._last = Answer(self, {"question": _plain(question), "adapter": _folder(adapter), "options": sampling})
        return self._last

    def prepare(self, adapter: str | Path | None) -> None:
        """Reads an adapter beside the base, so that the next question to it need not wait. Starts no process."""
        child = self._child
        if child is not None and child.alive:
            with contextlib.suppress(ModelError):  # it is ending
                child.send({"prepare": _folder(adapter)})

    def _begin(self) -> tuple[_Child, int]:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._child is None or not self._child.alive:
                self._child = _Child(self._spec)
            self._busy += 1
            self._count += 1
            return self._child, self._count

    def _finish(self) -> None:
        with self._lock:
            self._busy -= 1
            if self._idle is not None and not self._busy:
                self._timer = threading.Timer(self._idle, self._rest)
                self._timer.daemon = True
                self._timer.start()

    def _rest(self) -> None:
        """On the timer's thread."""
        with self._lock:
            if self._busy or self._child is None:
                return
            child, self._child = self._child, None
        child.close()
        if self._ended is not None:
            self._ended()

    def stop(self) -> None:
        """Ends the answer that is being given. Without one, nothing happens."""
        if self._last is not None:
            self._last.stop()

    def close(self) -> None:
        """Ends the process and so gives all of its memory back. The next question would start a new one."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            child, self._child = self._child, None
        if child is not None:
            child.close()

    def __enter__(self) -> ChatProcess:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class Answer(Iterator[str]):
    """One answer, piece by piece. It is asked for when the first piece is.

    Attributes:
        told: after the last piece: ``tokens``, ``seconds``, ``cut``, ``notes`` (see ``Answerer.told``). It stays empty
            when the answer was closed early.
    """

    def __init__(self, process: ChatProcess, message: Mapping[str, Any]) -> None:
        self._process, self._message = process, message
        self._at: tuple[_Child, int] | None = None
        self._stopped = False
        self.told: dict[str, Any] = {}
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def stop(self) -> None:
        """Ends it, from any thread; the pieces that came can still be read, and what was told."""
        self._stopped = True
        at = self._at
        if at is not None and at[0].alive:
            with contextlib.suppress(ModelError):
                at[0].send({"stop": at[1]})

    def close(self) -> None:
        """Ends it; nothing more is read."""
        self._pieces.close()

    def _read(self) -> Generator[str, None, None]:
        if self._stopped:
            return
        child, number = self._at = self._process._begin()
        pieces = child.listen(number)
        ended = False
        try:
            child.send({"ask": number, **self._message})
            if self._stopped:  # at the same moment
                self.stop()
            while not ended:
                said = pieces.get()
                if "piece" in said:
                    yield said["piece"]
                    continue
                ended = True
                self.told = said.get("told") or {}
                _check(said, child)
        finally:
            self._at = None
            child.forget(number)
            if not ended and child.alive:
                with contextlib.suppress(ModelError):
                    child.send({"stop": number})
            self._process._finish()


def _check(said: Mapping[str, Any], child: _Child) -> None:
    if "error" in said:
        raise pickle.loads(base64.b64decode(said["error"]))  # our own child wrote it, through a private pipe
    if "gone" in said:
        raise _ended(child)


def _ended(child: _Child) -> ModelError:
    status = child.process.poll()
    seen = "it was killed (signal 9), as a system does when memory is short" if status == -9 else ""
    return ModelError(
        "The chat's process has ended.",
        seen=seen or child.last_words() or f"exit status {status}",
        todo="ask again: a new one is started. When memory was short, use bits=4 or a smaller model",
    )


def _plain(question: Question) -> Any:
    return question if isinstance(question, str) else [dict(message) for message in question]


def _folder(adapter: str | Path | None) -> str | None:
    return None if adapter is None else str(adapter)


class _Child:
    """The running process, its pipes, and who waits for which answer."""

    def __init__(self, spec: ModelSpec) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child: a pipe would have to be drained
        self.process = aside.start("chat", self._log)
        self._end = weakref.finalize(self, aside.finish, self.process)
        self._writing = threading.Lock()
        self._listeners: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._gone = False
        threading.Thread(target=_read, args=(self.process.stdout, weakref.ref(self)), daemon=True).start()
        self.send({"spec": spec.to_json()})

    @property
    def alive(self) -> bool:
        return not self._gone and self.process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises ModelError when the child is gone."""
        line = json.dumps(message, default=str).encode() + b"\n"
        assert self.process.stdin is not None
        try:
            with self._writing:
                self.process.stdin.write(line)
                self.process.stdin.flush()
        except (OSError, ValueError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2.0)
            raise _ended(self) from error

    def listen(self, number: int) -> queue.SimpleQueue[dict[str, Any]]:
        box: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._listeners[number] = box
        if self._gone:
            box.put({"gone": True})
        return box

    def forget(self, number: int) -> None:
        self._listeners.pop(number, None)

    def heard(self, message: dict[str, Any]) -> None:
        """On the reading thread."""
        box = self._listeners.get(message.get("number", 0))
        if box is not None:
            box.put(message)

    def lost(self) -> None:
        """On the reading thread: the child's output ended."""
        self._gone = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        for box in list(self._listeners.values()):
            box.put({"gone": True})

    def last_words(self) -> str:
        """The end of what the child wrote to standard error."""
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._log.fileno()
            size = os.fstat(descriptor).st_size
            return os.pread(descriptor, 800, max(size - 800, 0)).decode("utf-8", "replace").strip()
        return ""

    def close(self) -> None:
        self._end()


def _read(pipe: IO[bytes], child: weakref.ref[_Child]) -> None:
    for line in pipe:
        me = child()
        if me is None:
            return
        with contextlib.suppress(ValueError):
            me.heard(json.loads(line))
        del me
    me = child()
    if me is not None:
        me.lost()


# --- the other end --------------------------------------------------------------------------------------------


class _Server:
    """Answers questions from standard input, one after another."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        self._spec: ModelSpec | None = None
        self._answerer: Any = None

    def listen(self, lines: IO[bytes]) -> None:
        """On a thread: takes questions in; a stop is heard while an answer is given. The end of input is the end."""
        for line in lines:
            message = json.loads(line)
            if "stop" in message:
                self._stopped.add(int(message["stop"]))
            else:
                self._questions.put(message)
        os._exit(0)  # whatever is being computed: nobody is there to read it

    def serve(self) -> None:
        """On the main thread."""
        while True:
            message = self._questions.get()
            if "spec" in message:
                self._spec = ModelSpec.from_json(message["spec"])
                continue
            if "prepare" in message:
                self._prepare(message["prepare"])
                continue
            number = int(message["ask"])
            try:
                self._answer(number, message)
            except Exception as error:  # noqa: BLE001 - the border of the process: the caller raises it
                self._say({"number": number, "error": base64.b64encode(pickle.dumps(_own(error))).decode()})
                error.__traceback__ = None  # its frames hold tensors

    def _prepare(self, adapter: str | None) -> None:
        if self._answerer is None:
            return
        try:
            self._answerer.swap(Path(adapter) if adapter else None)
        except Exception as error:  # noqa: BLE001 - the border of the process: the question to it will say why
            error.__traceback__ = None  # its frames hold tensors

    def _answer(self, number: int, message: Mapping[str, Any]) -> None:
        told: dict[str, Any] = {}
        if number not in self._stopped:
            self._ready(message.get("adapter"))
            for piece in self._pieces(message, number):
                self._say({"number": number, "piece": piece})
            told = self._answerer.told
        self._say({"number": number, "end": True, "told": told})
        self._stopped.discard(number)

    def _pieces(self, message: Mapping[str, Any], number: int) -> Iterator[str]:
        stream = self._answerer.stream(message["question"], **message["options"])
        try:
            for piece in stream:
                if number in self._stopped:
                    return
                if piece:
                    yield piece
        finally:
            stream.close()

    def _ready(self, adapter: str | None) -> None:
        if self._answerer is None:
            from ..engine.generation import Answerer

            self._answerer = Answerer(self._spec, Path(adapter) if adapter else None)  # type: ignore[arg-type]
        else:
            self._answerer.swap(Path(adapter) if adapter else None)

    def _say(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()


def _own(error: Exception) -> LlmnbError:
    """The caller may have no torch, so only errors of our own cross."""
    if isinstance(error, LlmnbError):
        return error
    seen = f"{type(error).__name__}: {error}"
    if any(words in seen.lower() for words in _FULL):
        todo = "a shorter question or fewer new tokens; or bits=4, or a smaller model"
        return ModelError("The memory did not suffice for this answer.", seen=seen.splitlines()[0][:300], todo=todo)
    return ModelError("The model could not answer.", seen=seen)


def _watch_parent() -> None:
    """For the case that a third process holds the other end of our input: without its parent the child ends, too."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main() -> None:
    """``python -m llmnb.launch.chat``."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    server = _Server(out)
    threading.Thread(target=server.listen, args=(os.fdopen(os.dup(0), "rb"),), daemon=True).start()
    threading.Thread(target=_watch_parent, daemon=True).start()
    server.serve()


if __name__ == "__main__":
    main()
