"""Rows as a model will see them, from a process of its own: the caller loads neither torch nor a tokenizer.

``PreviewProcess`` is the caller's end; ``python -m llmnb.launch.preview`` is the other. They talk in JSON lines, one
answer for each question. The documents are the caller's, so the process needs no database; it makes rows of them with
the code that a training uses, and tells a model's shape from its config. It ends when its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import IO, Any

from ..config import ModelSpec, TrainConfig
from ..errors import LlmnbError, ModelError
from . import aside

__all__ = ["PreviewProcess"]

_SHAPING = ("use_lora", "lora_r", "lora_target_modules", "lora_bias", "use_dora", "bits")
SHOWN_ROWS = 3
SHOWN_TOKENS = 400  # of a row


class PreviewProcess:
    """A process that makes rows for looking at. It starts with the first question and stays warm."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def warm(self) -> None:
        """Starts the process, so that the first answer comes sooner."""
        with self._lock:
            self._running()

    def rows(self, spec: ModelSpec, config: TrainConfig, documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The rows that a training would make of some documents.

        Args:
            spec: the model; its tokenizer is loaded, its weights are not.
            config: its settings for rows are used.
            documents: a sample, in the order of the training.

        Returns:
            ``rows`` (the first three: ``tokens`` as [text, trained, special], ``length``, ``trained``, how many tokens
            stand ``before`` and ``after`` those, and of a preference its ``side``),
            ``longest``, and the counts of ``engine.counts.RowReport``.

        Raises:
            LlmnbError: no such model, no such key, nothing to train on.
            ModelError: the process ended; the next question starts a new one.
        """
        return self._ask("rows", spec, config, documents=list(documents))

    def shape(self, spec: ModelSpec, config: TrainConfig) -> dict[str, Any]:
        """``shape`` (the fields of ``engine.shape.Shape``, or None), ``pace`` and ``room``. Raises as ``rows`` does."""
        return self._ask("shape", spec, config)

    def _ask(self, want: str, spec: ModelSpec, config: TrainConfig, **more: Any) -> dict[str, Any]:
        question = {"want": want, "spec": spec.to_json(), "config": config.to_json(), **more}
        line = json.dumps(question, default=_named).encode() + b"\n"
        with self._lock:
            answer = self._exchange(line)
        if "error" in answer:
            error = answer["error"]
            raise LlmnbError(error["what"], seen=error["seen"], todo=error["todo"])
        return answer

    def _exchange(self, line: bytes) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):
            answer = b""
        if not answer:
            self._process = None
            _finish(process)
            seen = self._last_words() or f"exit status {process.poll()}"
            raise ModelError("The preview's process has ended.", seen=seen, todo="change a setting to try again")
        return dict(json.loads(answer))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child: a pipe would have to be drained
            self._process = aside.start("preview", self._log)
            weakref.finalize(self, _finish, self._process)
        return self._process

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._log.seek(0)  # type: ignore[union-attr]
            return self._log.read()[-800:].decode("utf-8", "replace").strip()  # type: ignore[union-attr]
        return ""

    def close(self) -> None:
        """Ends the process, also while it answers."""
        process, self._process = self._process, None
        if process is not None:
            _finish(process)


def _finish(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
        return
    process.kill()
    process.wait(5.0)


def _named(value: Any) -> Any:
    """What JSON has no form for: an _id as its text, all else as a dict that no key takes for a text."""
    return str(value) if type(value).__name__ == "ObjectId" else {"": type(value).__name__}


# --- the other end --------------------------------------------------------------------------------------------


class _Maker:
    """Answers questions; remembers the last tokenizer, the last shape and the machine's pace."""

    def __init__(self) -> None:
        self._tokenizer: tuple[Any, Any, int | None] | None = None
        self._shape: tuple[Any, Any] | None = None
        self._pace: float | None = None

    def rows(self, spec: ModelSpec, config: TrainConfig, documents: list[dict[str, Any]]) -> dict[str, Any]:
        from ..engine import bases
        from ..engine.looking import shown_rows
        from ..engine.rows import make_rows

        named = (spec.model_name_or_path, spec.tokenizer_kwargs, spec.model_kwargs)
        if self._tokenizer is None or self._tokenizer[0] != named:
            tokenizer = bases.load_tokenizer(spec)
            bases.ensure_pad(tokenizer, None)
            self._tokenizer = named, tokenizer, bases.context_of(spec)
        _, tokenizer, context = self._tokenizer
        rows = make_rows(
            documents,
            tokenizer,
            replace(config, max_cut_share=1.0),  # a sample is looked at, whatever it lacks
            prompt_template=spec.prompt_template,
            context=context,
            name="train",
        )
        shown = shown_rows(tokenizer, rows, SHOWN_ROWS, SHOWN_TOKENS)
        report = rows.report
        notes = [note for note in report.notes if not note.startswith(f"{report.cut} of {report.found} rows have more")]
        return {**report.to_dict(), "notes": notes, "rows": shown, "longest": int(rows.lengths.max())}

    def shape(self, spec: ModelSpec, config: TrainConfig) -> dict[str, Any]:
        from ..engine import shape

        wanted = spec, [getattr(config, name) for name in _SHAPING]
        if self._shape is None or self._shape[0] != wanted:
            found = shape.shape(spec, config)
            self._shape = wanted, found and asdict(found)
        if self._pace is None:
            self._pace = shape.pace()
        return {"shape": self._shape[1], "pace": self._pace, "room": shape.room()}

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        spec, config = ModelSpec.from_json(question["spec"]), TrainConfig.from_json(question["config"])
        if question["want"] == "shape":
            return self.shape(spec, config)
        return self.rows(spec, config, question["documents"])


def main() -> None:
    """``python -m llmnb.launch.preview``."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    maker = _Maker()
    from ..engine import shape

    shape.ready()
    for line in sys.stdin.buffer:
        try:
            answer = maker.answer(json.loads(line))
        except LlmnbError as error:
            answer = {"error": {"what": error.what, "seen": error.seen, "todo": error.todo}}
        except Exception as error:  # noqa: BLE001 - the border of the process: the caller raises it
            answer = {
                "error": {"what": "The rows cannot be shown.", "seen": f"{type(error).__name__}: {error}", "todo": None}
            }
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
