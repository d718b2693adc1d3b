"""Checkpoints that are written beside the training: the same bytes, later; faults come back."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from drill import Drill, pairs, train

from llmnb.errors import RunError
from llmnb.events import Metric

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llmnb.engine import snapshots  # noqa: E402

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


class Looks(transformers.TrainerCallback):
    """Looks at each checkpoint as soon as its step is over."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        self.seen.append({path.name: path.read_bytes() for path in Path(folder).iterdir()})


def files(run):
    return [{path.name: path.read_bytes() for path in saved["folder"].iterdir()} for saved in run.saved]


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True, "lora_bias": "all"}, {"lora_dropout": 0.1}, {"bits": 4}],
    ids=["lora", "dora-bias", "dropout", "4-bit"],
)
def test_what_is_written_later_is_what_would_have_been_written_at_once(config, tmp_path):
    """Byte for byte, and the training goes on alike; the arguments hold the folder's own name."""
    options = {"documents": pairs(), "config": config, **SAVING}
    beside = train(tmp_path / "beside", **options)
    looks = Looks()
    at_once = train(tmp_path / "at once", trainer_kwargs={"callbacks": [looks]}, **options)
    assert beside.losses() == at_once.losses()
    for later, now in zip(files(beside), looks.seen, strict=True):
        assert set(later) == set(now)
        for name in set(now) - {"training_args.bin", "trainer_state.json"}:  # those two say when and where it was
            assert later[name] == now[name], name
    cards = {saved["README.md"] for saved in files(beside)}
    assert len(cards) == 1 and b"PEFT" in cards.pop()  # peft made the first one, and brought the others up to date
    kept = [saved["folder"] for saved in beside.saved]
    assert [folder.name for folder in kept] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    states = [transformers.TrainerState.load_from_json(str(folder / "trainer_state.json")) for folder in kept]
    assert [(s.global_step, len(s.log_history)) for s in states] == [(2, 2), (4, 4), (6, 6)]


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The adapter's file is held back until the next step was told; what it holds is still step 2's."""
    told = threading.Event()
    real = torch.save

    def slow(value, path, *args, **kwargs):
        if str(path).endswith("checkpoint-2/optimizer.pt"):
            assert told.wait(60), "step 3 waits for the checkpoint of step 2"
        real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", slow)
    drill = Drill()

    class Listens(list):
        def append(self, event):
            super().append(event)
            if isinstance(event, Metric) and event.step == 3:
                told.set()

    drill.events = Listens()
    run = train(tmp_path, drill=drill, **SAVING)
    assert [saved["step"] for saved in run.saved] == [2, 4, 6]
    monkeypatch.setattr(torch, "save", real)
    rest = train(tmp_path / "rest", resume=run.saved[0]["folder"], **SAVING)
    assert rest.losses() == {step: loss for step, loss in run.losses().items() if step > 2}


@pytest.mark.parametrize("step", [2, 6])
def test_a_fault_of_writing_ends_the_run(step, tmp_path, monkeypatch):
    """At the next checkpoint, or at the end of the run."""
    real = torch.save

    def full(value, path, *args, **kwargs):
        if str(path).endswith(f"checkpoint-{step}/optimizer.pt"):
            raise OSError(28, "No space left on device")
        real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    drill = Drill()
    with pytest.raises(RunError, match="disk of the run's folder is full"):
        train(tmp_path, drill=drill, **SAVING)
    assert [saved["step"] for saved in drill.saved] == list(range(2, step, 2))
    assert not any(thread.name == "llmnb-checkpoint" for thread in threading.enumerate())


def test_a_whole_model_is_written_at_once(tmp_path, monkeypatch):
    """A second copy of it is more memory than a run was planned with."""
    threads = set()
    real = torch.save

    def look(*args, **kwargs):
        threads.add(threading.current_thread().name)
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", look)
    train(tmp_path / "whole", config={"use_lora": False}, **SAVING)
    assert threads == {threading.main_thread().name}
    train(tmp_path / "adapter", **SAVING)
    assert threads > {threading.main_thread().name}


def test_copies_are_apart_from_what_they_were_made_of():
    weight = torch.nn.Parameter(torch.full((2, 3), 0.5).t())
    state = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}, "groups": [{"lr": 0.1, "at": (1, 2)}]}
    before = copy.deepcopy(state)
    copies = snapshots.Copies()
    made, (twin,) = copies.of(state), copies.of((weight,))
    copies.make()
    copies.make()  # nothing is left to do
    state["state"][0]["exp_avg"] += 1
    state["state"][0]["step"] += 1
    weight.data += 1
    assert made["groups"] == before["groups"] and torch.equal(made["state"][0]["exp_avg"], torch.ones(3))
    assert made["state"][0]["step"] == 1.0
    assert torch.equal(twin, torch.full((3, 2), 0.5)) and not twin.requires_grad and twin.stride() == weight.stride()


class Slow(snapshots.Copies):
    """Takes longer than a step computes; notes on which thread."""

    made: ClassVar[list[str]] = []

    def make(self):
        if self._sources:
            time.sleep(0.5)
            self.made.append(threading.current_thread().name)
        super().make()


class Meddles(transformers.TrainerCallback):
    """Changes the weights before the next step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01


class Ends(transformers.TrainerCallback):
    """Ends the training after step 4, and then changes the weights."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()


@pytest.mark.parametrize(
    ("callback", "arguments", "threads"),
    [
        (None, {}, "beside beside here"),  # after the last step nothing comes that it could be copied beside
        (Meddles, {}, "here here here"),
        (Ends, {}, "beside here"),
        (None, {"optim": "adafactor"}, "here here here"),
    ],
    ids=["nobody", "meddles", "ends", "an-optimizer-of-its-own"],
)
def test_nothing_changes_before_it_is_copied(callback, arguments, threads, tmp_path, monkeypatch):
    """Copies take longer than the step that they are made beside; where it may change something, they are made first.

    The bytes are those that are written when somebody looks at each checkpoint as soon as its step is over.
    """
    given = [callback()] if callback else []
    options = {"documents": pairs(), **SAVING, **arguments}
    looks = Looks()
    at_once = train(tmp_path / "at once", trainer_kwargs={"callbacks": [looks, *given]}, **options)
    monkeypatch.setattr(snapshots, "Copies", Slow)
    monkeypatch.setattr(Slow, "made", [])
    slow = train(tmp_path / "slow", trainer_kwargs={"callbacks": given}, **options)
    assert slow.losses() == at_once.losses()
    assert " ".join("beside" if name == "llmnb-checkpoint" else "here" for name in Slow.made) == threads
    for later, now in zip(files(slow), looks.seen, strict=True):
        for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert later[name] == now[name], name
