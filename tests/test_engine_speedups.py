"""What a run chooses by itself on a GPU; the choosing needs none."""

from __future__ import annotations

import pytest
from drill import folder_of, train

from llmnb.config import TrainConfig
from llmnb.engine import speedups

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GB = 10**9


@pytest.fixture
def installed(monkeypatch):
    """Which optional packages seem to be there."""
    names = {"liger_kernel", "bitsandbytes"}
    monkeypatch.setattr(speedups, "_installed", names.__contains__)
    return names


def kernels(cuda=True, **given):
    speedups.take_kernels(given, cuda)
    return given


def test_ligers_kernels_are_taken_on_a_gpu_where_they_are_installed(installed):
    """Never its loss, which scores prompts, too; and never against the person's word."""
    taken = kernels()
    assert taken["use_liger_kernel"] and not any(taken["liger_kernel_config"].values())
    assert set(taken["liger_kernel_config"]) == {"cross_entropy", "fused_linear_cross_entropy"}
    assert kernels(cuda=False) == {}
    assert kernels(use_liger_kernel=False) == {"use_liger_kernel": False}
    own = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}
    assert kernels(**own) == own
    installed.clear()
    assert kernels() == {}


def optimizer(tmp_path, *, trainable=7 * GB, memory=80 * GB, **given):
    config = TrainConfig(arguments=given)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, **given)
    notes = []
    speedups.take_optimizer(args, config, trainable, memory, lambda text, level: notes.append((level, text)))
    return str(args.optim.value), notes


def test_a_paged_optimizer_is_taken_where_adamw_would_not_fit(installed, tmp_path):
    name, ((level, text),) = optimizer(tmp_path)
    assert name == "paged_adamw_8bit" and level == "warning" and "112 GB" in text and "80" in text
    plain = str(transformers.TrainingArguments(str(tmp_path), use_cpu=True).optim.value)
    for more in ({"trainable": 42_000_000}, {"memory": None}):
        assert optimizer(tmp_path, **more) == (plain, [])
    assert optimizer(tmp_path, optim="adafactor") == ("adafactor", [])
    installed.discard("bitsandbytes")
    assert optimizer(tmp_path) == (plain, [])


def test_the_counts_say_what_was_taken(tmp_path):
    run = train(tmp_path, max_steps=1)
    assert run.counts["optimizer"] == "adamw_torch_fused" and run.counts["liger"] is False


@pytest.mark.gpu
def test_ligers_kernels_give_the_loss_of_the_models_own(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("liger_kernel")
    base = folder_of("llama")
    runs = {on: train(tmp_path / str(on), base=base, max_steps=5, use_liger_kernel=on) for on in (True, False)}
    assert runs[True].counts["liger"] and not runs[False].counts["liger"]
    for step, loss in runs[False].losses().items():
        assert runs[True].losses()[step] == pytest.approx(loss, rel=2e-2)  # bfloat16
