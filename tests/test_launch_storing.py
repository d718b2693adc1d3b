"""Checkpoints are stored beside the training: in order, all of them, and without making it wait."""

from __future__ import annotations

import shutil
import threading
import time

import pytest

from llmnb.errors import ArtifactError, RunError
from llmnb.launch.storing import Storer


def checkpoint(folder, step):
    made = folder / f"checkpoint-{step}"
    (made / "deep").mkdir(parents=True)
    (made / "adapter_model.safetensors").write_text(f"weights at {step}")
    (made / "deep" / "state.pt").write_text("state")
    return made


def test_the_training_goes_on_while_the_database_is_away(tmp_path):
    back, stored = threading.Event(), []

    def put(folder, step):
        assert back.wait(30)
        stored.append((step, (folder / "adapter_model.safetensors").read_text(), (folder / "deep/state.pt").exists()))

    storer = Storer(put, tmp_path / "storing")
    start = time.monotonic()
    for step in (1, 2, 3):
        made = checkpoint(tmp_path, step)
        storer.take(made, step=step)
        shutil.rmtree(made)  # the trainer keeps the newest only
    assert time.monotonic() - start < 1.0 and stored == []
    back.set()
    storer.finish(30)
    assert stored == [(step, f"weights at {step}", True) for step in (1, 2, 3)]
    assert not (tmp_path / "storing").exists()


def test_a_long_queue_makes_the_training_wait_so_that_the_disk_does_not_fill_up(tmp_path):
    back = threading.Event()
    storer = Storer(lambda folder, step: back.wait(30), tmp_path / "storing")
    taken = []

    def train():
        for step in range(12):
            storer.take(checkpoint(tmp_path, step), step=step)
            taken.append(step)

    thread = threading.Thread(target=train)
    thread.start()
    time.sleep(0.5)
    assert 4 <= len(taken) < 8
    back.set()
    thread.join(30)
    storer.finish(30)
    assert len(taken) == 12


def test_a_fault_is_raised_where_the_training_is(tmp_path):
    def put(folder, step):
        raise ArtifactError("The bucket is gone.")

    storer = Storer(put, tmp_path / "storing")
    storer.take(checkpoint(tmp_path, 1), step=1)
    with pytest.raises(ArtifactError, match="bucket"):
        storer.finish(30)
    with pytest.raises(ArtifactError, match="bucket"):
        storer.take(checkpoint(tmp_path, 2), step=2)


def test_what_could_not_be_stored_is_named(tmp_path):
    never = threading.Event()
    storer = Storer(lambda folder, step: never.wait(30), tmp_path / "storing")
    storer.take(checkpoint(tmp_path, 7), step=7)
    with pytest.raises(RunError, match="took no checkpoints") as caught:
        storer.finish(0.1)
    assert "checkpoint-7" in caught.value.seen and (tmp_path / "storing/checkpoint-7").is_dir()
    never.set()


def test_nobody_waits_for_a_run_that_is_killed(tmp_path):
    never, killed = threading.Event(), threading.Event()
    storer = Storer(lambda folder, step: never.wait(30), tmp_path / "storing", hopeless=killed.is_set)
    storer.take(checkpoint(tmp_path, 0), step=0)
    killed.set()
    start = time.monotonic()
    for step in range(1, 8):
        storer.take(checkpoint(tmp_path, step), step=step)
    storer.finish(30)
    assert time.monotonic() - start < 5
    never.set()
