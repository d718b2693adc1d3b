"""Checkpoints beside the training: what changes from step to step is copied, and a thread writes the copy.

Trainer writes an adapter, its optimizer, the tokenizer and its own state while the training waits. Here the waiting is
for the copies only; the files, and their names, are the same. One checkpoint is written at a time: the next one waits
for it, so that no more than one copy is in memory. Knows Trainer's way to save; no database.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .loop import Loop

__all__ = ["Writer", "copied"]


def copied(value: Any) -> Any:
    """Nested dicts, lists and tuples with each tensor copied to the CPU; anything else is the same object."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value


class Writer:
    """What is to be written of one checkpoint, in order, and the thread that does it."""

    def __init__(self) -> None:
        self._work: list[Callable[[], Any]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._card: bytes | None = None
        self.open = False

    @contextlib.contextmanager
    def taking(self, loop: Loop) -> Iterator[None]:
        """Meanwhile a checkpoint that can be written later is collected; its writing begins at the end.

        Raises:
            BaseException: what writing the one before raised.
        """
        self.wait()
        self.open = _can_wait(loop)
        try:
            yield
        except BaseException:
            self._work.clear()
            raise
        finally:
            self.open = False
        if self._work:
            self._thread = threading.Thread(target=self._write, name="llmnb-checkpoint", daemon=True)
            self._thread.start()

    def later(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls it in turn when a checkpoint is collected, else now."""
        if self.open:
            self._work.append(functools.partial(function, *args, **kwargs))
        else:
            function(*args, **kwargs)

    def _write(self) -> None:
        try:
            for write in self._work:
                write()
        except BaseException as error:  # noqa: BLE001 - the border of the thread: the training raises it
            self._error = error
        self._work.clear()

    def wait(self) -> None:
        """Until the last checkpoint is written, and handed over.

        Raises:
            BaseException: what writing it raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    # -- what Trainer saves ------------------------------------------------------------------------------------------

    def adapter(self, model: Any, save: Callable[..., Any], folder: str, **options: Any) -> None:
        """The trained weights as they are now."""
        if self.open and options.get("state_dict") is None:
            # Not state_dict(): of a 4-bit base it packs every weight.
            names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
            options["state_dict"] = {name: copied(p) if p.requires_grad else p.detach() for name, p in names.items()}
        self.later(self._adapter, save, folder, **options)

    def _adapter(self, save: Callable[..., Any], folder: str, **options: Any) -> None:
        # peft compiles the template of its model card anew for each checkpoint, two thirds of what writing one costs;
        # a card that is there it only brings up to date.
        card = Path(folder) / "README.md"
        if self._card is not None and not card.exists():
            card.parent.mkdir(parents=True, exist_ok=True)
            card.write_bytes(self._card)
        save(folder, **options)
        if self._card is None and card.exists():
            self._card = card.read_bytes()

    def tensors(self, state: dict[str, Any], path: Path) -> None:
        """An optimizer's or a schedule's state as it is now."""
        self.later(torch.save, copied(state) if self.open else state, path)

    def state(self, state: Any, path: str) -> None:
        """Trainer's own state as it is now. Of a long run its logs are megabytes of JSON."""
        if self.open:
            state = copy.copy(state)
            state.log_history = list(state.log_history)
            state.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
        self.later(type(state).save_to_json, state, path)


def _can_wait(loop: Loop) -> bool:
    """One worker, an adapter, and nobody who looks at the folder as soon as the step is over."""
    if loop.args.world_size > 1 or loop.is_deepspeed_enabled or loop.is_fsdp_enabled or loop.args.push_to_hub:
        return False
    looks = any(type(callback).on_save is not TrainerCallback.on_save for callback in loop.callback_handler.callbacks)
    return hasattr(loop.model, "peft_config") and loop.principal is None and not looks
