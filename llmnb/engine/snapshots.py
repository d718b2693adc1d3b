"""Checkpoints beside the training: what changes from step to step is copied, and a thread writes the copy.

Trainer writes an adapter, its optimizer, the tokenizer and its own state while the training waits. Here a thread does
it; the files, and their names, are the same. What is trained changes at the end of the next step only, so that the
thread copies it while that step is computed, and the training waits for the copies before it changes anything. One
checkpoint is written at a time: the next one waits for it, so that no more than one copy is in memory. Knows Trainer's
way to save; no database.
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

__all__ = ["Copies", "Writer"]


# What Trainer calls before a checkpoint is taken, or once the next step's gradients are there.
_HARMLESS = {"on_init_end", "on_train_begin", "on_step_end", "on_substep_end", "on_pre_optimizer_step"}
_HARMLESS |= {"on_optimizer_step", "on_train_end"}


class Copies:
    """Tensors with their copies on the CPU, which hold nothing until ``make``."""

    def __init__(self) -> None:
        self._sources: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []

    def of(self, value: Any) -> Any:
        """Nested dicts, lists and tuples with a copy in place of each tensor; anything else is the same object."""
        if isinstance(value, torch.Tensor):
            self._sources.append(value)
            self._copies.append(torch.empty_like(value, device="cpu", requires_grad=False))
            return self._copies[-1]
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return value

    def make(self) -> None:
        """Copies all of them, once; Python's lock is free meanwhile."""
        sources, copies = self._sources, self._copies
        self._sources, self._copies = [], []
        if sources:
            with torch.no_grad():
                torch._foreach_copy_(copies, sources)


class Writer:
    """What is to be written of one checkpoint, in order, and the thread that does it."""

    def __init__(self) -> None:
        self._work: list[Callable[[], Any]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._card: bytes | None = None
        self._copies = Copies()
        self._copied = threading.Event()
        self._copied.set()
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
            self._copies = Copies()
            raise
        finally:
            self.open = False
        if self._work:
            if _changes_soon(loop):
                self._copies.make()
            self._copied.clear()
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
            try:
                self._copies.make()
            finally:
                self._copied.set()
            for write in self._work:
                write()
        except BaseException as error:  # noqa: BLE001 - the border of the thread: the training raises it
            self._error = error
        self._work.clear()

    def settle(self) -> None:
        """Until what the last checkpoint holds is copied, and may change. What went wrong is raised by ``wait``."""
        self._copied.wait()

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
            copy = self._copies.of
            options["state_dict"] = {name: copy(p) if p.requires_grad else p.detach() for name, p in names.items()}
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
        self.later(torch.save, self._copies.of(state) if self.open else state, path)

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


def _changes_soon(loop: Loop) -> bool:
    """True where weights or optimizer may change before the next step's own change: nothing can be copied meanwhile."""
    if loop.control.should_training_stop or loop.state.global_step >= loop.state.max_steps:
        return True  # no step comes; what comes at the end of a run may change them
    optimizer = getattr(loop.optimizer, "optimizer", loop.optimizer)
    if not type(optimizer).__module__.startswith(("torch.optim.", "bitsandbytes.")):
        return True  # some make their step while gradients are computed
    return any(_of_a_person(callback) for callback in loop.callback_handler.callbacks)


def _of_a_person(callback: TrainerCallback) -> bool:
    """True for one that may do anything between two steps."""
    kind = type(callback)
    if kind.__module__.startswith(("transformers.", "llmnb.")):
        return False
    events = (name for name in dir(TrainerCallback) if name.startswith("on_") and name not in _HARMLESS)
    return any(getattr(kind, name) is not getattr(TrainerCallback, name) for name in events)
